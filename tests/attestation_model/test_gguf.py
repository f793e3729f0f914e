"""GGUF headers: real ones are read, and whatever lies is refused by a typed error before anything is allocated for
it.
"""

from __future__ import annotations

import ctypes
import io
import struct
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.gguf import MAX_HEADER_SIZE, TENSOR_TYPES, GgufArray, GgufHeader, ModelError, read_header, read_texts
from tests.gguf_files import ARRAY, BOOL, CHAT_TEMPLATE, I32, TEXT, U32, Gguf, Value, text, tiny_model

CHUNK = 1 << 20
"""Bytes that are read at once."""
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "gguf"
TINY = tiny_model().encode()


def read(data: bytes) -> GgufHeader:
    return read_header(io.BytesIO(data))


def refused(data: bytes) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read(data)
    return caught.value


def test_another_format_is_shown_as_people_read_it() -> None:
    error = refused(b"\x7fELF" + bytes(100))
    assert (error.expected, error.got) == ("'GGUF'", r"'\x7fELF'")
    assert refused(b"GG").got == "a file of 2 bytes"


def test_a_whole_file_is_described() -> None:
    header = read(TINY)
    assert header.version == 3
    assert header.alignment == 32
    assert header.text("tokenizer.chat_template") == CHAT_TEMPLATE
    assert header.text("llama.block_count") is None
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray("text", 262)
    assert header.metadata["tokenizer.ggml.token_type"] == GgufArray("i32", 262)
    assert header.data_offset % 32 == 0
    assert header.size == len(TINY)
    first = header.tensors[0]
    assert (first.name, first.kind, first.dimensions, first.offset) == ("token_embd.weight", "F32", (32, 262), 0)


def test_version_2_is_read_and_others_are_not() -> None:
    assert read(Gguf(version=2).encode()).version == 2
    for version in (0, 1, 4, 0x03000000):
        error = refused(Gguf(version=version).encode())
        assert (error.code, error.got, error.offset) == ("unsupported_gguf", str(version), 4)


def test_the_table_of_tensor_types_is_that_of_the_library() -> None:
    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    known = {}
    for number in range(llama_cpp.GGML_TYPE_COUNT):
        if block := base.ggml_blck_size(number):
            known[number] = (base.ggml_type_name(number).decode().upper(), block, base.ggml_type_size(number))
    assert {number: (name.upper(), *sizes) for number, (name, *sizes) in TENSOR_TYPES.items()} == known


def with_count(at: int, count: int) -> bytes:
    return TINY[:at] + struct.pack("<Q", count) + TINY[at + 8 :]


def one_entry(kind: int, value: Value) -> bytes:
    return Gguf([("key", kind, value)]).encode()


def one_tensor(kind: int, dimensions: tuple[int, ...], data: bytes) -> bytes:
    return Gguf(tensors=[("t", kind, dimensions, data)]).encode()


