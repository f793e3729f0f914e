"""``policy init``: a policy from reference values, written once, and never from what nobody vouches for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from attestation.anchors import AWS_NITRO_G1
from attestation.appraisal import registers_text
from attestation.chain import Anchor
from attestation.document import MAX_CERTIFICATE, MAX_FIELD
from attestation.errors import EvidenceError, PolicyError
from attestation.policy import MAX_AGE, MAX_LEEWAY, AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.reference import DIGEST_PREFIX, PCR_INSTANCE, PCR_ROLE
from attestation.release_signing import PublicKey, ReleaseError
from attestation.rules import (
    Binding,
    ChannelBinding,
    DigestRule,
    DocumentBinding,
    Ignore,
    Manifests,
    Measures,
    ModelRule,
    NameRule,
    Require,
)
from attestation.strict_toml import printable as require_printable
from strongroom import policy_sources as sources
from strongroom import reference_options as reference
from strongroom.files import holds, read_bounded, read_evidence, require_new, write_new
from strongroom.kms.options import NamedKeys, key_options, take_keys
from strongroom.options import Octets, err, json_option, load_policy, out
from strongroom.policy_sources import Source
from strongroom.policy_text import FIRST_USE, Remark, first_use, warnings
from strongroom.reference_options import (
    ANY_FILE,
    MANIFEST_SUFFIX,
    DigestOrFile,
    PinnedKey,
    Product,
    read_manifest,
)
from strongroom.render import printable, shorten, wrapped

POLICY_TOML = "policy.toml"


@click.command()
@click.option(
    "--output", "-o", type=ANY_FILE, default=POLICY_TOML, show_default=True, help="The policy; never overwritten."
)
@click.option("--from-eif", type=ANY_FILE, help="An enclave image file, to be measured.")
@click.option("--from-measurements", type=ANY_FILE, help="What `nitro-cli build-enclave` printed, as JSON.")
@click.option(
    "--from-evidence",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="A bundle, Evidence or a document (- is standard input): trust on first use.",
)
@click.option("--from-release", type=ANY_FILE, metavar="HISTORY", help="A publisher's signed release history.")
@click.option("--key", type=PinnedKey(), help="With --from-release: the publisher's public key, ed25519:HEX.")
@click.option("--product", type=Product(), metavar="NAME", help="With --from-release: what the history is about.")
@click.option(
    "--minimum-sequence",
    type=click.IntRange(1),
    metavar="N",
    help="With --from-release: the fewest entries.  [default: those of now]",
)
@click.option(
    "--release",
    metavar="NAME",
    help="What reports call the release.  [default: the file's name, or when Evidence was made]",
)
@click.option(
    "--anchor", type=ANY_FILE, metavar="FILE.der", help="An emulator's root certificate.  [default: AWS's root]"
)
@click.option(
    "--purpose",
    type=click.Choice(["channel", "document"]),
    help="Judge Strongroom channels, or any enclave's bare documents.  [default: what the Evidence is, else channel]",
)
@click.option(
    "--model",
    multiple=True,
    type=DigestOrFile(),
    metavar="FILE.gguf|FILE.manifest|sha384:HEX",
    help="A model that may run (PCR16); repeatable.",
)
@click.option(
    "--minimum-version",
    type=click.IntRange(0),
    metavar="N",
    help="Name the manifests of --model as files, of version N or newer, in place of their digests.",
)
@click.option("--ignore-model", metavar="REASON", help="Accept any model.")
@click.option(
    "--configuration",
    multiple=True,
    type=DigestOrFile(),
    metavar="enclave.toml|sha384:HEX",
    help="A configuration that may run (PCR17); repeatable.",
)
@click.option("--ignore-configuration", metavar="REASON", help="Accept any configuration.")
@click.option("--role", multiple=True, metavar="ARN", help="The parent's IAM role (PCR3); repeatable.  [default: any]")
@click.option("--instance", multiple=True, metavar="ID", help="The parent instance (PCR4); repeatable.  [default: any]")
@click.option(
    "--module-id", multiple=True, metavar="NAME", help="The enclave's own name, another at each start.  [default: any]"
)
@click.option(
    "--public-key",
    multiple=True,
    type=Octets(range(1, MAX_FIELD + 1)),
    help="Of --purpose document: the public key that it carries; repeatable.  [default: any]",
)
@click.option(
    "--user-data",
    multiple=True,
    type=Octets(range(1, MAX_FIELD + 1)),
    help="Of --purpose document: the user data that it carries; repeatable.  [default: any]",
)
@click.option(
    "--max-age", type=click.IntRange(1, MAX_AGE), default=300, show_default=True, help="Of documents, in seconds."
)
@click.option(
    "--leeway", type=click.IntRange(0, MAX_LEEWAY), default=120, show_default=True, help="For clocks, in seconds."
)
@key_options
@json_option
def init(**options: Any) -> None:
    """Write a policy from exactly one source of reference values.

    Which model and which configuration may run is asked for where the source does not say it. Role, instance, module
    and what a bare document carries are judged only where you name them: for what you do not name the policy accepts
    any, in so many words, and a warning says so.

    Evidence is verified before it is believed, and says of its model and configuration what it runs; to trust it is
    trust on first use, and the policy says so. A history's releases say themselves which models and configurations go
    with them.

    \b
    Examples:
      strongroom policy init --from-eif enclave.eif --model MODEL.gguf --configuration enclave.toml
      strongroom policy init --from-measurements build.json --model my.manifest --minimum-version 3 \\
        --configuration enclave.toml --role arn:aws:iam::111122223333:role/enclave
      strongroom policy init --from-eif enclave.eif --model MODEL.gguf --configuration enclave.toml \\
        --kms-model-key arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab \\
        --kms-context production
      strongroom policy init --from-evidence evidence.json --output first-use.toml
      strongroom policy init --from-evidence document.cbor --ignore-model "no Strongroom enclave" \\
        --ignore-configuration "no Strongroom enclave"
      strongroom policy init --from-release releases.jsonl --key ed25519:... --product assistant

    Exit codes: 0 written, 1 Evidence of an enclave that this policy would refuse, 2 usage or a broken file, 3 Evidence
    or a history that nothing vouches for.
    """
    keys = take_keys(options)
    asked = Asked(keys=keys, **options)
    require_sense(asked)
    require_new(asked.output)
    root = None if asked.anchor is None else read_bounded(asked.anchor, MAX_CERTIFICATE)
    anchor = AWS_NITRO_G1 if root is None else Anchor.emulated(root)
    source = _source(asked, anchor)
    made = policy_of(asked, anchor, source)
    source.require_accepted(made)
    wrote = write(files_of(made, asked.output, asked.anchor, source.notes), asked.output)
    remarks = [*source.remarks, *warnings(made, datetime.now(UTC))]
    if source.is_first_use and not any(remark.code == FIRST_USE for remark in remarks):
        remarks += [first_use(release.name) for release in made.accepted_releases]
    report(made, asked.output, wrote, source, remarks, asked.as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was given on the command line: the options, by their names."""

    output: Path
    from_eif: Path | None
    from_measurements: Path | None
    from_evidence: Path | None
    from_release: Path | None
    key: PublicKey | None
    product: str | None
    minimum_sequence: int | None
    release: str | None
    anchor: Path | None
    purpose: str | None
    model: tuple[bytes | Path, ...]
    minimum_version: int | None
    ignore_model: str | None
    configuration: tuple[bytes | Path, ...]
    ignore_configuration: str | None
    role: tuple[str, ...]
    instance: tuple[str, ...]
    module_id: tuple[str, ...]
    public_key: tuple[bytes, ...]
    user_data: tuple[bytes, ...]
    max_age: int
    leeway: int
    keys: NamedKeys | None
    as_json: bool


