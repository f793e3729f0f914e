"""``strongroom model inspect``: what a model is, and what memory it takes to serve it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

import click

from attestation.envelope import MAGIC
from attestation.errors import StrongroomError
from attestation.gguf import GgufArray, GgufHeader, read_header, read_texts
from attestation.model_family import REASONING_END, REASONING_START, Family, ModelFamily, model_family
from attestation.model_memory import (
    DEFAULT_WORK,
    MAX_BATCH,
    MAX_CONTEXT,
    MAX_PARALLEL,
    MIB,
    MIN_BATCH,
    MIN_CONTEXT,
    EngineMemory,
    KvType,
    ModelShape,
    SizingError,
    Work,
    engine_memory,
    kernel_beside,
)
from attestation.strict_json import Json
from strongroom.options import json_option

ENDS: Final = {"eos": "end of text", "eot": "end of turn", "eom": "end of message"}
"""What a model's metadata name its end tokens."""
LONGEST_NAME: Final = 80
"""Characters of a text from the file that are shown."""


class ModelEncrypted(StrongroomError):
    """Nobody here can tell what is in it (code ``model_encrypted``)."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class EndToken:
    """A token with which an answer ends, by the model's own metadata."""

    kind: str
    id: int
    text: str | None


@dataclass(frozen=True, slots=True)
class Tensors:
    """Those of one type."""

    kind: str
    count: int
    parameters: int
    size: int
    """Bytes."""


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--context",
    type=click.IntRange(MIN_CONTEXT, MAX_CONTEXT),
    default=DEFAULT_WORK.context,
    show_default=True,
    help="Tokens of one conversation, prompt and answer together.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, MAX_PARALLEL),
    default=DEFAULT_WORK.parallel,
    show_default=True,
    help="Conversations at once.",
)
@click.option(
    "--cells",
    type=click.IntRange(MIN_CONTEXT, MAX_CONTEXT * MAX_PARALLEL),
    help="Tokens of all conversations together; they share fewer than all contexts.  [default: all contexts]",
)
@click.option(
    "--kv-type",
    type=click.Choice([kind.value for kind in KvType]),
    default=DEFAULT_WORK.kv_type.value,
    show_default=True,
    help="As what keys and values are kept.",
)
@click.option("--no-repack", is_flag=True, help="Without the second copy of weights that is there for speed.")
@click.option(
    "--batch",
    type=click.IntRange(MIN_BATCH, MAX_BATCH),
    default=DEFAULT_WORK.batch,
    show_default=True,
    help="Tokens in one decode step.",
)
@json_option
def inspect(
    file: Path,
    context: int,
    parallel: int,
    cells: int | None,
    kv_type: str,
    no_repack: bool,
    batch: int,
    as_json: bool,
) -> None:
    """Show what FILE, a GGUF model, is, and the memory that it takes.

    Reads the header alone. The options are the keys of [engine] in enclave.toml; an enclave refuses at boot what does
    not fit, by the same account.

    \b
    Example:
      strongroom model inspect SmolLM2.gguf --context 4096 --parallel 4
      strongroom model inspect model.gguf --context 4096 --cells 8192 --kv-type q8_0 --json

    Exit codes: 0 shown, 2 no GGUF file, a broken or an encrypted one, or one that was not made for this context.
    """
    work = Work(context, parallel, cells, KvType(kv_type), not no_repack, batch)
    with file.open("rb") as opened:
        header = read_plain(opened, file.name)
        ends = list(end_tokens(header, opened))
    try:
        memory = engine_memory(ModelShape.of(header), work)
        unknown = None
    except SizingError as error:
        if error.code != "unknown_shape":
            raise
        memory, unknown = None, error
    if as_json:
        click.echo(json.dumps(as_object(header, ends, memory, unknown)))
    else:
        for line in (*described(header, ends), "", *accounted(memory, unknown)):
            click.echo(line)


def read_plain(file: BinaryIO, name: str) -> GgufHeader:
    """Raises ModelError, ModelEncrypted."""
    if file.read(len(MAGIC)) == MAGIC:
        raise ModelEncrypted(
            "model_encrypted",
            f"{shown(name)} is encrypted: what it is, only the enclave sees that gets its key",
            expected="the file that it was made from",
        )
    return read_header(file)


def end_tokens(header: GgufHeader, file: BinaryIO) -> Iterator[EndToken]:
    """Raises ModelError."""
    numbers = {kind: header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ENDS}
    ids = {kind: number for kind, number in numbers.items() if isinstance(number, int) and number >= 0}
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    texts = read_texts(file, tokens, set(ids.values())) if isinstance(tokens, GgufArray) else {}
    for kind, number in ids.items():
        yield EndToken(kind, number, texts.get(number))


def tensors_by_type(header: GgufHeader) -> list[Tensors]:
    """Largest first."""
    found: dict[str, Tensors] = {}
    for tensor in header.tensors:
        sum_ = found.get(tensor.kind, Tensors(tensor.kind, 0, 0, 0))
        parameters = sum_.parameters + prod(tensor.dimensions)
        found[tensor.kind] = Tensors(tensor.kind, sum_.count + 1, parameters, sum_.size + tensor.size)
    return sorted(found.values(), key=lambda each: -each.size)


