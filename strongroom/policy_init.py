"""``policy init``: a policy from reference values, written once, and never from what nobody vouches for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from attestation.anchors import AWS_NITRO_G1
from attestation.appraisal import registers_text
from attestation.chain import Anchor
from attestation.document import MAX_CERTIFICATE
from attestation.errors import PolicyError
from attestation.policy import DIGEST_PREFIX, MAX_AGE, MAX_LEEWAY, AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.reference import PCR_INSTANCE, PCR_ROLE
from attestation.release_signing import PublicKey
from attestation.rules import (
    ChannelBinding,
    DigestRule,
    DocumentBinding,
    Ignore,
    Manifests,
    Measures,
    ModelRule,
    Require,
)
from attestation.strict_toml import printable as require_printable
from strongroom import policy_sources as sources
from strongroom import reference_options as reference
from strongroom.files import read_bounded, read_evidence, require_new, write_new
from strongroom.options import err, json_option, load_policy, out
from strongroom.policy_sources import Source
from strongroom.policy_text import FIRST_USE, Remark, first_use, warnings
from strongroom.reference_options import (
    ANY_FILE,
    MANIFEST_SUFFIX,
    DigestOrFile,
    PinnedKey,
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
@click.option("--product", metavar="NAME", help="With --from-release: what the history is about.")
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
    "--max-age", type=click.IntRange(1, MAX_AGE), default=300, show_default=True, help="Of documents, in seconds."
)
@click.option(
    "--leeway", type=click.IntRange(0, MAX_LEEWAY), default=120, show_default=True, help="For clocks, in seconds."
)
@json_option
def init(
    output: Path,
    from_eif: Path | None,
    from_measurements: Path | None,
    from_evidence: Path | None,
    from_release: Path | None,
    key: PublicKey | None,
    product: str | None,
    minimum_sequence: int | None,
    release: str | None,
    anchor: Path | None,
    purpose: str | None,
    model: tuple[bytes | Path, ...],
    minimum_version: int | None,
    ignore_model: str | None,
    configuration: tuple[bytes | Path, ...],
    ignore_configuration: str | None,
    role: tuple[str, ...],
    instance: tuple[str, ...],
    max_age: int,
    leeway: int,
    as_json: bool,
) -> None:
    """Write a policy from exactly one source of reference values.

    What the source does not say is asked for: nothing is left out in silence. Evidence is verified before it is
    believed, and says of its model and configuration what it runs; to trust it is trust on first use, and the policy
    says so. A history's releases say themselves which models and configurations go with them.

    \b
    Examples:
      strongroom policy init --from-eif enclave.eif --model MODEL.gguf --configuration enclave.toml
      strongroom policy init --from-measurements build.json --model my.manifest --minimum-version 3 \\
        --configuration enclave.toml --role arn:aws:iam::111122223333:role/enclave
      strongroom policy init --from-evidence evidence.json --output first-use.toml
      strongroom policy init --from-evidence document.cbor --ignore-model "no Strongroom enclave" \\
        --ignore-configuration "no Strongroom enclave"
      strongroom policy init --from-release releases.jsonl --key ed25519:... --product assistant

    Exit codes: 0 written, 1 Evidence of an enclave that this policy would refuse, 2 usage or a broken file, 3 Evidence
    or a history that nothing vouches for.
    """
    if [from_eif, from_measurements, from_evidence, from_release].count(None) != 3:
        raise click.UsageError("name one of --from-eif, --from-measurements, --from-evidence and --from-release")
    if from_release is None and (key, product, minimum_sequence) != (None, None, None):
        raise click.UsageError("--key, --product and --minimum-sequence are for --from-release")
    if from_release is not None and release is not None:
        raise click.UsageError("--release is for one release; those of --from-release have names of their own")
    for what, given, reason in (("model", model, ignore_model), ("configuration", configuration, ignore_configuration)):
        if given and reason is not None:
            raise click.UsageError(f"--{what} and --ignore-{what} contradict each other")
    require_new(output)
    folder = output.parent
    if release is not None:
        require_printable("--release", release)
    root = None if anchor is None else read_bounded(anchor, MAX_CERTIFICATE)
    trusted = AWS_NITRO_G1 if root is None else Anchor.emulated(root)
    source: Source
    if from_eif is not None:
        source = sources.from_eif(from_eif, release)
    elif from_measurements is not None:
        source = sources.from_measurements(from_measurements, release)
    elif from_evidence is not None:
        source = sources.from_evidence(read_evidence(from_evidence), anchor=trusted, purpose=purpose, name=release)
    else:
        assert from_release is not None
        if key is None or product is None:
            raise click.UsageError("--from-release needs --key and --product: whose word it is, and about what")
        stated = _stated(from_release, folder, "releases.history")
        source = sources.from_history(from_release, stated, key=key, product=product, minimum_sequence=minimum_sequence)
    models: ModelRule
    if minimum_version is None:
        models = _rule("model", model, ignore_model, source.model, reference.model_digest)
    else:
        models = _manifests(model, minimum_version, folder)
    made = AppraisalPolicy(
        anchor=trusted,
        max_age_seconds=max_age,
        leeway_seconds=leeway,
        accept_debug=None,
        binding=(
            ChannelBinding()
            if (purpose or source.purpose) == "channel"
            else DocumentBinding(source.public_key, source.user_data)
        ),
        releases=source.releases,
        model=models,
        configuration=_rule(
            "configuration", configuration, ignore_configuration, source.configuration, reference.configuration
        ),
        pcrs={
            **source.registers,
            PCR_ROLE: _measured("role", role),
            PCR_INSTANCE: _measured("instance", instance),
        },
        module_id=Ignore("another one at each boot"),
    )
    source.require_accepted(made)
    wrote = _write(made, output, anchor, source.notes)
    remarks = warnings(made, datetime.now(UTC))
    if source.is_first_use and not any(remark.code == FIRST_USE for remark in remarks):
        remarks += [first_use(release.name) for release in made.accepted_releases]
    _report_init(made, wrote, source, remarks, as_json)


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


def _write(made: AppraisalPolicy, output: Path, anchor: Path | None, notes: Sequence[str]) -> list[Path]:
    """Writes the policy, and a copy of its root beside it where none is; all, or nothing.

    What was written is read back, as it will be read: so a history is held to what this user remembers of it.
    """
    files: dict[Path, bytes] = {}
    root = None
    if anchor is not None:
        root = require_printable("anchor.root", anchor.name)
        copy = output.parent / root
        if not (copy.is_file() and copy.stat().st_size <= MAX_CERTIFICATE and copy.read_bytes() == made.anchor.der):
            files[copy] = made.anchor.der
    files[output] = write_policy(made, root=root, notes=notes).encode()
    written: list[Path] = []
    try:
        for path, content in files.items():
            write_new(path, content)
            written.append(path)
        load_policy(output)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _report_init(
    made: AppraisalPolicy, wrote: Sequence[Path], source: Source, remarks: Sequence[Remark], as_json: bool
) -> None:
    if as_json:
        body = {
            "policy": str(wrote[-1]),
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