def require_sense(asked: Asked) -> None:
    """Raises click.UsageError for options that contradict each other."""
    if [asked.from_eif, asked.from_measurements, asked.from_evidence, asked.from_release].count(None) != 3:
        raise click.UsageError("name one of --from-eif, --from-measurements, --from-evidence and --from-release")
    if asked.from_release is None and (asked.key, asked.product, asked.minimum_sequence) != (None, None, None):
        raise click.UsageError("--key, --product and --minimum-sequence are for --from-release")
    if asked.from_release is not None and asked.release is not None:
        raise click.UsageError("--release is for one release; those of --from-release have names of their own")
    for what, given, reason in (
        ("model", asked.model, asked.ignore_model),
        ("configuration", asked.configuration, asked.ignore_configuration),
    ):
        if given and reason is not None:
            raise click.UsageError(f"--{what} and --ignore-{what} contradict each other")
    if asked.release is not None:
        require_printable("--release", asked.release)


# --- The source ---------------------------------------------------------------------------------------------------


def _source(asked: Asked, anchor: Anchor) -> Source:
    if asked.from_eif is not None:
        return sources.from_eif(asked.from_eif, asked.release)
    if asked.from_measurements is not None:
        return sources.from_measurements(asked.from_measurements, asked.release)
    if asked.from_evidence is not None:
        return _from_evidence(asked.from_evidence, asked, anchor)
    assert asked.from_release is not None  # by require_sense
    return _from_release(asked.from_release, asked)


