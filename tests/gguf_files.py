"""Writes GGUF files, and among them a real model of a few hundred kilobytes that llama.cpp loads: random weights,
bytes for tokens.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from attestation.gguf import TENSOR_TYPES

U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_CODES: Final = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Scalar = int | float | bool | str
Value = Scalar | tuple[int, Sequence[Scalar]]
"""An array is the type of its elements and the elements."""


@dataclass
class Gguf:
    """A file to be: every part of it may be a lie."""

    metadata: list[tuple[str, int, Value]] = field(default_factory=list)
    tensors: list[tuple[str, int, Sequence[int], bytes]] = field(default_factory=list)
    """Name, ggml's type, dimensions, data."""
    version: int = 3
    alignment: int = 32

    def encode(self) -> bytes:
        out = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata)))
        for key, kind, value in self.metadata:
            out += text(key) + struct.pack("<I", kind) + _value(kind, value)
        offset = 0
        for name, kind, dimensions, data in self.tensors:
            out += text(name) + struct.pack("<I", len(dimensions))
            out += b"".join(struct.pack("<Q", dimension) for dimension in dimensions)
            out += struct.pack("<IQ", kind, offset)
            offset += _padded(len(data), self.alignment)
        out += bytes(_padded(len(out), self.alignment) - len(out))
        for *_, data in self.tensors:
            out += data + bytes(_padded(len(data), self.alignment) - len(data))
        return bytes(out)


def text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(kind: int, value: Value) -> bytes:
    if kind == TEXT:
        assert isinstance(value, str)
        return text(value)
    if kind == ARRAY:
        assert isinstance(value, tuple)
        element, items = value
        return struct.pack("<IQ", element, len(items)) + b"".join(_value(element, item) for item in items)
    return struct.pack(_CODES[kind], value)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- A model that works
