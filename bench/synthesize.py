"""Made-up models: a GGUF file with the shape of a real one, whose speed and memory are the real one's and whose text is
not.

Tensors, their types and the tokenizer are those of llama.cpp's Q4_K_M: what it computes and reads for a token depends
on them and not on the weights' values. The weights are a key stream of AES (NIST SP 800-38A section 6.5), a stream of
its own for each tensor, under scales that keep activations near 1. The same arguments give the same bytes. The
vocabulary and the merges come from a GGUF file, which needs no tensors; the chat template from a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from attestation.errors import StrongroomError
from attestation.gguf import DEFAULT_ALIGNMENT, MAGIC, GgufArray, ModelError, read_header
from bench.model_shapes import SHAPES, TYPES, Shape, Tensor, tensors

EXAMPLE: Final = "python -m bench.synthesize --shape 1.5b --out made-up.gguf"
VECTORS: Final = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "gguf"
VOCABULARY: Final = VECTORS / "ggml-vocab-qwen2.gguf"
TEMPLATE: Final = VECTORS / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens (llama.h, ``llama_token_type``)."""
_Q4_K_M: Final = 15
"""llama.h, ``llama_ftype``."""
_QUANTIZATION_VERSION: Final = 2
"""ggml.h, ``GGML_QNT_VERSION``."""
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9
_VALUES: Final[Mapping[int, struct.Struct]] = {
    kind: struct.Struct("<" + code) for kind, code in {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}.items()
}
_BLOCKS: Final = 8192
"""Blocks that are made at once: 1.2 or 1.7 MB."""
_PROGRESS_SECONDS: Final = 2.0

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


class SynthesisError(StrongroomError):
    """No model can be made of this. Codes: ``no_vocabulary``, ``unfit_vocabulary``, ``no_chat_template``,
    ``unwritable_model``.
    """

    exit_code = 2


# --- The vocabulary ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-pair encoding, as a GGUF file carries it."""

    pre: str
    """How text is cut before it is merged (``tokenizer.ggml.pre``)."""
    tokens: tuple[bytes, ...]
    kinds: tuple[int, ...]
    merges: tuple[bytes, ...]
    chat_template: str | None

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Raises ModelError for a file that is no GGUF, SynthesisError ``no_vocabulary`` and ``unfit_vocabulary``."""
        try:
            with path.open("rb") as file:
                header = read_header(file)
                file.seek(0)
                data = file.read(header.data_offset)
        except OSError as error:
            raise SynthesisError("no_vocabulary", f"{path}: {error.strerror}") from error
        wanted = {"tokenizer.ggml.tokens": "text", "tokenizer.ggml.token_type": "i32", "tokenizer.ggml.merges": "text"}
        arrays = {key: value.kind for key, value in header.metadata.items() if isinstance(value, GgufArray)}
        if header.text("tokenizer.ggml.model") != "gpt2" or not wanted.items() <= arrays.items():
            raise SynthesisError(
                "unfit_vocabulary",
                f"{path} carries no byte-pair encoding",
                expected=f"tokenizer.ggml.model gpt2, {', '.join(wanted)}",
            )
        tokens, kinds, merges = (_elements(data, key) for key in wanted)
        if len(tokens) != len(kinds):
            raise SynthesisError(
                "unfit_vocabulary", f"{path} has not one type for each token", expected=len(tokens), got=len(kinds)
            )
        pre = header.text("tokenizer.ggml.pre") or "default"
        types = tuple(int.from_bytes(kind, "little", signed=True) for kind in kinds)
        return cls(pre, tokens, types, merges, header.text("tokenizer.chat_template"))

    def fitted(self, shape: Shape) -> Vocabulary:
        """With the shape's special tokens, filled up to its size. Raises SynthesisError ``unfit_vocabulary``."""
        if len(self.tokens) > shape.vocabulary:
            raise SynthesisError(
                "unfit_vocabulary",
                f"the vocabulary is larger than that of {shape.name}: name a smaller one with --vocabulary",
                expected=f"<= {shape.vocabulary} tokens",
                got=len(self.tokens),
            )
        tokens, kinds = list(self.tokens), list(self.kinds)
        for index in range(shape.vocabulary):
            name = b"[PAD%d]" % index
            if index == len(tokens):
                tokens.append(name)
                kinds.append(UNUSED)
            elif tokens[index] == name:  # some converters call them user-defined, which costs time in every prompt
                kinds[index] = UNUSED
        for index, text in shape.special.items():
            tokens[index] = text.encode()
            kinds[index] = CONTROL if text.startswith(("<|", "<｜")) else USER_DEFINED
        pre = "deepseek-r1-qwen" if self.pre == "qwen2" else self.pre
        return Vocabulary(pre, tuple(tokens), tuple(kinds), self.merges, self.chat_template)


