"""llama.cpp through its low-level C API, and no more of it than decoding needs. Only the engine process imports this.

Its high-level class copies every row of logits into numpy and holds a prompt cache of its own; here tokens go in and
one token comes out, sampled in llama.cpp's own chain, so that Python's part of a token is some ten microseconds.
"""

from __future__ import annotations

import ctypes
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import llama_cpp

from attestation.errors import StrongroomError
from enclave.generation import InvalidRequest
from enclave.prompt import Segment
from vsockrpc.messages import ChatMessage, ChatRequest

POLL: Final = 1
"""How long a decoding thread spins for the next step before it sleeps (0..100). 1 is some milliseconds: longer than the
gap between two steps of an answer, and over soon after its last. On a shared machine of 2 cores, medians of 10 answers:
no pool 119.6 tokens/s, 0: 116.3, 1: 120.6, 50 (ggml's default): 125.0; but 50 burns 0.2 s of a core behind each answer.
Within a step ggml's barriers spin whatever this says: with more threads than idle cores, decoding is many times slower.
"""
_MAX_THREADS: Final = 512  # GGML_MAX_N_THREADS
_DEFAULT_POLL: Final = 50
_PIECE_SIZE: Final = 256
_LIBRARY: Final = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libllama.so"))
"""For what llama-cpp-python does not bind, of ggml too: names are looked up in the libraries that llama.cpp itself has
loaded. A wheel has each library under several names, as copies; another copy has tables of its own, which nobody fills,
and with it a pool's threads compute zeros. Opened now: the user that this process becomes may not read these files.
"""


class LlamaRefused(StrongroomError):
    """llama.cpp does not take this model with these settings. Codes: ``model_refused``, ``context_exceeded``."""


class DecodeFailed(Exception):
    """llama_decode returned an error. Nobody vouches for its state now."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp's messages can hold pieces of prompts and of models."""


