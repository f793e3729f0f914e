"""A bounded reader of GGUF headers: what a model file claims to hold, checked against what is there.

GGUF (versions 2 and 3, little-endian) is the file format of llama.cpp: a magic, counts, typed metadata, tensor
descriptions, then the tensors' data. The format's reference is ``docs/gguf.md`` in the ggml repository. Headers lie, so
nothing here is allocated by a length that the file has not been seen to contain, and llama.cpp sees only what passed.
The layout rules are llama.cpp's own: tensors stand in file order, each padded to the alignment, without gaps or
overlaps.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final, TypeAlias

from attestation.errors import StrongroomError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

MAX_HEADER_SIZE: Final = 64 << 20
"""Bytes before the tensors' data. Vocabularies of 256,000 tokens need about 16 MiB."""
MAX_ENTRIES: Final = 1 << 16
"""Metadata entries, and tensors."""
MAX_KEY_SIZE: Final = 256
MAX_TEXT_SIZE: Final = 1 << 20
"""Bytes of one text in the metadata. Texts inside arrays (tokens) are stepped over and bounded by the header's size."""
MAX_TENSOR_NAME_SIZE: Final = 63
MAX_DIMENSIONS: Final = 4

_CHUNK: Final = 1 << 20
_INT64_MAX: Final = 2**63 - 1

_TEXT, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_KIND_NAMES: Final = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "text", "array", "u64", "i64", "f64")

TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml's tensor types: name, elements in a block, bytes in a block. A test holds the table against the library that
is installed.
"""


class ModelError(StrongroomError):
    """A model file that is broken or cannot be used. ``offset`` is the byte in the file at which that shows, where
    there is one.

    Codes: ``unreadable_model``, ``not_gguf``, ``unsupported_gguf``, ``truncated_gguf``, ``malformed_gguf``,
    ``bad_tensor``, ``no_chat_template``, ``malformed_manifest``.
    """

    exit_code = 2

    def __init__(
        self,
        code: str,
        message: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(
            code, message if offset is None else f"{message}, at byte {offset}", expected=expected, got=got
        )
        self.offset = offset


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata: what it holds and how many, not the elements."""

    kind: str
    """Of its elements: ``text``, ``bool``, ``u8``, ``f32`` and so on."""
    count: int
    """The number of elements."""
    offset: int = field(default=0, compare=False)
    """Bytes from the beginning of the file to the first element."""


