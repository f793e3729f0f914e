"""The table of docs/memory.md: what DeepSeek-R1's distills take, by the enclave's own account, from their shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

from attestation.gguf import GgufArray, GgufHeader, GgufTensor, MetadataValue
from attestation.model_memory import MIB, KvType, ModelShape, Work, engine_memory
from bench.model_shapes import SHAPES, Shape, tensors
from parent.image.sizing import plan

MERGES: Final = {"qwen2": 151_387, "llama": 280_147}
"""Of Qwen 2.5's tokenizer and of Llama 3's."""
ENTRY: Final = 20
"""Bytes of a token or a merge in a header, about."""
ORDER: Final = ("1.5b", "7b", "8b", "14b")
WORKS: Final = (
    Work(2048),
    Work(4096, cells=4096),
    Work(4096, cells=4096, repack=False),
    Work(4096),
    Work(4096, kv_type=KvType.Q8_0),
    Work(4096, 16, cells=16384, kv_type=KvType.Q8_0),
    Work(8192, 8, kv_type=KvType.Q8_0),
    Work(32768, 1),
    Work(32768, 1, kv_type=KvType.Q4_0, repack=False),
)
TITLES: Final = (
    *("context", "parallel", "cells", "kv_type", "repack"),
    *("weights", "repacked", "key-value", "the rest", "engine", "enclave"),
)


def shape_of(shape: Shape) -> ModelShape:
    """What a planner reads of a file in this shape, in Q4_K_M."""
    of, entries = shape.architecture, shape.vocabulary + MERGES[shape.architecture]
    made = tuple(GgufTensor(each.name, each.kind, each.dimensions, 0, each.size) for each in tensors(shape))
    metadata: dict[str, MetadataValue] = {
        "general.architecture": of,
        f"{of}.block_count": shape.layers,
        f"{of}.context_length": shape.context,
        f"{of}.embedding_length": shape.width,
        "tokenizer.ggml.tokens": GgufArray("text", shape.vocabulary),
        "tokenizer.ggml.merges": GgufArray("text", MERGES[of]),
    }
    size = entries * ENTRY + sum(tensor.size for tensor in made)
    return ModelShape.of(GgufHeader(3, metadata, made, 32, entries * ENTRY, size))


def row(shape: ModelShape, work: Work) -> tuple[str, ...]:
    """MiB, of what fills several times 1 MiB rounded up."""
    memory = engine_memory(shape, work)
    repacked, cache, *rest = memory.process
    streams, cells = work.streams
    held = f"{streams} x {cells}" if streams == work.parallel else f"{cells} shared"
    sizes = (memory.weights.size, repacked.size, cache.size, sum(part.size for part in rest), memory.resident)
    asked = (str(work.context), str(work.parallel), held, work.kv_type.value, str(work.repack).lower())
    return *asked, *(f"{-(-size // MIB):,}" for size in sizes), f"{plan(shape, work).memory:,}"


def lines() -> Iterator[str]:
    """Markdown, a table for each model."""
    for name in ORDER:
        shape = SHAPES[name]
        yield from (f"### {shape.name}", "")
        yield f"| {' | '.join(TITLES)} |"
        yield "|" + "---|" * len(TITLES)
        for work in WORKS:
            yield f"| {' | '.join(row(shape_of(shape), work))} |"
        yield ""


def main() -> int:
    """Prints it."""
    print("\n".join(lines()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
