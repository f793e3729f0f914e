"""``strongroom logs --enclave``: the events of an enclave that nobody supervises here, asked of it over its RPC."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from attestation.manifest import ModelManifest
from parent.modelstore import ModelStore
from tests.gguf_files import tiny_model
from tests.house import enclave_house
from vsockrpc.address import Address, UnixAddress
from vsockrpc.transport import IncomingCall, serve

STRONGROOM = str(Path(sys.executable).with_name("strongroom"))


async def logs(*options: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        STRONGROOM,
        "logs",
        *map(str, options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def said(*options: object) -> tuple[int | None, str, str]:
    process = await logs(*options)
    out, err = await process.communicate()
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Address:
    """With a path short enough for a socket."""
    return UnixAddress(str(tmp_path_factory.mktemp("l") / "s"))


async def test_an_enclave_tells_its_events(tmp_path: Path) -> None:
    async with enclave_house(tmp_path) as house:
        status, out, err = await said("--enclave", house.address)
        assert (status, err) == (0, "")
        phases = [event["phase"] for event in map(json.loads, out.splitlines()) if event["event"] == "phase"]
        assert phases[-1] == "SERVING"


async def test_whoever_follows_gets_the_new_ones_until_the_enclave_ends_them(tmp_path: Path) -> None:
    async with enclave_house(tmp_path) as house:
        process = await logs("--enclave", house.address, "--follow")
        assert process.stdout is not None
        while json.loads(await process.stdout.readline()).get("phase") != "SERVING":
            pass
        house.enclave.log.close_interval()
        assert json.loads(await process.stdout.readline())["event"] == "totals"
        house.enclave.log.close()
        _, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")


async def test_where_nobody_is_it_says_so(place: Address) -> None:
    status, out, err = await said("--enclave", place)
    assert (status, out) == (4, "")
    assert str(place) in err
    assert "unreachable" in err
    status, out, _ = await said("--enclave", place, "--follow")
    assert (status, out) == (4, "")


async def test_what_is_no_enclave_tells_no_events(place: Address, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_model().encode())
    async with serve(place, ModelStore(ModelManifest.from_gguf(model), model).handlers, on_error=print):
        status, _, err = await said("--enclave", place)
    assert status == 4
    assert f"{place} tells no events" in err
    assert "unknown_method" in err


@pytest.mark.parametrize("line", [b"\x1b[2J\n", b'{"event":"phase","phase":"FAILED"}\n', b"x" * 20_000])
async def test_what_is_no_event_is_not_printed(place: Address, line: bytes) -> None:
    async def events(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b'{"event":"one"}\n' + line)
        await asyncio.Event().wait()

    async with serve(place, {"events": events}, on_error=print):
        status, out, err = await said("--enclave", place, "--follow")
    assert (status, out) == (4, '{"event":"one"}\n')
    assert "bad_event" in err


async def test_an_enclave_that_dies_is_told_from_one_that_has_no_more(place: Address) -> None:
    async def events(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b'{"event":"one"}\n')
        begun.set()
        await asyncio.Event().wait()

    begun = asyncio.Event()
    async with serve(place, {"events": events}, on_error=print) as server:
        process = await logs("--enclave", place, "--follow")
        await begun.wait()
        for peer in list(server._peers):
            peer.link.lose("gone")
        out, err = await process.communicate()
    assert (process.returncode, out) == (4, b'{"event":"one"}\n')
    assert b"connection_lost" in err
    assert b"the enclave with it" in err


async def test_a_name_or_an_address(place: Address) -> None:
    status, _, err = await said("demo", "--enclave", place)
    assert status == 2
    assert "--enclave" in err
    status, _, err = await said("--enclave", "vsock:here:5005")
    assert status == 2