def _from_evidence(path: Path, asked: Asked, anchor: Anchor) -> Source:
    try:
        return sources.from_evidence(read_evidence(path), anchor=anchor, purpose=asked.purpose, name=asked.release)
    except EvidenceError as error:
        if error.code != "untrusted_chain" or asked.anchor is not None:
            raise
        message = f"{error.message}; if the enclave is an emulated one, name its root: --anchor FILE.der"
        raise EvidenceError(error.code, message, expected=error.expected, got=error.got) from error


def _from_release(path: Path, asked: Asked) -> Source:
    if asked.key is None or asked.product is None:
        raise click.UsageError("--from-release needs --key and --product: whose word it is, and about what")
    stated = _stated(path, asked.output.parent, "releases.history")
    try:
        return sources.from_history(
            path, stated, key=asked.key, product=asked.product, minimum_sequence=asked.minimum_sequence
        )
    except ReleaseError as error:
        raise error.of(str(path)) from error


# --- The policy ---------------------------------------------------------------------------------------------------


def policy_of(asked: Asked, anchor: Anchor, source: Source) -> AppraisalPolicy:
    """What was asked for, by the values of ``source``.

    Raises click.UsageError for what nobody says or what does not go together; PolicyError; what reading raises.
    """
    models: ModelRule
    if asked.minimum_version is None:
        models = _rule("model", asked.model, asked.ignore_model, source.model, reference.model_digest)
    else:
        models = _manifests(asked.model, asked.minimum_version, asked.output.parent)
    configurations = _rule(
        "configuration",
        asked.configuration,
        asked.ignore_configuration,
        source.configuration,
        reference.configuration,
    )
    return AppraisalPolicy(
        anchor=anchor,
        max_age_seconds=asked.max_age,
        leeway_seconds=asked.leeway,
        accept_debug=None,
        binding=_binding(asked, source),
        releases=source.releases,
        model=models,
        configuration=configurations,
        pcrs={
            **source.registers,
            PCR_ROLE: _measured("role", asked.role),
            PCR_INSTANCE: _measured("instance", asked.instance),
        },
        module_id=_module_id(asked.module_id),
        kms={} if asked.keys is None else asked.keys.rules(),
    )


def _binding(asked: Asked, source: Source) -> Binding:
    if (asked.purpose or source.purpose) == "document":
        return DocumentBinding(
            Require(asked.public_key) if asked.public_key else source.public_key,
            Require(asked.user_data) if asked.user_data else source.user_data,
        )
    if asked.public_key or asked.user_data:
        raise click.UsageError("--public-key and --user-data are for --purpose document; a channel has its own")
    return ChannelBinding()


def _module_id(given: tuple[str, ...]) -> NameRule:
    with _said_of("--module-id"):
        return Require(given) if given else Ignore("another one at each boot")


def _rule(
    what: str,
    given: Sequence[bytes | Path],
    ignored: str | None,
    known: DigestRule | None,
    digest: Callable[[bytes | Path], bytes],
) -> DigestRule:
    """What was asked for on the command line, else what the source knows; there is no third."""
    if ignored is not None:
        with _said_of(f"--ignore-{what}"):
            return Ignore(ignored)
    if given:
        return Require(tuple(map(digest, given)))
    if known is None:
        raise click.UsageError(
            f"the source does not say which {what}s may run: give --{what} FILE, --{what} {DIGEST_PREFIX}HEX, or"
            f' --ignore-{what} "why any will do"'
        )
    return known


