"""An enclave image, and what differs in two, for people as text and for programs as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Final

from rich.console import Console
from rich.text import Text

from attestation.eif import Architecture, Section
from attestation.image_diff import (
    ChangedEntry,
    Field,
    ImageContents,
    ImageDifference,
    ListedEntry,
    RamdiskContents,
    RamdiskDifference,
    SectionDifference,
    registers_over,
)
from attestation.measure import EnclaveImage
from attestation.ramdisk import Kind
from attestation.reference import ZERO_PCR
from attestation.releases import time_text
from strongroom.release_report import show_table
from strongroom.render import printable, shorten, wrapped

MAX_SHOWN: Final = 20
"""Files of one list that are shown to people; of more, how many there are."""
SECTION_TITLES: Final = ("section", "offset", "bytes", "sha384", "measured in")


# --- One image ----------------------------------------------------------------------------------------------------


def image_as_json(contents: ImageContents, at: datetime) -> dict[str, object]:
    """Everything that an image says, for programs: digests in hexadecimal, times as RFC 3339."""
    image = contents.image
    return {
        "version": image.version,
        "architecture": image.architecture,
        "default_memory": image.default_memory,
        "default_cpus": image.default_cpus,
        "cmdline": image.cmdline,
        "kernel_length": image.kernel_length,
        "sections": [
            {"name": name, "offset": section.offset, "size": section.size, "sha384": section.sha384.hex()}
            for name, section in image.named_sections().items()
        ],
        "metadata": None if image.metadata is None else dict(image.metadata),
        "signature": _signature_as_json(image, at),
        "measurements": {f"PCR{index}": value.hex() for index, value in image.measurements.as_registers().items()},
        "ramdisks": [_ramdisk_as_json(disk) for disk in contents.ramdisks],
    }


def _signature_as_json(image: EnclaveImage, at: datetime) -> dict[str, object] | None:
    signer = image.signer
    if signer is None:
        return None
    return {
        "subject": signer.subject,
        "curve": signer.key.curve.name,
        "not_before": time_text(signer.not_before),
        "not_after": time_text(signer.not_after),
        "valid_now": signer.not_before <= at <= signer.not_after,
    }


def _ramdisk_as_json(disk: RamdiskContents) -> dict[str, object]:
    counts = Counter(listed.entry.kind for listed in disk.entries)
    return {
        "entries": len(disk.entries),
        "kinds": {kind.value: counts[kind] for kind in Kind if counts[kind]},
        "unpacked": sum(listed.entry.size for listed in disk.entries),
        "newest": max((listed.entry.mtime for listed in disk.entries), default=0),
        "problem": None if disk.problem is None else disk.problem.as_json(),
    }


def show_image(console: Console, contents: ImageContents, at: datetime, *, whole: bool) -> None:
    """For people. Digests are shortened, unless ``whole``; registers never are."""
    image = contents.image
    for title, value in _facts(image, at):
        first, *others = wrapped(console, value, first=f"{title:<14}", indent=" " * 14)
        for line in (first, *others):
            console.print(Text(line), soft_wrap=True)
    rows = [_section_row(name, section, whole) for name, section in image.named_sections().items()]
    show_table(console, SECTION_TITLES, rows)
    console.print()
    for index, disk in enumerate(contents.ramdisks):
        console.print(Text(f"ramdisk{index:<7}{_ramdisk_text(disk)}"), soft_wrap=True)
        if disk.problem is not None:
            console.print(
                Text(f"{'':14}cannot be listed further: {printable(str(disk.problem))}", "red"), soft_wrap=True
            )
    console.print()
    show_registers(console, image)


def show_registers(console: Console, image: EnclaveImage) -> None:
    """A register on a line, whole."""
    for index, value in image.measurements.as_registers().items():
        console.print(Text(f"PCR{index}  {value.hex()}"), soft_wrap=True)


def _facts(image: EnclaveImage, at: datetime) -> Iterator[tuple[str, str]]:
    yield "format", f"EIF version {image.version}, {image.architecture}"
    yield "defaults", f"{image.default_memory >> 20} MiB, {image.default_cpus} CPUs (not measured)"
    yield "kernel", kernel_text(image)
    yield "command line", image.cmdline or "(empty)"
    if image.metadata is None:
        yield "metadata", "none, in this version"
    else:
        build = image.metadata["BuildMetadata"]
        assert isinstance(build, dict)  # as it was read
        yield "name", f"{image.metadata['ImageName']} {image.metadata['ImageVersion']} (not measured)"
        yield "built", ", ".join(f"{name} {value}" for name, value in build.items())
    yield "signature", signature_text(image, at)


def kernel_text(image: EnclaveImage) -> str:
    """Whether the kernel's own length is that of its section."""
    size = image.named_sections()["kernel"].size
    if image.architecture is Architecture.AARCH64:
        return f"{size} bytes; an aarch64 kernel does not state the length of its file"
    if image.kernel_length is None:
        return f"{size} bytes, and no bzImage: it does not say where it ends"
    if image.kernel_length == size:
        return f"{size} bytes, as its header says"
    return f"{size} bytes, where its header says {image.kernel_length}: a part of the command line may stand behind it"


