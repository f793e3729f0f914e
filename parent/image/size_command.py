"""``strongroom image size``: the memory and the CPUs of an enclave for a model, and where it could run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click

from attestation.eif import Architecture
from attestation.gguf import read_header
from attestation.model_memory import (
    DEFAULT_WORK,
    MAX_BATCH,
    MAX_CONTEXT,
    MAX_PARALLEL,
    MIN_BATCH,
    MIN_CONTEXT,
    KvType,
    ModelShape,
    Work,
)
from attestation.strict_json import Json
from parent.image.facts import ImageFacts, read_facts
from parent.image.instance_types import DATE, PARENT_CPUS, PARENT_MEMORY, PARENT_SHARE, SOURCE, InstanceType, fitting
from parent.image.sizing import ASSUMED_IMAGE, MIB, Plan, plan

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
GROUPS = 4
"""Sizes of instances that are shown to a person."""
DECIDED = {
    "running": "what stands in memory while it runs decides",
    "boot": "the boot decides",
    "nitro-cli": "the image's file decides",
}


@click.command()
@click.option("--model", type=FILE, required=True, help="The GGUF file. Of an encrypted model: what was encrypted.")
@click.option(
    "--context",
    type=click.IntRange(MIN_CONTEXT, MAX_CONTEXT),
    help=f"Tokens of one conversation, prompt and answer together.  [default: the image's, or {DEFAULT_WORK.context}]",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, MAX_PARALLEL),
    help=f"Conversations at once.  [default: the image's, or {DEFAULT_WORK.parallel}]",
)
@click.option(
    "--cells",
    type=click.IntRange(MIN_CONTEXT, MAX_CONTEXT * MAX_PARALLEL),
    help="Tokens of all conversations together: fewer than all contexts are shared.  [default: the image's, or all]",
)
@click.option(
    "--kv-type",
    type=click.Choice([kind.value for kind in KvType]),
    help=f"As what keys and values are kept.  [default: the image's, or {DEFAULT_WORK.kv_type}]",
)
@click.option(
    "--repack/--no-repack",
    default=None,
    help="Hold weights a second time, for speed.  [default: as in the image, or --repack]",
)
@click.option(
    "--batch",
    type=click.IntRange(MIN_BATCH, MAX_BATCH),
    help=f"Tokens in one decode step.  [default: the image's, or {DEFAULT_WORK.batch}]",
)
@click.option("--cpus", type=click.IntRange(1, 256), help="vCPUs of the enclave.  [default: 2 for each GiB of weights]")
@click.option("--image", type=FILE, help="The EIF.  [default: one of 300 MB, the most that ours may have]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def size(
    model: Path,
    cpus: int | None,
    image: Path | None,
    as_json: bool,
    **engine: Any,
) -> None:
    """Tell how much memory and how many CPUs an enclave needs.

    Reads the model's header alone. Every part is exact or an upper bound, and says which rule it follows. What the
    engine is to hold is what the image's enclave.toml says, unless an option names something else.

    \b
    Example:
      strongroom image size --model SmolLM2.gguf --context 2048 --parallel 8
      strongroom image size --model model.gguf --image enclave.eif --kv-type q8_0 --json

    Exit codes: 0 told, 2 the model or the image cannot be sized.
    """
    shape = read_shape(model)
    facts = ImageFacts(ASSUMED_IMAGE, Architecture.X86_64) if image is None else read_facts(image)
    needed = plan(shape, as_wanted(facts.work, **engine), facts.size, cpus=cpus)
    types = fitting(needed, facts.architecture)
    if as_json:
        click.echo(json.dumps(as_object(needed, types, facts, assumed=image is None)))
    else:
        show(needed, types, facts, assumed=image is None)


def as_wanted(
    work: Work,
    *,
    context: int | None = None,
    parallel: int | None = None,
    cells: int | None = None,
    kv_type: str | None = None,
    repack: bool | None = None,
    batch: int | None = None,
) -> Work:
    """``work``, and in it what somebody named. Cells are of contexts: with another number or size of these, they are as
    many as all of them take. Raises SizingError.
    """
    same = context is None and parallel is None
    return Work(
        context or work.context,
        parallel or work.parallel,
        cells or (work.cells if same else None),
        KvType(kv_type or work.kv_type),
        work.repack if repack is None else repack,
        batch or work.batch,
    )


def read_shape(model: Path) -> ModelShape:
    """Raises ModelError, SizingError."""
    with model.open("rb") as file:
        return ModelShape.of(read_header(file))


def show(needed: Plan, types: Sequence[InstanceType], facts: ImageFacts, *, assumed: bool) -> None:
    for part in needed.parts:
        click.echo(f"{part.name:<18}{mib(part.size):>8} MiB  {part.rule}")
    click.echo(f"{'while it runs':<18}{mib(needed.running):>8} MiB")
    click.echo(f"{'to boot':<18}{mib(needed.boot):>8} MiB  twice the unpacked image, and the archive")
    click.echo(f"{'for nitro-cli':<18}{mib(needed.demanded):>8} MiB  four times the image's file")
    if assumed:
        click.echo(f"no --image: {mib(facts.size.unpacked)} MiB assumed for it")
    giant, huge = needed.hugepages
    click.echo()
    click.echo(
        f"memory {needed.memory} MiB, as {giant} x 1 GiB + {huge} x 2 MiB ({DECIDED[needed.decided_by]}), "
        f"{needed.cpus} CPUs"
    )
    click.echo(f"  nitro-cli run-enclave --memory {needed.memory} --cpu-count {needed.cpus}")
    click.echo()
    if not types:
        click.echo(f"no instance type in the table ({facts.architecture}, {DATE}) is large enough")
        return
    click.echo(f"EC2 instance types, smallest first (as of {DATE}):")
    by_size = groupby(types, key=lambda each: (each.cpus, each.memory))
    for (cpus, memory), same in islice(by_size, GROUPS):
        click.echo(f"  {cpus:>3} vCPUs {memory // 1024:>4} GiB  {' '.join(each.name for each in same)}")
    click.echo(
        f"Left to the parent: {PARENT_CPUS} vCPUs, {PARENT_MEMORY // MIB} MiB and 1/{PARENT_SHARE} of the memory."
    )
    click.echo(f"Source: {SOURCE}")


def as_object(needed: Plan, types: Sequence[InstanceType], facts: ImageFacts, *, assumed: bool) -> dict[str, Json]:
    """Sizes of parts in bytes, of memory in MiB."""
    giant, huge = needed.hugepages
    return {
        "memory_mib": needed.memory,
        "cpus": needed.cpus,
        "decided_by": needed.decided_by,
        "hugepages": {"1GiB": giant, "2MiB": huge},
        "parts": [{"name": part.name, "bytes": part.size, "rule": part.rule} for part in needed.parts],
        "running_bytes": needed.running,
        "boot_bytes": needed.boot,
        "nitro_cli_bytes": needed.demanded,
        "image": {
            "assumed": assumed,
            "file_bytes": facts.size.file,
            "unpacked_bytes": facts.size.unpacked,
            "architecture": facts.architecture.value,
        },
        "instance_types": {
            "date": DATE,
            "source": SOURCE,
            "fitting": [{"name": each.name, "vcpus": each.cpus, "memory_mib": each.memory} for each in types],
        },
    }


def mib(size: int) -> int:
    """Rounded up."""
    return -(-size // MIB)
