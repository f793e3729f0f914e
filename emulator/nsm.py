"""The software NSM: the Nitro Secure Module's protocol over a real bank of registers, with documents signed by the
development PKI.

It is held to AWS's module: the same requests, limits, error codes and order of checks, and documents of the same bytes'
shape, which the same verifier accepts under this user's root as anchor. What AWS leaves open is decided strictly:
anything but a request as AWS's own library encodes it is ``InvalidOperation``.

The core is sans-IO and single-threaded: :meth:`SoftwareNsm.handle` takes a request's bytes and returns the response's.
:mod:`emulator.nsm` run as a program serves it on a socket.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import re
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from attestation.errors import StrongroomError
from attestation.reference import (
    DIGEST_SIZE,
    PCR_INSTANCE,
    PCR_ROLE,
    ZERO_PCR,
    PcrSet,
    extend,
    once_extended,
)
from emulator.pki import DevelopmentRoot, IssuedChain, ensure_development_root, issue_chain
from vsockrpc.address import Address, parse_address
from vsockrpc.sockets import Listener, listen_socket

MAX_REQUEST = 0x1000
MAX_RESPONSE = 0x3000
PCRS = 32
PCRS_OF_THE_SYSTEM = 16
"""Registers 0 to 15 are locked at boot."""
RANDOM_SIZE = 256
LEAF_RENEWAL = timedelta(minutes=30)
"""A leaf serves again until this long before its end, as AWS's do."""

DEFAULT_INSTANCE_ID = "i-00000000000000000"

_PROTECTED = cbor2.dumps({1: -35})
"""The COSE header: ES384 (RFC 9053 section 2.1)."""


class _Refused(Exception):
    """Carries an error code of the device to the end of the request."""


def boot_registers(
    image: PcrSet, *, instance_id: str = DEFAULT_INSTANCE_ID, role_arn: str | None = None, debug: bool = False
) -> dict[int, bytes]:
    """What registers 0 to 15 hold when an enclave starts; those that are zero are left out.

    A debug enclave has the image's registers zero, the parent's (3 and 4) still filled, as on Nitro.
    """
    registers = {} if debug else image.as_registers()
    registers[PCR_INSTANCE] = once_extended(instance_id.encode("ascii"))
    if role_arn is not None:
        registers[PCR_ROLE] = once_extended(role_arn.encode("ascii"))
    return registers


def new_module_id(instance_id: str = DEFAULT_INSTANCE_ID) -> str:
    """``<instance id>-enc<16 hex digits>``, a fresh one for every enclave."""
    return f"{instance_id}-enc{secrets.token_hex(8)}"


