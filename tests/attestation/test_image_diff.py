"""Two images: what differs, down to a file's owner, and which registers that changes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation import ramdisk
from attestation.eif import ImageError
from attestation.image_diff import ImageContents, ImageDifference, compare, read_contents, registers_over
from attestation.measure import measure_image
from tests.cpio_files import Member, archive, device, folder, link, packed
from tests.eif_files import CMDLINE, KERNEL, METADATA, METADATA_FIELDS, RAMDISK, Eif, Part, Signer, image

BOOT = (folder("dev"), Member("init", b"init"), Member("nsm.ko", b"module"))
ROOT = (folder("rootfs"), Member("rootfs/a", b"one"), link("rootfs/b", "a"), device("rootfs/null", 1, 3), Member("cmd"))


def made(boot: Sequence[Member] = BOOT, root: Sequence[Member] = ROOT) -> Eif:
    return image(ramdisks=[packed(archive(*boot)), packed(archive(*root))])


def contents(of: Eif) -> ImageContents:
    file = io.BytesIO(of.encode())
    return read_contents(measure_image(file), file)


def difference(before: Eif, after: Eif) -> ImageDifference:
    return compare(contents(before), contents(after))


def files(before: Sequence[Member], after: Sequence[Member]) -> list[tuple[str, str, str, str]]:
    """What changed in the files of the root, a line for each field."""
    [section] = difference(made(root=before), made(root=after)).sections
    assert (section.name, section.registers) == ("ramdisk1", (0, 2))
    assert section.files is not None
    return [(each.path, *field) for each in section.files.changed for field in each.fields]


def test_contents_are_listed_with_their_digests() -> None:
    found = contents(made())
    assert [[listed.entry.path for listed in disk.entries] for disk in found.ramdisks] == [
        ["dev", "init", "nsm.ko"],
        ["rootfs", "rootfs/a", "rootfs/b", "rootfs/null", "cmd"],
    ]
    assert found.ramdisks[1].entries[1].sha384 == hashlib.sha384(b"one").digest()
    assert all(disk.problem is None for disk in found.ramdisks)


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_NAMES"])
def test_what_is_held_of_an_image_is_bounded_over_all_its_ramdisks(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sum(len(str(member.name)) + 1 for member in (*BOOT, *ROOT)) + len("a")
    monkeypatch.setattr(ramdisk, limit, (len(BOOT) + len(ROOT) if limit == "MAX_ENTRIES" else names) - 1)
    first, second = contents(made()).ramdisks
    assert first.problem is None
    assert second.problem is not None
    assert (second.problem.code, len(second.entries)) == ("ramdisk_too_large", len(ROOT) - 1)


def test_progress_is_told_over_all_ramdisks() -> None:
    file, told = io.BytesIO(made().encode()), list[tuple[int, int]]()
    found = measure_image(file)
    read_contents(found, file, progress=lambda done, total: told.append((done, total)))
    size = sum(section.size for section in found.sections if section.type == RAMDISK)
    assert told == sorted(told)
    assert told[-1] == (size, size)


def test_the_same_is_the_same() -> None:
    found = difference(made(), made())
    assert found.is_empty
    assert found == ImageDifference((), (), False, {})


def test_a_changed_file_is_named_with_the_registers_that_it_changes() -> None:
    found = difference(made(), made(root=(*ROOT[:1], Member("rootfs/a", b"two!"), *ROOT[2:])))
    assert not found.is_empty
    assert list(found.registers) == [0, 2]
    [section] = found.sections
    assert section.files is not None
    [changed] = section.files.changed
    old, new = (f"sha384:{hashlib.sha384(data).hexdigest()}" for data in (b"one", b"two!"))
    assert (changed.path, changed.fields) == ("rootfs/a", (("content", old, new), ("size", "3 bytes", "4 bytes")))
    assert not section.files.is_packing_alone


@pytest.mark.parametrize(
    ("index", "member", "field"),
    [
        (1, replace(ROOT[1], mode=0o100755), ("rootfs/a", "mode", "0644", "0755")),
        (1, replace(ROOT[1], uid=5), ("rootfs/a", "owner", "0", "5")),
        (1, replace(ROOT[1], gid=5), ("rootfs/a", "group", "0", "5")),
        (1, replace(ROOT[1], mtime=5), ("rootfs/a", "time", "0", "5")),
        (3, device("rootfs/null", 1, 5), ("rootfs/null", "device", "1:3", "1:5")),
    ],
)
def test_each_field_of_a_file(index: int, member: Member, field: tuple[str, str, str, str]) -> None:
    assert files(ROOT, (*ROOT[:index], member, *ROOT[index + 1 :])) == [field]


def test_what_several_names_of_a_file_stand_for_in_the_end() -> None:
    def root(number: int) -> list[Member]:
        names = Member("rootfs/login", inode=number), Member("rootfs/good", b"good"), Member("rootfs/evil", b"evil")
        return [ROOT[0], *(replace(each, links=2, inode=each.inode + (each.data == b"evil")) for each in names)]

    good, evil = (f"sha384:{hashlib.sha384(data).hexdigest()}" for data in (b"good", b"evil"))
    assert files(root(1), root(2)) == [
        ("rootfs/login", "content of all names", good, evil),
        ("rootfs/good", "first name", "rootfs/login", "rootfs/good"),
        ("rootfs/evil", "first name", "rootfs/evil", "rootfs/login"),
    ]


def test_where_an_archive_ends_its_links_do() -> None:
    names = (Member("rootfs/a", b"one", links=2), Member("rootfs/b", links=2))
    whole = archive(ROOT[0], *names)
    parted = archive(ROOT[0], names[0]) + archive(names[1])
    found = difference(image(ramdisks=[b"", whole]), image(ramdisks=[b"", parted])).sections[0].files
    assert found is not None
    assert not found.is_packing_alone
    one, none = (f"sha384:{hashlib.sha384(data).hexdigest()}" for data in (b"one", b""))
    [changed] = found.changed
    assert (changed.path, changed.fields) == (
        "rootfs/b",
        (("first name", "rootfs/a", "rootfs/b"), ("content of all names", one, none)),
    )


def test_a_file_that_gets_a_second_name() -> None:
    one = f"sha384:{hashlib.sha384(b'one').hexdigest()}"
    assert files(ROOT, (ROOT[0], replace(ROOT[1], links=2), *ROOT[2:])) == [
        ("rootfs/a", "links", "1", "2"),
        ("rootfs/a", "first name", "none", "rootfs/a"),
        ("rootfs/a", "content of all names", "none", one),
    ]


def divided(*sizes: int) -> Eif:
    """An image whose measured sections are of these sizes, and of the same bytes together."""
    data = io.BytesIO(b"k" * 100 + b"c" * 20 + b"\0" * 400)
    kernel, cmdline, *disks = (data.read(size) for size in sizes)
    return image(ramdisks=disks).having(Part(KERNEL, kernel)).having(Part(CMDLINE, cmdline))


@pytest.mark.parametrize(
    ("sizes", "moved"),
    [
        ((110, 10, 200, 100, 100), {"kernel": (0, 1), "cmdline": (0, 1)}),
        ((100, 20, 240, 60, 100), {"ramdisk0": (0,), "ramdisk1": (0,)}),
        ((100, 20, 200, 40, 160), {"ramdisk1": (0, 2), "ramdisk2": (0, 2)}),
        ((100, 20, 200, 200), {"ramdisk1": (0, 2), "ramdisk2": (0, 2)}),
    ],
)
def test_a_boundary_that_was_moved_shows(sizes: tuple[int, ...], moved: dict[str, tuple[int, ...]]) -> None:
    found = difference(divided(100, 20, 200, 100, 100), divided(*sizes))
    assert found.moved == moved
    assert 0 not in found.registers


def test_another_signature_of_the_same_signer_is_no_moved_boundary() -> None:
    found = difference(made().signed(), made(root=ROOT[:-1]).signed())
    assert [section.name for section in found.sections] == ["ramdisk1", "signature"]
    assert (list(found.registers), found.moved) == ([0, 2], {})


def test_a_link_that_leads_elsewhere_and_a_file_in_its_place() -> None:
    assert files(ROOT, (*ROOT[:2], link("rootfs/b", "c"), *ROOT[3:])) == [("rootfs/b", "target", "a", "c")]
    kinds = files(ROOT, (*ROOT[:2], folder("rootfs/b"), *ROOT[3:]))
    assert ("rootfs/b", "kind", "symlink", "directory") in kinds
    assert ("rootfs/b", "target", "a", "none") in kinds


def test_what_is_in_one_alone_and_what_comes_in_another_order() -> None:
    found = difference(made(), made(root=(ROOT[0], ROOT[2], ROOT[1], Member("new"), *ROOT[4:])))
    assert found.sections[0].files is not None
    assert [each.entry.path for each in found.sections[0].files.added] == ["new"]
    assert [each.entry.path for each in found.sections[0].files.removed] == ["rootfs/null"]
    assert found.sections[0].files.is_reordered


def test_a_folder_that_comes_again_is_another_entry() -> None:
    found = difference(made(), made(root=(*ROOT, folder("rootfs", 0o700))))
    assert found.sections[0].files is not None
    [added] = found.sections[0].files.added
    assert (added.entry.path, added.entry.mode) == ("rootfs", 0o700)
    assert found.sections[0].files.changed == ()


def test_a_second_file_of_the_same_name_is_a_problem() -> None:
    twice = contents(image(ramdisks=[archive(*BOOT), archive(*ROOT), archive(Member("init"))]))
    assert [disk.problem is None for disk in twice.ramdisks] == [True, True, False]


@pytest.mark.parametrize("is_renumbered", [False, True])
def test_the_same_files_packed_otherwise(is_renumbered: bool) -> None:
    root = [replace(member, inode=number) for number, member in enumerate(ROOT, 5)] if is_renumbered else ROOT
    before, after = (image(ramdisks=[archive(*BOOT), disk]) for disk in (packed(archive(*ROOT)), archive(*root)))
    [section] = difference(before, after).sections
    assert section.files is not None
    assert section.files.is_packing_alone
    assert section.files.is_renumbered is is_renumbered


def test_a_ramdisk_that_cannot_be_listed_is_a_problem_of_its_own() -> None:
    whole, broken = (image(ramdisks=[archive(*BOOT), archive(*ROOT) + end]) for end in (b"", b"070709" + bytes(200)))
    found = difference(whole, broken)
    assert found.sections[0].files is not None
    none, problem = found.sections[0].files.problems
    assert none is None
    assert problem is not None
    assert problem.code == "unknown_ramdisk"
    assert not found.sections[0].files.is_packing_alone
    assert len(contents(broken).ramdisks[1].entries) == len(ROOT)


def test_sections_that_no_register_is_over() -> None:
    renamed = made().having(Part(METADATA, json.dumps({**METADATA_FIELDS, "ImageName": "x"}).encode()))
    found = difference(made(), renamed)
    assert [(each.name, each.registers, each.files) for each in found.sections] == [("metadata", (), None)]
    assert found.registers == {}
    assert not found.is_empty


def test_kernel_and_command_line() -> None:
    found = difference(made(), made().having(Part(KERNEL, b"another")).having(Part(CMDLINE, b"quiet")))
    assert [(each.name, each.registers) for each in found.sections] == [("kernel", (0, 1)), ("cmdline", (0, 1))]
    assert list(found.registers) == [0, 1]


def test_a_signature_and_a_ramdisk_more() -> None:
    signed = made().signed()
    found = difference(made(), signed)
    [section] = found.sections
    assert (section.name, section.before, section.registers) == ("signature", None, (8,))
    assert found.registers == {8: (bytes(48), Signer().pcr8())}
    found = difference(signed, made())
    assert (found.sections[0].after, found.registers[8][1]) == (None, bytes(48))
    more = image(ramdisks=[packed(archive(*BOOT)), packed(archive(*ROOT)), b""])
    [section] = difference(made(), more).sections
    assert (section.name, section.registers, section.files) == ("ramdisk2", (0, 2), None)


def test_the_header_and_the_order_of_sections() -> None:
    kernel, cmdline, metadata, *disks = made().parts
    other = Eif((metadata, kernel, cmdline, *disks), flags=1, memory=2 << 30, cpus=4)
    found = difference(made(), other)
    assert found.is_reordered
    assert found.sections == ()
    assert found.header == (
        ("architecture", "x86_64", "aarch64"),
        ("default memory", "1073741824 bytes", "2147483648 bytes"),
        ("default CPUs", "2", "4"),
    )
    assert found.registers == {}


@pytest.mark.parametrize("name", ["kernel", "cmdline", "metadata", "signature", "ramdisk0", "ramdisk1", "ramdisk9"])
def test_the_registers_of_a_section_are_those_that_it_changes(name: str) -> None:
    names = {"kernel": KERNEL, "cmdline": CMDLINE, "metadata": METADATA}
    before = image(ramdisks=[b""] * 10).signed()
    if name in names:
        data = json.dumps({**METADATA_FIELDS, "x": 1}).encode() if name == "metadata" else b"x"
        after = before.having(Part(names[name], data))
    elif name == "signature":
        after = before.signed(Signer(name="another"))
    else:
        number = int(name.removeprefix("ramdisk"))
        after = image(ramdisks=[b"\0" if each == number else b"" for each in range(10)])
    after = after if name == "signature" else after.signed()
    changed = [index for index in difference(before, after).registers if index != 8 or name == "signature"]
    assert tuple(changed) == registers_over(name)


def test_a_file_that_changes_meanwhile_is_refused() -> None:
    data = made().encode()
    found = measure_image(io.BytesIO(data))
    with pytest.raises(ImageError) as caught:
        read_contents(found, io.BytesIO(data[:-1] + b"x"))
    assert caught.value.code == "changed_image"


@given(
    st.lists(st.sampled_from([*ROOT, *BOOT[1:], Member("rootfs/a", b"x"), Member("rootfs/a")]), max_size=6), st.data()
)
def test_nothing_differs_just_when_the_bytes_are_the_same(root: list[Member], data: st.DataObject) -> None:
    other = data.draw(st.one_of(st.just(root), st.permutations(root), st.just([*root, Member("more")])))
    found = difference(made(root=root), made(root=other))
    assert found.is_empty == (archive(*root) == archive(*other))
    if not found.is_empty:
        assert found.sections[0].files is not None
        assert not found.sections[0].files.is_packing_alone or root != other
