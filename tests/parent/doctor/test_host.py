"""The machine itself: what is read, run and reached has an end, and is never changed."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from emulator.tls import TlsAuthority
from parent.doctor import host as module
from parent.doctor.host import MAX_TEXT, Host, Unreached
from parent.egress import Allowed

NAME = "kms.us-east-1.amazonaws.com"
AUTHORITY = TlsAuthority.generate(datetime.now(UTC))


@contextmanager
def answering(*lines: bytes, name: str = NAME) -> Iterator[Allowed]:
    """A server of one connection after the other, which gives them all the same answer."""
    context = AUTHORITY.server_context([name], datetime.now(UTC))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as speaking:
                    if speaking.recv(4096):
                        speaking.sendall(b"".join(line + b"\r\n" for line in lines))
                if ended.is_set():
                    return

        ended, port = threading.Event(), listener.getsockname()[1]
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Allowed.parse(f"{NAME}:443=127.0.0.1:{port}")
        finally:
            ended.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


# --- Files and programs -----------------------------------------------------------------------------------------------


def test_files_are_below_the_root_and_read_in_part(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/large").write_bytes(b"x" * (MAX_TEXT + 1))
    (tmp_path / "proc/binary").write_bytes(b"\xff\n")
    there = Host(tmp_path)
    assert there.exists("/proc/large")
    assert len(there.text("/proc/large") or "") == MAX_TEXT
    assert there.text("/proc/binary") == "\ufffd\n"
    assert there.text("/proc/none") is None
    assert there.text("/proc") is None
    assert not there.may_use("/proc/none")
    assert there.may_use("/proc/binary")


def test_room_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    there = Host(tmp_path)
    assert there.free("/a/b/c") > 0


def test_a_program_s_end_is_told(tmp_path: Path) -> None:
    there = Host()
    ran = there.run(sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (ran.status, sorted(ran.output.split())) == (3, ["err", "out"])
    assert there.run(str(tmp_path / "none")).status is None
    assert there.run("a\0b").status is None
    assert len(there.run(sys.executable, "-c", f"print('x' * {2 * MAX_TEXT})").output) == MAX_TEXT


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    ran = Host().run(sys.executable, "-c", "import time; time.sleep(3600)")
    assert (ran.status, ran.output) == (None, "TimeoutExpired")


def test_a_program_is_found_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "nitro-cli"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert Host(environment={"PATH": str(tmp_path)}).program("nitro-cli") == str(program)
    assert Host(environment={"PATH": "/nowhere"}).program("nitro-cli") is None


def test_who_asks() -> None:
    assert Host(environment={"USER": "somebody"}).user() == "somebody"
    assert Host(environment={}).user() == str(os.getuid())


def test_the_kernel_s_clock_can_be_asked() -> None:
    """The layout of its answer is right: a bound on the error of 16 s and more is what the kernel says of no bound."""
    said = Host().clock()
    assert said is not None
    assert 0 <= said.maximum_error < 3600


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(hours=-1), timedelta(hours=2)])
def test_a_place_that_answers_tells_the_time(ahead: timedelta) -> None:
    date = format_datetime(datetime.now(UTC) - ahead, usegmt=True)
    with answering(b"HTTP/1.1 400 Bad Request", b"date:" + date.encode(), b"Connection: close", b"") as place:
        reached = Host().reach(place, AUTHORITY.root_der)
    assert reached.ahead is not None
    assert abs(reached.ahead - ahead.total_seconds()) < 60


@pytest.mark.parametrize(
    "date", [b"X: y", b"Date: soon", b"Date: Tue, 99 Nov 2026 15:00:00 GMT", b"Date: \xff", b"Date:"]
)
def test_a_place_need_not_tell_the_time(date: bytes) -> None:
    with answering(b"HTTP/1.1 200 OK", date, b"") as place:
        assert Host().reach(place, AUTHORITY.root_der).ahead is None


def test_a_place_that_says_nothing_is_reached_all_the_same() -> None:
    with answering() as place:
        assert Host().reach(place, AUTHORITY.root_der).ahead is None


def unreached(place: Allowed, authority: bytes | None = AUTHORITY.root_der, host: Host | None = None) -> Unreached:
    with pytest.raises(Unreached) as caught:
        (host or Host()).reach(place, authority)
    assert caught.value.reason
    return caught.value


def test_nobody_is_believed_without_the_right_certificate() -> None:
    with answering() as place:
        assert unreached(place, None).stage == "tls"
        assert unreached(place, TlsAuthority.generate(datetime.now(UTC)).root_der).stage == "tls"
        assert unreached(place, b"no certificate").stage == "tls"
    with answering(name="kms.us-east-2.amazonaws.com") as place:
        assert unreached(place).stage == "tls"


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert unreached(Allowed.parse(f"{NAME}:443=127.0.0.1:{port}")).stage == "connection"


def test_somebody_listens_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert unreached(Allowed.parse(f"{NAME}:443=127.0.0.1:{port}")).stage == "deadline"


def test_a_name_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name server is the one that the machine's own files name, and nobody answers there."""
    monkeypatch.setattr("parent.names.QUERY_SECONDS", 0.2)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").write_text("127.0.0.1 here.example\n")
    (tmp_path / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    assert unreached(Allowed.parse("kms.example:443"), host=Host(tmp_path)).stage in ("name", "deadline")
