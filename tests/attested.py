"""A genuine attestation for tests that need a result: the software NSM in this process, an identity, and the real
verifier between them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from attestation.chain import Anchor
from attestation.commitment import Entropy, Evidence, Purpose, UserData
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy as policy_text
from attestation.reference import PcrSet
from attestation.rules import ChannelBinding, Forbid, Ignore, Release, Require
from attestation.verifier import AttestationResult, verify
from emulator.nsm import SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot
from enclave.config import ChannelSettings
from enclave.identity import Identity, OfferedKey
from enclave.nsm import Nsm

IMAGE = PcrSet(b"\x01" * 48, b"\x02" * 48, b"\x03" * 48)
MODEL = b"\x10" * 48
CONFIGURATION = b"\x11" * 48
SETTINGS = ChannelSettings(rotation_seconds=300, lifetime_seconds=600, max_requests=1000)

ROOT = DevelopmentRoot.generate(datetime.now(UTC))


class InProcess:
    """The NSM client's seam, answered by the core without a socket."""

    def __init__(self, nsm: SoftwareNsm) -> None:
        self._nsm = nsm

    def exchange(self, request: bytes) -> bytes:
        return self._nsm.handle(request)

    def close(self) -> None:
        pass


def software_nsm() -> Nsm:
    return Nsm(InProcess(SoftwareNsm(ROOT, boot_registers(IMAGE), module_id=new_module_id())))


def policy_for(model: bytes, configuration: bytes, *, max_age_seconds: int = 300) -> AppraisalPolicy:
    """What accepts the enclaves of this file. ``model`` and ``configuration`` are the digests behind PCR16 and
    PCR17.
    """
    return AppraisalPolicy(
        anchor=Anchor.emulated(ROOT.certificate_der),
        max_age_seconds=max_age_seconds,
        leeway_seconds=120,
        accept_debug=None,
        binding=ChannelBinding(),
        releases=(Release("test", IMAGE),),
        model=Require((model,)),
        configuration=Require((configuration,)),
        pcrs={3: Ignore("a test"), 4: Ignore("a test"), 8: Forbid()},
        module_id=Ignore("a test"),
    )


def write_policy(policy: AppraisalPolicy, directory: Path) -> Path:
    (directory / "root.der").write_bytes(ROOT.certificate_der)
    path = directory / "policy.toml"
    path.write_text(policy_text(policy, root="root.der"))
    return path


@dataclass
class Attested:
    """An identity, its NSM, and results about it."""

    nsm: Nsm = field(default_factory=software_nsm)
    identity: Identity = field(default_factory=lambda: Identity(MODEL, CONFIGURATION, Entropy.HOST, SETTINGS))

    def __post_init__(self) -> None:
        for index, digest in ((16, self.identity.model), (17, self.identity.configuration)):
            self.nsm.extend_pcr(index, digest)
            self.nsm.lock_pcr(index)

    @property
    def key(self) -> OfferedKey:
        return self.identity.current()

    def evidence(self, nonce: bytes) -> bytes:
        commitment = self.key.commitment
        binding = UserData(Purpose.CHANNEL, commitment.digest()).encode()
        return Evidence(self.nsm.attestation(user_data=binding, nonce=nonce), commitment.encode()).encode()

    def result(self) -> AttestationResult:
        nonce = secrets.token_bytes(32)
        policy = policy_for(self.identity.model, self.identity.configuration)
        return verify(self.evidence(nonce), policy=policy, nonce=nonce, at=datetime.now(UTC))
