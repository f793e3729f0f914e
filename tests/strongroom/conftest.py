"""A house to be a client of, and the front door to it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from strongroom.gateway import PromptCache
from strongroom.session import Session
from tests.gateways import gateway_of
from tests.house import House, house
from tests.terminal import Street, Terminal


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as opened:
        yield opened


@pytest.fixture
async def session(home: House) -> AsyncIterator[Session]:
    async with home.session() as opened:
        yield opened


@pytest.fixture
async def port(session: Session) -> AsyncIterator[int]:
    """A gateway's."""
    async with gateway_of(session, cache=PromptCache()) as port:
        yield port


@pytest.fixture
async def client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(port: int) -> AsyncIterator[httpx2.AsyncClient]:
    """For what no well-behaved client sends."""
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def strongroom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Terminal:
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("STRONGROOM_URL", "STRONGROOM_POLICY", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(monkeypatch, capsys)


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    folder = tmp_path_factory.mktemp("street")
    opened: list[Street] = []
    ready, loops, ending = threading.Event(), list[asyncio.AbstractEventLoop](), asyncio.Event()

    async def live() -> None:
        async with house(folder) as home:
            opened.append(Street(home, str(home.behind.write_policy())))
            loops.append(asyncio.get_running_loop())
            ready.set()
            await ending.wait()

    def main() -> None:
        try:
            asyncio.run(live())
        finally:
            ready.set()

    thread = threading.Thread(target=main)
    thread.start()
    ready.wait()
    yield opened[0]
    loops[0].call_soon_threadsafe(ending.set)
    thread.join()


@pytest.fixture
def nobody() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"
