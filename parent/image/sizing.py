"""How much memory and how many CPUs an enclave needs: arithmetic over what a model's file says of itself.

Every part has its rule beside it. What llama.cpp allocates was held against its own log and against resident memory
(llama-cpp-python 0.3.36, CPU only): weights, key-value cache and repacked weights are exact, the others are
upper bounds.

An enclave has no disk and no swap: what does not fit ends it. Its root file system is unpacked into memory and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from attestation.errors import StrongroomError
from attestation.gguf import TENSOR_TYPES, GgufArray, GgufHeader, GgufTensor
from parent.config import DEFAULT_BATCH

MIB: Final = 1 << 20
GIB: Final = 1 << 30

HUGE_PAGE: Final = 2 * MIB
"""The driver takes memory in regions of this size or a multiple of it (Documentation/virt/ne_overview.rst); AWS's
allocator reserves pages of 1 GiB as far as they go and of 2 MiB for the rest."""
EIF_FACTOR: Final = 4
"""nitro-cli refuses an enclave with less memory than so many times its image's file."""
CELL_STEP: Final = 256
"""llama.cpp rounds the cells of a sequence up to it (``GGML_PAD`` in llama-context.cpp)."""
SERVER: Final = 128 * MIB
"""The server's process: 28 MiB measured at rest and 55 at its peak, and a full queue of requests of the largest size
(64 times 1 MiB)."""
ENGINE: Final = 32 * MIB
"""The engine's process without the model: 21 MiB measured. What it maps of the image is counted there."""
VOCABULARY_ENTRY: Final = 192
"""Bytes of a token or a merge in llama.cpp's tables: 133 to 177 measured on five vocabularies."""
KERNEL: Final = 64 * MIB
KERNEL_SHARE: Final = 32
"""The kernel itself, and one part in so many of the memory: its table of pages is one in 64, page tables and what the
allocator cannot use come on top."""
MAX_CPUS: Final = 32
"""More threads than 16 whole cores do not decode faster: memory is what they wait for."""
WEIGHTS_OF_A_CORE: Final = GIB
"""Every token reads all weights. A core of a current machine reads some 15 GiB/s (measured: 1.1 GB of weights, 30
tokens/s on two), so that one for each of these gives more than 10 tokens/s."""

UNSEEN_TOKEN: Final = 4096
"""A token's cache is taken for one part in so many of the weights: in files of 4 bits to a weight it is one in 4500 of
SmolLM2 with 135 million of them, and one in 7000 of Llama 2 with 7 billion, whose heads share no keys."""
UNSEEN_VOCABULARY: Final = 1 << 18
UNSEEN_EMBEDDING: Final = 1 << 13
UNSEEN_CONTEXT: Final = 1 << 20
"""More than models have that fit into an enclave."""

_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"})
"""What ggml keeps a second time in rows of eight on CPUs with AVX2, Q2_K with AVX-512 (repack.cpp)."""
_NOT_MULTIPLIED: Final = frozenset({"token_embd.weight"})
_TYPES: Final = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}


class SizingError(StrongroomError):
    """An enclave whose size cannot be told, or that could not run. Codes: ``unknown_shape``, ``context_exceeded``."""

    exit_code = 2


