"""llama.cpp through its low-level C API, and no more of it than decoding needs. Only the engine process imports this.

Its high-level class decodes one sequence at a time, copies every row of logits and holds a prompt cache of its own;
here the rows of a step go in, and the logits of those that want a token come out, where llama.cpp has them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np

from attestation.errors import StrongroomError
from attestation.model_memory import KvType
from enclave.config import EngineSettings
from enclave.worker.kv_cache import Copy, Edit, Truncate
from enclave.worker.sampler import Candidates, Logits, Sampler, not_null
from enclave.worker.scheduler import Row
from enclave.worker.tokenizer import Tokenizer
from vsockrpc.chat import ChatMessage, ChatRequest, Generation

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


_KV_TYPES: Final[Mapping[KvType, int]] = {
    KvType.F16: llama_cpp.GGML_TYPE_F16,
    KvType.Q8_0: llama_cpp.GGML_TYPE_Q8_0,
    KvType.Q4_0: llama_cpp.GGML_TYPE_Q4_0,
}


class Llama:
    """One model and one context of several sequences. Sizes are tokens."""

    def __init__(self, path: str, settings: EngineSettings, *, threads: int, pins: bool = False) -> None:
        """Loads the GGUF file at ``path``, mapped, not copied. With ``pins`` each thread has a CPU of its own, if there
        is one for each; the thread that calls is one of them, and stays so. Raises LlamaRefused.
        """
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(None))
        llama_cpp.llama_backend_init()
        self._settings = settings
        self._model = self._load(path)
        self._vocabulary = not_null(llama_cpp.llama_model_get_vocab(self._model))
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._control_tokens = np.array(list(self._controls()), np.int32)
        self._context = self._make_context(threads)
        self._memory = not_null(llama_cpp.llama_get_memory(self._context))
        self._pool = _ThreadPool(self._context, threads, pins=pins)
        self._batch = _Batch(settings.batch)
        self._candidates = Candidates(self.vocabulary_size)
        self._piece = ctypes.create_string_buffer(_PIECE_SIZE)

    @property
    def can_truncate(self) -> bool:
        """Cells can be freed from any position on. Recurrent models have a state instead of cells."""
        return not (llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model))

    # --- Loading -----------------------------------------------------------------------------------------------------

    def _load(self, path: str) -> Any:
        parameters = llama_cpp.llama_model_default_params()
        _set(
            parameters,
            n_gpu_layers=0,
            load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP,
            vocab_only=False,
            check_tensors=False,
            use_extra_bufts=self._settings.repack,
        )
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not model:
            raise LlamaRefused("model_refused", "llama.cpp refuses the model", expected="a model it can load")
        if not llama_cpp.llama_model_has_decoder(model) or llama_cpp.llama_model_has_encoder(model):
            raise LlamaRefused("model_refused", "the model is no decoder", expected="a model that generates text")
        trained = llama_cpp.llama_model_n_ctx_train(model)
        if self._settings.context > trained:
            raise LlamaRefused(
                "context_exceeded",
                "the configured context is longer than the model's",
                expected=f"<= {trained}",
                got=self._settings.context,
            )
        return model

    def _make_context(self, threads: int) -> Any:
        settings = self._settings
        parameters = llama_cpp.llama_context_default_params()
        _set(
            parameters,
            n_ctx=settings.cells,
            n_batch=settings.batch,
            n_ubatch=settings.batch,
            n_seq_max=settings.parallel,
            n_outputs_max=settings.parallel,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
            if settings.kv_type is KvType.F16
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            type_k=_KV_TYPES[settings.kv_type],
            type_v=_KV_TYPES[settings.kv_type],
            kv_unified=settings.shares_cells,
            embeddings=False,
            offload_kqv=False,
            op_offload=False,
            no_perf=True,
        )
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context or llama_cpp.llama_n_ctx_seq(context) < settings.context:
            got = f"{settings.cells} cells of {settings.kv_type}"
            expected = "fewer, or f16 where heads are no whole blocks of another type"
            raise LlamaRefused("model_refused", "llama.cpp cannot make such a context", expected=expected, got=got)
        return context

    def warm_up(self) -> None:
        """Touches every weight and every buffer once, so that the first request does not pay for it: before that one,
        since it empties the memory. Raises DecodeFailed.
        """
        token = max(0, llama_cpp.llama_vocab_bos(self._vocabulary))
        many = self._settings.batch // self._settings.parallel
        sampler = self.sampler(ChatRequest((ChatMessage("user", ""),), top_k=40, top_p=0.9, min_p=0.05), [token])
        for count in (min(many, 32), 1):
            rows = [Row(slot, slot, 0, [token] * count, samples=True) for slot in range(self._settings.parallel)]
            for logits in self.decode((), rows).values():
                self.sample(sampler, logits, is_constrained=False)
            llama_cpp.llama_memory_clear(self._memory, False)
        sampler.close()

    def metadata(self, key: str) -> str | None:
        """The text under ``key`` in the model's metadata, of at most 64 bytes; None when there is none."""
        value = ctypes.create_string_buffer(65)
        size = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace") if size >= 0 else None

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

    def _controls(self) -> Iterator[int]:
        """Tokens that stand for no text and end nothing."""
        for token in range(self.vocabulary_size):
            kind = llama_cpp.llama_vocab_get_attr(self._vocabulary, token)
            if kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL and not self.ends(token):
                yield token

    def tokenizer(self, template: str) -> Tokenizer:
        """The tokenizer for prompts that ``template`` renders."""
        return Tokenizer(self._vocabulary, template, self.metadata("tokenizer.ggml.pre"))

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

    def decode(self, edits: Sequence[Edit], rows: Sequence[Row]) -> dict[int, Logits]:
        """Changes the memory, then decodes all rows, at most ``batch`` tokens, at once. The logits, by request, of rows
        that want a token; they are there until the next call. Raises DecodeFailed.
        """
        for edit in edits:
            self._edit(edit)
        wanted = self._batch.fill(rows)
        result = llama_cpp.llama_decode(self._context, self._batch.batch)
        if result != 0:
            raise DecodeFailed(result)
        return {request: self._logits(index) for request, index in wanted}

    def _edit(self, edit: Edit) -> None:
        match edit:
            case Truncate(slot, length):  # the cells are marked empty, not overwritten: attention does not reach them
                if not llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1):
                    raise DecodeFailed("the memory cannot be cut there")
            case Copy(source, target):
                llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def _logits(self, index: int) -> Logits:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise DecodeFailed("there are no logits")
        address = ctypes.addressof(pointer.contents)
        return np.frombuffer((ctypes.c_float * self.vocabulary_size).from_address(address), np.float32)

    # --- Sampling ----------------------------------------------------------------------------------------------------

    def sampler(
        self,
        request: Generation,
        prompt: Sequence[int],
        *,
        grammar: str | None = None,
        marks: Set[int] = frozenset(),
        ends: Set[int] = frozenset(),
    ) -> Sampler:
        """``marks`` are the control tokens that the grammar's own text has. ``ends`` are tokens that end an answer:
        those of which llama.cpp does not know are text to its grammar, in which none may come. Raises
        InvalidRequest.
        """
        unspoken = self._control_tokens
        if marks:
            unspoken = unspoken[~np.isin(unspoken, list(marks))]
        unknown = [token for token in ends if not self.ends(token)]
        if unknown:
            unspoken = np.concatenate([unspoken, np.array(unknown, np.int32)])
        return Sampler(self._vocabulary, self.vocabulary_size, request, prompt, grammar=grammar, unspoken=unspoken)

    def sample(self, sampler: Sampler, logits: Logits, *, is_constrained: bool) -> int:
        return sampler.sample(logits, self._candidates, is_constrained=is_constrained)


