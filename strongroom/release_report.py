"""A release history for people, as two tables, and for programs, as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from attestation.reference import digest_text
from attestation.releases import Entry, ReleasedImage, ReleaseHistory, time_text
from strongroom.render import printable, shorten

RELEASE_TITLES = ("release", "PCR0", "PCR1", "PCR2", "PCR8", "image", "commit", "models", "configurations")
ENTRY_TITLES = ("entry", "issued", "expires", "what it changed")
_GAP = "  "


def show_history(console: Console, history: ReleaseHistory, *, whole: bool) -> None:
    """The releases that count, a line each, and then what each entry changed. Digests are shortened, unless ``whole``;
    the key and the head, which somebody may want to copy, never are.
    """
    current = history.current
    for title, value in (
        ("product", printable(current.name)),
        ("key", str(history.key)),
        ("head", f"entry {current.sequence}, {digest_text(history.head.digest)}"),
        ("expires", time_text(history.expires)),
    ):
        console.print(Text(f"{title:<8}").append(value), soft_wrap=True)
    show_table(console, RELEASE_TITLES, [_release_row(each, whole) for each in current.releases])
    if not current.releases:
        console.print("no release counts: all have been taken back", soft_wrap=True)
    rows = [
        (str(entry.statement.sequence), time_text(entry.statement.issued), time_text(entry.statement.expires), change)
        for entry, change in zip(history.entries, _changes(history.entries), strict=True)
    ]
    show_table(console, ENTRY_TITLES, rows)


def as_json_object(history: ReleaseHistory) -> dict[str, object]:
    current = history.current
    return {
        "name": current.name,
        "key": str(history.key),
        "sequence": current.sequence,
        "digest": digest_text(history.head.digest),
        "issued": time_text(current.issued),
        "expires": time_text(current.expires),
        "releases": [
            {
                "name": release.name,
                "pcrs": {str(index): value.hex() for index, value in release.pcrs.as_registers().items()},
                "image": None if release.image is None else digest_text(release.image),
                "source": {"repository": release.source.repository, "commit": release.source.commit},
                "models": [digest_text(digest) for digest in release.models],
                "configurations": [digest_text(digest) for digest in release.configurations],
            }
            for release in current.releases
        ],
        "entries": [
            {
                "sequence": entry.statement.sequence,
                "digest": digest_text(entry.digest),
                "issued": time_text(entry.statement.issued),
                "expires": time_text(entry.statement.expires),
                "releases": [release.name for release in entry.statement.releases],
            }
            for entry in history.entries
        ],
    }


def _release_row(release: ReleasedImage, whole: bool) -> tuple[str, ...]:
    registers = release.pcrs.as_registers()
    values = (
        *(registers[index].hex() if index in registers else "unsigned" for index in (0, 1, 2, 8)),
        "not stated" if release.image is None else release.image.hex(),
        release.source.commit,
        ", ".join(digest.hex() for digest in release.models) or "none",
        ", ".join(digest.hex() for digest in release.configurations) or "none",
    )
    return (printable(release.name), *(value if whole else shorten(value) for value in values))


def _changes(entries: Sequence[Entry]) -> Iterator[str]:
    before: dict[str, ReleasedImage] = {}
    for entry in entries:
        now = {release.name: release for release in entry.statement.releases}
        changes = [f"+ {name}" for name in now if name not in before]
        changes += [f"- {name}" for name in before if name not in now]
        changes += [f"~ {name}" for name in now if name in before and now[name] != before[name]]
        yield printable(", ".join(changes)) or "the expiry"
        before = now


def show_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A row on a line; where that does not fit, a row is a paragraph, and each of its cells a line."""
    sizes = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    if sum(sizes) + len(_GAP) * (len(sizes) - 1) > console.width:
        _show_paragraphs(console, titles, rows)
        return
    console.print()
    for row in (titles, *rows):
        line = _GAP.join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip()
        console.print(Text(line, "bold" if row is titles else ""), soft_wrap=True)


def _show_paragraphs(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    size = max(map(len, titles))
    for row in rows:
        console.print()
        for title, cell in zip(titles, row, strict=True):
            style = "bold" if title is titles[0] else ""
            for number, part in enumerate(cell.split(", ")):
                console.print(Text(f"{'' if number else title:<{size}}{_GAP}{part}", style), soft_wrap=True)
