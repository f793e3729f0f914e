"""What a verification costs beside the signatures that it cannot do without.

The peer is ``cryptography`` itself, in the same process: as many raw P-384 verifications as the document has signatures
that are new, over the same bytes, each key freshly loaded from its DER. Cold, that is five (four certificates and the
document); with the CAs known, two; with the leaf known as well, one. Both sides take turns, sample by sample.

AWS's collected documents, where they are, are measured in the same way, and against the Rust verifier of
evervault-attestation-bindings. That one asks the system's clock and trusts AWS's root alone, so both run in a child
process whose clock faketime sets to the document's own time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import NameOID

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import ChainCache
from attestation.policy import AppraisalPolicy
from attestation.verifier import authenticate, verify
from bench import Row
from bench.turns import in_turns
from tests.pki import forge

LEAVES = 600
"""New ones, before they come again: more than a cache keeps."""
DOCUMENTS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "nitro"
RUST = "evervault_attestation_bindings"

COLD, WARM = 1.2, 1.25
"""The bars: how much longer a whole verification may take than the raw ones that remain."""


def rows() -> list[Row]:
    found = [*forged()]
    if DOCUMENTS.is_dir():
        found += [*collected(), *against_rust()]
    else:
        found.append(Row("AWS's real documents", "not measured", "they are not beside this repository"))
    return found


# --- The same signatures, raw ------------------------------------------------------------------------------------


def signatures(document: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Key, signature and message of the document's chain, root first, and of the document itself."""
    cose = cbor2.loads(document)
    protected, _, payload, raw = cose.value if isinstance(cose, cbor2.CBORTag) else cose
    fields = cbor2.loads(payload)
    path = [x509.load_der_x509_certificate(der) for der in (*fields["cabundle"], fields["certificate"])]
    keys = [one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for one in path]
    links = [(key, one.signature, one.tbs_certificate_bytes) for key, one in zip(keys, path[1:], strict=False)]
    signature = encode_dss_signature(int.from_bytes(raw[:48], "big"), int.from_bytes(raw[48:], "big"))
    return [*links, (keys[-1], signature, cbor2.dumps(["Signature1", protected, b"", payload]))]


def verify_raw(signed: list[tuple[bytes, bytes, bytes]]) -> None:
    for spki, signature, message in signed:
        key = load_der_public_key(spki)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))


def held(what: str, measured: tuple[float, ...], count: int, bar: float) -> Row:
    ours, raw = measured
    peer = f"{raw:.3f} ms ({count} raw {'verification' if count == 1 else 'verifications'}, cryptography)"
    return Row(what, f"{ours:.3f} ms", peer, f"{ours / raw:.3f}", f"<= {bar}", ours / raw <= bar)


# --- Evidence under a policy -------------------------------------------------------------------------------------


