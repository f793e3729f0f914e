"""Test vectors of bare documents under a policy: PROTOCOL.md section 3, "Bare documents", from step 6 on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from attestation.reference import ZERO_PCR, once_extended
from conformance.vectors import ACCEPTED, Subject, Vector
from tests.pki import forge

_USER_DATA = b"what the enclave says of itself"
_KEY = bytes(range(65))
_POLICIES: Mapping[str, tuple[str, str]] = {
    "document.toml": ("forbid = true", f'require = ["{_USER_DATA.hex()}"]'),
    "document-key.toml": (f'require = ["{_KEY.hex()}"]', "forbid = true"),
    "document-any.toml": ('ignore = "any key will do"', 'ignore = "any user data will do"'),
}
"""Their rules for public_key and user_data."""


@dataclass(frozen=True)
class Case:
    name: str
    expect: str
    about: str
    document: bytes
    at: datetime = forge.NOW
    policy: str = "document.toml"
    nonce: bytes = forge.NONCE

    def vector(self) -> Vector:
        return Vector(
            about=self.about,
            subject=Subject.APPRAISAL,
            expect=self.expect,
            step=None if self.expect == ACCEPTED else int(self.name[:2]),
            time=self.at,
            anchor="root.der",
            nonce=self.nonce,
            policy=self.policy,
            payload=self.document,
        )


def policies() -> Mapping[str, str]:
    return {
        name: forge.POLICY.replace(
            '[binding]\npurpose = "channel"\n',
            f'[binding]\npurpose = "document"\n[binding.public_key]\n{key}\n[binding.user_data]\n{user_data}\n',
        )
        for name, (key, user_data) in _POLICIES.items()
    }


def _document(**changes: object) -> bytes:
    return forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **{"user_data": _USER_DATA, **changes}))


def cases() -> Iterator[Case]:
    yield Case("accepted-appraisal", ACCEPTED, "a document that the policy accepts", _document())
    yield from _freshness()
    yield from _registers()
    yield from _fields()


def _freshness() -> Iterator[Case]:
    """Steps 6 and 7, and step 4 where the leeway is its matter."""

    def nonce(name: str, about: str, value: object) -> Case:
        return Case(f"06-appraisal-{name}", "wrong_nonce", about, _document(nonce=value))

    yield nonce("other", "another request's nonce", bytes(32))
    yield nonce("null", "no nonce", None)
    yield nonce("empty", "an empty nonce", b"")
    yield nonce("prefix", "the nonce without its last byte", forge.NONCE[:-1])
    for size in (16, 1024):
        sent = bytes(size)
        about = f"a nonce of {size} bytes"
        yield Case(f"06-appraisal-{size}", ACCEPTED, about, _document(nonce=sent), nonce=sent)

    def at(name: str, expect: str, about: str, time: datetime) -> Case:
        return Case(name, expect, about, _document(), time)

    second, millisecond = timedelta(seconds=1), timedelta(milliseconds=1)
    oldest, youngest = forge.NOW + 420 * second, forge.NOW - 120 * second
    yield at("07-appraisal-oldest", ACCEPTED, "as old as maximum age and leeway allow", oldest)
    yield at("07-appraisal-stale", "stale", "a millisecond older", oldest + millisecond)
    yield at("07-appraisal-youngest", ACCEPTED, "as far ahead as the leeway allows", youngest)
    about = "further ahead: not even the leaf is valid yet"
    yield at("04-appraisal-slow-clock", "untrusted_chain", about, youngest - millisecond)
    seconds = _document(timestamp=int(forge.NOW.timestamp()))
    yield Case("07-appraisal-seconds", "stale", "the timestamp is in seconds, and so from 1970", seconds)


def _registers() -> Iterator[Case]:
    """Steps 10 to 14."""

    def case(name: str, expect: str, about: str, **changes: bytes | None) -> Case:
        numbered = {int(register.removeprefix("pcr")): value for register, value in changes.items()}
        pcrs = {index: value for index, value in {**forge.PCRS, **numbered}.items() if value is not None}
        return Case(name, expect, about, _document(pcrs=pcrs))

    other, zero = forge.measured("something else"), ZERO_PCR
    yield case("10-appraisal-debug", "debug_mode", "PCR0, 1 and 2 are zero", pcr0=zero, pcr1=zero, pcr2=zero)
    for index in (0, 1, 2):
        yield case(f"11-appraisal-pcr{index}", "wrong_image", f"another PCR{index}", **{f"pcr{index}": other})
    second = forge.measured("image 2")
    yield case("11-appraisal-mixed", "wrong_image", "PCR0 of one release with the rest of another", pcr0=second)
    yield case("12-appraisal-model", "wrong_model", "another model", pcr16=once_extended(bytes(48)))
    yield case("12-appraisal-digest", "wrong_model", "PCR16 is the digest itself", pcr16=forge.COMMITMENT.model)
    yield case("12-appraisal-absent", "wrong_model", "PCR16 is not locked", pcr16=None)
    configuration = once_extended(bytes(48))
    yield case("13-appraisal-configuration", "wrong_configuration", "another configuration", pcr17=configuration)
    yield case("13-appraisal-absent", "wrong_configuration", "PCR17 is not locked", pcr17=None)
    yield case("14-appraisal-pcr3", "wrong_pcr", "PCR3, forbidden, is not zero", pcr3=other)
    yield case("14-appraisal-pcr4", "wrong_pcr", "PCR4 is not the one required", pcr4=other)
    yield case("14-appraisal-pcr31", "wrong_pcr", "PCR31, of which the policy says nothing", pcr31=other)


def _fields() -> Iterator[Case]:
    """Step 14, the fields that a bare document carries."""

    def case(name: str, expect: str, about: str, policy: str, **changes: object) -> Case:
        return Case(f"14-appraisal-{name}", expect, about, _document(**changes), policy=policy)

    none, one, any_one = "document.toml", "document-key.toml", "document-any.toml"
    yield case("key", "wrong_public_key", "a public_key, which is forbidden", none, public_key=_KEY)
    yield case(
        "key-empty", "wrong_public_key", "a public_key of no bytes is there, and forbidden", none, public_key=b""
    )
    yield case("user-data", "wrong_user_data", "other user_data", none, user_data=_USER_DATA + b".")
    yield case("user-data-null", "wrong_user_data", "no user_data, which is required", none, user_data=None)
    yield case("user-data-empty", "wrong_user_data", "user_data of no bytes", none, user_data=b"")
    required = {"user_data": None, "public_key": _KEY}
    yield case("key-required", ACCEPTED, "the public_key that is required", one, **required)
    other = {**required, "public_key": _KEY[:-1]}
    yield case("key-other", "wrong_public_key", "another public_key than the one required", one, **other)
    absent = {**required, "public_key": None}
    yield case("key-null", "wrong_public_key", "no public_key, which is required", one, **absent)
    forbidden = {**required, "user_data": _USER_DATA}
    yield case("user-data-forbidden", "wrong_user_data", "user_data, which is forbidden", one, **forbidden)
    yield case("any", ACCEPTED, "fields that the policy ignores", any_one, public_key=_KEY, user_data=bytes(1024))