def _elements(data: bytes, key: str) -> tuple[bytes, ...]:
    """The elements of an array in a header that ``read_header`` has accepted."""
    at = 24
    while True:
        name, at = _text(data, at)
        kind = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if kind == _TEXT:
            _, at = _text(data, at)
        elif kind != _ARRAY:
            at += _VALUES[kind].size
        else:
            element, count = struct.unpack_from("<IQ", data, at)
            at += 12
            elements: list[bytes] = []
            if element == _TEXT:
                for _ in range(count):
                    text, at = _text(data, at)
                    elements.append(text)
            else:
                size = _VALUES[element].size
                elements.extend(data[at + index * size : at + (index + 1) * size] for index in range(count))
                at += count * size
            if name == key.encode():
                return tuple(elements)


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    end = at + 8 + int.from_bytes(data[at : at + 8], "little")
    return data[at + 8 : end], end


# --- The file ---------------------------------------------------------------------------------------------------------


def synthesize(
    shape: Shape, out: Path, *, vocabulary: Vocabulary, chat_template: str, seed: int, progress: Progress
) -> int:
    """Writes the model to ``out``, which is there as a whole or not at all, and returns its size in bytes. Memory is
    that of the vocabulary and some MB.

    Raises SynthesisError ``unfit_vocabulary``, ``unwritable_model``.
    """
    header = _header(shape, vocabulary.fitted(shape), chat_template)
    size = len(header) + sum(_padded(tensor.size) for tensor in tensors(shape))
    partial = out.with_name(out.name + ".partial")
    try:
        try:
            with partial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # what does not fit is said at once
                _write(file, header, shape, seed, lambda: progress(file.tell(), size))
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SynthesisError(
            "unwritable_model", f"{out}: {error.strerror}", expected=f"a file of {size} bytes"
        ) from error
    return size


