"""The engine process at work: what arrives is planned, decoded, sampled and answered, step by step."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from attestation.model_family import ModelFamily
from enclave.config import EngineSettings
from enclave.generation import EngineError, InvalidRequest
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_DELTA_TOKENS,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    Count,
    Counted,
    End,
    Failed,
    Generate,
    Load,
    Pause,
    Piece,
    PipeError,
    Resume,
    ToServer,
    ToWorker,
    read_to_worker,
)
from enclave.worker.answer_format import answer_format
from enclave.worker.kv_cache import KvCache, tokens_of
from enclave.worker.llama import Llama
from enclave.worker.prompt import ChatTemplate, Prompt, Segment, TemplateError
from enclave.worker.reply import Reply
from enclave.worker.sampler import Logits, Sampler
from enclave.worker.scheduler import Admission, Sampled, Scheduler, Step
from enclave.worker.tokenizer import Tokenizer
from enclave.worker.truncation import fitting, without_oldest
from vsockrpc.chat import CompletionRequest, GenerationRequest
from vsockrpc.messages import Delta, Done, MessageReader, ToolCallDelta

_CHUNK = 256 << 10
COALESCE_SECONDS = 0.05
"""Text of one answer goes to the server at most so often, all tokens' that there are by then; its first at once, its
last with its end. Each time wakes the server, the proxy and the client, which take a core from decoding: measured on 2
cores, 1.2 ms a token when each goes alone (``bench.path``). It is the default tick, more often than which no record
leaves anyway.
"""
MESSAGE_SECONDS = 0.01
"""Text of some answer goes to the server so often, about, where many answer: whoever wakes while a step is decoded has
all of its threads wait.
"""
ADMIT_SECONDS = 0.01
"""Between two steps so many of those who arrived are taken in, one at least, as have their prompts rendered and cut
into tokens in this time: nobody in work is held up for longer, and a crowd is read together.
"""
USUAL_SAMPLING_SECONDS = 0.05
"""For the choice of one token. With a grammar that allows as much as it may at once (``json_grammar.MAX_OPEN``) and a
vocabulary of 152,000 tokens a pass takes 0.01 to 0.026 s on average and 0.048 s at most, where an honest schema is
concerned, and 0.1 s where one was made to be slow; without a grammar some 0.00005 s.
"""
MAX_SAMPLING_SECONDS = 5.0
"""For the choice of all tokens of one answer, over what is usual for each, and the making of its grammar: everybody
beside it waits meanwhile.
"""
ALIVE_SECONDS = 5.0
"""The server hears something so often at least while one token after the other is chosen."""


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


@dataclass(slots=True)
class _Request:
    """One that the scheduler has."""

    reply: Reply
    sampler: Sampler
    pieces: Mapping[int, bytes]
    """What tokens stand for that tell the parts of an answer apart."""
    forced: deque[int] = field(default_factory=deque)
    """Tokens that come next, whatever the model would say."""
    held: list[Delta] = field(default_factory=list)
    """What waits for the interval to pass."""
    has_spoken: bool = False
    has_format: bool = False
    sampling: float = 0.0
    """Seconds that its grammar and the choice of its tokens have taken, over the usual ones."""
    last: float = 0.0
    """Those of the token before."""
    failure: EngineError | None = None
    """Why it has no answer."""


class Loop:
    """Receives, plans, decodes, samples, answers; a cancellation is seen before every step."""

    def __init__(
        self,
        pipe: Pipe,
        llama: Llama,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        family: ModelFamily,
        settings: EngineSettings,
        *,
        ends: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ends`` are tokens that end an answer beside those of which llama.cpp knows."""
        self._pipe = pipe
        self._llama = llama
        self._template = template
        self._tokenizer = tokenizer
        self._family = family
        self._settings = settings
        self._ends = ends
        self._scheduler = Scheduler(
            cache=KvCache(slots=settings.parallel, cells=settings.cells, reuses=llama.can_truncate),
            slots=settings.parallel,
            context=settings.context,
            step=settings.batch,
            beside=settings.prefill,
            queue=settings.queue,
            longest_prompt=settings.prompt_tokens or None,
            longest_answer=settings.answer_tokens or None,
        )
        self._arrived: deque[Generate | Count] = deque()
        self._requests: dict[int, _Request] = {}
        self._clock = clock
        self._spoke = clock()
        self._due = 0.0
        """When text goes to the server the next time."""

    def run(self) -> None:
        """Until the server goes. Raises Gone, PipeError and DecodeFailed."""
        while True:
            self._receive()
            begun = self._clock()
            while self._arrived:
                self._admit(self._arrived.popleft())
                if self._clock() - begun >= ADMIT_SECONDS:
                    break
            step = self._scheduler.plan()
            if step is not None:
                self._work(step)

    def _receive(self) -> None:
        wait = self._scheduler.idle and not self._arrived
        while (message := self._pipe.receive(wait=wait)) is not None:
            wait = False
            match message:
                case Generate() | Count():
                    self._arrived.append(message)
                case Cancel(id=number):
                    self._arrived = deque(entry for entry in self._arrived if entry.id != number)
                    if self._scheduler.cancel(number):
                        self._requests.pop(number).sampler.close()
                case Pause(id=number):
                    self._scheduler.pause(number)
                case Resume(id=number):
                    self._scheduler.resume(number)
                case Load():
                    raise PipeError("loaded twice")

    def _admit(self, message: Generate | Count) -> None:
        try:
            prompt, tokens = self._prompt(message.request)
            if isinstance(message, Count):
                self._pipe.send(Counted(message.id, len(tokens)))
            else:
                self._begin(message.id, message.request, prompt, tokens)
        except EngineError as error:
            self._pipe.send(Failed(message.id, error))
        except TemplateError as error:
            refusal = InvalidRequest(error.message, expected=error.expected, got=error.got)
            self._pipe.send(Failed(message.id, refusal))

    def _prompt(self, request: GenerationRequest) -> tuple[Prompt, list[int]]:
        if isinstance(request, CompletionRequest):
            prompt, tokens = self._tokenized(Prompt((Segment(request.prompt, trusted=False),)))
        else:
            render, known = self._template.render, dict[str, list[int]]()
            short, dropped = without_oldest(request, context=self._settings.context)
            prompt, tokens = fitting(short, lambda part: self._tokenized(render(part), known), self._settings)
            prompt = replace(prompt, dropped_messages=prompt.dropped_messages + dropped)
        if not tokens:
            raise InvalidRequest("the prompt is empty", expected="at least 1 token", got=0)
        return prompt, tokens

    def _tokenized(self, prompt: Prompt, known: dict[str, list[int]] | None = None) -> tuple[Prompt, list[int]]:
        """``known``: of texts that may come again."""
        return prompt, self._tokenizer.tokens(prompt.segments, known)

    def _begin(self, number: int, request: GenerationRequest, prompt: Prompt, tokens: list[int]) -> None:
        begun = self._clock()
        form = answer_format(request, self._family, prompt, most_reasoning=self._settings.reasoning_tokens or None)
        pieces = self._pieces_of(form.marks)
        sampler = self._llama.sampler(request, tokens, grammar=form.grammar, marks=pieces.keys(), ends=self._ends)
        has_format = form.grammar is not None
        spent = self._clock() - begun if has_format else 0.0
        admission = Admission(
            number,
            tokens_of(tokens),
            form.reply,
            max_tokens=request.max_tokens,
            namespace=request.cache_secret,
            dropped_messages=prompt.dropped_messages,
        )
        try:
            self._scheduler.admit(admission)
        except BaseException:
            sampler.close()
            raise
        self._requests[number] = _Request(form.reply, sampler, pieces, has_format=has_format, sampling=spent)

    def _pieces_of(self, marks: frozenset[str]) -> dict[int, bytes]:
        """The marks that are tokens: llama.cpp writes nothing for those that are control tokens."""
        tokens = {mark: self._tokenizer.special(mark) for mark in marks}
        return {token[0]: mark.encode() for mark, token in tokens.items() if len(token) == 1}

    def _work(self, step: Step) -> None:
        logits = self._llama.decode(step.edits, step.rows)
        sampled: dict[int, Sampled] = {}
        for number, row in logits.items():
            sampled[number] = self._sample(self._requests[number], row)
            self._stay_alive()
        messages, now = list[ToServer](), self._clock()
        for number, output in self._scheduler.apply(step, sampled):
            request = self._requests[number]
            if request.failure is not None:
                continue
            match output:
                case Delta():
                    request.held.append(output)
                case Done():
                    del self._requests[number]
                    request.sampler.close()
                    messages += [*_pieces(number, request.held), End(number, output)]
        messages += self._due_pieces(now)
        messages += [self._give_up(number) for number in sampled if self._has_failed(number)]
        if not messages and now - self._spoke >= COALESCE_SECONDS:
            messages.append(Alive())  # the server takes a long silence for a death
        if messages:
            self._pipe.send(*messages)
            self._spoke = now

    def _due_pieces(self, now: float) -> Iterator[Piece]:
        """When it is time, of all at once: one wake-up of the server then, and not one for each."""
        is_time = now >= self._due
        if is_time:
            self._due = now + max(COALESCE_SECONDS, MESSAGE_SECONDS * len(self._requests))
        for number, request in self._requests.items():
            if is_time or not request.has_spoken:
                request.has_spoken = request.has_spoken or bool(request.held)
                yield from _pieces(number, request.held)

    def _stay_alive(self) -> None:
        now = self._clock()
        if now - self._spoke >= ALIVE_SECONDS:
            self._pipe.send(Alive())
            self._spoke = now

    def _has_failed(self, number: int) -> bool:
        request = self._requests.get(number)
        return request is not None and request.failure is not None

    def _is_too_slow(self, request: _Request) -> bool:
        """Whoever asks for what takes for ever to choose has no answer, and the others theirs in time. The next token
        is taken to need as long as the last.
        """
        if request.sampling + request.last <= MAX_SAMPLING_SECONDS:
            return False
        what = "of this format take" if request.has_format else "take, by these parameters,"
        limit = f"<= {MAX_SAMPLING_SECONDS:g} s over {USUAL_SAMPLING_SECONDS:g} s for each"
        request.failure = InvalidRequest(f"the tokens {what} too long to choose", expected=limit)
        return True

    def _give_up(self, number: int) -> Failed:
        request = self._requests.pop(number)
        assert request.failure is not None, "it has failed"
        self._scheduler.cancel(number)
        request.sampler.close()
        return Failed(number, request.failure)

    def _sample(self, request: _Request, logits: Logits) -> Sampled:
        llama, reply = self._llama, request.reply
        if not request.forced:
            self._force(request, reply.forced)
        if request.forced:
            return self._forced(request)
        if self._is_too_slow(request):
            return Sampled(0, b"", ends=True)  # nothing of it is sent
        begun = self._clock()
        try:
            token = llama.sample(request.sampler, logits, is_constrained=reply.is_constrained)
        except InvalidRequest as error:
            request.failure = error
            return Sampled(0, b"", ends=True)  # nothing of it is sent
        request.last = max(0.0, self._clock() - begun - USUAL_SAMPLING_SECONDS)
        request.sampling += request.last
        ends = llama.ends(token) or token in self._ends
        if ends and reply.forced_at_end is not None:
            self._force(request, reply.forced_at_end)
            return self._forced(request)
        piece = request.pieces.get(token) or llama.piece(token)
        logprobs = request.sampler.logprobs(logits, token)
        if logprobs is not None:
            own, top = logprobs
            likeliest = [(llama.piece(each), logprob) for each, logprob in top]
            return Sampled(token, piece, ends, (own, likeliest))
        return Sampled(token, piece, ends)

    def _force(self, request: _Request, text: str | None) -> None:
        if text is not None:
            request.forced.extend(self._tokenizer.special(text))

    def _forced(self, request: _Request) -> Sampled:
        token = request.forced.popleft()
        return Sampled(token, request.pieces.get(token) or self._llama.piece(token), ends=False)


