"""How much memory llama.cpp takes for a model: arithmetic over what the model's file says of itself.

It is done before there is any memory to take: by whoever chooses a machine, and by the enclave, which refuses at boot
what cannot fit. Every part of the account has its rule beside it. Rules are llama.cpp's own (0.3.36 of
llama-cpp-python, CPU only, x86_64 with AVX2, flash attention); tests hold them against its log and against resident
memory. Weights, repacked weights and key-value cache are exact, the others are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from attestation.errors import StrongroomError
from attestation.gguf import TENSOR_TYPES, GgufArray, GgufHeader, GgufTensor

MIB: Final = 1 << 20

# What [engine] in an enclave.toml takes, wherever it is said.
MIN_CONTEXT: Final = 64
MAX_CONTEXT: Final = 1 << 20
MAX_PARALLEL: Final = 64
"""llama.cpp's bound is 256 (LLAMA_MAX_SEQ)."""
MIN_BATCH: Final = 16
MAX_BATCH: Final = 4096

CELL_STEP: Final = 256
"""llama.cpp rounds the cells of a sequence, or those that sequences share, up to it (``GGML_PAD`` in
llama-context.cpp)."""
SERVER: Final = 160 * MIB
"""The server's process: 28 MiB measured at rest and 55 at its peak, a full queue of requests of the largest size (64
times 1 MiB), and answers that nobody reads: 16 MiB of whole ones, and 0.25 MiB of each that is not."""
ENGINE: Final = 64 * MIB
"""The engine's process without the model: 55 MiB resident measured, 24 of them mapped of the image; and what decoding
threads work in. The rest, half of it, is a prompt's while it becomes tokens."""
PROMPT_BYTES_PER_TOKEN: Final = 32
"""Of a context: the most of a prompt that is read. Natural language has about 4."""
MAX_PROMPT_SIZE: Final = 4 * MIB
"""Bytes of a prompt, whatever the context."""
PROMPT_BYTE: Final = 144
"""Bytes for a byte of a prompt while it becomes tokens: 130 measured where each byte is a word of its own, 25 to 45 of
ordinary text. Most of it are llama.cpp's words and symbols."""
VOCABULARY_ENTRY: Final = 192
"""Bytes of a token or a merge in llama.cpp's tables: 133 to 177 measured on five vocabularies."""
CANDIDATE: Final = 48
"""Bytes of a token while the next one is chosen: 12 in llama.cpp's array of candidates, and what numpy takes for a
moment."""
HELD_TOKEN: Final = 64
"""Bytes of a token that stands in a cell, in the books of what can be used again."""
KERNEL: Final = 64 * MIB
KERNEL_SHARE: Final = 32
"""An enclave's kernel itself, and one part in so many of the memory: its table of pages is one in 64, page tables and
what the allocator cannot use come on top."""
_UNITS: Final = 16
"""Numbers of a token that are no activations: its position, its place, and rounding."""

UNSEEN_TOKEN: Final = 4096
"""A token's cache is taken for one part in so many of the weights: in files of 4 bits to a weight it is one in 4500 of
SmolLM2 with 135 million of them, and one in 7000 of Llama 2 with 7 billion, whose heads share no keys."""
UNSEEN_VOCABULARY: Final = 1 << 18
UNSEEN_EMBEDDING: Final = 1 << 13
UNSEEN_WIDTH: Final = 1 << 15
UNSEEN_CONTEXT: Final = 1 << 20
"""More than models have that fit into an enclave."""

_LONGEST_NAME: Final = 80
"""Characters of a text from the file that an error repeats."""
_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"})
"""What ggml keeps a second time in rows of eight on CPUs with AVX2, Q2_K with AVX-512 (repack.cpp)."""
_NOT_MULTIPLIED: Final = frozenset({"token_embd.weight"})
_TYPES: Final = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}


class SizingError(StrongroomError):
    """Memory that cannot be told, or work that no engine does. Codes: ``unknown_shape``, ``context_exceeded``,
    ``wrong_work``.
    """

    exit_code = 2