def described(header: GgufHeader, ends: list[EndToken]) -> Iterator[str]:
    """Lines for people."""
    by_type, architecture = tensors_by_type(header), header.text("general.architecture")
    template, trained = header.text("tokenizer.chat_template"), _trained(header)
    tokens, merges = (_count(header, key) for key in ("tokens", "merges"))
    name = header.text("general.name")
    if name is not None:
        yield f"{'name':<18}{shown(name)}"
    yield f"{'architecture':<18}{'not said' if architecture is None else shown(architecture)}"
    yield f"{'parameters':<18}{_rounded(sum(each.parameters for each in by_type))} in {len(header.tensors)} tensors"
    for each in by_type:
        yield f"  {each.kind:<16}{_rounded(each.parameters):>8}, {_mib(each.size)} MiB, {each.count} of the tensors"
    yield f"{'trained context':<18}{'not said' if trained is None else f'{trained} tokens'}"
    yield f"{'tokenizer':<18}{tokens} tokens, {merges} merges"
    yield f"{'chat template':<18}{'none' if template is None else f'{len(template)} characters'}"
    read = family_of(header)
    known = read.family is not Family.UNKNOWN
    yield f"{'family':<18}{read.family}{'' if known else ': plain text, but for what its chat template shows'}"
    yield f"{'reasoning':<18}{f'between {REASONING_START} and {REASONING_END}' if read.reasons else 'none'}"
    by_itself = "only where tool_choice asks for one" if read.calls is None else f"in the way of {read.calls}"
    yield f"{'tool calls':<18}{by_itself}"
    if not ends:
        yield f"{'end tokens':<18}not said"
    for token in ends:
        text = "" if token.text is None else f" {shown(token.text)}"
        yield f"{ENDS[token.kind]:<18}{token.id}{text}"


def family_of(header: GgufHeader) -> ModelFamily:
    """With its own chat template: how an enclave reads its answers."""
    template = header.text("tokenizer.chat_template") or ""
    return model_family(header.text("general.architecture"), header.text("tokenizer.ggml.pre"), template)


def accounted(memory: EngineMemory | None, unknown: SizingError | None) -> Iterator[str]:
    """Lines for people."""
    if memory is None:
        yield f"its memory cannot be told: {unknown}"
        return
    for part in memory.parts:
        yield f"{part.name:<18}{_mib(part.size):>8} MiB  {part.rule}"
    yield f"{'the engine':<18}{_mib(memory.resident):>8} MiB  resident at its peak, weights included"
    yield f"{'with its server':<18}{_mib(memory.total):>8} MiB"
    enclave = _mib(memory.total + kernel_beside(memory.total).size)
    yield f"{'an enclave':<18}{enclave:>8} MiB  its kernel included; its image comes on top (strongroom image size)"


def as_object(
    header: GgufHeader, ends: list[EndToken], memory: EngineMemory | None, unknown: SizingError | None
) -> dict[str, Json]:
    """Sizes in bytes."""
    by_type, template, read = tensors_by_type(header), header.text("tokenizer.chat_template"), family_of(header)
    return {
        "name": header.text("general.name"),
        "architecture": header.text("general.architecture"),
        "parameters": sum(each.parameters for each in by_type),
        "tensors": [
            {"type": each.kind, "count": each.count, "parameters": each.parameters, "bytes": each.size}
            for each in by_type
        ],
        "file_bytes": header.size,
        "trained_context": _trained(header),
        "tokens": _count(header, "tokens"),
        "merges": _count(header, "merges"),
        "chat_template": template is not None,
        "family": str(read.family),
        "reasons": read.reasons,
        "tool_calls": None if read.calls is None else str(read.calls),
        "end_tokens": [{"kind": each.kind, "id": each.id, "text": each.text} for each in ends],
        "memory": None if memory is None else memory_as_object(memory),
        "memory_unknown": None if unknown is None else {**unknown.as_json()},
    }


def memory_as_object(memory: EngineMemory) -> dict[str, Json]:
    """In bytes."""
    return {
        "parts": [{"name": part.name, "bytes": part.size, "rule": part.rule} for part in memory.parts],
        "engine_bytes": memory.resident,
        "engine_and_server_bytes": memory.total,
        "enclave_bytes_beside_its_image": memory.total + kernel_beside(memory.total).size,
    }


def shown(text: str) -> str:
    """One short line: a file may say anything."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _trained(header: GgufHeader) -> int | None:
    value = header.metadata.get(f"{header.text('general.architecture')}.context_length")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _count(header: GgufHeader, key: str) -> int:
    array = header.metadata.get(f"tokenizer.ggml.{key}")
    return array.count if isinstance(array, GgufArray) else 0


def _rounded(parameters: int) -> str:
    if parameters < 1_000_000:
        return str(parameters)
    return f"{parameters / 1e9:.2f} B" if parameters >= 1_000_000_000 else f"{parameters / 1e6:.1f} M"


def _mib(size: int) -> int:
    return -(-size // MIB)