class _Batch:
    """``llama_batch``, with room for so many tokens, over arrays of ours: a row is written slice by slice."""

    def __init__(self, size: int) -> None:
        self._tokens = (ctypes.c_int32 * size)()
        self._positions = (ctypes.c_int32 * size)()
        self._slots = (ctypes.c_int32 * size)()
        self._counts = (ctypes.c_int32 * size)(*[1] * size)
        self._wants = (ctypes.c_int8 * size)()
        start, width = ctypes.addressof(self._slots), ctypes.sizeof(ctypes.c_int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._each_slot = (pointer * size)(*(ctypes.cast(start + index * width, pointer) for index in range(size)))
        self.batch = llama_cpp.llama_batch()
        _set(
            self.batch,
            token=self._tokens,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._each_slot,
            logits=self._wants,
        )

    def fill(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """The request and the place of each token whose logits are wanted."""
        wanted: list[tuple[int, int]] = []
        at = 0
        for row in rows:
            count = len(row.tokens)
            end = at + count
            self._tokens[at:end] = list(row.tokens)
            self._positions[at:end] = list(range(row.start, row.start + count))
            self._slots[at:end] = [row.slot] * count
            self._wants[at:end] = [0] * count
            if row.samples:
                self._wants[end - 1] = 1
                wanted.append((row.request, end - 1))
            at = end
        self.batch.n_tokens = at
        return wanted


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

    def __init__(self, context: Any, threads: int, *, pins: bool) -> None:
        parameters = self._Parameters()
        _LIBRARY.ggml_threadpool_params_init(ctypes.byref(parameters), ctypes.c_int(threads))
        filled = (parameters.n_threads, parameters.priority, parameters.poll, parameters.strict_cpu, parameters.paused)
        if filled != (threads, 0, _DEFAULT_POLL, False, False):
            raise RuntimeError("struct ggml_threadpool_params is not laid out as expected")
        parameters.poll = POLL
        cpus = sorted(os.sched_getaffinity(0))
        if pins and threads == len(cpus) and cpus[-1] < _MAX_THREADS:
            # Else two stand in one's queue now and then, after others have woken, and within a step one waits for the
            # other.
            for cpu in cpus:
                parameters.cpumask[cpu] = True
            parameters.strict_cpu = True
        _LIBRARY.ggml_threadpool_new.restype = ctypes.c_void_p
        pool = not_null(_LIBRARY.ggml_threadpool_new(ctypes.byref(parameters)))
        _LIBRARY.llama_attach_threadpool.restype = None
        _LIBRARY.llama_attach_threadpool(ctypes.c_void_p(context), ctypes.c_void_p(pool), ctypes.c_void_p(pool))


def _set(parameters: Any, **values: object) -> None:
    """Sets fields that exist: ctypes takes unknown ones in silence, and llama.cpp renames them."""
    known = {field[0] for field in parameters._fields_}
    for name, value in values.items():
        if name not in known:
            raise RuntimeError(f"{type(parameters).__name__} has no field {name}")
        setattr(parameters, name, value)
