"""Why two images have different registers: which sections differ, and which files in which ramdisk.

An auditor who builds an image anew and gets other registers has 96 digits that say nothing. :func:`read_contents` lists
what is in an image, :func:`compare` says what is not the same in another, and which registers that changes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, TypeAlias

from attestation.eif import ImageError, Section, SectionType
from attestation.measure import EnclaveImage, Progress, SectionReader
from attestation.ramdisk import Kind, RamdiskEntry, RamdiskError, RamdiskReader, Unpacking
from attestation.reference import PCR_APPLICATION, PCR_BOOT, PCR_IMAGE, PCR_SIGNER, ZERO_PCR, digest_text


@dataclass(frozen=True, slots=True)
class ListedEntry:
    """An entry of a ramdisk, with what is in it."""

    entry: RamdiskEntry
    """What its header says."""
    sha384: bytes
    """Of its content, 48 bytes."""


@dataclass(frozen=True, slots=True)
class RamdiskContents:
    """What is in one ramdisk."""

    entries: tuple[ListedEntry, ...]
    """In the order of the archives; up to what cannot be read, where there is such."""
    problem: ImageError | None
    """Why it cannot be listed to its end."""


@dataclass(frozen=True, slots=True)
class ImageContents:
    """An image with all that its ramdisks hold."""

    image: EnclaveImage
    """What was measured."""
    ramdisks: tuple[RamdiskContents, ...]
    """In the order of the file."""


def read_contents(image: EnclaveImage, file: BinaryIO, *, progress: Progress | None = None) -> ImageContents:
    """Lists the ramdisks of ``image``, which was measured from ``file``: one that can seek.

    What cannot be listed, by RamdiskError, is a problem of its ramdisk. Raises ImageError ``changed_image`` for a file
    that is another one by now, and what ``file.read`` raises.
    """
    sections = [section for section in image.sections if section.type is SectionType.RAMDISK]
    total, before, ramdisks = sum(section.size for section in sections), 0, []
    unpacking = Unpacking()
    for section in sections:
        data = SectionReader(file, section, progress=progress, before=before, total=total)
        ramdisks.append(_listed(data, section, unpacking))
        data.finish()
        before += section.size
    return ImageContents(image, tuple(ramdisks))


def _listed(data: SectionReader, section: Section, unpacking: Unpacking) -> RamdiskContents:
    entries: list[ListedEntry] = []
    reader = RamdiskReader(data, section.size, offset=section.data_offset, unpacking=unpacking)
    try:
        for entry in reader:
            digest = hashlib.sha384()
            for piece in reader.content():
                digest.update(piece)
            entries.append(ListedEntry(entry, digest.digest()))
    except RamdiskError as error:
        return RamdiskContents(tuple(entries), error)
    return RamdiskContents(tuple(entries), None)


Field: TypeAlias = tuple[str, str, str]
"""What differs, before and after."""


@dataclass(frozen=True, slots=True)
class ChangedEntry:
    """One name in both ramdisks, and not the same."""

    path: str
    """As in :class:`~attestation.ramdisk.RamdiskEntry`."""
    fields: tuple[Field, ...]
    """Of kind, content, size, target, mode, owner, group, time, device, links, first name and content of all names
    those that differ, in words.
    """


@dataclass(frozen=True, slots=True)
class RamdiskDifference:
    """How the content of two ramdisks differs. Where nothing here does, the same files are packed otherwise."""

    added: tuple[ListedEntry, ...]
    """In the second alone, in its order."""
    removed: tuple[ListedEntry, ...]
    """In the first alone, in its order."""
    changed: tuple[ChangedEntry, ...]
    """In both, in the order of the first."""
    is_reordered: bool
    """Whether what is in both comes in another order."""
    is_renumbered: bool
    """Whether files that are the same have other inode numbers."""
    problems: tuple[ImageError | None, ImageError | None]
    """Why the first, or the second, cannot be listed to its end."""

    @property
    def is_packing_alone(self) -> bool:
        """Whether the files are the same, in the same order: then compression, padding or numbers differ."""
        return not (self.added or self.removed or self.changed or self.is_reordered or any(self.problems))


@dataclass(frozen=True, slots=True)
class SectionDifference:
    """A section that is not the same in both images, or is in one alone."""

    name: str
    """Its type, and of a ramdisk its number, from 0."""
    before: Section | None
    """In the first image."""
    after: Section | None
    """In the second."""
    registers: tuple[int, ...]
    """Those that are over it: indexes of 0 to 31."""
    files: RamdiskDifference | None
    """Of a ramdisk that both images have."""


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """What is not the same in two images."""

    header: tuple[Field, ...]
    """Of the header's fields, which no register is over, those that differ, in words."""
    sections: tuple[SectionDifference, ...]
    """Those that differ, in the order of the first, and then of the second."""
    is_reordered: bool
    """Whether sections that both have stand in another order."""
    registers: Mapping[int, tuple[bytes, bytes]]
    """By index of 0 to 31 the values of 48 bytes that differ, before and after; of one that has none, zeros."""

    @property
    def is_empty(self) -> bool:
        """Whether the images are the same to the last byte."""
        return not (self.header or self.sections or self.is_reordered or self.registers)

    @property
    def moved(self) -> Mapping[str, tuple[int, ...]]:
        """The sections that differ although registers over them do not, and those registers.

        A register is over sections one behind the other, without their lengths: then the end of one of them was moved.
        The registers cannot tell the two images apart, and they boot otherwise.
        """
        same = {
            each.name: tuple(index for index in each.registers if index not in self.registers)
            for each in self.sections
            if each.name != _SIGNATURE  # of which the signer alone is measured
        }
        return {name: registers for name, registers in same.items() if registers}