MetadataValue: TypeAlias = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor's data stand, and as what. Every number has been held against the file's size."""

    name: str
    """At most :data:`MAX_TENSOR_NAME_SIZE` bytes of UTF-8."""
    kind: str
    """ggml's name of the type."""
    dimensions: tuple[int, ...]
    """Elements along each of up to 4 axes; the first is the length of a row."""
    offset: int
    """Bytes from the beginning of the data section."""
    size: int
    """Bytes, without padding."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself, after every check of this module."""

    version: int
    """Of the format: 2 or 3."""
    metadata: Mapping[str, MetadataValue]
    """By key, in the order of the file. Of an array there is its type and length alone."""
    tensors: tuple[GgufTensor, ...]
    """In the order of the file, without gaps between them."""
    alignment: int
    """Bytes, a power of two: every tensor begins at a multiple of it."""
    data_offset: int
    """Bytes from the beginning of the file to the data section."""
    size: int
    """Bytes from the beginning of the file to the end of the last tensor: the file has at least these."""

    def text(self, key: str) -> str | None:
        """The text under ``key``; None when it is absent or no text."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def read_header(file: BinaryIO) -> GgufHeader:
    """Reads and checks a header from the beginning of a seekable ``file``, and that the tensors it describes are
    inside the file.

    At most :data:`MAX_HEADER_SIZE` bytes are read; the tensors' data is not. Raises ModelError, never anything else.
    """
    try:
        return _Reader(file).header()
    except (OSError, ValueError) as error:  # ValueError: io on a closed file
        raise ModelError("unreadable_model", f"the model cannot be read ({type(error).__name__})") from error


def read_texts(file: BinaryIO, array: GgufArray, wanted: Collection[int]) -> dict[int, str]:
    """Those of the texts of ``array`` that are wanted, by their index, from the file whose header has it. What is no
    UTF-8 is replaced.

    Raises ModelError, as :func:`read_header` does: the file may be another one by now.
    """
    if array.kind != _KIND_NAMES[_TEXT]:
        return {}
    try:
        return _Reader(file, array.offset).texts(min(array.count, max(wanted, default=-1) + 1), frozenset(wanted))
    except (OSError, ValueError) as error:
        raise ModelError("unreadable_model", f"the model cannot be read ({type(error).__name__})") from error


class _Reader:
    """A cursor over the file with one chunk in memory. Every method that consumes bytes first knows that the file has
    them.
    """

    def __init__(self, file: BinaryIO, start: int = 0) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        file.seek(start)
        self._chunk = b""
        self._at = 0
        self._chunk_start = start

    # --- Bytes -------------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        return self._chunk_start + self._at

    def _require(self, count: int, what: str) -> None:
        position = self._position
        left = self._size - position
        if count > left:
            raise ModelError(
                "truncated_gguf",
                f"the file ends inside {what}",
                expected=f"{count} bytes",
                got=f"{left} bytes",
                offset=position,
            )
        if position + count > MAX_HEADER_SIZE:
            raise ModelError(
                "malformed_gguf",
                f"the header is too large: {what}",
                expected=f"<= {MAX_HEADER_SIZE} bytes",
                got=f"{position + count} bytes",
                offset=position,
            )

    def _fill(self, count: int, what: str) -> None:
        """Makes the next ``count`` bytes part of the chunk in memory."""
        self._require(count, what)
        rest = self._chunk[self._at :]
        fresh = self._file.read(max(_CHUNK, count - len(rest)))
        self._chunk_start += self._at
        self._chunk, self._at = rest + fresh, 0
        if len(self._chunk) < count:  # the file shrank after its size was taken
            self._size = self._chunk_start + len(self._chunk)
            self._require(count, what)

    def _take(self, count: int, what: str) -> bytes:
        if self._at + count > len(self._chunk):
            self._fill(count, what)
        start = self._at
        self._at += count
        return self._chunk[start : self._at]

    def _skip(self, count: int, what: str) -> None:
        self._require(count, what)
        if self._at + count <= len(self._chunk):
            self._at += count
            return
        target = self._position + count
        self._file.seek(target)
        self._chunk, self._at, self._chunk_start = b"", 0, target

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _count(self, what: str) -> int:
        offset = self._position
        count = self._u64(what)
        if count > MAX_ENTRIES:
            raise ModelError(
                "malformed_gguf", f"too many: {what}", expected=f"<= {MAX_ENTRIES}", got=count, offset=offset
            )
        return count

    def _text(self, limit: int, what: str) -> str:
        offset = self._position
        size = self._u64(what)
        if size > limit:
            raise ModelError(
                "malformed_gguf", f"too long: {what}", expected=f"<= {limit} bytes", got=size, offset=offset
            )
        try:
            return self._take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError("malformed_gguf", f"not UTF-8: {what}", offset=offset) from error

    def _skip_texts(self, count: int, what: str) -> None:
        """Steps over ``count`` texts. It is the one hot loop: a vocabulary has several 100,000."""
        for _ in range(count):
            at = self._at
            if at + 8 > len(self._chunk):
                self._fill(8, what)
                at = 0
            size = int.from_bytes(self._chunk[at : at + 8], "little")
            self._at = at + 8
            if self._at + size <= len(self._chunk) and self._chunk_start + self._at + size <= MAX_HEADER_SIZE:
                self._at += size
            else:
                self._skip(size, what)

    def texts(self, count: int, wanted: Collection[int]) -> dict[int, str]:
        """Of the next ``count`` texts those that are wanted."""
        found = {}
        for index in range(count):
            size = self._u64("a text of an array")
            if index in wanted:
                found[index] = self._take(size, "a text of an array").decode("utf-8", "replace")
            else:
                self._skip(size, "a text of an array")
        return found

    # --- The format --------------------------------------------------------------------------------------------------

    def header(self) -> GgufHeader:
        magic = self._take(4, "the magic") if self._size >= 4 else b""
        if magic != MAGIC:
            got = ascii(magic.decode("latin-1")) if magic else f"a file of {self._size} bytes"
            expected = ascii(MAGIC.decode("ascii"))
            raise ModelError(
                "not_gguf", "not a GGUF file, which begins otherwise", expected=expected, got=got, offset=0
            )
        version = self._u32("the version")
        if version not in VERSIONS:
            raise ModelError("unsupported_gguf", "unknown GGUF version", expected="2 or 3", got=version, offset=4)
        tensor_count = self._count("tensors")
        entry_count = self._count("metadata entries")
        metadata: dict[str, MetadataValue] = {}
        for index in range(entry_count):
            key, value = self._entry(index, metadata)
            metadata[key] = value
        alignment = self._alignment(metadata)
        return self._layout(version, metadata, [self._tensor(index) for index in range(tensor_count)], alignment)

    def _entry(self, index: int, before: Mapping[str, MetadataValue]) -> tuple[str, MetadataValue]:
        offset = self._position
        key = self._text(MAX_KEY_SIZE, f"the key of metadata entry {index}")
        if not key or key in before:
            raise ModelError(
                "malformed_gguf", "an empty or repeated key", expected="each key once", got=ascii(key), offset=offset
            )
        what = f"the value of {key!a}"
        kind = self._u32(what)
        if kind == _TEXT:
            return key, self._text(MAX_TEXT_SIZE, what)
        if kind == _ARRAY:
            return key, self._array(what)
        return key, self._scalar(kind, what)

    def _scalar(self, kind: int, what: str) -> int | float | bool:
        offset = self._position
        layout = _SCALARS.get(kind)
        if layout is None:
            raise ModelError("malformed_gguf", f"unknown type of {what}", expected="0..12", got=kind, offset=offset - 4)
        value: int | float = layout.unpack(self._take(layout.size, what))[0]
        if kind != _BOOL:
            return value
        if value not in (0, 1):
            raise ModelError(
                "malformed_gguf", f"not a truth value: {what}", expected="0 or 1", got=value, offset=offset
            )
        return bool(value)

    def _array(self, what: str) -> GgufArray:
        offset = self._position
        kind = self._u32(what)
        count = self._u64(what)
        layout = _SCALARS.get(kind)
        if layout is not None:
            self._skip(count * layout.size, what)
        elif kind == _TEXT:
            self._require(count * 8, what)  # each has at least its length
            self._skip_texts(count, what)
        else:
            raise ModelError(
                "malformed_gguf",
                f"unknown type of elements: {what}",
                expected="a scalar or text",
                got=kind,
                offset=offset,
            )
        return GgufArray(_KIND_NAMES[kind], count, offset + 12)

    def _alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or alignment <= 0
            or alignment & (alignment - 1)
        ):
            raise ModelError(
                "malformed_gguf", "bad general.alignment", expected="a power of two", got=ascii(alignment)[:80]
            )
        return alignment

    def _tensor(self, index: int) -> GgufTensor:
        offset = self._position
        name = self._text(MAX_TENSOR_NAME_SIZE, f"the name of tensor {index}")
        what = f"tensor {name!a}"
        count = self._u32(what)
        if count > MAX_DIMENSIONS:
            raise ModelError(
                "bad_tensor", f"too many dimensions: {what}", expected=f"<= {MAX_DIMENSIONS}", got=count, offset=offset
            )
        dimensions = tuple(self._u64(what) for _ in range(count))
        elements = 1
        for dimension in dimensions:
            elements *= dimension
            if not 0 < elements <= _INT64_MAX:
                raise ModelError(
                    "bad_tensor",
                    f"impossible shape: {what}",
                    expected="1..2^63-1 elements",
                    got=dimensions,
                    offset=offset,
                )
        number = self._u32(what)
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            raise ModelError(
                "bad_tensor", f"unknown type: {what}", expected="a type of ggml", got=number, offset=offset
            )
        type_name, block_elements, block_size = kind
        row = dimensions[0] if dimensions else 1
        if row % block_elements:
            raise ModelError(
                "bad_tensor",
                f"rows are not whole blocks: {what}",
                expected=f"a multiple of {block_elements}",
                got=row,
                offset=offset,
            )
        return GgufTensor(name, type_name, dimensions, self._u64(what), elements // block_elements * block_size)

    def _layout(
        self, version: int, metadata: Mapping[str, MetadataValue], tensors: list[GgufTensor], alignment: int
    ) -> GgufHeader:
        data_offset = -(-self._position // alignment) * alignment
        names: set[str] = set()
        expected, end = 0, self._position
        for tensor in tensors:
            if tensor.name in names:
                raise ModelError(
                    "bad_tensor", "two tensors of one name", expected="each name once", got=ascii(tensor.name)
                )
            names.add(tensor.name)
            if tensor.offset != expected:
                raise ModelError(
                    "bad_tensor",
                    f"tensor {tensor.name!a} is not where the one before it ends",
                    expected=f"offset {expected}",
                    got=tensor.offset,
                )
            end = data_offset + tensor.offset + tensor.size
            if end > self._size:
                raise ModelError(
                    "truncated_gguf",
                    f"the file ends before tensor {tensor.name!a} does",
                    expected=f"{end} bytes",
                    got=f"{self._size} bytes",
                    offset=self._size,
                )
            expected = -(-(tensor.offset + tensor.size) // alignment) * alignment
        return GgufHeader(version, metadata, tuple(tensors), alignment, data_offset, end)