def _pieces(request: int, held: list[Delta]) -> list[Piece]:
    """What was held back: each token's text stays by itself, for a client that wants it so."""
    pieces = [Piece(request, part) for delta in held for part in _parts(delta)]
    held.clear()
    return pieces


def _parts(delta: Delta) -> Iterator[Delta]:
    """A token may stand for more text than a message may hold, and so may a whole call; and many tokens may have waited
    for their text to become certain.
    """
    size = MAX_DELTA_CHARACTERS
    calls, logprobs = delta.tool_calls, delta.logprobs
    text = max(len(delta.content), len(delta.reasoning), sum(len(call.arguments) for call in calls))
    if text <= size and len(logprobs) <= MAX_DELTA_TOKENS:
        yield delta
        return
    longest = max(len(delta.content), len(delta.reasoning))
    for start in range(0, longest, size):
        end = start + size
        yield Delta(delta.content[start:end], delta.reasoning[start:end])
    for start in range(0, len(logprobs), MAX_DELTA_TOKENS):
        yield Delta(logprobs=logprobs[start : start + MAX_DELTA_TOKENS])
    for call in calls:
        yield Delta(tool_calls=(replace(call, arguments=call.arguments[:size]),))
        for start in range(size, len(call.arguments), size):
            yield Delta(tool_calls=(ToolCallDelta(call.index, call.arguments[start : start + size]),))