def _manifests(given: Sequence[bytes | Path], minimum_version: int, folder: Path) -> Manifests:
    files = [each for each in given if isinstance(each, Path) and each.suffix == MANIFEST_SUFFIX]
    if not files or len(files) < len(given):
        raise click.UsageError(f"--minimum-version is for manifests: give --model FILE{MANIFEST_SUFFIX}, and no other")
    read = [(_stated(path, folder, "model.manifests"), read_manifest(path)) for path in files]
    with _said_of("--minimum-version"):
        return Manifests(tuple(read), minimum_version)


def _measured(what: str, given: tuple[str, ...]) -> Measures | Ignore:
    with _said_of(f"--{what}"):
        return Measures(given) if given else Ignore(f"no {what} was given to policy init")


@contextlib.contextmanager
def _said_of(option: str) -> Iterator[None]:
    """A value that no policy takes is said of the ``option`` that it was given in."""
    try:
        yield
    except PolicyError as error:
        raise error.at(option) from error


def _stated(path: Path, folder: Path, field: str) -> str:
    """How a policy in ``folder`` names ``path``. Raises PolicyError for a name that no policy can hold."""
    return require_printable(field, os.path.relpath(path.parent.resolve() / path.name, folder.resolve()))


def files_of(made: AppraisalPolicy, output: Path, anchor: Path | None, notes: Sequence[str]) -> Mapping[Path, bytes]:
    """What there is to write: the policy, and a copy of its root beside it where none is."""
    files: dict[Path, bytes] = {}
    root = None
    if anchor is not None:
        root = require_printable("anchor.root", anchor.name)
        copy = output.parent / root
        if not holds(copy, made.anchor.der):
            files[copy] = made.anchor.der
    files[output] = write_policy(made, root=root, notes=notes).encode()
    return files


def write(files: Mapping[Path, bytes], policy: Path) -> list[Path]:
    """Writes all of these, or nothing.

    ``policy``, one of them or there already, is read back, as it will be read: so a history is held to what this user
    remembers of it.
    """
    written: list[Path] = []
    try:
        for path, content in files.items():
            write_new(path, content)
            written.append(path)
        load_policy(policy)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def report(
    made: AppraisalPolicy,
    policy: Path,
    wrote: Sequence[Path],
    source: Source,
    remarks: Sequence[Remark],
    as_json: bool,
) -> None:
    """What was written, for people or for programs, and what to know of it."""
    if as_json:
        body = {
            "policy": str(policy),
            "wrote": [str(path) for path in wrote],
            "source": source.kind,
            "trust_on_first_use": source.is_first_use,
            "purpose": "channel" if isinstance(made.binding, ChannelBinding) else "document",
            "releases": [
                {
                    "name": release.name,
                    "pcrs": {str(index): value.hex() for index, value in release.pcrs.as_registers().items()},
                }
                for release in made.accepted_releases
            ],
            **remarks_as_json(remarks),
        }
        click.echo(json.dumps(body))
        return
    for path in wrote:
        click.echo(f"wrote {printable(str(path))}")
    if policy not in wrote:
        click.echo(f"unchanged {printable(str(policy))}")
    for release in made.accepted_releases:
        out.print(f"release {release.name}: {shorten(registers_text(release.pcrs.as_registers()))}", soft_wrap=True)
    for remark in remarks:
        show_remark(err, remark)


def show_remark(console: Console, remark: Remark) -> None:
    """For people, on standard output or standard error."""
    kind, style = ("note", "dim") if remark.is_note else ("warning", "yellow")
    first, *others = wrapped(console, f"{kind:<7}  {remark.code}: {remark.text}", indent=" " * 9)
    console.print(Text(first[:9], style).append(first[9:], "default"), soft_wrap=True)
    for line in others:
        console.print(Text(line), soft_wrap=True)


def remarks_as_json(remarks: Sequence[Remark]) -> dict[str, list[dict[str, str]]]:
    """For programs."""
    return {
        "warnings": [remark.as_json() for remark in remarks if not remark.is_note],
        "notes": [remark.as_json() for remark in remarks if remark.is_note],
    }
