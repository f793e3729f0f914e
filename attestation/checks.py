"""The verifier's checklist: which steps there are, and what became of each.

The numbers are those of PROTOCOL.md section 3.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

STEPS = {
    1: "Evidence encoding",
    2: "COSE structure",
    3: "document fields",
    4: "certificate chain",
    5: "signature",
    6: "nonce",
    7: "freshness",
    8: "binding",
    9: "commitment",
    10: "debug mode",
    11: "image",
    12: "model",
    13: "configuration",
    14: "other PCRs and module",
    15: "entropy",
}

KEY_STEPS = {
    16: "KMS key",
    17: "copies of the key",
    18: "key policy",
    19: "grants",
    20: "who may change it",
    21: "wrapped key",
}
"""Behind those of Evidence, where a policy names KMS keys: once for each."""

QUESTIONS = {
    1: "Is it bounded, canonical CBOR, so that two readers of it cannot see two different things?",
    2: "Is the document a COSE_Sign1 under ES384, the one algorithm of the Nitro Secure Module?",
    3: "Has the document the fields that AWS specifies, each of its type and within its bounds?",
    4: "Does every certificate lead to the anchor that the policy names, and are all valid at the verification time?",
    5: "Has the key of that chain signed exactly these bytes?",
    6: "Does the document answer this request, or is it a recording?",
    7: "Is the document no older than the policy allows, and not from the future?",
    8: "Was the document signed for this channel: is its user_data the digest of the commitment?",
    9: "Is the commitment whole, and do the locked registers PCR16 and PCR17 say the same of model and configuration?",
    10: "Is the enclave's memory closed to its host? In debug mode PCR0, PCR1 and PCR2 are all zero.",
    11: "Is the image one release of the policy, all of its registers together?",
    12: "Is the model, which PCR16 commits to, one that the policy accepts?",
    13: "Is the configuration, which PCR17 commits to, one that the policy accepts?",
    14: "Is there nothing else measured or carried than what the policy accepts?",
    15: "Do the enclave's keys come from the hardware's randomness? An emulated enclave's are known to its host.",
    16: "Is it the key that the policy names, is it in use, and was it made where nobody has seen it?",
    17: "Is this the only copy of the key, or has another region one with a policy of its own?",
    18: "Does KMS release to the releases of the policy, all registers together, and to nothing else?",
    19: "Has nobody been handed a permission beside the key's policy?",
    20: "Can nobody change this later, or only those whom the policy trusts with it?",
    21: "Is the wrapped key under this key, for this purpose, and not an older one?",
}
"""What each step asks."""


class Label(StrEnum):
    """What must be said wherever a verdict is shown, be it good or bad."""

    ARCHIVED = "ARCHIVED"
    DEBUG = "DEBUG"
    EMULATED = "EMULATED"


class Status(StrEnum):
    """What became of a step of the checklist."""

    PASSED = "passed"
    FAILED = "failed"
    IGNORED = "ignored"
    """By the written words of the policy, or because an archived document is judged."""
    NOT_REACHED = "not_reached"
    NOT_APPLICABLE = "not_applicable"
    """A step about the commitment of a channel, where a bare document is judged; or about the wrapped key in use, where
    there is none.
    """


class Check(NamedTuple):
    """One line of a report. ``code`` is set on a failure only; step 14 has a line for each thing that it judges."""

    step: int
    """Its number in ``STEPS`` or ``KEY_STEPS``, 1 to 21."""
    name: str
    """What was checked: the step's name, or in step 14 that of the register or field."""
    status: Status
    """What became of it."""
    expected: str | None = None
    got: str | None = None
    """Texts for people, both this and ``expected``. None where nothing was compared."""
    code: str | None = None
    explanation: str | None = None
    """Why: what a failure means, or in whose words the step is ignored or not applicable. None where it passed."""

    def as_json(self) -> dict[str, str | int | None]:
        return {
            "step": self.step,
            "name": self.name,
            "status": self.status.value,
            "expected": self.expected,
            "got": self.got,
            "code": self.code,
            "explanation": self.explanation,
        }
