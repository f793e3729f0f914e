"""Where the reference values of a new policy come from: an image, what nitro-cli measured, Evidence, or a publisher.

Nothing that nobody vouches for gets into a policy: Evidence is verified at its own time, and by the very policy that is
made of it, before anything is written; a release history is verified whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from attestation import cbor
from attestation.bundle import Bundle, read_kept
from attestation.chain import Anchor
from attestation.checks import Label
from attestation.commitment import Commitment, Evidence
from attestation.cose import COSE_SIGN1_TAG, CoseSign1
from attestation.document import PCR_COUNT, AttestationDocument
from attestation.errors import AppraisalError, StrongroomError
from attestation.measure import EnclaveImage
from attestation.policy import AppraisalPolicy
from attestation.reference import (
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_CONFIGURATION,
    PCR_IMAGE,
    PCR_INSTANCE,
    PCR_MODEL,
    PCR_ROLE,
    PCR_SIGNER,
    ZERO_PCR,
    PcrSet,
)
from attestation.release_signing import PublicKey
from attestation.releases import MAX_HISTORY, ReleaseHistory, time_text
from attestation.rules import (
    DigestRule,
    FieldRule,
    Forbid,
    Ignore,
    RegisterRule,
    Release,
    Released,
    Require,
    SignedReleases,
)
from attestation.verifier import authenticate, verify_archived
from strongroom import reference_options as reference
from strongroom.files import read_bounded
from strongroom.image.check import require_sound
from strongroom.image.commands import open_image
from strongroom.policy_text import TRUST_ON_FIRST_USE, Remark

_NOT_GIVEN = "none was given to policy init: whoever uses the document judges it"
_HAVE_A_RULE = frozenset(
    (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION, PCR_ROLE, PCR_INSTANCE, PCR_SIGNER, PCR_MODEL, PCR_CONFIGURATION)
)
"""Registers for which every policy says something anyway."""


class SourceError(StrongroomError):
    """Reference values cannot be taken from this: ``wrong_purpose``, ``no_measurements``."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Source:
    """What a source says of itself, for a policy to be made of it."""

    kind: str
    """As in the option's name: ``eif``, ``measurements``, ``evidence`` or ``release``."""
    releases: tuple[Release, ...] | SignedReleases
    notes: tuple[str, ...]
    """For the policy's reader, a paragraph each."""
    purpose: str = "channel"
    """What the source is fit for, where nobody asks for something else."""
    model: DigestRule | None = None
    configuration: DigestRule | None = None
    """None where the source does not know."""
    registers: Mapping[int, RegisterRule] = field(default_factory=dict)
    """Rules for what it has in other registers."""
    public_key: FieldRule = field(default_factory=lambda: Ignore(_NOT_GIVEN))
    user_data: FieldRule = field(default_factory=lambda: Ignore(_NOT_GIVEN))
    """Rules for what a bare document carries."""
    remarks: tuple[Remark, ...] = ()
    """What to know of the values."""
    judged: bytes | None = None
    nonce: bytes | None = None
    """The Evidence or document that the values were taken from, and what it answers, where that is known."""

    @property
    def is_first_use(self) -> bool:
        """Whether the values are an enclave's own word."""
        return self.judged is not None

    def require_accepted(self, policy: AppraisalPolicy) -> None:
        """Raises EvidenceError or AppraisalError when ``policy`` does not accept the Evidence that it was made of."""
        if self.judged is not None:
            verify_archived(self.judged, policy=policy, nonce=self.nonce)


def from_eif(path: Path, name: str | None) -> Source:
    """An enclave image file, measured here, and asked what ``image verify`` asks of it.

    Raises ImageError; BrokenImage; PolicyError for a name that is not printable; OSError.
    """
    with open_image(path) as opened:
        remarks = require_sound(opened.contents(), datetime.now(UTC))
    return of_image(opened.image, name or path.name, remarks=remarks)


def of_image(
    image: EnclaveImage,
    name: str,
    *,
    remarks: Sequence[Remark],
    model: DigestRule | None = None,
    configuration: DigestRule | None = None,
) -> Source:
    """An image that was found sound, with the remarks of that, and what is known of its model and configuration.
    Raises PolicyError as :func:`from_eif`.
    """
    made = _measured("eif", image.measurements, name, "an enclave image file, measured here")
    notes = (*made.notes, *(f"{remark.text[:1].upper()}{remark.text[1:]}." for remark in remarks))
    return replace(made, notes=notes, model=model, configuration=configuration, remarks=tuple(remarks))


def from_measurements(path: Path, name: str | None) -> Source:
    """What ``nitro-cli build-enclave`` printed. Raises as :func:`from_eif`; OSError."""
    pcrs = reference.measurements(path)
    return _measured("measurements", pcrs, name or path.name, "what nitro-cli build-enclave printed")


def _measured(kind: str, pcrs: PcrSet, name: str, words: str) -> Source:
    registers = {PCR_SIGNER: Forbid()} if pcrs.pcr8 is None else {}
    return Source(kind, (Release(name, pcrs),), (f"The reference values come from {words}.",), registers=registers)


