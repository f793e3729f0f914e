"""What a key costs that KMS releases to an enclave, beside what it costs anybody else.

The peer is boto3's own ``decrypt`` at the same emulated KMS, in the same process, over a connection that is kept, with
no ``Recipient``. Between it and a whole release stand three more steps, each with one thing added to the one before, so
that the difference divides by measurement. KMS, NSM and the parent's egress are the real commands in processes of their
own. All kinds take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import ParamSpec, TypeVar
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.secret import Secret
from bench import Row
from bench.kms_at_once import at_full_speed, at_once
from bench.kms_emulator import ANSWERING, MAKING, PLAIN_ANSWER, VERIFYING, read_times
from bench.kms_house import CONTEXT, ENCLAVE, HOST, PLAIN, PLAINTEXT, REGION, KmsHouse, kms_house
from bench.turns import in_turns, since
from emulator.cms import envelop
from enclave.kms.client import KmsClient, _SignedAt
from enclave.kms.cms import open_enveloped, parse, unwrap
from enclave.kms.https import Attempt, KmsPool, _common_validity, trusting
from enclave.kms.service import Kms
from enclave.kms.tunnel import Tunnel, TunnelStream
from vsockrpc.address import TcpAddress, parse_address

LATENCY_MS = 200
RECORD = "for the record"

P = ParamSpec("P")
T = TypeVar("T")


def rows(turns: int = 40) -> list[Row]:
    """``turns`` of each kind; fewer of what takes longer."""
    found = [*opening()]
    with kms_house() as house:
        found += asyncio.run(divided(house, turns))
        found += first_of_a_boot(house, max(3, turns // 4))
        found += asyncio.run(at_full_speed(house, max(3, turns // 8)))
    with kms_house(latency_ms=LATENCY_MS) as house:
        found += asyncio.run(at_once(house, LATENCY_MS, max(3, turns // 4)))
    return found


# --- Opening what KMS answers -----------------------------------------------------------------------------------------


def opening() -> Iterator[Row]:
    """``CiphertextForRecipient`` with a data key in it."""
    key = rsa.generate_private_key(65537, 2048)
    ber = envelop(PLAINTEXT, key.public_key())
    enveloped = parse(ber)
    content_key = unwrap(enveloped, key).expose()
    oaep = OAEP(MGF1(SHA256()), SHA256(), None)

    def raw() -> None:
        key.decrypt(enveloped.encrypted_key, oaep)
        opened = Cipher(AES256(content_key), CBC(enveloped.iv)).decryptor()
        opened.update(enveloped.ciphertext) + opened.finalize()

    ours, parsing, theirs = (1e3 * each for each in in_turns(lambda: open_enveloped(ber, key), lambda: parse(ber), raw))
    yield Row(
        f"opening KMS's CMS, {len(ber)} bytes of BER with a key of 32",
        f"{ours:.0f} µs, of which reading the BER {parsing:.0f} µs",
        f"{theirs:.0f} µs (RSA-2048 OAEP and AES-CBC of the same bytes, cryptography)",
        f"{ours / theirs:.2f}",
        RECORD,
    )


# --- One release, and how its difference divides ----------------------------------------------------------------------

Step = Callable[[], Awaitable[float]]
"""Does its work once, and gives the milliseconds of it."""


async def divided(house: KmsHouse, turns: int, calls: int = 5) -> list[Row]:
    """Steps from boto3's ``decrypt`` to a whole release."""
    within = _Within()
    async with _steps(house, within) as steps:
        measured: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-1, turns):
            for name, step in steps.items():
                taken = median([await step() for _ in range(calls)])
                if turn >= 0:  # the first connects
                    measured[name].append(taken)
    measured = _calm(measured)
    typical = {name: median(taken) for name, taken in measured.items()}
    (plain, *_, release), added = typical, _added(measured)
    found = [
        Row(
            release,
            f"{typical[release]:.2f} ms",
            f"{typical[plain]:.2f} ms ({plain})",
            f"{added(release, plain):+.2f} ms",
            RECORD,
        )
    ]
    details = {
        OUR_CLIENT: within.told(SIGNING),
        WITH_RECIPIENT: _of_the_emulator(house),
        release: within.told(DOCUMENT, OPENING),
    }
    for before, name in itertools.pairwise(typical):
        what = f"... {'the rest: ' + REST if name is release else name}"
        found.append(
            Row(
                what,
                f"{typical[name]:.2f} ms{details.get(name, '')}",
                f"{typical[before]:.2f} ms (the step before)",
                f"{added(name, before):+.2f} ms",
                RECORD,
            )
        )
    return [*found, *await _handshakes(house, turns)]


