"""``ask`` and ``chat``: one answer, or many, on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import click

from attestation.errors import StrongroomError
from attestation.policy import AppraisalPolicy
from strongroom.commands import F, err, out, session_options
from strongroom.render import verdict_line, warn_of_labels
from strongroom.session import Session
from vsockrpc.messages import ChatMessage, ChatRequest, Delta, Done


def sampling_options(command: F) -> F:
    for option in (
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Makes a sampled answer repeatable."),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 2),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=512,
            show_default=True,
            help="The longest answer, in tokens.",
        ),
        click.option("--system", metavar="TEXT", help="A system message before the conversation."),
    ):
        command = option(command)
    return command


class Spoken:
    """One answer as it streams to the terminal, with the times that it took on the client's clock."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._asked = time.monotonic()
        self._first: float | None = None
        self.text = ""
        self.done: Done | None = None
        self.seconds_to_first = 0.0
        self.tokens_per_second = 0.0

    async def listen(self, session: Session, request: ChatRequest) -> None:
        async with contextlib.aclosing(session.chat(request)) as answers:
            async for answer in answers:
                match answer:
                    case Delta(text):
                        self._first = self._first or time.monotonic()
                        self.text += text
                        self._write(text)
                    case Done():
                        self._finish(answer)

    def _finish(self, done: Done) -> None:
        ended = time.monotonic()
        self.done = done
        first = self._first or ended
        self.seconds_to_first = first - self._asked
        if ended > first and done.completion_tokens > 1:
            self.tokens_per_second = (done.completion_tokens - 1) / (ended - first)

    def as_json(self) -> dict[str, object]:
        assert self.done is not None
        return {
            "text": self.text,
            "finish_reason": self.done.finish_reason,
            "usage": {"prompt_tokens": self.done.prompt_tokens, "completion_tokens": self.done.completion_tokens},
            "seconds_to_first_token": round(self.seconds_to_first, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sampling options say, and the system message that begins every conversation."""

    system: str | None
    max_tokens: int
    temperature: float
    seed: int | None

    def request(self, *messages: ChatMessage) -> ChatRequest:
        beginning = (ChatMessage("system", self.system),) if self.system else ()
        return ChatRequest(
            (*beginning, *messages), max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed
        )


@click.command()
@click.argument("prompt")
@session_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the answer is whole.")
def ask(
    prompt: str,
    url: str,
    policy: Path,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Ask one question; the answer streams. PROMPT "-" reads it from standard input.

    The enclave is verified before anything of the prompt leaves this process.

    \b
    Example:
      strongroom ask "Why is the sky blue?" --policy policy.toml
      git diff | strongroom ask - --system "Review this change."
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request = Sampling(system, max_tokens, temperature, seed).request(ChatMessage("user", text))
    spoken = Spoken((lambda piece: None) if as_json else write_now)

    async def run() -> None:
        async with Session(url, AppraisalPolicy.load(policy)) as session:
            warn_of_labels(err, await session.verify())
            await spoken.listen(session, request)

    asyncio.run(run())
    if as_json:
        click.echo(json.dumps(spoken.as_json()))
    else:
        click.echo()


@click.command()
@session_options
@sampling_options
def chat(url: str, policy: Path, system: str | None, max_tokens: int, temperature: float, seed: int | None) -> None:
    """Talk with the model; Ctrl-D ends. Ctrl-C stops an answer, and the model behind it.

    \b
    Example:
      strongroom chat --policy policy.toml --system "You are terse."
    """

    async def run() -> None:
        async with Session(url, AppraisalPolicy.load(policy)) as session:
            result = await session.verify()
            out.print(verdict_line(result))
            warn_of_labels(out, result)
            await talk(session, Sampling(system, max_tokens, temperature, seed))

    asyncio.run(run())


async def talk(session: Session, sampling: Sampling) -> None:
    """Turns of a conversation until the end of input. A failed turn is said and forgotten; the conversation goes on."""
    history: tuple[ChatMessage, ...] = ()
    while (line := await _read_line()) is not None:
        if not line.strip():
            continue
        turn = (*history, ChatMessage("user", line))
        spoken = Spoken(write_now)
        answering = asyncio.ensure_future(spoken.listen(session, sampling.request(*turn)))
        async with _interruptible(answering):
            try:
                await answering
            except asyncio.CancelledError:
                if not answering.cancelled():
                    raise
                click.echo("\n(stopped)", err=True)
                continue
            except StrongroomError as error:
                click.echo(f"\nstrongroom: {error}", err=True)
                continue
        click.echo()
        history = (*turn, ChatMessage("assistant", spoken.text))
    click.echo()


async def _read_line() -> str | None:
    """A line from the terminal, None at its end. Ctrl-C here ends the program, as everywhere else."""

    def read() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    return await asyncio.to_thread(read)


@contextlib.asynccontextmanager
async def _interruptible(task: asyncio.Future[None]) -> AsyncIterator[None]:
    """While it is open, Ctrl-C cancels ``task`` instead of the program."""
    loop = asyncio.get_running_loop()
    previous = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, previous)