def from_history(file: Path, stated: str, *, key: PublicKey, product: str, minimum_sequence: int | None) -> Source:
    """A publisher's history, verified. ``stated`` is its name, relative to the policy's folder; ``minimum_sequence``
    defaults to its length. Raises ReleaseError; PolicyError when every release has been taken back; OSError.
    """
    data = read_bounded(file, MAX_HISTORY)
    history = ReleaseHistory.verify(data, key=key, name=product, minimum_sequence=minimum_sequence or 1, head=None)
    releases = SignedReleases(stated, minimum_sequence or len(history.entries), history)
    current = history.current.releases
    return Source(
        "release",
        releases,
        ("The reference values are what a publisher signs. Renew the history's file, and this policy stays.",),
        model=Released() if any(release.models for release in current) else None,
        configuration=Released() if any(release.configurations for release in current) else None,
        registers={PCR_SIGNER: Forbid()} if any(release.pcrs.pcr8 is None for release in current) else {},
    )


def from_evidence(data: bytes, *, anchor: Anchor, purpose: str | None, name: str | None) -> Source:
    """A bundle, Evidence or a bare document: trust on first use. Its document is authenticated here (steps 1 to 5); the
    rest is for :meth:`Source.require_accepted`, and until that has passed nothing may be written.

    Raises EvidenceError; AppraisalError ``debug_mode``; SourceError; PolicyError.
    """
    kept = read_kept(data)
    evidence = kept.evidence if isinstance(kept, Bundle) else kept
    is_evidence = Evidence.is_in(evidence)
    if purpose is None:
        purpose = "channel" if is_evidence else "document"
    if purpose == "channel" and not is_evidence:
        raise SourceError(
            "wrong_purpose",
            "a bare document opens no channel",
            expected="Evidence, or purpose document",
            got="a document",
        )
    parts = Evidence.decode(evidence) if is_evidence else Evidence(evidence, b"")
    authentic = authenticate(parts.document, anchor=anchor, at=_stated_time(parts.document))
    if Label.DEBUG in authentic.labels:
        raise AppraisalError(
            "debug_mode",
            "the enclave was in debug mode: nothing in it was measured, and its host reads its memory",
            expected="PCR0, PCR1 and PCR2 not all zero",
            got="all zero",
        )
    claims = authentic.claims
    commitment = Commitment.decode(parts.commitment) if purpose == "channel" else None
    pcrs = _image_registers(claims)
    made = time_text(claims.timestamp)
    registers: dict[int, RegisterRule] = {} if pcrs.pcr8 else {PCR_SIGNER: Forbid()}
    for index in range(PCR_COUNT):
        value = claims.pcrs.get(index, ZERO_PCR)
        if value != ZERO_PCR and index not in _HAVE_A_RULE:
            registers[index] = Require((value,))
    return Source(
        "evidence",
        (Release(f"{TRUST_ON_FIRST_USE}, {name or made}", pcrs),),
        (
            f"TRUST ON FIRST USE: the reference values are what an enclave said of itself, at {made}.",
            f"It was the module {claims.module_id}.",
            "That proves what ran there, and not that it is any good: who chose the enclave chose what is accepted.",
            "Compare the registers with a build of your own, or with what the publisher signs.",
        ),
        purpose=purpose,
        model=None if commitment is None else Require((commitment.model,)),
        configuration=None if commitment is None else Require((commitment.configuration,)),
        registers=registers,
        public_key=_carried(claims.public_key),
        user_data=_carried(claims.user_data),
        judged=evidence if purpose == "channel" else parts.document,
        nonce=kept.nonce if isinstance(kept, Bundle) else None,
    )


def _stated_time(document: bytes) -> datetime:
    """When ``document`` says that it was made: at that time its chain and its signature are to prove it."""
    signed = CoseSign1.from_cbor(cbor.decode(document, optional_tag=COSE_SIGN1_TAG))
    return AttestationDocument.from_cbor(cbor.decode(signed.payload, indefinite_top_map=True)).timestamp


def _image_registers(claims: AttestationDocument) -> PcrSet:
    missing = [f"PCR{index}" for index in (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION) if index not in claims.pcrs]
    if missing:
        raise SourceError(
            "no_measurements",
            "the document does not say which image runs",
            expected="PCR0, PCR1 and PCR2",
            got=f"no {' and no '.join(missing)}",
        )
    signer = claims.pcrs.get(PCR_SIGNER, ZERO_PCR)
    return PcrSet(
        claims.pcrs[PCR_IMAGE],
        claims.pcrs[PCR_BOOT],
        claims.pcrs[PCR_APPLICATION],
        None if signer == ZERO_PCR else signer,
    )


def _carried(value: bytes | None) -> FieldRule:
    """A key or data of one document is nothing to hold the next one to; that there was none, is."""
    return (
        Forbid()
        if value is None
        else Ignore("documents of one enclave differ in it: whoever uses the document judges it")
    )
