"""What can be wrong with the policy of a key: the rules of :mod:`attestation.keypolicy.lint`, and what one finds.

Each rule has a stable code. Its severity says what follows from it. ERROR: no verdict accepts the key, since it can be
opened by something that is no accepted release, now or later, or nobody can tell, or since it is not in use. WARNING:
neither is so, and the policy is weaker or less useful than it looks. NOTE: something to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Severity(StrEnum):
    """What follows from a finding, the worst first."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a key policy should not have."""

    severity: Severity
    """What follows where it is broken."""
    means: str
    """What it is, in a few words."""
    fix: str
    """What to do about it, as an order."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Where a rule was broken."""

    rule: str
    """A key of ``RULES``: stable, for programs."""
    statement: str | None
    """The statement's Sid, else ``Statement[N]`` counted from 0; or a grant's id. None: the policy or the key."""
    detail: str
    """What stands there, for people."""

    @property
    def severity(self) -> Severity:
        return RULES[self.rule].severity

    @property
    def why(self) -> str:
        """What is wrong, and what stands there."""
        return f"{RULES[self.rule].means}: {self.detail}"

    @property
    def fix(self) -> str:
        """What to do about it."""
        return RULES[self.rule].fix

    def as_json(self) -> dict[str, str | None]:
        """``severity``, ``rule``, ``statement``, ``why`` and ``fix``."""
        return {
            "severity": self.severity.value,
            "rule": self.rule,
            "statement": self.statement,
            "why": self.why,
            "fix": self.fix,
        }


_SHAPE: Final = (
    "ask, in the same Allow statement, with StringEqualsIgnoreCase and the values of one release, for"
    " kms:RecipientAttestation:PCR0, PCR1, PCR2, PCR17, PCR8 of a signed image, and PCR16 where prompts are opened"
)
_OUT: Final = "take it out of the policy"


def _error(means: str, fix: str) -> Rule:
    return Rule(Severity.ERROR, means, fix)


def _warning(means: str, fix: str) -> Rule:
    return Rule(Severity.WARNING, means, fix)


def _note(means: str, fix: str) -> Rule:
    return Rule(Severity.NOTE, means, fix)


