"""The software NSM as a process: it starts, says so, ends with its parent, leaves nothing, and no client can stop
it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import cbor2
import pytest

from attestation.reference import ZERO_PCR, PcrSet
from emulator.nsm import MAX_CONNECTIONS, NsmServer, SoftwareNsm, boot_registers, new_module_id
from emulator.pki import ROOT_CERTIFICATE_FILE, ROOT_FILE, DevelopmentRoot, ensure_development_root
from enclave.nsm import Nsm, open_nsm
from vsockrpc.address import UnixAddress
from vsockrpc.sockets import listen_socket

PCRS = [f"--pcr{index}={index + 1:096x}" for index in range(3)]
PROGRAM = [sys.executable, "-m", "emulator.nsm"]


@dataclass(frozen=True, slots=True)
class Running:
    process: subprocess.Popen[bytes]
    ready: dict[str, str]

    @property
    def address(self) -> str:
        return self.ready["address"]

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self.address.removeprefix("unix:"))
        connection.settimeout(60)
        return connection


@contextmanager
def running(directory: Path, *options: str, listen: str | None = None) -> Iterator[Running]:
    listen = listen or f"unix:{directory / 'nsm.sock'}"
    command = [*PROGRAM, f"--listen={listen}", f"--pki={directory / 'pki'}", *PCRS, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "no line of JSON"
            yield Running(process, json.loads(line))
        finally:
            process.terminate()


def output(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdout.read(), process.stderr.read()


def ask(connection: socket.socket, request: bytes) -> object:
    connection.sendall(len(request).to_bytes(4) + request)
    return answer(connection)


def answer(connection: socket.socket) -> object:
    length = int.from_bytes(connection.recv(4, socket.MSG_WAITALL))
    return cbor2.loads(connection.recv(length, socket.MSG_WAITALL))


RANDOM = cbor2.dumps("GetRandom")


def is_random(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"GetRandom"}


# --- Its life ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_the_signal_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as nsm, nsm.connect() as connection:
        path = tmp_path / "nsm.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert is_random(ask(connection, RANDOM))
        nsm.process.send_signal(number)
        assert nsm.process.wait(60) == 0
        assert output(nsm.process) == (b"", b"")
        assert connection.recv(1) == b""
    assert sorted(os.listdir(tmp_path)) == ["pki"]
    assert sorted(os.listdir(tmp_path / "pki")) == [ROOT_CERTIFICATE_FILE, ROOT_FILE]


def test_says_when_it_is_ready(tmp_path: Path) -> None:
    with running(tmp_path, "--instance-id=i-026ae32a18c80f866") as nsm:
        assert nsm.ready["event"] == "ready"
        assert nsm.ready["module_id"].startswith("i-026ae32a18c80f866-enc")
        assert open_nsm(nsm.address).describe_nsm().module_id == nsm.ready["module_id"]


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed and cannot tidy up; the pipe that both held closes only when the NSM is gone too."""
    script = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    command = [*PROGRAM, f"--listen=unix:{tmp_path / 'nsm.sock'}", f"--pki={tmp_path / 'pki'}", *PCRS]
    with subprocess.Popen([sys.executable, "-c", script, *command], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            assert json.loads(parent.stdout.readline())["event"] == "ready"
        finally:
            parent.kill()
        assert parent.stdout.read() == b""
    assert not (tmp_path / "nsm.sock").exists()


def test_registers_from_the_command_line(tmp_path: Path) -> None:
    with running(tmp_path, f"--pcr8={9:096x}", "--role-arn=arn:aws:iam::1:role/r") as nsm:
        client = open_nsm(nsm.address)
        assert [int.from_bytes(client.describe_pcr(index).data) for index in (0, 1, 2, 8)] == [1, 2, 3, 9]
        assert client.describe_pcr(3).data != ZERO_PCR


def test_debug_enclave(tmp_path: Path) -> None:
    with running(tmp_path, "--debug") as nsm:
        client = open_nsm(nsm.address)
        assert [client.describe_pcr(index).data for index in range(3)] == [ZERO_PCR] * 3
        assert client.describe_pcr(4).data != ZERO_PCR


def test_over_tcp_on_a_port_of_the_systems_choice(tmp_path: Path) -> None:
    with running(tmp_path, listen="tcp:127.0.0.1:0") as nsm:
        assert nsm.address != "tcp:127.0.0.1:0"
        assert len(open_nsm(nsm.address).get_random()) == 256


def test_replaces_a_dead_socket_and_not_a_live_one(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "nsm.sock"))
    with running(tmp_path) as nsm:
        second = subprocess.run(
            [*PROGRAM, f"--listen={nsm.address}", f"--pki={tmp_path / 'pki'}", *PCRS], capture_output=True, check=False
        )
        assert second.returncode == 4
        assert b"someone listens there already" in second.stderr
        assert len(open_nsm(nsm.address).get_random()) == 256


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, check=False)