# ------------------------------------------------------------------------------------------------

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BOS, EOS, SYSTEM, USER, ASSISTANT = 257, 258, 259, 260, 261
_SPECIAL: Final = (
    ("<|begin|>", CONTROL),
    ("<|end|>", CONTROL),
    ("<|system|>", CONTROL),
    ("<|user|>", USER_DEFINED),  # as in vocabularies whose role marks were never declared special
    ("<|assistant|>", CONTROL),
)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tiny_model(*, chat_template: str | None = CHAT_TEMPLATE, context: int = 16384) -> Gguf:
    """One layer, 262 tokens: the 256 bytes, one merge, and special tokens. What it says is noise, the same every
    time, without an end.
    """
    embedding, heads, feed_forward = 32, 2, 64
    tokens = [*_byte_alphabet(), "Ġt", *(name for name, _ in _SPECIAL)]
    kinds = [NORMAL] * 257 + [kind for _, kind in _SPECIAL]
    generator = random.Random(20251122)

    def floats(count: int, scale: float = 0.5) -> bytes:
        return struct.pack(f"<{count}f", *(generator.gauss(0, scale) for _ in range(count)))

    def ones(count: int) -> bytes:
        return struct.pack(f"<{count}f", *[1.0] * count)

    # The end's row is zero, so that its logit is, and others are above it.
    table = [floats(embedding) if index != EOS else bytes(4 * embedding) for index in range(len(tokens))]
    square, wide = (embedding, embedding), (embedding, feed_forward)
    metadata: list[tuple[str, int, Value]] = [
        ("general.architecture", TEXT, "llama"),
        ("general.name", TEXT, "tiny"),
        ("llama.context_length", U32, context),
        ("llama.embedding_length", U32, embedding),
        ("llama.block_count", U32, 1),
        ("llama.feed_forward_length", U32, feed_forward),
        ("llama.attention.head_count", U32, heads),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        ("llama.rope.dimension_count", U32, embedding // heads),
        ("tokenizer.ggml.model", TEXT, "gpt2"),
        ("tokenizer.ggml.pre", TEXT, "gpt-2"),
        ("tokenizer.ggml.tokens", ARRAY, (TEXT, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (I32, kinds)),
        ("tokenizer.ggml.merges", ARRAY, (TEXT, ["Ġ t"])),
        ("tokenizer.ggml.bos_token_id", U32, BOS),
        ("tokenizer.ggml.eos_token_id", U32, EOS),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
    ]
    if chat_template is not None:
        metadata.append(("tokenizer.chat_template", TEXT, chat_template))
    tensors: list[tuple[str, int, Sequence[int], bytes]] = [
        ("token_embd.weight", 0, (embedding, len(tokens)), b"".join(table)),
        ("output_norm.weight", 0, (embedding,), ones(embedding)),
        ("blk.0.attn_norm.weight", 0, (embedding,), ones(embedding)),
        *((f"blk.0.attn_{name}.weight", 0, square, floats(embedding**2)) for name in ("q", "k", "v", "output")),
        ("blk.0.ffn_norm.weight", 0, (embedding,), ones(embedding)),
        *((f"blk.0.ffn_{name}.weight", 0, wide, floats(embedding * feed_forward)) for name in ("gate", "up")),
        ("blk.0.ffn_down.weight", 0, wide[::-1], floats(embedding * feed_forward)),
    ]
    return Gguf(metadata, tensors)


# --- Models of other shapes -------------------------------------------------------------------------------------------

KINDS: Final = {name: (number, elements, size) for number, (name, elements, size) in TENSOR_TYPES.items()}


def with_entry(file: Gguf, key: str, kind: int, value: Value) -> Gguf:
    file.metadata = [each for each in file.metadata if each[0] != key] + [(key, kind, value)]
    return file


def without(file: Gguf, key: str) -> Gguf:
    file.metadata = [each for each in file.metadata if each[0] != key]
    return file


def grouped(*, kind: str = "Q4_K", tied: bool = False) -> Gguf:
    """Two layers of zeros, four heads with two groups, in the types of a common quantisation."""
    embedding, forward, groups = 256, 512, 128
    file = tiny_model(context=4096)
    values: dict[str, tuple[int, Value]] = {
        "embedding_length": (U32, embedding),
        "block_count": (U32, 2),
        "feed_forward_length": (U32, forward),
        "attention.head_count": (U32, 4),
        "attention.head_count_kv": (U32, 2),
        "attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "rope.dimension_count": (U32, embedding // 4),
    }
    for key, (of, value) in values.items():
        with_entry(file, f"llama.{key}", of, value)
    file.tensors = []

    def add(name: str, as_kind: str, *dimensions: int) -> None:
        number, elements, size = KINDS[as_kind]
        count = 1
        for dimension in dimensions:
            count *= dimension
        file.tensors.append((name, number, dimensions, bytes(count // elements * size)))

    add("token_embd.weight", "F32" if not tied else kind, embedding, 264 if tied else 262)
    add("output_norm.weight", "F32", embedding)
    if not tied:
        add("output.weight", "Q6_K", embedding, 262)
    for layer in range(2):
        of_layer = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            add(f"{of_layer}{name}.weight", "F32", embedding)
        for name, rows in (("attn_q", embedding), ("attn_k", groups), ("attn_v", groups), ("attn_output", embedding)):
            add(f"{of_layer}{name}.weight", kind, embedding, rows)
        for name in ("ffn_gate", "ffn_up"):
            add(f"{of_layer}{name}.weight", kind, embedding, forward)
        add(f"{of_layer}ffn_down.weight", "Q6_K", forward, embedding)
    return file


def joined(**metadata: int) -> Gguf:
    """A model whose queries, keys and values come from one matrix."""
    file = grouped()
    file.tensors = [
        (name.replace("attn_q.", "attn_qkv."), kind, dimensions, data)
        for name, kind, dimensions, data in file.tensors
        if ".attn_k." not in name and ".attn_v." not in name
    ]
    for key, value in metadata.items():
        with_entry(file, f"llama.attention.{key}", U32, value)
    return file
