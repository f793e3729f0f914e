"""A file of any content is described, or is a ModelError; what is described lies inside the file."""

from __future__ import annotations

import io

from attestation.gguf import ModelError, read_header
from tests.gguf_files import ARRAY, BOOL, I32, TEXT, U32, Gguf


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


def seeds() -> list[bytes]:
    texts = Gguf(
        [("general.name", TEXT, "x"), ("tokens", ARRAY, (TEXT, ["a", "", "bc"])), ("ids", ARRAY, (I32, [1, -1]))]
    )
    tensors = Gguf(
        [("general.alignment", U32, 64), ("flag", BOOL, True)],
        [("a", 0, (3, 2), bytes(24)), ("b", 2, (64,), bytes(36)), ("c", 12, (256, 1, 1, 2), bytes(288))],
        alignment=64,
    )
    return [Gguf().encode(), Gguf(version=2).encode(), texts.encode(), tensors.encode()]