def signature_text(image: EnclaveImage, at: datetime) -> str:
    """Who signed the image, and until when the certificate is valid."""
    signer = image.signer
    if signer is None:
        return "none"
    period = f"{time_text(signer.not_before)} to {time_text(signer.not_after)}"
    now = "valid" if signer.not_before <= at <= signer.not_after else "NOT VALID NOW"
    return f"verified, by {signer.subject} ({signer.key.curve.name}); certificate {now}, {period}"


def _section_row(name: str, section: Section, whole: bool) -> tuple[str, ...]:
    measured = " ".join(_named(registers_over(name))) or "none"
    digest = section.sha384.hex()
    return name, str(section.offset), str(section.size), digest if whole else shorten(digest), measured


def _ramdisk_text(disk: RamdiskContents) -> str:
    counts = Counter(listed.entry.kind for listed in disk.entries)
    kinds = ", ".join(f"{kind} {counts[kind]}" for kind in Kind if counts[kind])
    return f"{kinds or 'nothing'}; {sum(listed.entry.size for listed in disk.entries)} bytes unpacked"


# --- Two images ---------------------------------------------------------------------------------------------------


def difference_as_json(found: ImageDifference) -> dict[str, object]:
    """For programs."""
    return {
        "same": found.is_empty,
        "header": [_field_as_json(each) for each in found.header],
        "sections": [_section_as_json(each) for each in found.sections],
        "sections_reordered": found.is_reordered,
        "boundaries_moved": {name: _named(registers) for name, registers in found.moved.items()},
        "registers": {
            f"PCR{index}": {"before": before.hex(), "after": after.hex()}
            for index, (before, after) in found.registers.items()
        },
    }


def _field_as_json(each: Field) -> dict[str, str]:
    name, before, after = each
    return {"name": name, "before": before, "after": after}


def _section_as_json(each: SectionDifference) -> dict[str, object]:
    return {
        "name": each.name,
        "before": None if each.before is None else {"size": each.before.size, "sha384": each.before.sha384.hex()},
        "after": None if each.after is None else {"size": each.after.size, "sha384": each.after.sha384.hex()},
        "registers": _named(each.registers),
        "files": None if each.files is None else _files_as_json(each.files),
    }


def _files_as_json(files: RamdiskDifference) -> dict[str, object]:
    return {
        "added": [_listed_as_json(each) for each in files.added],
        "removed": [_listed_as_json(each) for each in files.removed],
        "changed": [
            {"path": each.path, "fields": [_field_as_json(changed) for changed in each.fields]}
            for each in files.changed
        ],
        "reordered": files.is_reordered,
        "renumbered": files.is_renumbered,
        "packing_alone": files.is_packing_alone,
        "problems": [None if problem is None else problem.as_json() for problem in files.problems],
    }