def _calm(measured: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The half of the turns in which boto3's ``decrypt``, whatever ours did, took the shortest."""
    peer = next(iter(measured.values()))
    turns = sorted(range(len(peer)), key=peer.__getitem__)[: (len(peer) + 1) // 2]
    return {name: [taken[turn] for turn in turns] for name, taken in measured.items()}


def _added(measured: Mapping[str, list[float]]) -> Callable[[str, str], float]:
    """What one kind takes longer than another, turn by turn."""
    return lambda name, to: median(one - other for one, other in zip(measured[name], measured[to], strict=True))


OUR_CLIENT = "our client: a thread, SigV4 and certificates at a given time, strict JSON"
WITH_RECIPIENT = "with Recipient: document verified, CMS made, some KiB more each way"
REST = "the NSM's document, credentials from memory, CMS opened, two changes of thread"
SIGNING, DOCUMENT, OPENING = "signing", "the document", "CMS"


class _Within:
    """The milliseconds that parts of our steps take where they are."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def timed(self, part: str, work: Callable[P, T]) -> Callable[P, T]:
        """``work``, whose calls count as ``part``."""
        taken = self._taken[part] = []

        def run(*arguments: P.args, **options: P.kwargs) -> T:
            begun = time.perf_counter()
            result = work(*arguments, **options)
            taken.append(since(begun))
            return result

        return run

    def told(self, *parts: str) -> str:
        return ", of which " + ", ".join(f"{part} {median(self._taken[part]):.2f}" for part in parts)


@contextlib.asynccontextmanager
async def _steps(house: KmsHouse, within: _Within) -> AsyncIterator[dict[str, Step]]:
    nsm, plain = house.nsm(), house.plain_client()
    watched = house.nsm()
    watched.transport.exchange = within.timed(DOCUMENT, watched.transport.exchange)  # type: ignore[method-assign]
    key = rsa.generate_private_key(65537, 2048)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    loop = asyncio.get_running_loop()
    endpoint = TcpAddress(HOST, 443)

    def straight(seconds: float) -> TunnelStream:
        connected = socket.create_connection(("127.0.0.1", house.port), seconds)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return TunnelStream(connected, loop)

    def through(seconds: float) -> TunnelStream:
        return tunnel.open(HOST, 443, seconds=seconds)

    named: dict[str, object] = house.request()
    tunnel = Tunnel(parse_address(house.egress))
    clients = [
        KmsClient(REGION, endpoint, KmsPool(HOST, 443, (house.authority,), dial, kept=1))
        for dial in (straight, through)
    ]
    kms = await asyncio.to_thread(Kms, house.settings(), watched)

    async def boto3s() -> float:
        begun = time.perf_counter()
        answer = plain.decrypt(**named)
        taken = since(begun)
        assert answer["Plaintext"] == PLAINTEXT
        return taken

    async def asked(client: KmsClient, role: str, extra: dict[str, object], at: datetime) -> float:
        credentials = house.role(role)
        begun = time.perf_counter()
        answer = await asyncio.to_thread(client.call, "decrypt", Attempt(at, credentials, seconds=10), named | extra)
        taken = since(begun)
        assert "CiphertextForRecipient" in answer or answer["Plaintext"] == PLAINTEXT
        return taken

    async def without_recipient() -> float:
        return await asked(clients[0], PLAIN, {}, datetime.now(UTC))

    async def with_recipient(client: KmsClient) -> float:
        document = nsm.attestation(nonce=bytes(32), user_data=bytes(64), public_key=spki)
        recipient = {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document}
        return await asked(client, ENCLAVE, {"Recipient": recipient}, datetime.now(UTC))

    async def release() -> float:
        begun = time.perf_counter()
        released = await kms.decrypt(house.wrapped, key=house.key, context=CONTEXT)
        taken = since(begun)
        assert released == Secret(PLAINTEXT)
        return taken

    opening_cms = mock.patch("enclave.kms.service.open_enveloped", within.timed(OPENING, open_enveloped))
    signing = mock.patch.object(_SignedAt, "add_auth", within.timed(SIGNING, _SignedAt.add_auth))
    try:
        with opening_cms, signing:
            yield {
                "boto3 decrypt, kept connection, no Recipient": boto3s,
                OUR_CLIENT: without_recipient,
                WITH_RECIPIENT: lambda: with_recipient(clients[0]),
                "through the tunnel and the parent's egress": lambda: with_recipient(clients[1]),
                "one release over a kept connection: document, tunnel, TLS, KMS, CMS": release,
            }
    finally:
        await kms.close()
        for client in clients:
            await asyncio.to_thread(client.close)
        await tunnel.close()
        plain.close()


def _of_the_emulator(house: KmsHouse) -> str:
    """What the emulated KMS does more for ``Recipient``, as it took its own times."""
    taken = read_times(Path(house.times))
    answering = taken[ANSWERING] - taken[PLAIN_ANSWER]
    return f", of which KMS {answering:.2f}: verifying {taken[VERIFYING]:.2f}, CMS {taken[MAKING]:.2f}"


async def _handshakes(house: KmsHouse, turns: int) -> list[Row]:
    """A new connection, which a boot needs one of, and each release that finds all others in use."""
    context, standard = trusting((house.authority,)), ssl.create_default_context(cafile=house.root_file)
    tunnel = Tunnel(parse_address(house.egress))
    checks: list[float] = []

    def ours() -> float:
        begun = time.perf_counter()
        stream = tunnel.open(HOST, 443, seconds=10)
        with context.wrap_socket(stream.socket, server_hostname=HOST) as tls:
            connected = time.perf_counter()
            _common_validity(tls)
            checks.append(since(connected))
            taken = since(begun)
        stream.close()
        return taken

    def plain() -> float:
        begun = time.perf_counter()
        with (
            socket.create_connection(("127.0.0.1", house.port)) as tcp,
            standard.wrap_socket(tcp, server_hostname=HOST),
        ):
            return since(begun)

    pairs = [(await asyncio.to_thread(ours), await asyncio.to_thread(plain)) for _ in range(turns)]
    await tunnel.close()
    mine, theirs = (median(side) for side in zip(*pairs, strict=True))
    difference = median(one - other for one, other in pairs)
    return [
        Row(
            "a new connection to KMS: tunnel, TLS, and the chain's time",
            f"{mine:.2f} ms, of which reading the chain's time {median(checks):.2f} ms",
            f"{theirs:.2f} ms (TCP and TLS of Python's ssl, straight)",
            f"{difference:+.2f} ms",
            RECORD,
        )
    ]


# --- The first of a boot ----------------------------------------------------------------------------------------------


def first_of_a_boot(house: KmsHouse, runs: int) -> Iterator[Row]:
    """In a new process each, from after its imports."""
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "boto3": []}
    for _ in range(runs):
        for side, taken in measured.items():
            done = subprocess.run(
                [sys.executable, "-m", "bench.kms", "--first", side],
                input=json.dumps(asdict(house)),
                capture_output=True,
                text=True,
                check=True,
            )
            taken.append(json.loads(done.stdout))
    ours, theirs = ({part: median(run[part] for run in side) for part in side[0]} for side in measured.values())
    yield Row(
        "the first release of a boot: RSA key, client, credentials, connection",
        f"{ours['made'] + ours['first']:.0f} ms: RSA key {ours['key']:.0f}, client {ours['made'] - ours['key']:.0f}, "
        f"first call {ours['first']:.1f} (then {ours['second']:.1f})",
        f"{theirs['made'] + theirs['first']:.0f} ms (boto3: client {theirs['made']:.0f}, first decrypt "
        f"{theirs['first']:.1f}, then {theirs['second']:.1f})",
        f"{ours['made'] + ours['first'] - theirs['made'] - theirs['first']:+.0f} ms",
        RECORD,
    )


async def _first_release(house: KmsHouse) -> dict[str, float]:
    nsm, generate = house.nsm(), rsa.generate_private_key
    keys: list[float] = []

    def generated(exponent: int, size: int) -> rsa.RSAPrivateKey:
        begun = time.perf_counter()
        key = generate(exponent, size)
        keys.append(since(begun))
        return key

    with mock.patch.object(rsa, "generate_private_key", generated):
        begun = time.perf_counter()
        kms = await asyncio.to_thread(Kms, house.settings(), nsm)
        taken = {"made": since(begun), "key": sum(keys)}
    for name in ("first", "second"):
        begun = time.perf_counter()
        await kms.decrypt(house.wrapped, key=house.key, context=CONTEXT)
        taken[name] = since(begun)
    await kms.close()
    return taken


def _first_decrypt(house: KmsHouse) -> dict[str, float]:
    begun = time.perf_counter()
    client = house.plain_client()
    taken = {"made": since(begun)}
    for name in ("first", "second"):
        begun = time.perf_counter()
        client.decrypt(**house.request())
        taken[name] = since(begun)
    client.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kms", description=__doc__)
    parser.add_argument("--turns", type=int, default=40, help="of each kind (default: 40)")
    parser.add_argument("--first", choices=("ours", "boto3"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first is None:
        for row in rows(options.turns):
            print(row)
    else:
        house = KmsHouse(**json.load(sys.stdin))
        taken = asyncio.run(_first_release(house)) if options.first == "ours" else _first_decrypt(house)
        print(json.dumps(taken))


if __name__ == "__main__":
    main()