def entry_of(raw: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + raw


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not_gguf"),
    "another format": (lambda: b"PK\x03\x04" + bytes(100), "not_gguf"),
    "big-endian": (lambda: b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "unsupported_gguf"),
    "header cut short": (lambda: TINY[:20], "truncated_gguf"),
    "metadata cut short": (lambda: TINY[:500], "truncated_gguf"),
    "data cut short": (lambda: TINY[:-200], "truncated_gguf"),
    "2^64-1 tensors": (lambda: with_count(8, 2**64 - 1), "malformed_gguf"),
    "2^64-1 entries": (lambda: with_count(16, 2**64 - 1), "malformed_gguf"),
    "one entry too many": (lambda: with_count(16, 19), "malformed_gguf"),
    "key of 2^63 bytes": (lambda: entry_of(struct.pack("<Q", 2**63)), "malformed_gguf"),
    "key longer than the file": (lambda: entry_of(struct.pack("<Q", 200) + b"key"), "truncated_gguf"),
    "empty key": (lambda: Gguf([("", U32, 1)]).encode(), "malformed_gguf"),
    "key twice": (lambda: Gguf([("a", U32, 1), ("a", U32, 2)]).encode(), "malformed_gguf"),
    "key that is no UTF-8": (lambda: entry_of(struct.pack("<Q", 1) + b"\xff" + bytes(16)), "malformed_gguf"),
    "type 13": (lambda: entry_of(text("key") + struct.pack("<I", 13) + bytes(8)), "malformed_gguf"),
    "truth value 2": (lambda: one_entry(BOOL, 2), "malformed_gguf"),
    "text of 1 MiB and one": (lambda: one_entry(TEXT, "x" * (2**20 + 1)), "malformed_gguf"),
    "array of arrays": (lambda: one_entry(ARRAY, (ARRAY, [])), "malformed_gguf"),
    "array of 2^63 numbers": (
        lambda: entry_of(text("key") + struct.pack("<IIQ", ARRAY, I32, 2**63) + bytes(64)),
        "truncated_gguf",
    ),
    "array of 2^61 texts": (
        lambda: entry_of(text("key") + struct.pack("<IIQ", ARRAY, TEXT, 2**61) + bytes(64)),
        "truncated_gguf",
    ),
    "text in an array longer than the file": (
        lambda: entry_of(text("key") + struct.pack("<IIQQ", ARRAY, TEXT, 1, 2**64 - 1) + bytes(64)),
        "truncated_gguf",
    ),
    "alignment 0": (lambda: Gguf([("general.alignment", U32, 0)]).encode(), "malformed_gguf"),
    "alignment 24": (lambda: Gguf([("general.alignment", U32, 24)]).encode(), "malformed_gguf"),
    "alignment that is a text": (lambda: Gguf([("general.alignment", TEXT, "32")]).encode(), "malformed_gguf"),
    "5 dimensions": (lambda: one_tensor(0, (1, 1, 1, 1, 1), bytes(4)), "bad_tensor"),
    "dimension 0": (lambda: one_tensor(0, (0,), b""), "bad_tensor"),
    "2^64 elements": (lambda: one_tensor(0, (2**32, 2**32), bytes(4)), "bad_tensor"),
    "unknown tensor type": (lambda: one_tensor(4, (32,), bytes(32)), "bad_tensor"),
    "half a block": (lambda: one_tensor(2, (16,), bytes(18)), "bad_tensor"),
    "tensor beyond the file": (lambda: one_tensor(0, (2**40,), bytes(4)), "truncated_gguf"),
    "tensor larger than the next one's offset says": (
        lambda: Gguf(tensors=[("a", 0, (64,), bytes(4)), ("b", 0, (64,), bytes(256))]).encode(),
        "bad_tensor",
    ),
    "two tensors of one name": (
        lambda: Gguf(tensors=[("a", 0, (1,), bytes(4)), ("a", 0, (1,), bytes(4))]).encode(),
        "bad_tensor",
    ),
    "tensor name of 64 bytes": (lambda: Gguf(tensors=[("n" * 64, 0, (1,), bytes(4))]).encode(), "malformed_gguf"),
}


@pytest.mark.parametrize("size", range(4))
def test_a_file_shorter_than_the_magic_is_said_with_its_size(size: int) -> None:
    assert refused(b"GGUF"[:size]).got == f"a file of {size} bytes"


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    make, code = LIES[lie]
    error = refused(make())
    assert error.code == code
    assert error.expected is not None or "UTF-8" in error.message


def test_every_truncation_is_a_typed_error() -> None:
    small = Gguf([("a", TEXT, "text"), ("b", ARRAY, (TEXT, ["x", ""])), ("c", U32, 7)], [("t", 0, (4,), bytes(16))])
    data = small.encode()
    size = read(data).size
    for end in range(size):
        assert refused(data[:end]).code in ("not_gguf", "truncated_gguf")
    assert read(data[:size]).size == size


def test_a_header_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        count = MAX_HEADER_SIZE // 4
        file.write(entry_of(text("key") + struct.pack("<IIQ", ARRAY, I32, count)))
        file.truncate(2 * MAX_HEADER_SIZE)
    with path.open("rb") as file, pytest.raises(ModelError) as caught:
        read_header(file)
    assert caught.value.code == "malformed_gguf"
    assert "too large" in caught.value.message


