"""``python -m enclave`` as a process: how it ends, and what it says when its boot halts."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vsockrpc.address import UnixAddress
from vsockrpc.transport import Client, ConnectionLost, Fault, connect

TOML = f"""\
version = 1
[rpc]
listen = "unix:rpc.sock"
[nsm]
address = "unix:nsm.sock"
entropy = "host"
[model]
store = "unix:models.sock"
manifest = "sha384:{"00" * 48}"
"""


async def started(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "enclave", *arguments,
        cwd=folder, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


@asynccontextmanager
async def halted(folder: Path, *more: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """An enclave without an NSM: its boot halts, and it stays."""
    (folder / "enclave.toml").write_text(TOML)
    process = await started(folder, "--config", "enclave.toml", *more)
    try:
        while True:
            assert process.returncode is None, (await process.communicate())[1].decode()
            try:
                async with connect(UnixAddress(str(folder / "rpc.sock"))) as client:
                    yield process, client
                return
            except ConnectionLost:
                await asyncio.sleep(0.02)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("version = 2", "version"),
        (TOML.replace('"host"', '"none"'), "nsm.entropy"),
        (TOML + "[debug]\n", "debug"),
        (TOML.replace("unix:nsm.sock", "http://nsm"), "http://nsm"),
        (TOML.replace("unix:rpc.sock", "unix:no/such/folder/rpc.sock"), "no/such/folder"),
    ],
)
async def test_a_configuration_that_cannot_be_used(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "enclave.toml").write_text(text)
    process = await started(tmp_path, "--config", "enclave.toml")
    out, errors = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert errors.decode().startswith("enclave: ")
    assert named in errors.decode()
    assert "Traceback" not in errors.decode()


@pytest.mark.parametrize("arguments", [["--config", "nothing.toml"], ["--debug"], []])
async def test_a_mistake_of_usage(tmp_path: Path, arguments: list[str]) -> None:
    process = await started(tmp_path, *arguments)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors.decode()


async def test_a_halted_enclave_stays_to_say_why_and_answers_nothing_else(tmp_path: Path) -> None:
    async with halted(tmp_path) as (process, client):
        async with client.call("events", {}) as call:
            received = bytearray()
            async for piece in call:
                received += piece
                if b'"halted"' in received and received.endswith(b"\n"):
                    break
        event = json.loads(received.splitlines()[-1])
        assert (event["phase"], event["code"]) == ("ENTROPY", "nsm_unavailable")
        for method, meta in (("evidence", {"nonce": bytes(32)}), ("sealed", {"key_id": bytes(16)})):
            with pytest.raises(Fault) as caught:
                async with client.call(method, meta) as call:
                    await call.read(1)
            assert caught.value.code == "unavailable"
        assert process.returncode is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_well(tmp_path: Path, number: signal.Signals) -> None:
    async with halted(tmp_path) as (process, client):
        async with client.call("events", {}) as call:
            await call.reply()
            process.send_signal(number)
            await call.read(1 << 20)  # the events end with what there is
        out, errors = await process.communicate()
        assert (process.returncode, out, errors) == (0, b"", b"")
    assert not (tmp_path / "rpc.sock").exists()


async def test_there_is_no_call_that_loads_or_runs_anything(tmp_path: Path) -> None:
    async with halted(tmp_path) as (_, client):
        for method in ("load", "model.file", "model.manifest", "exec", "debug", "attest", "shutdown", "metrics"):
            with pytest.raises(Fault) as caught:
                async with client.call(method, {}) as call:
                    await call.reply()
            assert caught.value.code == "unknown_method"


@pytest.mark.parametrize("content", [None, b""])
async def test_an_image_that_was_cut_off_does_not_begin(tmp_path: Path, content: bytes | None) -> None:
    """The parent chooses the memory, and so how much of an image the kernel could unpack."""
    (tmp_path / "enclave.toml").write_text(TOML)
    last = tmp_path / "~last"
    if content is not None:
        last.write_bytes(content)
    process = await started(tmp_path, "--config", "enclave.toml", "--last-file", str(last))
    _, said = await process.communicate()
    assert (process.returncode, "[image_cut_off]" in said.decode()) == (2, True)
    last.write_bytes(b"whole")
    async with halted(tmp_path, "--last-file", str(last)) as (_, client):
        assert client is not None