class Llama:
    """One model, one context, one sequence at a time. Sizes are tokens."""

    def __init__(self, path: str, *, context: int, batch: int, threads: int) -> None:
        """Loads the GGUF file at ``path``, mapped, not copied. Raises LlamaRefused."""
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(None))
        llama_cpp.llama_backend_init()
        self.context = context
        self.batch = min(batch, context)
        self._model = self._load(path)
        self._vocabulary = _there(llama_cpp.llama_model_get_vocab(self._model))
        self._context = self._make_context(threads)
        self._memory = _there(llama_cpp.llama_get_memory(self._context))
        self._pool = _ThreadPool(self._context, threads)
        self._batch = llama_cpp.llama_batch_init(self.batch, 0, 1)
        self._tokens = (ctypes.c_int32 * self.batch).from_address(ctypes.addressof(self._batch.token.contents))
        self._positions = (ctypes.c_int32 * self.batch).from_address(ctypes.addressof(self._batch.pos.contents))
        for index in range(self.batch):
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
            self._batch.logits[index] = 0
        self._piece = ctypes.create_string_buffer(_PIECE_SIZE)

    # --- Loading -----------------------------------------------------------------------------------------------------

    def _load(self, path: str) -> Any:
        parameters = llama_cpp.llama_model_default_params()
        _set(
            parameters, n_gpu_layers=0, load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, vocab_only=False, check_tensors=False
        )
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not model:
            raise LlamaRefused("model_refused", "llama.cpp refuses the model", expected="a model it can load")
        if not llama_cpp.llama_model_has_decoder(model) or llama_cpp.llama_model_has_encoder(model):
            raise LlamaRefused("model_refused", "the model is no decoder", expected="a model that generates text")
        trained = llama_cpp.llama_model_n_ctx_train(model)
        if self.context > trained:
            raise LlamaRefused(
                "context_exceeded",
                "the configured context is longer than the model's",
                expected=f"<= {trained}",
                got=self.context,
            )
        return model

    def _make_context(self, threads: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        _set(
            parameters,
            n_ctx=self.context,
            n_batch=self.batch,
            n_ubatch=self.batch,
            n_seq_max=1,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
            embeddings=False,
            offload_kqv=False,
            op_offload=False,
            no_perf=True,
        )
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context or llama_cpp.llama_n_ctx_seq(context) < self.context:
            raise LlamaRefused("model_refused", "llama.cpp cannot make a context of this size", got=self.context)
        return context

    def warm_up(self) -> None:
        """Touches every weight and every buffer once, so that the first request does not pay for it. Raises
        DecodeFailed.
        """
        token = max(0, llama_cpp.llama_vocab_bos(self._vocabulary))
        sampler = Sampler(ChatRequest((ChatMessage("user", ""),), top_k=40, top_p=0.9, min_p=0.05))
        self.decode([token] * min(self.batch, 8), 0, samples=False)
        self.decode([token], min(self.batch, 8), samples=True)
        self.sample(sampler)
        self.decode([token], 0, samples=True)
        sampler.close()

    # --- Tokens ------------------------------------------------------------------------------------------------------

    @property
    def bos(self) -> str:
        """The text of the beginning-of-sequence token; empty when there is none."""
        return self._text(llama_cpp.llama_vocab_bos(self._vocabulary))

    @property
    def eos(self) -> str:
        return self._text(llama_cpp.llama_vocab_eos(self._vocabulary))

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocabulary, token) or b""
        return text.decode("utf-8", "replace")

    def tokenizer(self, template: str) -> Tokenizer:
        """The tokenizer for prompts that ``template`` renders."""
        return Tokenizer(self._vocabulary, template)

    def piece(self, token: int) -> bytes:
        """What a token stands for in text: nothing for a control token."""
        size = llama_cpp.llama_token_to_piece(self._vocabulary, token, self._piece, len(self._piece), 0, False)
        if size < 0:
            self._piece = ctypes.create_string_buffer(-size)
            return self.piece(token)
        return self._piece.raw[:size]

    def ends(self, token: int) -> bool:
        """It is one of the model's end-of-generation tokens."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    # --- Decoding ----------------------------------------------------------------------------------------------------

    def decode(self, tokens: Sequence[int], start: int, *, samples: bool) -> None:
        """Decodes at most ``batch`` tokens at the positions from ``start``; 0 forgets all that was there. Raises
        DecodeFailed.
        """
        if start == 0:
            # The cells are marked empty, not overwritten: attention reaches only cells that belong to a position.
            llama_cpp.llama_memory_clear(self._memory, False)
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count] = list(tokens)
        self._positions[:count] = list(range(start, start + count))
        self._batch.logits[count - 1] = samples
        result = llama_cpp.llama_decode(self._context, self._batch)
        self._batch.logits[count - 1] = 0
        if result != 0:
            raise DecodeFailed(result)

    def sample(self, sampler: Sampler) -> int:
        """The next token, from the logits of the last decode."""
        return int(llama_cpp.llama_sampler_sample(sampler.chain, self._context, -1))


class Sampler:
    """llama.cpp's chain for one request's parameters, whose bounds are those of ``ChatRequest.decode``."""

    def __init__(self, request: ChatRequest) -> None:
        self.chain = _there(llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params()))
        if request.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if request.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(request.top_k))
        if request.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(request.top_p, 1))
        if request.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(request.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(request.temperature))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        self._add(llama_cpp.llama_sampler_init_dist(seed))

    def _add(self, link: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.chain, _there(link))

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self.chain)


class Tokenizer:
    """Turns a prompt's segments into tokens: the tokens that mean something come from trusted segments alone.

    Those are the control tokens, the ends of generation, and the *user defined* ones to which the template gives a
    meaning. Not asking for special tokens is not enough to keep them out of a person's text: llama.cpp parses user
    defined ones always, some models' role marks are of that type, and merging may arrive at any token's text. So what
    comes out is checked.
    """

    def __init__(self, vocabulary: Any, template: str) -> None:
        self._vocabulary = vocabulary
        self._bos = llama_cpp.llama_vocab_bos(vocabulary) if llama_cpp.llama_vocab_get_add_bos(vocabulary) else None
        meaningful = dict(self._meaningful(template))
        self._meaningful_ids = frozenset(meaningful)
        self.mark_starts = frozenset(text[0] for text in meaningful.values())
        """The characters with which the texts of tokens that mean something begin."""
        self._behind_start = re.compile(
            f"(?<=[{''.join(map(re.escape, sorted(self.mark_starts)))}])" if meaningful else "$a"
        )

    def _meaningful(self, template: str) -> Iterator[tuple[int, str]]:
        """Such tokens with their texts. One of a single character cannot be told from the character."""
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocabulary)):
            kind = llama_cpp.llama_vocab_get_attr(self._vocabulary, token)
            ends = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
            if not ends and not kind & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED):
                continue
            text = (llama_cpp.llama_vocab_get_text(self._vocabulary, token) or b"").decode("utf-8", "replace")
            meant = ends or kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL or text in template or _looks_special(text)
            if meant and len(text) > 1:
                yield token, text

    def tokens(self, segments: Sequence[Segment]) -> list[int]:
        """Raises InvalidRequest for a person's text that cannot be kept apart from the model's special tokens."""
        tokens: list[int] = []
        for segment in segments:
            tokens += self._tokenize(segment.text, special=True) if segment.trusted else self._plain(segment.text)
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def _plain(self, text: str) -> list[int]:
        tokens = self._tokenize(text, special=False)
        if self._meaningful_ids.isdisjoint(tokens):
            return tokens
        # The text holds such a token's text. Cut behind every character that could begin one, no part holds a whole
        # one.
        parts = self._behind_start.split(text)
        tokens = [token for part in parts for token in self._tokenize(part, special=False)]
        if not self._meaningful_ids.isdisjoint(tokens):
            raise InvalidRequest("a message cannot be told apart from the model's special tokens")
        return tokens

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, special)
        if count < 0:
            raise RuntimeError("more tokens than bytes")
        return tokens[:count]


def _looks_special(text: str) -> bool:
    return re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL) is not None


class _ThreadPool:
    """The threads that decode, started once, so that no thread need ever be started behind the seccomp filter.

    Without a pool of ours, llama.cpp starts and joins its threads at every decode (this build has no OpenMP).
    llama-cpp-python does not bind the functions, so they are bound here; the structure's layout is checked against
    the values with which the library itself fills it.
    """

    class _Parameters(ctypes.Structure):
        _fields_ = (  # struct ggml_threadpool_params
            ("cpumask", ctypes.c_bool * _MAX_THREADS),
            ("n_threads", ctypes.c_int),
            ("priority", ctypes.c_int),
            ("poll", ctypes.c_uint32),
            ("strict_cpu", ctypes.c_bool),
            ("paused", ctypes.c_bool),
        )

    def __init__(self, context: Any, threads: int) -> None:
        parameters = self._Parameters()
        _LIBRARY.ggml_threadpool_params_init(ctypes.byref(parameters), ctypes.c_int(threads))
        filled = (parameters.n_threads, parameters.priority, parameters.poll, parameters.strict_cpu, parameters.paused)
        if filled != (threads, 0, _DEFAULT_POLL, False, False):
            raise RuntimeError("struct ggml_threadpool_params is not laid out as expected")
        parameters.poll = POLL
        _LIBRARY.ggml_threadpool_new.restype = ctypes.c_void_p
        pool = _there(_LIBRARY.ggml_threadpool_new(ctypes.byref(parameters)))
        _LIBRARY.llama_attach_threadpool.restype = None
        _LIBRARY.llama_attach_threadpool(ctypes.c_void_p(context), ctypes.c_void_p(pool), ctypes.c_void_p(pool))


def _set(parameters: Any, **values: object) -> None:
    """Sets fields that exist: ctypes takes unknown ones in silence, and llama.cpp renames them."""
    known = {field[0] for field in parameters._fields_}
    for name, value in values.items():
        if name not in known:
            raise RuntimeError(f"{type(parameters).__name__} has no field {name}")
        setattr(parameters, name, value)


def _there(pointer: Any) -> Any:
    if not pointer:
        raise MemoryError("llama.cpp returned no object")
    return pointer