def forged() -> Iterator[Row]:
    """A whole verdict: all fifteen steps."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "root.der").write_bytes(forge.ROOT_DER)
        policy = AppraisalPolicy.parse(forge.POLICY, Path(folder))
    cache = ChainCache()
    document = forge.document()
    known, raw = forge.evidence(document), signatures(document)
    new_leaves = cycle([with_another_leaf(number) for number in range(LEAVES)])

    def verdict(evidence: bytes, cache: ChainCache | None) -> None:
        verify(evidence, policy=policy, nonce=forge.NONCE, at=forge.NOW, cache=cache)

    cold = in_turns(lambda: verdict(known, None), lambda: verify_raw(raw))
    leaf = in_turns(lambda: verdict(next(new_leaves), cache), lambda: verify_raw(raw[-2:]))
    warm = in_turns(lambda: verdict(known, cache), lambda: verify_raw(raw[-1:]))
    yield held("verify, nothing known", cold, 5, COLD)
    yield held("verify, a new leaf of known CAs", leaf, 2, WARM)
    yield held("verify, a known leaf", warm, 1, WARM)
    ours, theirs = (" / ".join(f"{1000 / pair[side]:.0f}" for pair in (cold, leaf, warm)) for side in (0, 1))
    what = "documents per second on one core: nothing known / new leaf / known leaf"
    yield Row(what, ours, f"{theirs} (raw, as above)", "", "for the record")


def with_another_leaf(number: int) -> bytes:
    earlier = forge.LEAF.not_before - timedelta(seconds=number + 1)
    chain = forge.chain(leaf=replace(forge.LEAF, not_before=earlier))
    return forge.evidence(forge.document(forge.payload_fields(chain=chain)))


# --- AWS's documents ---------------------------------------------------------------------------------------------


def valid_documents() -> list[tuple[bytes, datetime]]:
    index = json.loads((DOCUMENTS / "INDEX.json").read_text())["documents"]
    return [
        ((DOCUMENTS / entry["file"]).read_bytes(), datetime.fromisoformat(entry["verify_at"]))
        for entry in index
        if entry["expected"] == "valid"
    ]


def collected() -> Iterator[Row]:
    """The five steps that prove a document, each of AWS's in turn."""
    cache = ChainCache()
    documents = valid_documents()
    raw = cycle([signatures(document) for document, _ in documents])
    last = cycle([signatures(document)[-1:] for document, _ in documents])
    cold, warm = cycle(documents), cycle(documents)
    for document, at in documents:
        authenticate(document, anchor=AWS_NITRO_G1, at=at, cache=cache)

    def proven(turn: Iterator[tuple[bytes, datetime]], cache: ChainCache | None) -> None:
        document, at = next(turn)
        authenticate(document, anchor=AWS_NITRO_G1, at=at, cache=cache)

    name = f"authenticate, AWS's {len(documents)} documents"
    nothing = in_turns(lambda: proven(cold, None), lambda: verify_raw(next(raw)))
    leaves = in_turns(lambda: proven(warm, cache), lambda: verify_raw(next(last)))
    yield held(f"{name}, nothing known", nothing, 5, COLD)
    yield held(f"{name}, known leaves", leaves, 1, WARM)


def against_rust() -> Iterator[Row]:
    what = "authenticate, nothing known, at the document's own time"
    if importlib.util.find_spec(RUST) is None:
        yield Row(what, "not measured", f"{RUST} is not installed: make bench installs it where it has a wheel")
        return
    faketime = shutil.which("faketime")
    if faketime is None:
        yield Row(what, "not measured", f"{RUST} asks the system's clock: apt-get install faketime")
        return
    pairs = []
    for number, (document, at) in enumerate(valid_documents()):
        if its_certificate(document) is None:
            continue
        child = subprocess.run(
            [faketime, "-f", f"@{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}", sys.executable, "-m", __name__, str(number)],
            env=os.environ | {"TZ": "UTC", "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        pairs.append(json.loads(child.stdout))
    ours, theirs = (statistics.mean(side) for side in zip(*pairs, strict=True))
    peer = f"{theirs:.3f} ms ({RUST}, Rust)"
    yield Row(
        f"{what}, {len(pairs)} documents", f"{ours:.3f} ms", peer, f"{ours / theirs:.2f}", "<= 1.0", ours <= theirs
    )


def its_certificate(document: bytes) -> bytes | None:
    """A certificate for the key that the document's ``user_data`` holds, without which the peer takes no document. Who
    signed it the peer does not ask. None for a document that holds no key.
    """
    cose = cbor2.loads(document)
    fields = cbor2.loads((cose.value if isinstance(cose, cbor2.CBORTag) else cose)[2])
    try:
        key = load_der_public_key(fields["user_data"] or b"")
    except ValueError:
        return None
    assert isinstance(key, ec.EllipticCurvePublicKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key).serial_number(1)
    builder = builder.not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2040, 1, 1))
    return builder.sign(forge.private_key("bench"), hashes.SHA384()).public_bytes(Encoding.DER)


def beside_rust(number: int) -> tuple[float, ...]:
    """In the child: our median and the peer's for one document, under the clock as it stands."""
    rust = importlib.import_module(RUST)
    document, _ = valid_documents()[number]
    certificate = its_certificate(document)

    def ours() -> None:
        authenticate(document, anchor=AWS_NITRO_G1, at=datetime.now(UTC))

    def theirs() -> None:
        if rust.attest_enclave(certificate, [], document) is not True:
            raise SystemExit(f"bench: {RUST} refuses document {number}")

    return in_turns(ours, theirs)


if __name__ == "__main__":
    print(json.dumps(beside_rust(int(sys.argv[1]))))