class SoftwareNsm:
    """The module of one emulated enclave, from its boot on. Not thread-safe: the device serialises requests, and so
    must the caller."""

    def __init__(
        self,
        root: DevelopmentRoot,
        registers: Mapping[int, bytes],
        *,
        module_id: str,
        region: str = "local",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``registers`` as from :func:`boot_registers`. Raises :class:`emulator.pki.PkiError` for a module id or region
        that no certificate can name."""
        if not all(0 <= index < PCRS_OF_THE_SYSTEM and len(value) == DIGEST_SIZE for index, value in registers.items()):
            raise ValueError(f"registers 0..{PCRS_OF_THE_SYSTEM - 1} of {DIGEST_SIZE} bytes each")
        self._pcrs = [registers.get(index, ZERO_PCR) for index in range(PCRS)]
        self._locked = [index < PCRS_OF_THE_SYSTEM for index in range(PCRS)]
        self._root = root
        self._region = region
        self._clock = clock
        self._chain = issue_chain(root, module_id, region, clock())
        self.module_id = module_id

    def handle(self, request: bytes) -> bytes:
        """The response to any bytes whatever; at most :data:`MAX_RESPONSE`."""
        try:
            response = self._answer(request)
        except _Refused as refused:
            response = {"Error": str(refused)}
        except StrongroomError:
            response = {"Error": "InternalError"}  # no chain can be issued: the clock left the root's validity
        return cbor2.dumps(response)

    def _answer(self, request: bytes) -> object:
        if len(request) > MAX_REQUEST:
            raise _Refused("InputTooLarge")
        match _decoded(request):
            case "DescribeNSM":
                return {"DescribeNSM": self._description()}
            case "GetRandom":
                return {"GetRandom": {"random": os.urandom(RANDOM_SIZE)}}
            case {"DescribePCR": {"index": index, **rest}} if not rest:
                index = self._index(index)
                return {"DescribePCR": {"lock": self._locked[index], "data": self._pcrs[index]}}
            case {"ExtendPCR": {"index": index, "data": bytes(data), **rest}} if not rest:
                index = self._writable(index)
                self._pcrs[index] = extend(self._pcrs[index], data)
                return {"ExtendPCR": {"data": self._pcrs[index]}}
            case {"LockPCR": {"index": index, **rest}} if not rest:
                self._locked[self._writable(index)] = True
                return "LockPCR"
            case {"LockPCRs": {"range": count, **rest}} if not rest:
                if _u16(count) > PCRS:
                    raise _Refused("InvalidIndex")
                self._locked[:count] = [True] * count
                return "LockPCRs"
            case {"Attestation": dict(fields)} if fields.keys() <= {"user_data", "nonce", "public_key"}:
                return {"Attestation": {"document": self._document(fields)}}
        raise _Refused("InvalidOperation")

    def _index(self, value: object) -> int:
        index = _u16(value)
        if index >= PCRS:
            raise _Refused("InvalidIndex")
        return index

    def _writable(self, value: object) -> int:
        index = self._index(value)
        if self._locked[index]:
            raise _Refused("ReadOnlyIndex")
        return index

    def _description(self) -> dict[str, object]:
        return {
            "version_major": 1,
            "version_minor": 0,
            "version_patch": 0,
            "module_id": self.module_id,
            "max_pcrs": PCRS,
            "locked_pcrs": [index for index in range(PCRS) if self._locked[index]],
            "digest": "SHA384",
        }

    def _document(self, fields: Mapping[str, object]) -> bytes:
        """A COSE_Sign1 in the bytes' shape of AWS's since 2025-08: untagged, the payload's map of indefinite length,
        null for what is absent."""
        if not all(value is None or isinstance(value, bytes) for value in fields.values()):
            raise _Refused("InvalidOperation")
        now = self._clock()
        chain = self._current_chain(now)
        payload = b"\xbf"
        for key, value in {
            "module_id": self.module_id,
            "digest": "SHA384",
            "timestamp": int(now.timestamp() * 1000),
            "pcrs": {index: self._pcrs[index] for index in range(PCRS) if self._locked[index]},
            "certificate": chain.certificate,
            "cabundle": list(chain.cabundle),
            "public_key": fields.get("public_key"),
            "user_data": fields.get("user_data"),
            "nonce": fields.get("nonce"),
        }.items():
            payload += cbor2.dumps(key) + cbor2.dumps(value)
        payload += b"\xff"
        signed = cbor2.dumps(["Signature1", _PROTECTED, b"", payload])
        r, s = decode_dss_signature(chain.key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return cbor2.dumps([_PROTECTED, {}, payload, r.to_bytes(48) + s.to_bytes(48)])

    def _current_chain(self, now: datetime) -> IssuedChain:
        """The leaf is used again while it is valid for a while; a clock that jumped in either direction gets a new
        one."""
        if not self._chain.not_before <= now <= self._chain.not_after - LEAF_RENEWAL:
            self._chain = issue_chain(self._root, self.module_id, self._region, now)
        return self._chain


def _decoded(request: bytes) -> object:
    stream = BytesIO(request)
    try:
        value: object = cbor2.CBORDecoder(stream, allow_duplicate_keys=False, max_depth=4).decode()
    except cbor2.CBORDecodeError:
        raise _Refused("InvalidOperation") from None
    if stream.tell() != len(request) or (isinstance(value, dict) and len(value) != 1):
        raise _Refused("InvalidOperation")
    return value


def _u16(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFF:  # not isinstance: a bool is an int
        raise _Refused("InvalidOperation")
    return value


# --- The program -------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 64
"""At the cap the oldest connection gives way: clients of the device connect, ask and leave, so an old one is an idle
one."""
IDLE_SECONDS = 60.0
EXCHANGE_SECONDS = 10.0
"""For the rest of a request after its first byte, and for the client to take the response."""

PR_SET_PDEATHSIG = 1


class NsmServer:
    """Serves one module on a stream socket: ``u32 big-endian length || CBOR`` in both directions.

    Requests are answered on the event loop one at a time, as the device's mutex has it. A client that announces too
    much, drips or does not read loses its own connection only.
    """

    def __init__(self, nsm: SoftwareNsm) -> None:
        self._nsm = nsm
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}  # oldest first

    async def serve(self, listener: Listener, stop: asyncio.Event) -> None:
        """Accepts on ``listener``, which the caller closes, until ``stop`` is set."""
        server = await asyncio.start_server(self._connection, sock=listener.sock, limit=MAX_REQUEST)
        try:
            await stop.wait()
        finally:
            server.close()
            tasks = list(self._connections.values())
            for writer in self._connections:
                writer.transport.abort()
            await asyncio.gather(*tasks)
            await server.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.transport.abort()
        task = asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        writer.transport.set_write_buffer_limits(0)  # drain() returns when the kernel has it all
        # What ends a connection is the client's doing: it left, or it was too slow.
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            while await self._exchange(reader, writer):
                pass
        self._connections.pop(writer, None)
        writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when its end cannot be found, so that the connection must go."""
        async with asyncio.timeout(IDLE_SECONDS):
            first = await reader.readexactly(1)
        async with asyncio.timeout(EXCHANGE_SECONDS):
            length = int.from_bytes(first + await reader.readexactly(3))
            fits = length <= MAX_REQUEST
            response = self._nsm.handle(await reader.readexactly(length) if fits else bytes(MAX_REQUEST + 1))
            writer.write(len(response).to_bytes(4) + response)
            await writer.drain()
        return fits


def end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when the thread that started it ends, so that a killed launcher
    leaves nothing running."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(0)  # it died before the kernel was told


async def _run(nsm: SoftwareNsm, address: Address, root: DevelopmentRoot) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = await listen_socket(address)
    ready = {
        "event": "ready",
        "address": str(listener.address),
        "module_id": nsm.module_id,
        "root_sha256": hashlib.sha256(root.certificate_der).hexdigest(),
    }
    try:
        print(json.dumps(ready), flush=True)
        await NsmServer(nsm).serve(listener, stop)
    finally:
        listener.close()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    def pcr(text: str) -> bytes:
        if re.fullmatch(f"[0-9a-fA-F]{{{2 * DIGEST_SIZE}}}", text) is None:
            raise argparse.ArgumentTypeError(f"a PCR has {2 * DIGEST_SIZE} hex digits")
        return bytes.fromhex(text)

    def ascii_text(text: str) -> str:
        if not text.isascii():
            raise argparse.ArgumentTypeError("ASCII only")
        return text

    def address(text: str) -> Address:
        try:
            return parse_address(text)
        except StrongroomError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser = argparse.ArgumentParser(prog="python -m emulator.nsm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--listen", type=address, required=True, metavar="ADDRESS", help="unix:PATH, vsock:CID:PORT or tcp:HOST:PORT"
    )
    parser.add_argument(
        "--pki", type=Path, metavar="DIR", help="folder of the development root (default: this user's; made if missing)"
    )
    for index in range(3):
        parser.add_argument(f"--pcr{index}", type=pcr, required=True, metavar="HEX", help="measurement of the image")
    parser.add_argument(
        "--pcr8", type=pcr, metavar="HEX", help="measurement of the signing certificate (default: zero)"
    )
    parser.add_argument(
        "--instance-id", type=ascii_text, default=DEFAULT_INSTANCE_ID, help="measured into PCR4 (default: %(default)s)"
    )
    parser.add_argument(
        "--role-arn", type=ascii_text, help="IAM role of the parent, measured into PCR3 (default: PCR3 is zero)"
    )
    parser.add_argument("--region", default="local", help="named in the certificates (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="a debug enclave: PCR0, 1, 2 and 8 are zero")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM, SIGINT or the parent's end. Prints one line of JSON when ready. Exit codes: 0, 2 usage, 4
    cannot serve."""
    options = _arguments(argv)
    try:
        end_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the root key is in this process's memory
        root = ensure_development_root(options.pki)
        image = PcrSet(options.pcr0, options.pcr1, options.pcr2, options.pcr8)
        registers = boot_registers(
            image, instance_id=options.instance_id, role_arn=options.role_arn, debug=options.debug
        )
        nsm = SoftwareNsm(root, registers, module_id=new_module_id(options.instance_id), region=options.region)
        asyncio.run(_run(nsm, options.listen, root))
    except StrongroomError as error:
        print(f"emulator.nsm: {error}", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"emulator.nsm: cannot serve at {options.listen}: {error.strerror or error}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