class KvType(StrEnum):
    """As what llama.cpp holds keys and values."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    def size(self, elements: int) -> int:
        """Bytes of a row."""
        block, size = _TYPES[self.value.upper()]
        return -(-elements // block) * size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how much memory it takes. Sizes are bytes."""

    architecture: str
    weights: int
    """The file."""
    repacked: int
    """What llama.cpp holds a second time in another order, for speed."""
    rows: tuple[tuple[int, int], ...]
    """Elements of a key and of a value, all heads together, of each layer."""
    embedding: int
    vocabulary: int
    entries: int
    """Tokens and merges."""
    trained_context: int

    @classmethod
    def of(cls, header: GgufHeader) -> ModelShape:
        """Raises SizingError ``unknown_shape``."""
        architecture = header.text("general.architecture") or ""
        tensors = {tensor.name: tensor for tensor in header.tensors}
        layers = range(_number(header, architecture, "block_count"))
        tokens, merges = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
        if not isinstance(tokens, GgufArray):
            raise _unknown("tokenizer.ggml.tokens", "an array")
        return cls(
            architecture,
            header.size,
            sum(tensor.size for tensor in header.tensors if _is_repacked(tensor, tensors)),
            tuple(_row(header, architecture, tensors, layer) for layer in layers),
            _number(header, architecture, "embedding_length"),
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
        entries = 2 * UNSEEN_VOCABULARY
        return cls("", weights, weights, ((row, row),), UNSEEN_EMBEDDING, UNSEEN_VOCABULARY, entries, UNSEEN_CONTEXT)


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine is to hold at once."""

    context: int
    """Tokens of a sequence, prompt and answer together."""
    parallel: int = 1
    """Sequences."""
    kv_type: KvType = KvType.F16
    batch: int = DEFAULT_BATCH


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bytes of an image: of its file, and of what the ramdisks in it hold when they are unpacked."""

    file: int
    unpacked: int


ASSUMED_IMAGE: Final = ImageSize(file=300_000_000, unpacked=300_000_000)
"""Where no image is named: the most that ours may have without weights."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the account."""

    name: str
    size: int
    """Bytes."""
    rule: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What an enclave needs. It is the largest of three: what stands in memory while it runs, what its boot takes, and
    what nitro-cli asks for.
    """

    parts: tuple[Part, ...]
    """Of what stands in memory while it runs, in bytes."""
    boot: int
    """Bytes: the root file system may take half of the memory, and the archive it comes from lies beside it."""
    demanded: int
    """Bytes that nitro-cli asks for."""
    cpus: int
    """Even: whole cores of two threads."""

    @property
    def running(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.parts)

    @property
    def memory(self) -> int:
        """MiB, as nitro-cli's ``--memory`` and the allocator's ``memory_mib``: whole huge pages."""
        return rounded(max(self.running, self.boot, self.demanded)) // MIB

    @property
    def decided_by(self) -> str:
        """Which of the three it is."""
        most = max(self.running, self.boot, self.demanded)
        return {self.running: "running", self.boot: "boot", self.demanded: "nitro-cli"}[most]

    @property
    def hugepages(self) -> tuple[int, int]:
        """Pages of 1 GiB and of 2 MiB, as AWS's allocator divides it."""
        size = self.memory * MIB
        return size // GIB, size % GIB // HUGE_PAGE


def plan(shape: ModelShape, work: Work, image: ImageSize = ASSUMED_IMAGE, *, cpus: int | None = None) -> Plan:
    """``cpus`` is what somebody wants; an odd number is made even. Raises SizingError ``context_exceeded``."""
    if work.context > shape.trained_context:
        raise SizingError(
            "context_exceeded",
            "the model was not made for such a context, and the engine would refuse it",
            expected=f"<= {shape.trained_context} tokens",
            got=work.context,
        )
    cells = rounded(work.context, CELL_STEP) * work.parallel
    batch = min(work.batch, work.context)
    repacked = "a second copy of the weights whose type ggml reorders"
    parts = (
        Part("weights", shape.weights, "the file, once: what was received is what llama.cpp maps"),
        Part("repacked weights", shape.repacked, repacked if shape.repacked else "none of a type that ggml reorders"),
        Part(
            "key-value cache",
            cells * sum(work.kv_type.size(key) + work.kv_type.size(value) for key, value in shape.rows),
            f"{work.parallel} x {cells // work.parallel} tokens, {len(shape.rows)} layers, {work.kv_type}",
        ),
        Part(
            "compute",
            4 * batch * (shape.vocabulary + 3 * shape.embedding)
            + 6 * batch * cells // work.parallel
            + 4 * shape.vocabulary * work.parallel,
            f"{batch} tokens a step: logits, activations and mask",
        ),
        Part("vocabulary", shape.entries * VOCABULARY_ENTRY, f"{shape.entries} tokens and merges"),
        Part("server", SERVER, "Python, and a full queue of requests"),
        Part("engine", ENGINE, "Python, without the model"),
        Part("image", image.unpacked, "the root file system, in memory"),
    )
    used = sum(part.size for part in parts)
    kernel = -(-(used + KERNEL) * KERNEL_SHARE // (KERNEL_SHARE - 1)) - used
    wanted = 2 * -(-shape.weights // WEIGHTS_OF_A_CORE) if cpus is None else cpus
    return Plan(
        (*parts, Part("kernel", kernel, f"{KERNEL // MIB} MiB and 1/{KERNEL_SHARE} of the memory")),
        boot=2 * image.unpacked + image.file,
        demanded=EIF_FACTOR * image.file,
        cpus=rounded(min(wanted, MAX_CPUS) if cpus is None else max(cpus, 1), 2),
    )


def rounded(size: int, step: int = HUGE_PAGE) -> int:
    """Up to the next multiple of ``step``."""
    return -(-size // step) * step


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
            got=f"architecture {architecture!a}",
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
    return SizingError("unknown_shape", f"the model does not say {key}", expected=expected)