def test_a_file_that_cannot_be_read_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "closed.gguf"
    path.write_bytes(TINY)
    file = path.open("rb")
    file.close()
    with pytest.raises(ModelError) as caught:
        read_header(file)
    assert caught.value.code == "unreadable_model"


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error() -> None:
    class Shrinking(io.BytesIO):
        """Says one size, and has another by the time that it is read."""

        def read(self, size: int | None = -1, /) -> bytes:
            self.truncate(100)
            return super().read(size)

    with pytest.raises(ModelError) as caught:
        read_header(Shrinking(TINY))
    assert caught.value.code == "truncated_gguf"


@given(st.data())
def test_a_changed_byte_parses_or_is_a_typed_error(data: st.DataObject) -> None:
    damaged = bytearray(TINY[: read(TINY).data_offset])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(damaged) + TINY[len(damaged) :])
    except ModelError as error:
        assert error.code  # noqa: PT017 - it may parse as well


@pytest.mark.parametrize("shift", range(24))
def test_a_vocabulary_may_go_beyond_what_is_read_at_once(shift: int) -> None:
    """The reader takes a mebibyte at a time; ``shift`` moves its end over a token's length and its text."""
    padding = "x" * (2**20 - 200 + shift)
    tokens = [f"token {index:04}" for index in range(40)]
    metadata: list[tuple[str, int, Value]] = [
        ("padding", TEXT, padding),
        ("tokens", ARRAY, (TEXT, tokens)),
        ("behind", U32, 7),
    ]
    header = read(Gguf(metadata, [("t", 0, (4,), bytes(16))]).encode())
    assert header.metadata == {"padding": padding, "tokens": GgufArray("text", 40), "behind": 7}
    assert [tensor.name for tensor in header.tensors] == ["t"]


# --- Texts of an array ------------------------------------------------------------------------------------------------


def test_texts_of_an_array_are_read_by_their_index() -> None:
    tokens = [f"token {index:04}" for index in range(2 * CHUNK // 18)] + ["", "<｜User｜>"]
    data = Gguf([("padding", TEXT, "x" * 99), ("tokens", ARRAY, (TEXT, tokens)), ("behind", U32, 7)]).encode()
    array = read(data).metadata["tokens"]
    assert isinstance(array, GgufArray)
    last = len(tokens) - 1
    wanted = {0, 3, CHUNK // 18, last - 1, last}
    assert read_texts(io.BytesIO(data), array, wanted) == {index: tokens[index] for index in wanted}
    assert read_texts(io.BytesIO(data), array, [last + 1, 5]) == {5: tokens[5]}
    assert read_texts(io.BytesIO(data), array, ()) == {}
    broken = data.replace("<｜User｜>".encode(), b"\xff" * 12)
    assert read_texts(io.BytesIO(broken), array, [last]) == {last: "\ufffd" * 12}


def test_numbers_are_no_texts() -> None:
    data = Gguf([("numbers", ARRAY, (U32, [1, 2]))]).encode()
    array = read(data).metadata["numbers"]
    assert isinstance(array, GgufArray)
    assert read_texts(io.BytesIO(data), array, [0]) == {}


def test_a_file_that_is_another_by_now_is_a_typed_error() -> None:
    data = Gguf([("tokens", ARRAY, (TEXT, ["a", "b"]))]).encode()
    array = read(data).metadata["tokens"]
    assert isinstance(array, GgufArray)
    with pytest.raises(ModelError, match="truncated_gguf"):
        read_texts(io.BytesIO(data[: array.offset + 9]), array, [1])
    with pytest.raises(ModelError, match="truncated_gguf"):
        read_texts(io.BytesIO(data[: array.offset] + b"\xff" * 100), array, [0])
    closed = io.BytesIO(data)
    closed.close()
    with pytest.raises(ModelError, match="unreadable_model"):
        read_texts(closed, array, [0])


@pytest.mark.skipif(
    not VECTORS.is_dir(), reason="llama.cpp's vocabularies are not beside this repository: ../shared/vectors/gguf"
)
def test_a_real_vocabulary_is_read() -> None:
    with (VECTORS / "ggml-vocab-qwen2.gguf").open("rb") as file:
        header = read_header(file)
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray("text", 151936)
    assert header.metadata["tokenizer.ggml.merges"] == GgufArray("text", 151387)
    assert header.tensors == ()
