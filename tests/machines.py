"""Stand-ins for QEMU and its vsock device: real processes and real sockets, and no machine in between.

The device forwards as vhost-device-vsock does: a connection to the guest goes to the socket ``guest_PORT`` in the
instance's folder, where a test serves. The file ``behaviour`` there tells the machine what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from parent.launch.vsock_device import VSOCK
from parent.registry import Instance

_DEVICE = """
import os, socket, sys, threading
options = dict(each.split("=") for each in sys.argv[sys.argv.index("--vm") + 1].split(","))
if os.path.exists("no-device"):
    sys.exit(open("no-device").read())

def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    for each in source, sink:
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

def carry(host):
    line = b""
    while not line.endswith(b"\\n"):
        line += host.recv(1)
    guest = socket.socket(socket.AF_UNIX)
    try:
        guest.connect("guest_" + line.split()[1].decode())
    except OSError:
        host.close()
        return
    host.sendall(b"OK 1073741824\\n")
    for pair in (host, guest), (guest, host):
        threading.Thread(target=copy, args=pair, daemon=True).start()

hosts = socket.socket(socket.AF_UNIX)
hosts.bind(options["uds-path"])
hosts.listen()
machine = socket.socket(socket.AF_UNIX)
machine.bind(options["socket"])
if not os.path.exists("deaf-device"):
    machine.listen()
while True:
    carry(hosts.accept()[0])
"""

_QEMU = """
import json, os, socket, sys, time
json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ)}, open("qemu.json", "w"))
behaviour = open("behaviour").read() if os.path.exists("behaviour") else "serve"
machine = socket.socket(socket.AF_UNIX)
machine.connect(sys.argv[sys.argv.index("-chardev") + 1].split("path=")[1])
if behaviour == "refuse":
    sys.exit("qemu: the image has no kernel")
if behaviour == "panic":
    print("Kernel panic\\x1b[31m - not syncing", flush=True)
    sys.exit(0)
if behaviour == "talk":
    while True:
        sys.stdout.write("x" * 100_000)
if behaviour != "mute":
    heart = socket.socket(socket.AF_UNIX)
    heart.connect("vsock_9000")
    heart.sendall(b"\\xb7")
    assert heart.recv(1) == b"\\xb7"
print("booted", flush=True)
if behaviour.startswith("say "):
    print(behaviour.removeprefix("say "), end="\\r\\n", flush=True)
    sys.exit(0)
time.sleep(600)
"""


def stand_in_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the launcher take the stand-ins."""
    for variable, program, text in (
        ("STRONGROOM_QEMU", "qemu-system-x86_64", _QEMU),
        ("STRONGROOM_VSOCK_DEVICE", "vhost-device-vsock", _DEVICE),
    ):
        path = folder / program / "bin" / program
        path.parent.mkdir(parents=True)
        path.write_text(f"#!{sys.executable} -IS\n{text}")
        path.chmod(0o755)
        monkeypatch.setenv(variable, str(folder / program))


Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def device_in_this_process(instance: Instance, guest: Guest, *, answer: bytes = b"OK 7\n") -> AsyncIterator[None]:
    """A device whose guest listens at port 5005 only. What the guest says at once comes with the device's answer."""
    serving: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readline() == b"CONNECT 5005\n":
                writer.write(answer)
                await guest(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(carry(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_unix_server(accepted, instance.directory / VSOCK)
    try:
        yield
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def processes_of(instance: Instance) -> Iterator[int]:
    """Those that work in the instance's folder."""
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(each / "cwd") == str(instance.directory):
                yield int(each.name)


def until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
