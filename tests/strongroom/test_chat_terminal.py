"""``strongroom chat`` at a terminal: a pseudo-terminal, and the keys as a person presses them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import sys
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.house import House
from vsockrpc.chat import ChatRequest
from vsockrpc.messages import Delta, Done, Usage

CTRL_C, CTRL_D = b"\x03", b"\x04"
LONG = "a long answer of many small pieces"


@dataclass
class Keyboard:
    """The other side of a terminal: what is typed, and what is on the screen."""

    master: int
    process: asyncio.subprocess.Process
    screen: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def look(self) -> None:
        try:
            piece = os.read(self.master, 1 << 16)
        except OSError:  # the last who had the terminal open has gone
            piece = b""
        if not piece:
            asyncio.get_running_loop().remove_reader(self.master)
        self.screen += piece.decode("utf-8", "replace")
        self._changed.set()

    async def sees(self, text: str, count: int = 1) -> None:
        """Waits until ``text`` is on the screen so many times."""
        while self.screen.count(text) < count:
            self._changed.clear()
            assert self.process.returncode is None, self.screen
            await self._changed.wait()

    async def rests(self) -> None:
        """Waits until the program waits. A person is not so fast as to press a key between prompt and read, where
        Python's ``readline`` would miss a signal.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    async def ends(self) -> int:
        return await self.process.wait()


@contextlib.asynccontextmanager
async def chatting(home: House, *arguments: str, term: str = "dumb") -> AsyncIterator[Keyboard]:
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    policy = home.behind.write_policy()
    command = [sys.executable, "-m", "strongroom.cli", "chat", "--url", home.url, "--policy", str(policy), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=take_terminal,
        env={**os.environ, "TERM": term, "INPUTRC": "/dev/null", "COLUMNS": "100"},
    )
    os.close(slave)
    keyboard = Keyboard(master, process)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, keyboard.look)
    try:
        yield keyboard
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(master)
        os.close(master)


@pytest.fixture
async def keyboard(home: House) -> AsyncIterator[Keyboard]:
    async with chatting(home) as keyboard:
        await keyboard.sees("> ")
        yield keyboard


def last_asked(home: House) -> ChatRequest:
    request = home.engine.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


async def test_a_conversation(home: House, keyboard: Keyboard) -> None:
    assert "EMULATED" in keyboard.screen
    keyboard.press(b"good morning\n")
    await keyboard.sees("good morning", 2)
    await keyboard.sees("> ", 2)
    keyboard.press(b"good night\n")
    await keyboard.sees("good night", 2)
    await keyboard.sees("> ", 3)
    keyboard.press(CTRL_D)
    assert await keyboard.ends() == 0
    assert [(message.role, message.content) for message in last_asked(home).messages] == [
        ("user", "good morning"),
        ("assistant", "good morning"),
        ("user", "good night"),
    ]
    first, second = (request.cache_secret for request in home.engine.requests)
    assert first == second is not None  # what was computed of a turn serves the next one


async def test_reasoning_is_shown_apart_and_is_no_part_of_the_conversation(home: House) -> None:
    home.engine.script = [
        Delta(reasoning="let me\x1b[2J "),
        Delta(reasoning="see"),
        Delta("so it is"),
        Done("stop", Usage(5, 5)),
    ]
    async with chatting(home, term="xterm") as keyboard:
        await keyboard.sees("> ")
        keyboard.press(b"well?\n")
        await keyboard.sees("so it is")
        await keyboard.sees("> ", 2)
        dimmed = "\x1b[2mlet me[2J \x1b[0m\x1b[2msee\x1b[0m\r\n\r\nso it is\r\n"
        assert dimmed in keyboard.screen
        keyboard.press(b"and?\n")
        await keyboard.sees("so it is", 2)
    assert [message.content for message in last_asked(home).messages] == ["well?", "so it is", "and?"]


async def test_each_conversation_has_a_cache_of_its_own(home: House) -> None:
    for _ in range(2):
        async with chatting(home) as keyboard:
            await keyboard.sees("> ")
            keyboard.press(b"good morning\n")
            await keyboard.sees("good morning", 2)
    one, other = (request.cache_secret for request in home.engine.requests)
    assert one != other


async def test_ctrl_d_ends(keyboard: Keyboard) -> None:
    keyboard.press(CTRL_D)
    assert await keyboard.ends() == 0


async def test_ctrl_c_at_the_prompt_ends_at_once(keyboard: Keyboard) -> None:
    await keyboard.rests()
    keyboard.press(CTRL_C)
    assert await keyboard.ends() == 130
    assert "Traceback" not in keyboard.screen


async def test_ctrl_c_with_half_a_line_typed_ends_at_once(home: House, keyboard: Keyboard) -> None:
    keyboard.press(b"half a li")
    await keyboard.sees("half a li")
    await keyboard.rests()
    keyboard.press(CTRL_C)
    assert await keyboard.ends() == 130
    assert home.engine.requests == []


async def test_ctrl_c_stops_the_answer_and_the_model_behind_it_and_nothing_else(
    home: House, keyboard: Keyboard
) -> None:
    held = home.engine.hold_after(4)
    keyboard.press(f"{LONG}\n".encode())
    await held.wait()
    keyboard.press(CTRL_C)
    await keyboard.sees("(stopped)")
    await home.engine.idle.wait()
    home.engine.go_on()
    await keyboard.sees("> ", 2)
    keyboard.press(b"short\n")
    await keyboard.sees("short", 2)
    await keyboard.sees("> ", 3)
    keyboard.press(CTRL_D)
    assert await keyboard.ends() == 0
    assert [message.content for message in last_asked(home).messages] == ["short"]  # the stopped turn is gone
    assert "Traceback" not in keyboard.screen


async def test_ctrl_c_after_a_stopped_answer_ends_at_the_prompt(home: House, keyboard: Keyboard) -> None:
    held = home.engine.hold_after(0)
    keyboard.press(b"hello\n")
    await held.wait()
    keyboard.press(CTRL_C)
    await keyboard.sees("(stopped)")
    await keyboard.sees("> ", 2)
    await keyboard.rests()
    keyboard.press(CTRL_C)
    assert await keyboard.ends() == 130


async def test_a_failed_turn_is_said_and_the_conversation_goes_on(home: House, keyboard: Keyboard) -> None:
    await home.behind.stop()
    keyboard.press(b"hello\n")
    await keyboard.sees("[unavailable]")
    await keyboard.sees("> ", 2)
    await home.behind.start()
    keyboard.press(b"again\n")
    await keyboard.sees("again", 2)
    await keyboard.sees("> ", 3)
    keyboard.press(CTRL_D)
    assert await keyboard.ends() == 0


async def test_an_answer_cannot_drive_the_terminal(home: House, keyboard: Keyboard) -> None:
    home.engine.say = "before \x1b]0;owned\x07\x1b[2J after"
    keyboard.press(b"hello\n")
    await keyboard.sees("before ]0;owned[2J after")
    assert "\x1b" not in keyboard.screen


async def test_ctrl_c_while_the_enclave_is_verified_ends_at_once(home: House) -> None:
    asked, never = asyncio.Event(), asyncio.Event()

    async def silent(*_: object) -> None:
        asked.set()
        await never.wait()

    home.hostile.application = silent
    async with chatting(home) as keyboard:
        await asked.wait()
        keyboard.press(CTRL_C)
        assert await keyboard.ends() == 130
        assert "Traceback" not in keyboard.screen
    never.set()
