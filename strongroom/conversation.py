"""``ask`` and ``chat``: one answer, or many, on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import click

from attestation.errors import StrongroomError
from attestation.reference import digest_text
from attestation.verifier import AttestationResult
from strongroom.options import F, err, load_policy, out, session_options
from strongroom.render import printable, verdict_line, warn_of_labels
from strongroom.session import Session
from vsockrpc.chat import CACHE_SECRET_SIZE, MAX_SEED, ChatMessage, ChatRequest
from vsockrpc.messages import Delta, Done

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""What moves a terminal's cursor, sets its title or its clipboard (ECMA-48's C0 and C1): no answer needs it."""


def sampling_options(command: F) -> F:
    for option in (
        click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Makes a sampled answer repeatable."),
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


class Voice:
    """Where an answer is heard: standard output. Reasoning is shown to a person alone, dimmed, with an empty line
    behind it; a file or another program gets the answer and nothing else. Leaving it ends the line, so that what is
    said of an answer that broke off has one of its own.
    """

    def __init__(self) -> None:
        self._reasons = False
        self._spoke = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spoke:
            write_now("\n")

    def say(self, delta: Delta) -> None:
        if delta.reasoning and out.is_terminal:
            self._reasons = self._spoke = True
            out.print(delta.reasoning.translate(_CONTROLS), style="dim", end="", soft_wrap=True)
        if delta.content:
            write_now("\n\n" * self._reasons + delta.content)
            self._reasons, self._spoke = False, True


class Spoken:
    """One answer as it comes, with the times that it took on the client's clock."""

    def __init__(self, say: Callable[[Delta], None] = lambda delta: None) -> None:
        self._say = say
        self._asked = time.monotonic()
        self._first: float | None = None
        self.text = ""
        self.reasoning = ""
        self.done: Done | None = None
        self.seconds_to_first = 0.0
        self.tokens_per_second = 0.0

    async def listen(self, session: Session, request: ChatRequest) -> None:
        async with contextlib.aclosing(session.chat(request)) as answers:
            async for answer in answers:
                match answer:
                    case Delta():
                        self._first = self._first or time.monotonic()
                        self.text += answer.content
                        self.reasoning += answer.reasoning
                        self._say(answer)
                    case Done():
                        self._finish(answer)

    def _finish(self, done: Done) -> None:
        ended = time.monotonic()
        self.done = done
        first = self._first or ended
        self.seconds_to_first = first - self._asked
        written = done.usage.completion_tokens
        if ended > first and written > 1:
            self.tokens_per_second = (written - 1) / (ended - first)

    def as_json(self, result: AttestationResult) -> dict[str, object]:
        """The answer, and what vouched for who gave it."""
        assert self.done is not None
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.done.finish_reason,
            "usage": self.done.usage.as_map(),
            "seconds_to_first_token": round(self.seconds_to_first, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "model": digest_text(result.commitment.model),
            "labels": sorted(result.labels),
        }


def write_now(text: str) -> None:
    """To standard output as it comes. A terminal is spared control characters, whatever the model was made to say."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@contextlib.contextmanager
def open_session(url: str, policy: Path) -> Iterator[tuple[asyncio.Runner, Session]]:
    """A session, and the runner that every use of it goes through: waiting for a person is outside the event loop."""
    with asyncio.Runner() as runner:
        session = Session(url, load_policy(policy), reread=partial(load_policy, policy))
        try:
            yield runner, session
        finally:
            runner.run(session.close())


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sampling options say, and the system message that begins every conversation."""

    system: str | None
    max_tokens: int
    temperature: float
    seed: int | None
    cache_secret: bytes | None = None
    """What the enclave has computed of a turn serves the next one."""

    def request(self, *messages: ChatMessage) -> ChatRequest:
        """Raises MessageError for what no enclave would accept."""
        beginning = (ChatMessage("system", self.system),) if self.system else ()
        request = ChatRequest(
            (*beginning, *messages),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            cache_secret=self.cache_secret,
        )
        return ChatRequest.decode(request.encode())


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
    request = Sampling(system, max_tokens, temperature, seed).request(ChatMessage("user", prompt_text(prompt)))
    with Voice() as voice, open_session(url, policy) as (runner, session):
        spoken = Spoken() if as_json else Spoken(voice.say)
        result = runner.run(session.verify())
        warn_of_labels(err, result)
        runner.run(spoken.listen(session, request))
    if as_json:
        click.echo(json.dumps(spoken.as_json(result)))


def prompt_text(argument: str) -> str:
    """What an argument says, or standard input for ``-``."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise click.BadParameter("standard input is not text in UTF-8") from error


@click.command()
@session_options
@sampling_options
def chat(url: str, policy: Path, system: str | None, max_tokens: int, temperature: float, seed: int | None) -> None:
    """Talk with the model; Ctrl-D ends. Ctrl-C stops an answer, and the model behind it.

    \b
    Example:
      strongroom chat --policy policy.toml --system "You are terse."
    """
    with open_session(url, policy) as (runner, session):
        result = runner.run(session.verify())
        out.print(verdict_line(result))
        warn_of_labels(out, result)
        talk(runner, session, Sampling(system, max_tokens, temperature, seed))


def talk(runner: asyncio.Runner, session: Session, sampling: Sampling) -> None:
    """Turns of a conversation until the end of input. A failed turn is said and forgotten; the conversation goes on.

    Ctrl-C stops an answer, and the model behind it; at the prompt it raises KeyboardInterrupt.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # editing of the line in input(), where Python was built with it
            import readline  # noqa: F401
    sampling = replace(sampling, cache_secret=secrets.token_bytes(CACHE_SECRET_SIZE))
    history: tuple[ChatMessage, ...] = ()
    while (line := _read_line("> " if at_terminal else "")) is not None:
        if not line.strip():
            continue
        turn = (*history, ChatMessage("user", line))
        try:
            with Voice() as voice:
                spoken = Spoken(voice.say)
                runner.run(spoken.listen(session, sampling.request(*turn)))
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
        except StrongroomError as error:
            click.echo(f"strongroom: {printable(str(error))}", err=True)
        else:
            history = (*turn, ChatMessage("assistant", spoken.text))
    click.echo()


def _read_line(prompt: str) -> str | None:
    """A line of input, None at its end."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except UnicodeDecodeError:
            click.echo("strongroom: this is not text in UTF-8", err=True)
