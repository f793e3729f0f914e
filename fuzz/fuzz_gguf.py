"""A file of any content is described, or is a ModelError; what is described lies inside the file, and its memory can be
told or is a SizingError.
"""

from __future__ import annotations

import io

from attestation.gguf import GgufArray, ModelError, read_header, read_texts
from attestation.model_memory import ModelShape, SizingError, Work, engine_memory
from tests.gguf_files import ARRAY, BOOL, I32, TEXT, U32, Gguf, tiny_model


def one_input(data: bytes) -> None:
    try:
        header = read_header(io.BytesIO(data))
    except ModelError:
        return
    assert header.size <= len(data)
    end = 0
    for tensor in header.tensors:
        assert tensor.offset >= end, "tensors that overlap"
        assert tensor.offset % header.alignment == 0
        end = tensor.offset + tensor.size
    assert not header.tensors or header.data_offset + end == header.size
    for value in header.metadata.values():
        if isinstance(value, GgufArray):
            texts = read_texts(io.BytesIO(data), value, (0, value.count - 1, value.count))
            assert value.kind != "text" or texts.keys() == {0, value.count - 1} & set(range(value.count))
    try:
        memory = engine_memory(ModelShape.of(header), Work(64, 2))
    except SizingError:
        return
    assert memory.total > memory.resident > header.size


def seeds() -> list[bytes]:
    texts = Gguf(
        [("general.name", TEXT, "x"), ("tokens", ARRAY, (TEXT, ["a", "", "bc"])), ("ids", ARRAY, (I32, [1, -1]))]
    )
    tensors = Gguf(
        [("general.alignment", U32, 64), ("flag", BOOL, True)],
        [("a", 0, (3, 2), bytes(24)), ("b", 2, (64,), bytes(36)), ("c", 12, (256, 1, 1, 2), bytes(288))],
        alignment=64,
    )
    return [Gguf().encode(), Gguf(version=2).encode(), texts.encode(), tensors.encode(), tiny_model().encode()]
