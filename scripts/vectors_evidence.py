"""Test vectors of Evidence and of the documents in it, PROTOCOL.md sections 2 and 3: tests/vectors/evidence/*.vector.

The format is that of conformance/vectors.py. Beside the vectors lie what they name: policies, and anchors as DER.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import cbor2

from attestation.commitment import Commitment, Purpose, UserData
from attestation.reference import ZERO_PCR, extend, once_extended
from conformance.vectors import ACCEPTED, SUFFIX, Subject, Vector
from scripts import vectors_appraisal, vectors_chain, vectors_documents
from tests.pki import forge


@dataclass(frozen=True)
class Case:
    """Evidence with one thing wrong, or one thing unusual. ``expect`` is ``accepted`` or the code of the failure."""

    name: str
    expect: str
    about: str
    evidence: bytes
    at: datetime = forge.NOW
    policy: str = "policy.toml"

    def vector(self) -> Vector:
        return Vector(
            about=self.about,
            subject=Subject.EVIDENCE,
            expect=self.expect,
            step=None if self.expect == ACCEPTED else int(self.name[:2]),
            time=self.at,
            anchor="root.der",
            nonce=forge.NONCE,
            policy=self.policy,
            payload=self.evidence,
        )


def files() -> Mapping[str, bytes]:
    debug = forge.POLICY.replace("[debug]\nforbid = true", '[debug]\naccept = "a test of the debug mode"')
    module = forge.POLICY.replace('ignore = "it changes at every start"', 'require = ["i-0123456789abcdef0-enc0"]')
    policies = {"policy.toml": forge.POLICY, "debug-accepted.toml": debug, "module.toml": module}
    policies |= vectors_appraisal.policies()
    made = {**vectors_chain.anchors(), **{name: policy.encode() for name, policy in policies.items()}}
    named = [(case.name, case.vector()) for case in cases()]
    named += [(case.name, case.vector()) for case in vectors_appraisal.cases()]
    named += [(case.name, case.vector()) for case in (*vectors_documents.cases(), *vectors_chain.cases())]
    for name, vector in named:
        assert name + SUFFIX not in made, name
        made[name + SUFFIX] = vector.encode()
    return made


def cases() -> Iterator[Case]:
    yield Case("accepted", ACCEPTED, "as an enclave sends it", forge.evidence())
    yield from _encoding()
    yield from _freshness()
    yield from _bindings()
    yield from _commitments()
    yield from _registers()
    yield from _appraisal()


def _encoding() -> Iterator[Case]:
    """Step 1."""
    good, commitment = forge.document(), forge.COMMITMENT.encode()
    envelope = {"v": 1, "document": good, "commitment": commitment}

    def malformed(name: str, about: str, made: bytes) -> Case:
        return Case(f"01-evidence-{name}", "malformed_evidence", about, made)

    yield malformed("empty", "no bytes", b"")
    yield malformed("array", "an array in place of the map", cbor2.dumps([1, good, commitment]))
    yield malformed("trailing", "a byte behind the map", forge.evidence() + b"\x00")
    yield malformed("truncated", "the last byte is missing", forge.evidence()[:-1])
    yield malformed("unknown-field", "a field of no meaning", cbor2.dumps({**envelope, "w": 1}, canonical=True))
    yield malformed("version", "version 2", cbor2.dumps({**envelope, "v": 2}, canonical=True))
    yield malformed("key-order", "keys that are not in bytewise order", cbor2.dumps(dict(reversed(envelope.items()))))
    yield malformed("duplicate-key", "the version twice", forge.raw_map([("v", 1), *envelope.items()]))
    long_integer = forge.raw_map(list(envelope.items())).replace(b"\x61v\x01", b"\x61v\x18\x01", 1)
    yield malformed("long-integer", "the version in two bytes where one does", long_integer)
    for field in ("v", "document", "commitment"):
        without = {name: value for name, value in envelope.items() if name != field}
        yield malformed(f"without-{field}", f"no {field}", cbor2.dumps(without, canonical=True))
    entries = sorted(envelope.items(), key=lambda entry: cbor2.dumps(entry[0]))
    yield malformed("indefinite", "a map of indefinite length", forge.raw_map(entries, indefinite=True))
    chunks = [(name, value if name == "v" else forge.chunked(str(value))) for name, value in entries]
    yield malformed("chunked", "document and commitment in chunks", forge.raw_map(chunks))
    yield malformed("tagged", "a tag on the map", b"\xd2" + forge.evidence())
    yield malformed(
        "document-text", "the document is a text", cbor2.dumps({**envelope, "document": "x"}, canonical=True)
    )
    yield malformed(
        "document-null", "the document is null", cbor2.dumps({**envelope, "document": None}, canonical=True)
    )
    large = {**envelope, "document": bytes(16_385)}
    yield malformed("document-large", "a document of 16,385 bytes", cbor2.dumps(large, canonical=True))
    large = {**envelope, "document": bytes(16_384), "commitment": bytes(16_384)}
    yield malformed("large", "more than 32,768 bytes", cbor2.dumps(large, canonical=True))
    yield malformed("bare-document", "a document without its map", good)


def _freshness() -> Iterator[Case]:
    """Steps 6 and 7."""

    def nonce(name: str, about: str, value: object) -> Case:
        made = forge.document(forge.payload_fields(nonce=value))
        return Case(f"06-{name}", "wrong_nonce", about, forge.evidence(made))

    yield nonce("other", "another request's nonce", bytes(32))
    yield nonce("null", "no nonce", None)
    yield nonce("absent", "no such field", forge.ABSENT)
    yield nonce("empty", "an empty nonce", b"")
    yield nonce("prefix", "the nonce without its last byte", forge.NONCE[:-1])
    yield nonce("longer", "the nonce and one byte", forge.NONCE + b"\x00")
    for size in (512, 513, 1024):
        yield nonce(f"nonce-{size}", f"a nonce of {size} bytes is well formed, and another", bytes(size))

    def case(name: str, expect: str, about: str, at: datetime) -> Case:
        return Case(f"07-{name}", expect, about, forge.evidence(), at)

    second, millisecond = timedelta(seconds=1), timedelta(milliseconds=1)
    yield case("oldest", ACCEPTED, "as old as maximum age and leeway allow", forge.NOW + 420 * second)
    yield case("stale", "stale", "a millisecond older", forge.NOW + 420 * second + millisecond)
    yield case("youngest", ACCEPTED, "as far ahead as the leeway allows", forge.NOW - 120 * second)
    future = forge.chain(leaf=replace(forge.LEAF, not_before=forge.NOW - timedelta(hours=1)))
    yield Case(
        "07-future",
        "from_the_future",
        "a millisecond further ahead",
        forge.evidence(forge.document(forge.payload_fields(chain=future))),
        forge.NOW - 120 * second - millisecond,
    )
    yield Case(
        "04-slow-clock",
        ACCEPTED,
        "the client's clock is a minute slow: the leaf is not valid yet, and the leeway allows for it",
        forge.evidence(),
        at=forge.NOW - 60 * second,
    )
    # The document's time stands in for a slow clock's; the leaf must be valid then.
    late = forge.chain(leaf=replace(forge.LEAF, not_before=forge.NOW + second))
    yield Case(
        "04-slow-clock-early-leaf",
        "untrusted_chain",
        "the client's clock is a minute slow, and the leaf begins a second behind the document",
        forge.evidence(forge.document(forge.payload_fields(chain=late))),
        at=forge.NOW - 60 * second,
    )
    # The leeway is for clocks that are slow. To one that is ahead, or right, an expired leaf has expired.
    short = forge.chain(leaf=replace(forge.LEAF, not_after=forge.NOW + 30 * second))
    yield Case(
        "04-fast-clock",
        "untrusted_chain",
        "the leaf ended half a minute ago; the document is within its age, and that does not matter",
        forge.evidence(forge.document(forge.payload_fields(chain=short))),
        at=forge.NOW + 60 * second,
    )
    seconds = forge.document(forge.payload_fields(timestamp=int(forge.NOW.timestamp())))
    yield Case("07-seconds", "stale", "the timestamp is in seconds, and so from 1970", forge.evidence(seconds))


def _bindings() -> Iterator[Case]:
    """Step 8."""
    digest = forge.COMMITMENT.digest()

    def case(name: str, about: str, **changes: object) -> Case:
        made = forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes))
        return Case(f"08-{name}", "wrong_binding", about, forge.evidence(made))

    yield case("public-key", "a public_key", public_key=bytes(32))
    yield case("public-key-empty", "a public_key of no bytes", public_key=b"")
    yield case("user-data-null", "no user_data", user_data=None)
    yield case("user-data-empty", "user_data of no bytes", user_data=b"")
    yield case("user-data-1024", "1024 bytes of user_data are well formed, and bind nothing", user_data=bytes(1024))
    yield case("purpose-kms", "a document for a key service", user_data=UserData(Purpose.KMS, digest).encode())
    yield case("purpose-unknown", "a purpose that does not exist", user_data=cbor2.dumps([1, "anything", digest]))
    yield case("version", "version 2", user_data=cbor2.dumps([2, "channel", digest]))
    yield case("long", "a fourth element", user_data=cbor2.dumps([1, "channel", digest, b""]))
    yield case("short-digest", "32 bytes of the digest", user_data=cbor2.dumps([1, "channel", digest[:32]]))
    yield case(
        "not-deterministic",
        "the version in two bytes",
        user_data=b"\x83\x18\x01" + cbor2.dumps([1, "channel", digest])[2:],
    )
    other = replace(forge.COMMITMENT, boot_id=bytes(16)).encode()
    yield Case("08-other-commitment", "wrong_binding", "another boot's commitment", forge.evidence(commitment=other))


def _commitments() -> Iterator[Case]:
    """Step 9."""

    def case(name: str, about: str, encoded: bytes, expect: str = "malformed_commitment") -> Case:
        made = forge.document(forge.payload_fields(encoded))
        return Case(f"09-{name}", expect, about, forge.evidence(made, encoded))

    fields = cbor2.loads(forge.COMMITMENT.encode())

    def changed(**changes: object) -> bytes:
        return cbor2.dumps({**fields, **changes}, canonical=True)

    yield case("unknown-field", "a field of no meaning", changed(more=1))
    yield case(
        "without-entropy",
        "no entropy",
        cbor2.dumps({k: v for k, v in fields.items() if k != "entropy"}, canonical=True),
    )
    yield case("version", "version 2", changed(v=2))
    yield case("suite", "another suite", changed(suite="X25519/HKDF-SHA256/AES-128-GCM"))
    yield case("key-short", "a key of 1215 bytes", changed(key=fields["key"][:-1]))
    yield case("key-long", "a key of 1217 bytes", changed(key=fields["key"] + b"\x00"))
    yield case("boot-id", "a boot id of 15 bytes", changed(boot_id=bytes(15)))
    yield case("model", "a model's digest of 32 bytes", changed(model=bytes(32)))
    yield case("configuration", "a configuration's digest of 64 bytes", changed(configuration=bytes(64)))
    yield case("lifetime-zero", "a lifetime of 0 s", changed(lifetime=0))
    yield case("lifetime-long", "a lifetime of 86401 s", changed(lifetime=86401))
    yield case("lifetime-text", "a lifetime in words", changed(lifetime="600"))
    yield case("entropy", "randomness of a third kind", changed(entropy="dice"))
    yield case("receipt-key", "a receipt key of 31 bytes", changed(receipt_key=bytes(31)))
    yield case("empty", "no bytes", b"")
    yield case("duplicate-key", "the lifetime twice", forge.raw_map([*fields.items(), ("lifetime", 86400)]))
    yield case("indefinite", "a map of indefinite length", forge.raw_map(list(fields.items()), indefinite=True))
    long_lifetime = [
        (name, forge.Encoded(b"\x1a\x00\x00\x02\x58") if name == "lifetime" else fields[name]) for name in fields
    ]
    yield case("long-integer", "the lifetime in four bytes where two do", forge.raw_map(long_lifetime))
    yield case("key-order", "keys out of order", cbor2.dumps(dict(reversed(fields.items()))))
    yield case("trailing", "a byte behind the map", forge.COMMITMENT.encode() + b"\x00")
    yield case("key-id", "the id of another key", changed(key_id=bytes(16)), "wrong_binding")


def _registers() -> Iterator[Case]:
    """Step 9, the registers that follow from the commitment."""

    def registers(name: str, about: str, **changes: object) -> Case:
        pcrs = {index: value for index, value in forge.PCRS.items() if f"pcr{index}" not in changes}
        pcrs |= {int(key[3:]): value for key, value in changes.items() if isinstance(value, bytes)}
        made = forge.document(forge.payload_fields(pcrs=pcrs))
        return Case(f"09-{name}", "wrong_binding", about, forge.evidence(made))

    model, configuration = forge.COMMITMENT.model, forge.COMMITMENT.configuration
    yield registers("pcr16-absent", "PCR16 is not locked", pcr16=None)
    yield registers("pcr17-absent", "PCR17 is not locked", pcr17=None)
    yield registers("pcr16-zero", "PCR16 was never extended", pcr16=ZERO_PCR)
    yield registers("pcr16-other", "PCR16 holds another model", pcr16=once_extended(bytes(48)))
    yield registers("pcr16-twice", "PCR16 was extended twice", pcr16=extend(once_extended(model), model))
    yield registers("pcr17-other", "PCR17 holds another configuration", pcr17=once_extended(bytes(48)))
    yield registers(
        "pcrs-swapped",
        "model and configuration in each other's registers",
        pcr16=once_extended(configuration),
        pcr17=once_extended(model),
    )


def _appraisal() -> Iterator[Case]:
    """Steps 10 to 15."""

    def case(name: str, expect: str, about: str, pcrs: Mapping[int, bytes], policy: str = "policy.toml") -> Case:
        made = forge.document(forge.payload_fields(pcrs=dict(pcrs)))
        return Case(name, expect, about, forge.evidence(made), policy=policy)

    yield case("10-debug", "debug_mode", "PCR0, 1 and 2 are zero", forge.DEBUG_PCRS)
    yield case(
        "10-debug-accepted",
        ACCEPTED,
        "the same, under a policy that accepts it by name",
        forge.DEBUG_PCRS,
        "debug-accepted.toml",
    )
    yield case(
        "14-debug-signer",
        "wrong_pcr",
        "PCR8 is there in an accepted debug mode, and the policy forbids it where no release names it",
        {**forge.DEBUG_PCRS, 8: forge.measured("signer")},
        "debug-accepted.toml",
    )
    yield case(
        "11-partly-zero",
        "wrong_image",
        "PCR0 and PCR1 are zero, PCR2 is not: no debug mode, and no image",
        {**forge.PCRS, 0: ZERO_PCR, 1: ZERO_PCR},
        "debug-accepted.toml",
    )
    for index in (0, 1, 2):
        changed = {**forge.PCRS, index: forge.measured("a changed file")}
        yield case(f"11-pcr{index}", "wrong_image", f"another PCR{index}", changed)
        absent = {key: value for key, value in forge.PCRS.items() if key != index}
        yield case(f"11-pcr{index}-absent", "wrong_image", f"no PCR{index}", absent)
    second = {0: forge.measured("image 2"), 1: forge.measured("boot 2"), 2: forge.measured("application 2")}
    signer = {8: forge.measured("signer")}
    yield case("11-mixed", "wrong_image", "PCR0 of one release with the rest of another", {**forge.PCRS, 0: second[0]})
    yield case("11-signed", ACCEPTED, "the second release, signed", {**forge.PCRS, **second, **signer})
    yield case("11-unsigned", "wrong_image", "the second release without its signer", {**forge.PCRS, **second})
    other_signer = {8: forge.measured("another signer")}
    yield case(
        "11-signer", "wrong_image", "the second release, signed by another", {**forge.PCRS, **second, **other_signer}
    )
    yield case("14-pcr3", "wrong_pcr", "PCR3, forbidden, is not zero", {**forge.PCRS, 3: forge.measured("a role")})
    yield case("14-pcr4", "wrong_pcr", "PCR4 is not the one required", {**forge.PCRS, 4: forge.measured("elsewhere")})
    yield case(
        "14-pcr4-absent", "wrong_pcr", "PCR4, required, is absent", {k: v for k, v in forge.PCRS.items() if k != 4}
    )
    yield case("14-pcr8", "wrong_pcr", "the first release, signed though it names no signer", {**forge.PCRS, **signer})
    yield case(
        "14-pcr9", "wrong_pcr", "PCR9, of which the policy says nothing", {**forge.PCRS, 9: forge.measured("more")}
    )
    yield case(
        "14-pcr31", "wrong_pcr", "PCR31, of which the policy says nothing", {**forge.PCRS, 31: forge.measured("x")}
    )
    yield case("14-module", "wrong_module", "another enclave than the policy names", forge.PCRS, "module.toml")
    yield case("14-pcr31-zero", ACCEPTED, "PCR31, locked and zero", {**forge.PCRS, 31: ZERO_PCR})

    def committed(name: str, expect: str, about: str, commitment: Commitment) -> Case:
        pcrs = {**forge.PCRS, 16: once_extended(commitment.model), 17: once_extended(commitment.configuration)}
        encoded = commitment.encode()
        made = forge.document(forge.payload_fields(encoded, pcrs=pcrs))
        return Case(name, expect, about, forge.evidence(made, encoded))

    yield committed("12-model", "wrong_model", "another model", replace(forge.COMMITMENT, model=bytes(48)))
    yield committed(
        "13-configuration",
        "wrong_configuration",
        "another configuration",
        replace(forge.COMMITMENT, configuration=bytes(48)),
    )