def _write(file: BinaryIO, header: bytes, shape: Shape, seed: int, written: Callable[[], None]) -> None:
    file.write(header)
    for tensor in tensors(shape):
        for piece in _data(tensor, seed):
            file.write(piece)
            written()
        file.write(bytes(_padded(tensor.size) - tensor.size))


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _header(shape: Shape, vocabulary: Vocabulary, chat_template: str) -> bytes:
    """Everything before the tensors' data (ggml, docs/gguf.md, version 3)."""
    of = shape.architecture
    entries = [
        _text_entry("general.architecture", of),
        _text_entry("general.type", "model"),
        _text_entry("general.name", f"Made-up weights in the shape of {shape.name}"),
        _number("general.file_type", _U32, _Q4_K_M),
        _number("general.quantization_version", _U32, _QUANTIZATION_VERSION),
        _number(f"{of}.block_count", _U32, shape.layers),
        _number(f"{of}.context_length", _U32, shape.context),
        _number(f"{of}.embedding_length", _U32, shape.width),
        _number(f"{of}.feed_forward_length", _U32, shape.feed_forward),
        _number(f"{of}.attention.head_count", _U32, shape.heads),
        _number(f"{of}.attention.head_count_kv", _U32, shape.kv_heads),
        _number(f"{of}.attention.layer_norm_rms_epsilon", _F32, shape.rms_epsilon),
        _number(f"{of}.rope.freq_base", _F32, shape.rope_base),
        _number(f"{of}.rope.dimension_count", _U32, shape.width // shape.heads),
        _text_entry("tokenizer.ggml.model", "gpt2"),
        _text_entry("tokenizer.ggml.pre", vocabulary.pre),
        _array("tokenizer.ggml.tokens", _TEXT, [_sized(token) for token in vocabulary.tokens]),
        _array("tokenizer.ggml.token_type", _I32, [_VALUES[_I32].pack(kind) for kind in vocabulary.kinds]),
        _array("tokenizer.ggml.merges", _TEXT, [_sized(merge) for merge in vocabulary.merges]),
        _number("tokenizer.ggml.bos_token_id", _U32, shape.bos),
        _number("tokenizer.ggml.eos_token_id", _U32, shape.eos),
        _number("tokenizer.ggml.padding_token_id", _U32, shape.padding),
        _number("tokenizer.ggml.add_bos_token", _BOOL, True),
        _number("tokenizer.ggml.add_eos_token", _BOOL, False),
        _text_entry("tokenizer.chat_template", chat_template),
    ]
    described, offset = [], 0
    for tensor in tensors(shape):
        lengths = struct.pack(f"<I{len(tensor.dimensions)}Q", len(tensor.dimensions), *tensor.dimensions)
        described.append(_sized(tensor.name.encode()) + lengths + struct.pack("<IQ", TYPES[tensor.kind][0], offset))
        offset += _padded(tensor.size)
    header = b"".join([MAGIC, struct.pack("<IQQ", 3, len(described), len(entries)), *entries, *described])
    return header.ljust(_padded(len(header)), b"\0")


def _sized(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _number(key: str, kind: int, value: float) -> bytes:
    return _sized(key.encode()) + struct.pack("<I", kind) + _VALUES[kind].pack(value)


def _text_entry(key: str, value: str) -> bytes:
    return _sized(key.encode()) + struct.pack("<I", _TEXT) + _sized(value.encode())


def _array(key: str, kind: int, elements: list[bytes]) -> bytes:
    return _sized(key.encode()) + struct.pack("<IIQ", _ARRAY, kind, len(elements)) + b"".join(elements)


# --- The weights ------------------------------------------------------------------------------------------------------


def _data(tensor: Tensor, seed: int) -> Iterator[bytes | bytearray]:
    """A tensor's bytes, in pieces."""
    key = hashlib.sha256(f"strongroom made-up weights {seed} {tensor.name}".encode()).digest()[:16]
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    if tensor.kind == "F32":
        if tensor.name.endswith(".bias"):  # within 0.125 of 0
            values = [byte / 1024 - 0.125 for byte in stream.update(bytes(tensor.elements))]
        else:  # a norm's, or a frequency's: a factor
            values = [1.0] * tensor.elements
        yield struct.pack(f"<{tensor.elements}f", *values)
        return
    _, elements, block = TYPES[tensor.kind]
    fixed = _scales(tensor)
    left = tensor.elements // elements
    while left:
        count = min(left, _BLOCKS)
        piece = bytearray(stream.update(bytes(count * block)))
        for place, byte in fixed.items():
            piece[place::block] = bytes((byte,)) * count
        yield piece
        left -= count


def _scales(tensor: Tensor) -> dict[int, int]:
    """The bytes of a block that are not random, by their place: its scales in half precision, so that a row of weights
    has about the length 1, which is what keeps activations near 1 (ggml-common.h, ``block_q4_K``, ``block_q6_K``).
    """
    deviation = 1 / math.sqrt(tensor.dimensions[0])
    if tensor.kind == "Q4_K":
        # d * scale * q - dmin * min; scale and min of 6 bits, q of 4, all even: dmin = 7.5 d gives a mean of 0 and a
        # deviation of 258 d.
        d = deviation / 258
        halves = {0: d, 2: 7.5 * d}
    else:
        # d * scale * (q - 32); scale a signed byte, q of 6 bits, all even: a deviation of 1366 d.
        halves = {208: deviation / 1366}
    return {place + index: byte for place, half in halves.items() for index, byte in enumerate(struct.pack("<e", half))}


# --- The command ------------------------------------------------------------------------------------------------------


def _chat_template(path: Path | None, vocabulary: Vocabulary) -> str:
    """The one that is named, DeepSeek's, or the vocabulary's own. Raises SynthesisError ``no_chat_template``."""
    if path is None and not TEMPLATE.is_file() and vocabulary.chat_template is not None:
        return vocabulary.chat_template
    try:
        return (path or TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SynthesisError(
            "no_chat_template", f"{path or TEMPLATE} is no template ({type(error).__name__}): name one with --template"
        ) from error


class Narrator:
    """Says how far it is, once it takes longer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + _PROGRESS_SECONDS

    def __call__(self, done: int, total: int) -> None:
        if self._clock() >= self._next:
            print(f"synthesize: {done >> 20} of {total >> 20} MiB", file=sys.stderr, flush=True)
            self._next = self._clock() + _PROGRESS_SECONDS


def main(arguments: list[str] | None = None) -> int:
    """0 when the model is written, 2 when it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.synthesize",
        description="A model of random weights with the shape, the speed and the memory of a real one.",
        epilog=f"Example: {EXAMPLE}",
    )
    names = "; ".join(f"{key}: {shape.name}" for key, shape in SHAPES.items())
    parser.add_argument("--shape", required=True, choices=SHAPES, help=names)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the GGUF file; it is replaced")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="GGUF",
        help="a GGUF file with the tokenizer, tensors or none; 8b needs one with the 128256 tokens of Llama 3, or less "
        f"(default: ../shared/vectors/gguf/{VOCABULARY.name})",
    )
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help=f"the chat template (default: ../shared/vectors/gguf/{TEMPLATE.name})",
    )
    parser.add_argument("--seed", type=int, default=0, help="other weights (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    try:
        if options.vocabulary is None and not VOCABULARY.is_file():
            raise SynthesisError("no_vocabulary", "name a GGUF file that has the tokenizer with --vocabulary")
        vocabulary = Vocabulary.read(options.vocabulary or VOCABULARY)
        size = synthesize(
            shape,
            options.out,
            vocabulary=vocabulary,
            chat_template=_chat_template(options.template, vocabulary),
            seed=options.seed,
            progress=Narrator(),
        )
    except (SynthesisError, ModelError) as error:
        print(json.dumps({"error": error.as_json()}) if options.json else f"synthesize: {error}", file=sys.stderr)
        return error.exit_code
    made = list(tensors(shape))
    parameters = sum(tensor.elements for tensor in made)
    if options.json:
        print(json.dumps({"file": str(options.out), "size": size, "tensors": len(made), "parameters": parameters}))
    else:
        print(f"{options.out}: {size} bytes, {len(made)} tensors, {parameters / 1e9:.2f} B parameters made up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