def test_what_it_cannot_start_with(tmp_path: Path) -> None:
    listen, pki = f"--listen=unix:{tmp_path / 'nsm.sock'}", f"--pki={tmp_path / 'pki'}"
    for arguments, code, says in (
        ([listen, pki, "--pcr0=00", *PCRS[1:]], 2, b"96 hex digits"),
        ([listen, pki, *PCRS[1:]], 2, b"--pcr0"),
        (["--listen=nsm.sock", pki, *PCRS], 2, b"bad_address"),
        ([listen, pki, *PCRS, "--instance-id=i-1"], 4, b"invalid_argument"),
        ([listen, pki, *PCRS, "--region=EU"], 4, b"invalid_argument"),
        ([listen, pki, *PCRS, "--role-arn=r\xf4le"], 2, b"ASCII"),
        ([f"--listen=unix:{tmp_path / 'no' / 'nsm.sock'}", pki, *PCRS], 4, b"No such file"),
        (["--listen=unix:" + "a" * 200, pki, *PCRS], 2, b"too long"),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (code, b"")
        assert says in result.stderr
        assert b"Traceback" not in result.stderr


def test_key_that_others_may_read(tmp_path: Path) -> None:
    ensure_development_root(tmp_path / "pki")
    (tmp_path / "pki" / ROOT_FILE).chmod(0o644)
    result = run(f"--listen=unix:{tmp_path / 'nsm.sock'}", f"--pki={tmp_path / 'pki'}", *PCRS)
    assert result.returncode == 4
    assert b"unsafe_permissions" in result.stderr
    assert b"chmod 600" in result.stderr


# --- Its clients -------------------------------------------------------------------------------------------------


@pytest.fixture
def nsm(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path) as nsm:
        yield nsm
        assert nsm.process.poll() is None, "a client stopped it"
        nsm.process.terminate()
        assert nsm.process.wait(60) == 0
        assert output(nsm.process) == (b"", b"")


def test_many_requests_on_one_connection(nsm: Running) -> None:
    with nsm.connect() as connection:
        assert all(is_random(ask(connection, RANDOM)) for _ in range(50))


def test_requests_in_one_piece_and_byte_by_byte(nsm: Running) -> None:
    message = len(RANDOM).to_bytes(4) + RANDOM
    with nsm.connect() as connection:
        connection.sendall(message * 3)
        assert all(is_random(answer(connection)) for _ in range(3))
        for byte in message:
            connection.sendall(bytes([byte]))
        assert is_random(answer(connection))


def test_length_that_no_request_has(nsm: Running) -> None:
    for length in (0x1001, 0xFFFF_FFFF):
        with nsm.connect() as connection:
            connection.sendall(length.to_bytes(4))
            assert answer(connection) == {"Error": "InputTooLarge"}
            assert connection.recv(1) == b""


def test_empty_and_senseless_requests(nsm: Running) -> None:
    with nsm.connect() as connection:
        for request in (b"", b"\x00", os.urandom(64), b"\x9f" * 4096):
            assert ask(connection, request) == {"Error": "InvalidOperation"}
        assert is_random(ask(connection, RANDOM))


def test_clients_that_stop_in_the_middle_hold_nobody_up(nsm: Running) -> None:
    with ExitStack() as stack:
        for part in (b"", b"\x00", b"\x00\x00\x00\x0a", b"\x00\x00\x00\x0a\x69Get"):
            stack.enter_context(nsm.connect()).sendall(part)
        assert len(open_nsm(nsm.address).get_random()) == 256


def test_client_that_leaves_in_the_middle(nsm: Running) -> None:
    for part in (b"\x00", b"\x00\x00\x00\x0a\x69Get", b"\x00\x00\x00\x0a" + RANDOM):
        with nsm.connect() as connection:
            connection.sendall(part)
    assert len(open_nsm(nsm.address).get_random()) == 256


def test_client_that_never_reads(nsm: Running) -> None:
    with nsm.connect() as connection:
        connection.setblocking(False)
        message = len(RANDOM).to_bytes(4) + RANDOM
        with pytest.raises(BlockingIOError):
            while True:  # until the answers have filled both directions' buffers
                connection.send(message * 64)
        assert len(open_nsm(nsm.address).get_random()) == 256


def test_idle_connections_give_way_to_new_ones(nsm: Running) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(nsm.connect()) for _ in range(3 * MAX_CONNECTIONS)]
        for _ in range(3):
            assert len(open_nsm(nsm.address).get_random()) == 256
        assert idle[0].recv(1) == b""


def test_one_bank_for_all_clients(nsm: Running) -> None:
    first, second = open_nsm(nsm.address), open_nsm(nsm.address)
    value = first.extend_pcr(20, b"data")
    first.lock_pcr(20)
    assert second.describe_pcr(20).data == value
    assert 20 in second.describe_nsm().locked_pcrs


def test_another_program_may_speak_to_it(nsm: Running) -> None:
    """The socket is the interface: a client that is not ours, with the same bytes."""
    assert isinstance(open_nsm(nsm.address), Nsm)
    with nsm.connect() as connection:
        assert ask(connection, cbor2.dumps({"LockPCRs": {"range": 18}})) == "LockPCRs"
        described = ask(connection, cbor2.dumps("DescribeNSM"))
        assert isinstance(described, dict)
        assert described["DescribeNSM"]["locked_pcrs"] == list(range(18))


@pytest.mark.parametrize("part", [b"", b"\x00", b"\x00\x00\x00\x0a\x69Get"])
async def test_client_that_drips_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    monkeypatch.setattr("emulator.nsm.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("emulator.nsm.EXCHANGE_SECONDS", 0.05)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    registers = boot_registers(PcrSet(ZERO_PCR, ZERO_PCR, ZERO_PCR))
    module = SoftwareNsm(DevelopmentRoot.generate(now), registers, module_id=new_module_id(), clock=lambda: now)
    address = UnixAddress(str(tmp_path / "nsm.sock"))
    listener = await listen_socket(address)
    stop = asyncio.Event()
    serving = asyncio.create_task(NsmServer(module).serve(listener, stop))
    reader, writer = await asyncio.open_unix_connection(address.path)
    writer.write(part)
    assert await reader.read() == b""
    writer.close()
    stop.set()
    await serving
    listener.close()
    assert not Path(address.path).exists()
