"""The engine process: ``python -I -m enclave.worker PIPE WEIGHTS``, started by :class:`enclave.engine.LlamaEngine`
with two inherited descriptors.

It holds no key, has no NSM, and gives up whatever it can before the first byte of a prompt comes: see :func:`main`
for the order. Everything that can still be imported later fails, so all of it is imported here. Its standard streams
lead nowhere.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything can be imported that nobody measured
    from enclave.imports import only_measured

    only_measured()

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from attestation.errors import StrongroomError
from enclave import confine
from enclave.generation import EngineError, Finished, InvalidRequest, TextDelta
from enclave.llama import Llama, Sampler, Tokenizer
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    End,
    Failed,
    Generate,
    Load,
    PipeError,
    Ready,
    Refused,
    Text,
    ToServer,
    ToWorker,
    read_to_worker,
)
from enclave.prompt import ChatTemplate, TemplateError
from enclave.scheduler import PromptRead, Sampled, Scheduler, Step
from vsockrpc.messages import MessageReader

_CHUNK = 256 << 10
NICENESS = 5
"""Decoding keeps every core busy: whoever carries what it has decoded goes first. Without, each of the three wake-ups
to the client waits for a slice of a decoding thread, 2 ms each (``bench.path``).
"""
COALESCE_SECONDS = 0.03
"""Text of one answer goes to the server at most so often; its first token at once, its last with its end. Each message
wakes the server, the proxy and the client, which take a core from decoding: measured on 2 cores, 1.2 ms a token when
each goes alone (``bench.path``).
"""


class Gone(Exception):
    """The server closed the pipe."""


class Pipe:
    """This process's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = MessageReader(MAX_TO_WORKER)
        self._arrived: deque[ToWorker] = deque()

    def receive(self, *, wait: bool) -> ToWorker | None:
        """The next message; None when there is none and ``wait`` is false. Raises Gone and PipeError."""
        while not self._arrived:
            try:
                data = self._connection.recv(_CHUNK, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionError as error:
                raise Gone from error
            if not data:
                raise Gone
            self._arrived.extend(read_to_worker(self._reader, data))
        return self._arrived.popleft()

    def send(self, *messages: ToServer) -> None:
        """Raises Gone."""
        try:
            self._connection.sendall(b"".join(message.encode() for message in messages))
        except ConnectionError as error:
            raise Gone from error


class Loop:
    """Receives, plans, decodes, answers; a cancellation is seen before every step."""

    def __init__(
        self,
        pipe: Pipe,
        llama: Llama,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        queue: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipe = pipe
        self._llama = llama
        self._template = template
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(context=llama.context, chunk=llama.batch, queue=queue)
        self._arrived: deque[Generate] = deque()
        self._samplers: dict[int, Sampler] = {}
        self._clock = clock
        self._held: dict[int, str] = {}
        """Text that waits for its request's interval to pass."""
        self._due: dict[int, float] = {}
        self._spoke = clock()

    def run(self) -> None:
        """Until the server goes. Raises Gone, PipeError and DecodeFailed."""
        while True:
            self._receive()
            if self._arrived:  # one between two steps, so that those who arrive do not hold up the one in work
                self._admit(self._arrived.popleft())
            step = self._scheduler.plan()
            if step is not None:
                self._work(step)

    def _receive(self) -> None:
        wait = self._scheduler.idle and not self._arrived
        while (message := self._pipe.receive(wait=wait)) is not None:
            wait = False
            match message:
                case Generate():
                    self._arrived.append(message)
                case Cancel(id=number):
                    self._arrived = deque(entry for entry in self._arrived if entry.id != number)
                    if self._scheduler.cancel(number):
                        self._samplers.pop(number).close()
                        self._held.pop(number, None)
                        self._due.pop(number, None)
                case Load():
                    raise PipeError("loaded twice")

    def _admit(self, message: Generate) -> None:
        request = message.request
        try:
            conversation = [(entry.role, entry.content) for entry in request.messages]
            tokens = self._tokenizer.tokens(self._template.render(conversation))
            if not tokens:
                raise InvalidRequest("the prompt is empty", expected="at least 1 token", got=0)
            self._scheduler.admit(message.id, tokens, max_tokens=request.max_tokens, stop=request.stop)
        except EngineError as error:
            self._pipe.send(Failed(message.id, error))
        except TemplateError as error:
            refusal = InvalidRequest(error.message, expected=error.expected, got=error.got)
            self._pipe.send(Failed(message.id, refusal))
        else:
            self._samplers[message.id] = Sampler(request)

    def _work(self, step: Step) -> None:
        self._llama.decode(step.tokens, step.start, samples=step.samples)
        sampled = None
        if step.samples:
            token = self._llama.sample(self._samplers[step.request])
            sampled = Sampled(token, self._llama.piece(token), self._llama.ends(token))
        number, messages, now = step.request, list[ToServer](), self._clock()
        for output in self._scheduler.apply(step, sampled):
            match output:
                case TextDelta(text):
                    self._held[number] = self._held.get(number, "") + text
                    if now >= self._due.get(number, now):
                        messages += self._release(number, now)
                case Finished():
                    self._samplers.pop(number).close()
                    messages += [*self._release(number, now), End(number, output)]
                    self._due.pop(number, None)
                case PromptRead():
                    messages.append(Alive())
        if not messages and now - self._spoke >= COALESCE_SECONDS:
            messages.append(Alive())  # the server takes a long silence for a death
        if messages:
            self._pipe.send(*messages)
            self._spoke = now

    def _release(self, number: int, now: float) -> list[ToServer]:
        """The text that was held back for a request; the next may go after the interval."""
        self._due[number] = now + COALESCE_SECONDS
        return _texts(number, self._held.pop(number, ""))


def _texts(request: int, text: str) -> list[ToServer]:
    """Usually one message. A token may stand for more text than one may hold."""
    size = MAX_DELTA_CHARACTERS
    return [Text(request, text[start : start + size]) for start in range(0, len(text), size)]


def main(arguments: list[str]) -> int:
    """Exit status: 0 when the server went, 1 when it refused the model or broke down."""
    pipe_fd, weights_fd = map(int, arguments)
    pipe = Pipe(socket.socket(fileno=pipe_fd))
    try:
        load = pipe.receive(wait=True)
        if not isinstance(load, Load):
            return 1
        # 1. Rights go first; the weights are opened once more through /proc, which a process that changed its user
        # may do only while dumpable.
        os.nice(NICENESS)
        confine.close_all_but({pipe_fd, weights_fd})
        confine.forbid_core_dumps()
        own_user = confine.become(load.uid)
        confine.drop_capabilities()
        confine.die_with(load.parent)
        confine.forbid_new_privileges()
        confine.set_dumpable(True)
        llama = Llama(f"/proc/self/fd/{weights_fd}", context=load.context, batch=load.batch, threads=load.threads)
        confine.set_dumpable(False)
        os.close(weights_fd)
        tokenizer = llama.tokenizer(load.template)
        template = ChatTemplate(load.template, bos=llama.bos, eos=llama.eos, mark_starts=tokenizer.mark_starts)
        loop = Loop(pipe, llama, template, tokenizer, load.queue)
        # 2. Whatever is made on first use is used once. A template may refuse a conversation; it may not fail on the
        # simplest.
        llama.warm_up()
        with suppress(InvalidRequest):
            template.render([("user", "")])
        # 3. Nothing new from here on, then the filter.
        confine.forbid_new_resources()
        seccomp = confine.allow_decoding_only()
        pipe.send(Ready(own_user, seccomp))
        loop.run()
    except Gone:
        return 0
    except StrongroomError as error:
        pipe.send(Refused(error.code, error.message, error.expected, error.got))
        return 1
    raise AssertionError("the loop ends by an exception")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
