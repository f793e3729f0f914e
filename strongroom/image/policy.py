"""``image policy``: the appraisal policy, and the key policy, of the enclaves that an image starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.text import Text

from attestation import strict_toml
from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor
from attestation.document import MAX_CERTIFICATE
from attestation.envelope import EnvelopePurpose
from attestation.errors import PolicyError, StrongroomError
from attestation.image_files import CONFIGURATION_PATH, ImageFileError, read_configuration
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.keyrelease import released_to
from attestation.policy import MAX_AGE, MAX_LEEWAY, AppraisalPolicy
from attestation.reference import DIGEST_PREFIX, DIGEST_SIZE, configuration_digest, digest_text
from attestation.rules import Require
from strongroom import policy_sources as sources
from strongroom.files import holds, read_bounded, require_new
from strongroom.image.check import require_sound
from strongroom.image.commands import OpenImage, open_image
from strongroom.kms.key_policies import Expected, generated, principals_options, show_findings, use_options
from strongroom.kms.options import ENCRYPTED_MODEL, NamedKeys, key_options, take_keys
from strongroom.options import err, json_option
from strongroom.policy_init import POLICY_TOML, Asked, files_of, policy_of, report, require_sense, write
from strongroom.policy_text import warnings
from strongroom.reference_options import ANY_FILE
from strongroom.render import printable

NITRO_DEVICE: Final = "device:/dev/nsm"
HOST_ENTROPY: Final = "host"
ROOT_DER: Final = "development-root.der"
"""The copy of this user's development root beside a policy."""


class ImagePolicyError(StrongroomError):
    """No policy can be made of this image: ``no_configuration``, ``bad_configuration``."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Configured:
    """What the measured configuration in an image says that a policy needs."""

    digest: bytes
    """Of its bytes, as committed to PCR17."""
    manifest: bytes
    """Digest of the one model's manifest, as committed to PCR16."""
    nsm: str
    entropy: str
    keys: NamedKeys | None
    """The KMS keys that the enclave uses."""

    @property
    def is_emulated(self) -> bool:
        """Whether something else than Nitro's own device signs the documents."""
        return self.nsm != NITRO_DEVICE

    @classmethod
    def parse(cls, data: bytes) -> Configured:
        """The enclave reads its configuration whole and strictly; here only these fields are taken.

        Raises ImagePolicyError ``bad_configuration``.
        """
        try:
            top = strict_toml.read(data.decode("utf-8"))
            nsm, model = top.table("nsm"), top.table("model")
            manifest = model.text("manifest")
            if not re.fullmatch(f"{DIGEST_PREFIX}[0-9a-f]{{{2 * DIGEST_SIZE}}}", manifest):
                expected = f"{DIGEST_PREFIX} and {2 * DIGEST_SIZE} digits"
                raise strict_toml.wrong_value("model.manifest", expected, ascii(manifest))
            return cls(
                digest=configuration_digest(data),
                manifest=bytes.fromhex(manifest.removeprefix(DIGEST_PREFIX)),
                nsm=nsm.text("address"),
                entropy=nsm.text("entropy"),
                keys=_keys(top),
            )
        except (UnicodeDecodeError, StrongroomError) as error:
            message = f"the image's {CONFIGURATION_PATH} cannot be read: {error}"
            raise ImagePolicyError("bad_configuration", message) from error


def _keys(top: strict_toml.Table) -> NamedKeys | None:
    if not top.has("kms"):
        return None
    kms = top.table("kms")
    tables = {purpose: kms.table(purpose.table) for purpose in EnvelopePurpose if kms.has(purpose.table)}
    keys = {purpose: KeyArn.parse(table.text("key")) for purpose, table in tables.items()}
    contexts = {table.text("context") for table in tables.values()}
    if not keys:
        return None
    if len(contexts) > 1:
        message, expected = "the two keys have different contexts", "one context: write the policy by hand"
        raise PolicyError("contradiction", message, field="kms", expected=expected)
    return NamedKeys(keys, contexts.pop(), (), ENCRYPTED_MODEL)


