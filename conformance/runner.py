"""Asks a verifier, in a process of its own, and says where it differs from what is expected.

The verifier is somebody's command: what it writes is bounded, what it does not write is not waited for, and what it
leaves behind is ended.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conformance.cases import Case
from conformance.protocol import MAX_ANSWER, Answer, ProtocolError

MAX_STARTS = 4
"""How often one run starts the command: once, and anew after a case that it did not survive."""

_PIECE = 65_536


class StartError(Exception):
    """The command cannot be started at all."""


@dataclass(frozen=True, slots=True)
class Silence:
    """There was no answer, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    got: Answer | Silence

    @property
    def agrees(self) -> bool:
        """The verdicts are the same."""
        return isinstance(self.got, Answer) and self.got.verdict is self.case.expected.verdict

    @property
    def code_agrees(self) -> bool | None:
        """The codes are the same; None where one of the two has none, or the verdicts differ already."""
        if not self.agrees or not isinstance(self.got, Answer) or None in (self.got.code, self.case.expected.code):
            return None
        return self.got.code == self.case.expected.code


def run(cases: Iterable[Case], command: Sequence[str], *, deadline: float) -> list[Result]:
    """Every case with what ``command`` says to it; ``deadline`` is in seconds for each answer.

    A verifier that dies, hangs or writes what is no answer loses that case and is started anew for the next, until it
    has been started ``MAX_STARTS`` times: then it is asked no more. Raises StartError.
    """
    results: list[Result] = []
    verifier: _Verifier | None = None
    starts = 0
    try:
        for case in cases:
            if verifier is None and starts == MAX_STARTS:
                results.append(Result(case, Silence(f"not asked: the command failed {MAX_STARTS} times")))
                continue
            if verifier is None:
                verifier, starts = _Verifier(command, deadline), starts + 1
            try:
                results.append(Result(case, verifier.ask(case)))
            except _Silent as silent:
                results.append(Result(case, Silence(str(silent))))
                verifier.end(at_once=True)
                verifier = None
    finally:
        if verifier is not None:
            verifier.end(at_once=False)
    return results


class _Silent(Exception):
    """The verifier gave no answer and is to be ended."""


class _Verifier:
    """One process of the command."""

    def __init__(self, command: Sequence[str], deadline: float) -> None:
        self._deadline = deadline
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise StartError(f"cannot start {command[0]}: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)

    def ask(self, case: Case) -> Answer:
        """Raises _Silent."""
        line = self._exchange(case.question.encode())
        try:
            return Answer.decode(line, case.question.id)
        except ProtocolError as error:
            raise _Silent(f"not an answer: {error}") from None

    def _exchange(self, question: bytes) -> bytes:
        """One line for another. The verifier may write before it has read all, so that neither waits for the other."""
        answer = bytearray()
        until = time.monotonic() + self._deadline
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                ready = selector.select(max(0.0, until - time.monotonic()))
                if not ready:
                    raise _Silent(f"no answer within {self._deadline:g} s")
                for key, _ in ready:
                    if key.fileobj is self._output:
                        answer += self._received(MAX_ANSWER + 1 - len(answer))
                        continue
                    question = question[self._sent(question[:_PIECE]) :]
                    if not question:
                        selector.unregister(self._input)
        if question:
            raise _Silent("an answer before the question was read")
        return bytes(answer)

    def _received(self, most: int) -> bytes:
        if most == 0:
            raise _Silent(f"a line of more than {MAX_ANSWER} bytes")
        received = os.read(self._output.fileno(), most)
        if not received:
            raise self._ended()
        return received

    def _sent(self, piece: bytes) -> int:
        try:
            return os.write(self._input.fileno(), piece)
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> _Silent:
        try:
            return _Silent(f"the command ended with status {self._process.wait(self._deadline)}")
        except subprocess.TimeoutExpired:
            return _Silent("the command has closed its output")

    def end(self, *, at_once: bool) -> None:
        """Closes its input, and waits for it to end of itself unless that shall be ``at_once``."""
        self._input.close()
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._deadline)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: what it has started goes too
        self._process.wait()
        self._output.close()