RULES: Final = MappingProxyType(
    {
        # What an Allow statement that opens the key asks of an enclave.
        "unattested": _error("an Allow opens the key without any attestation", _SHAPE),
        "image_alone": _error("PCR0 alone is asked for, which says little without the others", _SHAPE),
        "missing_register": _error("some registers are asked for, and not all of the release's", _SHAPE),
        "unknown_release": _error(
            "a register's value is that of no accepted release",
            "remove the value; or, if it is meant, accept its release in the appraisal policy first",
        ),
        "mixed_releases": _error(
            "the values of several releases stand in one statement",
            "write one statement for each release: the values of each key are alternatives, so that PCR0 of one"
            " release passes with PCR1 of another",
        ),
        "zero_register": _error(
            "a register of zero is accepted, which is what an enclave in debug mode reports",
            "take the measurements of the image file, never of an enclave that runs",
        ),
        "malformed_register": _error(
            "a value that no register has, so that the condition never holds",
            "write 96 hexadecimal digits, without a prefix",
        ),
        "policy_variable": _error(
            "a policy variable stands where a register has one exact value: it may be whatever the request says",
            "write the register's digits",
        ),
        "misspelt_key": _error(
            "a condition key that KMS does not have: an Allow never counts, a Deny may count for everybody or nobody",
            "spell it as AWS does; PCR is followed by the register's number, 0 to 31, without zeros before it",
        ),
        "nitro_tpm": _error(
            "the registers of a NitroTPM are asked for, which no enclave has",
            "use kms:RecipientAttestation:PCR and the number: those of the enclave",
        ),
        "if_exists": _error(
            "the condition holds when there is no attestation at all", "use the operator without IfExists"
        ),
        "null_condition": _error(
            "that a register is there, or is not there, is asked for, in place of its value", _SHAPE
        ),
        "for_all_values": _error(
            "ForAllValues holds when there is no attestation at all", "use the operator without ForAllValues"
        ),
        "for_any_value": _error(
            "ForAnyValue is for keys of many values, and a register has one", "use the operator without ForAnyValue"
        ),
        "negated_operator": _error(
            "an Allow for every value but some also holds for no attestation at all",
            "name the accepted values with StringEqualsIgnoreCase, and keep negations for Deny",
        ),
        "pattern_operator": _error(
            "a pattern stands where a register has one exact value", "use StringEqualsIgnoreCase with the whole value"
        ),
        "wrong_operator": _error(
            "an operator for numbers, times, addresses or the like is used on a register", "use StringEqualsIgnoreCase"
        ),
        "unknown_operator": _error(
            "an operator that IAM does not have, so that nobody can tell what the statement does",
            "spell it as AWS does",
        ),
        "unconditioned_context": _error(
            "what was encrypted for another purpose or context is opened too",
            "ask with StringEquals for kms:EncryptionContext:strongroom:purpose and"
            " kms:EncryptionContext:strongroom:context, one value each",
        ),
        "wrong_context": _error(
            "the key is opened for another purpose or context than this one",
            "use one key for one purpose and one context, and name those in every statement",
        ),
        # Who may do what.
        "wildcard_principal": _error(
            "everybody, in every account of AWS, is allowed something", "name the roles, by their ARNs"
        ),
        "wildcard_action": _error(
            "a pattern of actions covers some that open the key or hand it out", "name each action that is needed"
        ),
        "root_delegation": _error(
            "the account itself is allowed to open or to change the key, so that its IAM policies decide who may",
            "name the roles, by their ARNs, and let the key policy alone decide",
        ),
        "not_principal": _error("everybody but a few is allowed something", "name those who are allowed it"),
        "not_action": _error("everything but a few actions is allowed", "name the actions that are needed"),
        "not_resource": _error(
            "the statement is about everything but some resources", 'write "Resource": "*", which is this key'
        ),
        "unknown_action": _error(
            "an action that is not known here: misspelt, or newer than this program and perhaps one that opens the key",
            "spell it as AWS does, or take it out",
        ),
        "reencrypt": _error(
            "what is encrypted under this key may be moved under another one; KMS asks no enclave for that", _OUT
        ),
        "create_grant": _error(
            "somebody may hand out permissions beside the policy, and no grant can ask for attestation", _OUT
        ),
        "replicate_key": _error(
            "somebody may copy the key into another region, under a policy of their own choice", _OUT
        ),
        "import_key_material": _error("somebody may choose the key, and so know it outside of KMS", _OUT),
        "untrusted_administrator": _error(
            "somebody whom the appraisal policy does not trust can change what the key opens to",
            "lock the key policy, or name these administrators as trusted in the appraisal policy",
        ),
        "grant_opens": _error(
            "a grant opens the key, and no grant can ask for attestation", "revoke or retire the grant"
        ),
        # The key itself.
        "not_enabled": _error(
            "the key is not in use, so that nothing can be sealed to it or opened",
            "enable the key, or name another one",
        ),
        "wrong_key": _error(
            "not a symmetric key for encryption that the account manages itself",
            "make a key with `strongroom kms key create`",
        ),
        "foreign_material": _error(
            "the key material does not come from KMS, so that somebody may know it",
            "make a key whose material KMS makes: origin AWS_KMS",
        ),
        "unseen_copy": _error(
            "a copy of the key in another region has a policy that was not judged",
            "judge each copy's policy, or use a key of one region",
        ),
        "multi_region": _error(
            "copies of the key can be in several regions, each with a policy of its own", "use a key of one region"
        ),
        # Weak, and not open.
        "case_sensitive": _warning(
            "StringEquals tells upper from lower case, and holds only for digits written as KMS does",
            "use StringEqualsIgnoreCase for hexadecimal digits",
        ),
        "bound_by_deny": _warning(
            "only a Deny elsewhere keeps this Allow from opening the key to everything; without it nothing does", _SHAPE
        ),
        "weak_deny": _warning(
            "a Deny looks as if it kept others out, and does not",
            "ask for the registers in each Allow; a Deny that complements it has one key, StringNotEqualsIgnoreCase,"
            ' and is for everybody ("Principal": "*")',
        ),
        "broad_principal": _warning(
            "an account, a service or a federation is allowed something, and others decide who that is",
            "name the roles, by their ARNs",
        ),
        "other_account": _warning(
            "somebody of another account is allowed something", "see that the account is meant, and trusted"
        ),
        "administers_and_uses": _warning(
            "one principal both administers the key and uses it", "give administration and use to different roles"
        ),
        "unconditioned_sealing": _warning(
            "somebody may encrypt for any purpose and context",
            "ask for kms:EncryptionContext:strongroom:purpose and kms:EncryptionContext:strongroom:context",
        ),
        "primary_region": _warning("somebody may move the leading copy of the key into another region", _OUT),
        "unfit_action": _warning("an action that does nothing with a symmetric key", _OUT),
        "alias_resource": _warning(
            "an alias stands in place of the key, so that the statement does nothing",
            'write "Resource": "*", which is this key',
        ),
        "other_resource": _warning(
            "another resource is named, so that the statement does nothing", 'write "Resource": "*", which is this key'
        ),
        "release_without_statement": _warning(
            "an accepted release to which the key is not opened",
            "add its statement: `strongroom kms key rotate-image`",
        ),
        # To know.
        "changeable": _note(
            "trusted administrators can change what the key opens to later",
            "lock the key policy once no other release will come: `strongroom kms key lock`",
        ),
        "can_destroy": _note("somebody can disable or delete the key, which opens nothing", "nothing, if it is meant"),
        "grant_seals": _note(
            "a grant lets somebody encrypt under the key, which opens nothing", "retire the grant, if it is not meant"
        ),
    }
)
"""Every rule by its code."""