@click.command()
@click.argument("file", type=ANY_FILE)
@click.option(
    "--out",
    "--output",
    "-o",
    "output",
    type=ANY_FILE,
    default=POLICY_TOML,
    show_default=True,
    help="The policy. One that is there stays; if it is another one, that is an error.",
)
@click.option("--release", metavar="NAME", help="What reports call the image.  [default: the file's name]")
@click.option(
    "--root",
    type=ANY_FILE,
    metavar="FILE.der",
    help="Of an image for an emulated NSM: its root certificate.  [default: this user's development root]",
)
@click.option("--role", multiple=True, metavar="ARN", help="The parent's IAM role (PCR3); repeatable.  [default: any]")
@click.option("--instance", multiple=True, metavar="ID", help="The parent instance (PCR4); repeatable.  [default: any]")
@click.option(
    "--max-age", type=click.IntRange(1, MAX_AGE), default=300, show_default=True, help="Of documents, in seconds."
)
@click.option(
    "--leeway", type=click.IntRange(0, MAX_LEEWAY), default=120, show_default=True, help="For clocks, in seconds."
)
@key_options
@click.option(
    "--kms-condition",
    type=ANY_FILE,
    metavar="FILE",
    help="Write the policy of a KMS key too, which opens to this image alone; one that is there stays, as with --out.",
)
@use_options
@principals_options
@json_option
def policy(
    file: Path,
    output: Path,
    root: Path | None,
    kms_condition: Path | None,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    users: tuple[str, ...],
    sealers: tuple[str, ...],
    readers: tuple[str, ...],
    **options: Any,
) -> None:
    """Write the appraisal policy of the enclaves that an image starts.

    The image must be one that `strongroom image verify` does not call broken. The registers come from it, and so do the
    model and the configuration: an image of Strongroom holds its measured configuration, which names the model's
    manifest and the KMS keys. An image without one has no such policy: `strongroom policy init --from-eif` asks for
    what is missing.

    Where the configuration asks Nitro's own device, AWS's root is trusted; where it asks an emulated NSM, the policy
    says EMULATED. With --kms-condition the policy of a KMS key is written beside it, by the same registers: --user
    names the parents' role, --sealer who encrypts, --administrator who may change it; without one nobody ever can.

    \b
    Examples:
      strongroom image policy enclave.eif --out policy.toml
      strongroom image policy enclave.eif --role arn:aws:iam::111122223333:role/parent
      strongroom image policy enclave.eif --kms-condition key-policy.json --use model --context production \\
        --user arn:aws:iam::111122223333:role/parent --administrator arn:aws:iam::111122223333:role/key-admin

    Exit codes: 0 written, or there already, 2 usage, no image of Strongroom, or a broken one.
    """
    keys = take_keys(options)
    if kms_condition is None and (use or context or administrators or users or sealers or readers):
        raise click.UsageError(
            "--use, --context, --user, --sealer, --reader and --administrator are for --kms-condition"
        )
    for path in (output, kms_condition):
        if path is not None and not path.is_file():
            require_new(path)
    now = datetime.now(UTC)
    with open_image(file) as opened:
        remarks = require_sound(opened.contents(), now)
        configured = _configuration(opened)
    if configured.keys is not None and keys is not None and keys.keys != configured.keys.keys:
        raise click.UsageError("the configuration in the image names other KMS keys")
    anchor, root_file = _anchor(configured, root)
    asked = _asked(file, output, root_file, keys or configured.keys, options)
    require_sense(asked)
    source = sources.of_image(
        opened.image,
        asked.release or file.name,
        remarks=remarks,
        model=Require((configured.manifest,)),
        configuration=Require((configured.digest,)),
    )
    made = policy_of(asked, anchor, source)
    files = dict(files_of(made, output, root_file, (*source.notes, _note(configured))))
    if kms_condition is not None:
        key_policy = _key_policy(made, output, use, context, administrators, users, sealers, readers)
        files = {kms_condition: key_policy.encode().encode() + b"\n", **files}
    wrote = write({path: content for path, content in files.items() if not holds(path, content)}, output)
    report(made, output, wrote, source, [*remarks, *warnings(made, now)], asked.as_json)
    if configured.entropy == HOST_ENTROPY and not configured.is_emulated:
        text = "warning  the enclave takes its random numbers from what its host can see: entropy is not nsm-hwrng"
        err.print(Text(text, "yellow"), soft_wrap=True)


