"""Shapes of models that people run: what decides their size and speed, and their special tokens.

Layers, widths and heads are those of DeepSeek's published configurations; which tensors a file has, and in which types,
is llama.cpp's choice for its Q4_K_M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from attestation.gguf import TENSOR_TYPES

TYPES: Final[Mapping[str, tuple[int, int, int]]] = {
    name: (number, elements, size) for number, (name, elements, size) in TENSOR_TYPES.items()
}
"""Of tensors, by ggml's name: its number, elements in a block, bytes in a block."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides a model's size and speed, and its special tokens. Widths are elements: multiples of 256, a block."""

    name: str
    architecture: str
    """llama.cpp's name of it: ``qwen2`` (biases at query, key and value) or ``llama`` (frequency factors of RoPE)."""
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    context: int
    """Tokens."""
    rope_base: float
    rms_epsilon: float
    vocabulary: int
    """Tokens. A smaller vocabulary is filled up with unused ones."""
    special: Mapping[int, str]
    """Tokens in the place of the vocabulary's own."""
    bos: int
    eos: int
    padding: int

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads


_QWEN_SPECIAL: Final = {
    151643: "<｜end▁of▁sentence｜>",
    151644: "<｜User｜>",
    151645: "<｜Assistant｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151648: "<think>",
    151649: "</think>",
    151659: "<|fim_prefix|>",
    151660: "<|fim_middle|>",
    151661: "<|fim_suffix|>",
    151662: "<|fim_pad|>",
    151663: "<|repo_name|>",
    151664: "<|file_sep|>",
}
_LLAMA_SPECIAL: Final = {
    128000: "<｜begin▁of▁sentence｜>",
    128001: "<｜end▁of▁sentence｜>",
    128011: "<｜User｜>",
    128012: "<｜Assistant｜>",
    128013: "<think>",
    128014: "</think>",
    128015: "<｜▁pad▁｜>",
}

SHAPES: Final[Mapping[str, Shape]] = {
    "1.5b": Shape(
        name="DeepSeek-R1-Distill-Qwen-1.5B",
        architecture="qwen2",
        layers=28,
        width=1536,
        feed_forward=8960,
        heads=12,
        kv_heads=2,
        context=131072,
        rope_base=10000.0,
        rms_epsilon=1e-6,
        vocabulary=151936,
        special=_QWEN_SPECIAL,
        bos=151646,
        eos=151643,
        padding=151643,
    ),
    "7b": Shape(
        name="DeepSeek-R1-Distill-Qwen-7B",
        architecture="qwen2",
        layers=28,
        width=3584,
        feed_forward=18944,
        heads=28,
        kv_heads=4,
        context=131072,
        rope_base=10000.0,
        rms_epsilon=1e-6,
        vocabulary=152064,
        special=_QWEN_SPECIAL,
        bos=151646,
        eos=151643,
        padding=151643,
    ),
    "14b": Shape(
        name="DeepSeek-R1-Distill-Qwen-14B",
        architecture="qwen2",
        layers=48,
        width=5120,
        feed_forward=13824,
        heads=40,
        kv_heads=8,
        context=131072,
        rope_base=1000000.0,
        rms_epsilon=1e-5,
        vocabulary=152064,
        special=_QWEN_SPECIAL,
        bos=151646,
        eos=151643,
        padding=151643,
    ),
    "8b": Shape(
        name="DeepSeek-R1-Distill-Llama-8B",
        architecture="llama",
        layers=32,
        width=4096,
        feed_forward=14336,
        heads=32,
        kv_heads=8,
        context=131072,
        rope_base=500000.0,
        rms_epsilon=1e-5,
        vocabulary=128256,
        special=_LLAMA_SPECIAL,
        bos=128000,
        eos=128001,
        padding=128015,
    ),
}
"""By what ``--shape`` calls them."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    kind: str
    """Q4_K, Q6_K or F32."""
    dimensions: tuple[int, ...]
    """Elements; the first is the length of a row."""

    @property
    def elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def size(self) -> int:
        """Bytes."""
        _, elements, size = TYPES[self.kind]
        return self.elements // elements * size


def tensors(shape: Shape) -> Iterator[Tensor]:
    """The tensors of a Q4_K_M, in the order of the file (llama.cpp, src/llama-quant.cpp, ``llama_tensor_get_type``)."""
    width, wide, narrow = shape.width, shape.feed_forward, shape.kv_width
    yield Tensor("token_embd.weight", "Q4_K", (width, shape.vocabulary))
    if shape.architecture == "llama":
        yield Tensor("rope_freqs.weight", "F32", (width // shape.heads // 2,))
    for layer in range(shape.layers):
        finer = "Q6_K" if _gets_more_bits(layer, shape.layers) else "Q4_K"
        block = f"blk.{layer}."
        yield Tensor(block + "attn_norm.weight", "F32", (width,))
        for name, kind, rows in (("q", "Q4_K", width), ("k", "Q4_K", narrow), ("v", finer, narrow)):
            yield Tensor(f"{block}attn_{name}.weight", kind, (width, rows))
            if shape.architecture == "qwen2":
                yield Tensor(f"{block}attn_{name}.bias", "F32", (rows,))
        yield Tensor(block + "attn_output.weight", "Q4_K", (width, width))
        yield Tensor(block + "ffn_norm.weight", "F32", (width,))
        yield Tensor(block + "ffn_gate.weight", "Q4_K", (width, wide))
        yield Tensor(block + "ffn_up.weight", "Q4_K", (width, wide))
        yield Tensor(block + "ffn_down.weight", finer, (wide, width))
    yield Tensor("output_norm.weight", "F32", (width,))
    yield Tensor("output.weight", "Q6_K", (width, shape.vocabulary))


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them (``use_more_bits``)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