def _listed_as_json(each: ListedEntry) -> dict[str, object]:
    entry = each.entry
    return {"path": entry.path, "kind": entry.kind, "size": entry.size, "sha384": each.sha384.hex()}


def show_difference(console: Console, found: ImageDifference, *, whole: bool) -> None:
    """For people: what differs, section by section, and then what that does to the registers."""
    if found.is_empty:
        console.print("the images are the same")
        return
    limit = None if whole else MAX_SHOWN
    for line, style in _difference_lines(found, limit):
        text = printable(line if whole else shorten(line))
        console.print(Text(text, style), soft_wrap=True)


def _difference_lines(found: ImageDifference, limit: int | None) -> Iterator[tuple[str, str]]:
    for name, before, after in found.header:
        yield f"header: {name} {before} -> {after} (not measured)", ""
    if found.is_reordered:
        yield "the sections stand in another order", ""
    for section in found.sections:
        registers = " ".join(_named(section.registers)) or "no register"
        yield f"{section.name}: {_section_text(section)}; in {registers}", "bold"
        if section.files is not None:
            yield from _files_lines(section.files, limit)
    yield "", ""
    if found.moved:
        same = " ".join(_named(sorted({index for registers in found.moved.values() for index in registers})))
        names = ", ".join(found.moved)
        yield f"A BOUNDARY WAS MOVED: {names} changed, and {same} did not", "bold red"
        yield "the same bytes are divided otherwise: the second image boots otherwise, and no document shows it", "red"
    elif not found.registers:
        yield "every register is the same", "green"
    for index, (one, other) in found.registers.items():
        yield f"PCR{index}: {_register_text(one)} -> {_register_text(other)}", "yellow"


def _named(registers: Iterable[int]) -> list[str]:
    return [f"PCR{index}" for index in registers]


def _section_text(section: SectionDifference) -> str:
    match section.before, section.after:
        case None, Section(size=size):
            return f"added, {size} bytes"
        case Section(size=size), None:
            return f"removed, {size} bytes"
        case before, after:
            assert before is not None  # a section is in one of them
            assert after is not None
            sizes = f"{before.size} bytes" if before.size == after.size else f"{before.size} -> {after.size} bytes"
            return f"changed, {sizes}"


def _files_lines(files: RamdiskDifference, limit: int | None) -> Iterator[tuple[str, str]]:
    added = [f"+ {_listed_text(each)}" for each in files.added]
    removed = [f"- {_listed_text(each)}" for each in files.removed]
    changed = [f"~ {_changed_text(each)}" for each in files.changed]
    for lines, style in ((added, "green"), (removed, "red"), (changed, "yellow")):
        yield from (("  " + line, style) for line in islice(lines, limit))
        if limit is not None and len(lines) > limit:
            yield f"  and {len(lines) - limit} more (--full)", style
    if files.is_reordered:
        yield "  the files come in another order", "yellow"
    if files.is_packing_alone:
        numbers = "; inode numbers differ" if files.is_renumbered else ""
        yield f"  the same files in the same order: they are packed otherwise{numbers}", "yellow"
    for which, problem in zip(("first", "second"), files.problems, strict=True):
        if problem is not None:
            yield f"  of the {which} image it cannot be listed further: {problem}", "red"


def _listed_text(each: ListedEntry) -> str:
    entry = each.entry
    content = f", {entry.size} bytes" if entry.kind is Kind.FILE else ""
    return f"{entry.path or '/'} ({entry.kind}{content})"


def _changed_text(each: ChangedEntry) -> str:
    return f"{each.path or '/'}: " + ", ".join(f"{name} {before} -> {after}" for name, before, after in each.fields)


def _register_text(value: bytes) -> str:
    return "none" if value == ZERO_PCR else value.hex()