def _configuration(opened: OpenImage) -> Configured:
    try:
        return Configured.parse(read_configuration(opened.image, opened.file))
    except ImageFileError as error:
        code = "bad_configuration"
        message = f"nobody can say which configuration runs in this image: {error.message}"
        if error.code == "no_such_file":
            code = "no_configuration"
            message = (
                f"this is no image of Strongroom: it has no {CONFIGURATION_PATH}, so that nobody can say here which"
                " model and which configuration run in it; say so with `strongroom policy init --from-eif FILE --model"
                " ... --configuration ...`, or with --ignore-model and --ignore-configuration where neither is measured"
            )
        raise ImagePolicyError(code, message, expected=error.expected, got=error.got) from error


def _anchor(configured: Configured, root: Path | None) -> tuple[Anchor, Path | None]:
    """The root to trust, and the file that is to be copied beside the policy, or after which a copy is called."""
    if not configured.is_emulated:
        if root is not None:
            raise click.UsageError(
                f"--root is for an emulated NSM; the image asks {NITRO_DEVICE}, for which AWS vouches"
            )
        return AWS_NITRO_G1, None
    if root is not None:
        return Anchor.emulated(read_bounded(root, MAX_CERTIFICATE)), root
    from strongroom.prepare import development_root  # the emulator is needed for such an image alone

    return Anchor.emulated(development_root()), Path(ROOT_DER)


def _asked(file: Path, output: Path, root: Path | None, keys: NamedKeys | None, options: dict[str, Any]) -> Asked:
    """As ``policy init`` would have been asked, about this image."""
    return Asked(
        output=output,
        from_eif=file,
        from_measurements=None,
        from_evidence=None,
        from_release=None,
        key=None,
        product=None,
        minimum_sequence=None,
        anchor=root,
        purpose=None,
        model=(),
        minimum_version=None,
        ignore_model=None,
        configuration=(),
        ignore_configuration=None,
        module_id=(),
        public_key=(),
        user_data=(),
        keys=keys,
        **options,
    )


def _note(configured: Configured) -> str:
    who = "Documents are signed by an emulated NSM" if configured.is_emulated else "Documents are signed by Nitro"
    nsm, digest = printable(configured.nsm), digest_text(configured.digest)
    return f"The configuration is the image's own {CONFIGURATION_PATH} ({digest}). {who} ({nsm})."


def _key_policy(
    made: AppraisalPolicy,
    output: Path,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    users: tuple[str, ...],
    sealers: tuple[str, ...],
    readers: tuple[str, ...],
) -> KeyPolicy:
    """Raises click.UsageError for what is missing, KeyPolicyError, KeyChangeError ``refused_key_policy``."""
    if use is None and len(made.kms) != 1:
        raise click.UsageError("say what the key is for: --use prompt, or --use model")
    purpose = next(iter(made.kms)) if use is None else EnvelopePurpose(use)
    rule = made.kms.get(purpose)
    if rule is not None and context not in (None, rule.context):
        raise click.UsageError(f"the policy's context is {rule.context}, not {context}")
    trusted = rule.administrators if rule is not None else administrators
    context = rule.context if rule is not None else context
    wanted = Expected(output, tuple(released_to(made, purpose)), purpose, context, trusted)
    key_policy = generated(wanted, users=users, sealers=sealers, readers=readers, administrators=administrators)
    judged = wanted.judge(key_policy)
    show_findings(err, judged.findings)
    judged.require_none("the appraisal policy does not trust these administrators; nothing was written")
    return key_policy