_SIGNATURE: Final = "signature"
_BOOTS, _APPLIES = (PCR_IMAGE, PCR_BOOT), (PCR_IMAGE, PCR_APPLICATION)
_REGISTERS: Final = {
    "kernel": _BOOTS,
    "cmdline": _BOOTS,
    "ramdisk0": _BOOTS,
    _SIGNATURE: (PCR_SIGNER,),
    "metadata": (),
}
"""By a section's name. All other ramdisks are the application's."""


def registers_over(section: str) -> tuple[int, ...]:
    """The registers that the section of this name is measured in (PROTOCOL.md section 4)."""
    return _REGISTERS.get(section, _APPLIES)


def compare(before: ImageContents, after: ImageContents) -> ImageDifference:
    """What is in ``after`` not as it is in ``before``."""
    ours, theirs = before.image.named_sections(), after.image.named_sections()
    both = [name for name in ours if name in theirs]
    different = [
        name
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if name not in both or ours[name].sha384 != theirs[name].sha384
    ]
    disks = [{f"ramdisk{index}": each for index, each in enumerate(image.ramdisks)} for image in (before, after)]
    return ImageDifference(
        header=tuple(_header(before.image, after.image)),
        sections=tuple(
            SectionDifference(
                name,
                ours.get(name),
                theirs.get(name),
                registers_over(name),
                _files(disks[0][name], disks[1][name]) if all(name in disk for disk in disks) else None,
            )
            for name in different
        ),
        is_reordered=both != [name for name in theirs if name in ours],
        registers=_registers(before.image, after.image),
    )


def _header(before: EnclaveImage, after: EnclaveImage) -> Iterator[Field]:
    for name, one, other in (
        ("version", before.version, after.version),
        ("architecture", before.architecture, after.architecture),
        ("default memory", f"{before.default_memory} bytes", f"{after.default_memory} bytes"),
        ("default CPUs", before.default_cpus, after.default_cpus),
    ):
        if one != other:
            yield name, str(one), str(other)


def _registers(before: EnclaveImage, after: EnclaveImage) -> dict[int, tuple[bytes, bytes]]:
    ours, theirs = before.measurements.as_registers(), after.measurements.as_registers()
    values = {index: (ours.get(index, ZERO_PCR), theirs.get(index, ZERO_PCR)) for index in sorted({*ours, *theirs})}
    return {index: (one, other) for index, (one, other) in values.items() if one != other}


def _files(before: RamdiskContents, after: RamdiskContents) -> RamdiskDifference:
    ours, theirs = _by_place(before), _by_place(after)
    both = [place for place in ours if place in theirs]
    linked = _linked(before), _linked(after)
    changed = (
        ChangedEntry(place[0], tuple(_fields(_said(ours[place], linked[0]), _said(theirs[place], linked[1]))))
        for place in both
    )
    return RamdiskDifference(
        added=tuple(listed for place, listed in theirs.items() if place not in ours),
        removed=tuple(listed for place, listed in ours.items() if place not in theirs),
        changed=tuple(each for each in changed if each.fields),
        is_reordered=both != [place for place in theirs if place in ours],
        is_renumbered=any(ours[place].entry.inode != theirs[place].entry.inode for place in both),
        problems=(before.problem, after.problem),
    )


def _by_place(contents: RamdiskContents) -> dict[tuple[str, int], ListedEntry]:
    """By path, and how often it was there before: a folder may come several times, the last with its mode and owner."""
    seen: Counter[str] = Counter()
    placed = {}
    for listed in contents.entries:
        path = listed.entry.path
        placed[path, seen[path]] = listed
        seen[path] += 1
    return placed


_Inode: TypeAlias = tuple[int, tuple[int, int, int]]
"""What the names of one file have in common: the archive, and the number."""


def _inode(entry: RamdiskEntry) -> _Inode | None:
    """None where there is but one name, whatever the number is."""
    return (entry.archive, entry.inode) if entry.kind is Kind.FILE and entry.links > 1 else None


def _linked(contents: RamdiskContents) -> dict[_Inode, tuple[str, bytes]]:
    """The first name of each file with several, and the digest of what all of them have when it is unpacked: the last
    content that is not empty.
    """
    files: dict[_Inode, tuple[str, bytes]] = {}
    for listed in contents.entries:
        inode = _inode(listed.entry)
        if inode is not None:
            first, content = files.get(inode, (listed.entry.path, listed.sha384))
            files[inode] = first, listed.sha384 if listed.entry.size else content
    return files


def _fields(before: Iterator[tuple[str, str]], after: Iterator[tuple[str, str]]) -> Iterator[Field]:
    for (name, one), (_, other) in zip(before, after, strict=True):
        if one != other:
            yield name, one, other


def _said(listed: ListedEntry, linked: Mapping[_Inode, tuple[str, bytes]]) -> Iterator[tuple[str, str]]:
    entry = listed.entry
    inode = _inode(entry)
    first, content = ("none", "none") if inode is None else (linked[inode][0], digest_text(linked[inode][1]))
    yield "kind", entry.kind
    yield "content", digest_text(listed.sha384)
    yield "size", f"{entry.size} bytes"
    yield "target", entry.target or "none"
    yield "mode", f"{entry.mode:04o}"
    yield "owner", str(entry.uid)
    yield "group", str(entry.gid)
    yield "time", str(entry.mtime)
    yield "device", "none" if entry.device is None else f"{entry.device[0]}:{entry.device[1]}"
    yield "links", str(entry.links)
    yield "first name", first
    yield "content of all names", content