class KvType(StrEnum):
    """As what llama.cpp keeps keys and values: ggml's types."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    def size(self, elements: int) -> int:
        """Bytes of a row."""
        block, size = _TYPES[self.value.upper()]
        return -(-elements // block) * size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how much memory it takes."""

    architecture: str
    """llama.cpp's name; empty where it is not known."""
    weights: int
    """Bytes of the file."""
    repacked: int
    """Bytes that llama.cpp can hold a second time in another order, for speed."""
    rows: tuple[tuple[int, int], ...]
    """Elements of a key and of a value, all heads together, of each layer."""
    embedding: int
    """Elements of a token between two layers."""
    width: int
    """Elements of a token at the widest place within a layer, which is its feed-forward."""
    vocabulary: int
    """Tokens."""
    entries: int
    """Tokens and merges."""
    trained_context: int
    """Tokens of a sequence at most."""

    @classmethod
    def of(cls, header: GgufHeader) -> ModelShape:
        """Raises SizingError ``unknown_shape``."""
        architecture = header.text("general.architecture") or ""
        tensors = {tensor.name: tensor for tensor in header.tensors}
        layers = range(_number(header, architecture, "block_count"))
        tokens, merges = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
        if not isinstance(tokens, GgufArray):
            raise _unknown("tokenizer.ggml.tokens", "an array")
        used = header.metadata.get(f"{architecture}.expert_used_count")
        return cls(
            architecture,
            header.size,
            sum(tensor.size for tensor in header.tensors if _is_repacked(tensor, tensors)),
            tuple(_row(header, architecture, tensors, layer) for layer in layers),
            _number(header, architecture, "embedding_length"),
            max(_width(tensor, used) for tensor in header.tensors),
            tokens.count,
            tokens.count + (merges.count if isinstance(merges, GgufArray) else 0),
            _number(header, architecture, "context_length"),
        )

    @classmethod
    def unseen(cls, weights: int) -> ModelShape:
        """The most that is to be expected of a model of so many bytes whose header nobody here can read: an encrypted
        one, or one that does not say its shape. All of its weights are held a second time.
        """
        row = weights // UNSEEN_TOKEN // 4  # of a key, and of a value: numbers of 16 bits
        return cls(
            architecture="",
            weights=weights,
            repacked=weights,
            rows=((row, row),),
            embedding=UNSEEN_EMBEDDING,
            width=UNSEEN_WIDTH,
            vocabulary=UNSEEN_VOCABULARY,
            entries=2 * UNSEEN_VOCABULARY,
            trained_context=UNSEEN_CONTEXT,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine is to hold at once: the keys of ``[engine]`` in ``enclave.toml`` that decide its memory, with
    their defaults.

    Raises SizingError ``wrong_work`` for what no engine takes.
    """

    context: int = 2048
    """Tokens of a sequence at most, prompt and answer together."""
    parallel: int = 4
    """Sequences that are decoded at once."""
    cells: int | None = None
    """Tokens of all sequences together. With fewer than all contexts take, the sequences share them; None is as many as
    that."""
    kv_type: KvType = KvType.F16
    """As what keys and values are kept."""
    repack: bool = True
    """Weights are held a second time in an order that is faster to compute with."""
    batch: int = 512
    """Tokens that one decode takes at most."""

    def __post_init__(self) -> None:
        most = self.context * self.parallel
        if self.cells is not None and not self.context <= self.cells <= most:
            raise SizingError(
                "wrong_work",
                "cells: not for one context at least and for all of them at most",
                expected=f"{self.context}..{most}",
                got=self.cells,
            )
        if self.batch < self.parallel:
            raise SizingError(
                "wrong_work",
                "batch: less than a token of each sequence",
                expected=f">= {self.parallel}",
                got=self.batch,
            )

    @property
    def streams(self) -> tuple[int, int]:
        """How many runs of cells llama.cpp makes, and of how many cells each: one that all sequences share, or one for
        each of them.
        """
        if self.cells is not None and self.cells < self.context * self.parallel:
            return 1, _rounded(self.cells, CELL_STEP)
        return self.parallel, _rounded(self.context, CELL_STEP)


DEFAULT_WORK: Final = Work()
"""What an engine holds where nobody says it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of an account."""

    name: str
    """Stable."""
    size: int
    """Bytes."""
    rule: str
    """How it came about, for people."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What a model takes while it is served, part by part."""

    weights: Part
    """They stand in memory before an engine starts, and are mapped by it, not copied."""
    process: tuple[Part, ...]
    """What the engine's process takes beside them."""
    server: Part
    """The process in front of it."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of it."""
        return self.weights, *self.process, self.server

    @property
    def allocated(self) -> int:
        """Bytes that the engine's process takes once the weights are there."""
        return sum(part.size for part in self.process)

    @property
    def resident(self) -> int:
        """Bytes of the engine's process at its peak, with the weights that it maps."""
        return self.weights.size + self.allocated

    @property
    def total(self) -> int:
        """Bytes, the server's too."""
        return self.resident + self.server.size


def engine_memory(shape: ModelShape, work: Work) -> EngineMemory:
    """Raises SizingError ``context_exceeded``."""
    if work.context > shape.trained_context:
        raise SizingError(
            "context_exceeded",
            "the context is longer than the model was made for",
            expected=f"<= {shape.trained_context}",
            got=work.context,
        )
    streams, cells = work.streams
    repacked = shape.repacked if work.repack else 0
    row = sum(work.kv_type.size(key) + work.kv_type.size(value) for key, value in shape.rows)
    shared = f"{cells} tokens, shared by {work.parallel}" if streams < work.parallel else f"{streams} x {cells} tokens"
    tokens = _rounded(min(work.batch, cells * streams), work.parallel)
    return EngineMemory(
        weights=Part("weights", shape.weights, "the file, once: what was received is what llama.cpp maps"),
        process=(
            Part("repacked weights", repacked, _repacking(shape, work)),
            Part("key-value cache", cells * streams * row, f"{shared}, {len(shape.rows)} layers, {work.kv_type}"),
            Part(
                "compute",
                _compute(shape, tokens, cells, work.parallel),
                f"{tokens} tokens a step: activations and mask; {work.parallel} rows of logits",
            ),
            Part("vocabulary", shape.entries * VOCABULARY_ENTRY, f"{shape.entries} tokens and merges"),
            Part(
                "sampling",
                shape.vocabulary * CANDIDATE + cells * streams * HELD_TOKEN,
                f"{shape.vocabulary} candidates, and the books of the cache",
            ),
            _engine(work.context),
        ),
        server=Part("server", SERVER, "Python, and a full queue of requests"),
    )


def _engine(context: int) -> Part:
    """One prompt at a time becomes tokens."""
    prompt = min(context * PROMPT_BYTES_PER_TOKEN, MAX_PROMPT_SIZE)
    size = ENGINE + max(0, prompt * PROMPT_BYTE - ENGINE // 2)
    return Part("engine", size, f"Python, without the model, and a prompt of {prompt} bytes")


def kernel_beside(used: int) -> Part:
    """What the kernel of an enclave takes in which so many bytes are used."""
    size = -(-(used + KERNEL) * KERNEL_SHARE // (KERNEL_SHARE - 1)) - used
    return Part("kernel", size, f"{KERNEL // MIB} MiB and 1/{KERNEL_SHARE} of the memory")


def _compute(shape: ModelShape, tokens: int, cells: int, outputs: int) -> int:
    """llama.cpp's compute buffer for a step, ggml's buffer for quantised activations, and the buffer of logits.

    The first has the mask (half precision), and is as large as the worse of two moments needs: three times the
    feed-forward and four times a token, or the logits of every sequence. Numbers of 32 bits.
    """
    layer = tokens * (3 * shape.width + 4 * shape.embedding + _UNITS)
    output = outputs * (shape.vocabulary + 4 * shape.embedding + _UNITS)
    return 2 * tokens * cells + 4 * max(layer, output) + 2 * tokens * shape.width + 4 * outputs * shape.vocabulary


def _repacking(shape: ModelShape, work: Work) -> str:
    if not work.repack:
        return "none: repack = false"
    return "a second copy of the weights whose type ggml reorders" if shape.repacked else "none of a type for it"


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _width(tensor: GgufTensor, experts: object) -> int:
    """Elements that a matrix of a layer makes of a token; those of experts, as many times as there are chosen."""
    if not tensor.name.startswith("blk.") or len(tensor.dimensions) < 2:
        return 0
    chosen = tensor.dimensions[2] if len(tensor.dimensions) > 2 else 1
    if isinstance(experts, int) and 0 < experts < chosen:
        chosen = experts
    return tensor.dimensions[1] * chosen


def _row(header: GgufHeader, architecture: str, tensors: dict[str, GgufTensor], layer: int) -> tuple[int, int]:
    """The matrices that make keys and values have as many rows; models that join them to one say it in the metadata."""
    key, value = tensors.get(f"blk.{layer}.attn_k.weight"), tensors.get(f"blk.{layer}.attn_v.weight")
    if key is not None and value is not None and len(key.dimensions) == len(value.dimensions) == 2:
        return key.dimensions[1], value.dimensions[1]
    if f"blk.{layer}.attn_qkv.weight" not in tensors:
        raise SizingError(
            "unknown_shape",
            f"layer {layer} has no attention that this can size",
            expected=f"blk.{layer}.attn_k and attn_v, or attn_qkv",
            got=f"architecture {_shown(architecture)}",
        )
    heads = _number(header, architecture, "attention.head_count")
    groups = header.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    width = _number(header, architecture, "embedding_length") // heads
    key_length, value_length = (
        header.metadata.get(f"{architecture}.attention.{name}_length", width) for name in ("key", "value")
    )
    if not (isinstance(groups, int) and isinstance(key_length, int) and isinstance(value_length, int)):
        raise _unknown(f"{architecture}.attention.head_count_kv", "one number for all layers")
    if groups <= 0 or key_length <= 0 or value_length <= 0:
        raise _unknown(f"{architecture}.attention.head_count_kv and the lengths of heads", "positive numbers")
    return groups * key_length, groups * value_length


def _is_repacked(tensor: GgufTensor, tensors: dict[str, GgufTensor]) -> bool:
    """Matrices whose rows can be taken by eight. The table of tokens is only read, unless it is the output as well."""
    if tensor.kind not in _REPACKED or len(tensor.dimensions) < 2 or tensor.dimensions[1] % 8:
        return False
    return tensor.name not in _NOT_MULTIPLIED or "output.weight" not in tensors


def _number(header: GgufHeader, architecture: str, key: str) -> int:
    value = header.metadata.get(f"{architecture}.{key}")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _unknown(f"{architecture}.{key}", "a positive number")
    return value


def _unknown(key: str, expected: str) -> SizingError:
    return SizingError("unknown_shape", f"the model does not say {_shown(key)}", expected=expected)


def _shown(text: str) -> str:
    """A file may say anything."""
    return ascii(text[:_LONGEST_NAME])[1:-1]
