"""``image measure``, ``describe``, ``verify``, ``diff`` and ``extract``: what a person and a program are told."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attestation.image_files import CONFIGURATION_PATH
from attestation.reference import configuration_digest, digest_text
from tests.cpio_files import Member, archive, device, folder, link, packed
from tests.eif_files import CMDLINE, CMDLINE_TEXT, KERNEL, METADATA, RAMDISK, Eif, Part, Signer, image
from tests.terminal import Terminal

NOW = datetime.now(UTC)
TOML = b"version = 1\n"
BOOT = (folder("dev"), Member("init", b"\x7fELF init", mode=0o100755))
ROOT = (
    Member("cmd", b"/usr/bin/python3\n"),
    folder("rootfs"),
    folder("rootfs/dev"),
    folder("rootfs/etc", 0o555),
    folder("rootfs/etc/strongroom"),
    Member("rootfs/etc/strongroom/enclave.toml", TOML, mtime=1_000_000),
    link("rootfs/etc/mtab", "/proc/mounts"),
    device("rootfs/dev/null", 1, 3),
    Member("rootfs/usr-bin-su", b"su", mode=0o104755),
)


def kernel(extra: bytes = b"") -> bytes:
    """A bzImage of one setup sector and two paragraphs."""
    head = bytearray(1056)
    head[0x1F1], head[0x1F4], head[0x211] = 1, 2, 1
    head[0x1FE:0x206] = b"\x55\xaa" + bytes(2) + b"HdrS"
    head[0x206:0x208] = (0x20F).to_bytes(2, "little")
    return bytes(head) + extra


def built(*, root: Sequence[Member] = ROOT, boot: Sequence[Member] = BOOT) -> Eif:
    disks = [packed(archive(*boot)), packed(archive(*root))]
    return image(ramdisks=disks).having(Part(KERNEL, kernel()))


def and_then(*third: Member) -> Eif:
    """With a third ramdisk."""
    made = built()
    return replace(made, parts=(*made.parts, Part(RAMDISK, archive(*third))))


GOOD = built()
SIGNER = Signer(not_before=NOW - timedelta(days=1), not_after=NOW + timedelta(days=1))


@pytest.fixture
def run(strongroom: Terminal, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return strongroom


def kept(path: Path, of: Eif = GOOD, name: str = "enclave.eif") -> str:
    (path / name).write_bytes(of.encode())
    return str(path / name)


def registers(of: Eif) -> dict[str, str]:
    return dict(zip(("PCR0", "PCR1", "PCR2"), (value.hex() for value in of.registers()), strict=True))


# --- measure
# ------------------------------------------------------------------------------------------------


def test_measure_prints_registers(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "measure", kept(tmp_path))
    assert ran.code == 0
    assert ran.out == "".join(f"{name}  {value}\n" for name, value in registers(GOOD).items())


@pytest.mark.parametrize("signed", [False, True])
def test_measure_prints_what_nitro_cli_prints(run: Terminal, tmp_path: Path, signed: bool) -> None:
    made = GOOD.signed() if signed else GOOD
    ran = run("image", "measure", kept(tmp_path, made), "--json")
    fields = {"HashAlgorithm": "Sha384 { ... }", **registers(made)}
    if signed:
        fields["PCR8"] = Signer().pcr8().hex()
    assert ran.out == json.dumps({"Measurements": fields}, indent=2) + "\n"


def test_measure_reads_a_pipe(run: Terminal) -> None:
    seen = run("image", "measure", "-", "--json", stdin=GOOD.encode()).json["Measurements"]
    assert seen["PCR0"] == registers(GOOD)["PCR0"]


def test_a_broken_image_says_where(run: Terminal, tmp_path: Path) -> None:
    broken = kept(tmp_path, replace(GOOD, crc=0))
    ran = run("image", "measure", broken, "--json")
    assert (ran.code, ran.json["error"]["code"], ran.json["error"]["offset"]) == (2, "wrong_crc", "544")
    assert run("image", "measure", str(tmp_path / "absent")).code == 2


# --- describe
# ------------------------------------------------------------------------------------------------


def test_describe_says_all(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "describe", kept(tmp_path, GOOD.signed(SIGNER)))
    assert ran.code == 0
    for said in (
        "EIF version 4, x86_64",
        "1024 MiB, 2 CPUs (not measured)",
        "1056 bytes, as its header says",
        CMDLINE_TEXT,
        "strongroom 1.0",
        "BuildTool nitro-cli",
        "verified, by CN=A release engineer (secp384r1); certificate valid",
        "file 1, directory 1; 9 bytes unpacked",
        "symlink 1",
        "PCR0 PCR1",
        *registers(GOOD).values(),
    ):
        assert said in ran.out


def test_describe_for_programs(run: Terminal, tmp_path: Path) -> None:
    signer = replace(SIGNER, not_after=NOW - timedelta(hours=1))
    seen = run("image", "describe", kept(tmp_path, GOOD.signed(signer)), "--json").json
    assert seen["measurements"] == {**registers(GOOD), "PCR8": signer.pcr8().hex()}
    assert seen["signature"]["valid_now"] is False
    assert seen["kernel_length"] == 1056
    assert [section["name"] for section in seen["sections"]][-1] == "signature"
    assert seen["metadata"]["ImageName"] == "strongroom"
    assert seen["ramdisks"][1]["kinds"] == {"file": 3, "directory": 4, "symlink": 1, "character device": 1}
    assert seen["ramdisks"][1]["newest"] == 1_000_000


def test_describe_takes_any_image(run: Terminal, tmp_path: Path) -> None:
    odd = image(version=3, ramdisks=[b"no archive"]).having(Part(CMDLINE, b""))
    ran = run("image", "describe", kept(tmp_path, odd))
    assert ran.code == 0
    assert "cannot be listed further" in ran.out
    assert "no bzImage" in ran.out
    seen = run("image", "describe", str(tmp_path / "enclave.eif"), "--json").json
    assert (seen["metadata"], seen["signature"]) == (None, None)
    assert seen["ramdisks"][0]["problem"]["code"] == "unknown_ramdisk"
    arm = kept(tmp_path, replace(odd, flags=1), "arm.eif")
    assert "does not state" in run("image", "describe", arm).out


# --- verify
# ------------------------------------------------------------------------------------------------


def test_a_whole_image_is_verified(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "verify", kept(tmp_path, GOOD.signed(SIGNER)))
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "VERIFIED"
    body = run("image", "verify", kept(tmp_path), "--json").json
    assert body["verdict"] == "verified"
    assert {check["name"]: check["status"] for check in body["checks"]} == {
        "structure": "ok",
        "signature": "n/a",
        "kernel": "ok",
        "command line": "n/a",
        "files": "ok",
        "layout": "ok",
    }


BROKEN: dict[str, tuple[Eif, str]] = {
    "another copy for the init": (built(boot=(*BOOT, Member("cmdline", b"quiet"))), "command line"),
    "command line behind the kernel": (GOOD.having(Part(KERNEL, kernel(b"init=/sh "))), "kernel"),
    "no bzImage": (GOOD.having(Part(KERNEL, b"something")), "kernel"),
    "expired": (GOOD.signed(replace(SIGNER, not_after=NOW - timedelta(hours=1))), "signature"),
    "not yet valid": (GOOD.signed(replace(SIGNER, not_before=NOW + timedelta(hours=1))), "signature"),
    "files that nobody can list": (replace(GOOD, parts=(*GOOD.parts, Part(RAMDISK, b"xyz"))), "files"),
    "another init": (built(root=(*ROOT, Member("./init", b"another"))), "files"),
    "another cmdline": (built(root=(*ROOT, Member("/cmdline", b"another"))), "layout"),
    "another driver": (built(root=(*ROOT, Member("nsm.ko", b"another"))), "layout"),
    "a folder of the boot": (built(root=(*ROOT, folder("dev"))), "layout"),
    "an init in a third ramdisk": (and_then(Member("init", b"another")), "files"),
    "an init by a link": (and_then(folder("rootfs"), link("rootfs/up", ".."), Member("rootfs/up/init")), "files"),
    "rootfs is a link": (built(root=(link("rootfs", "."), Member("rootfs/init"))), "files"),
    "a file twice": (built(root=(*ROOT, ROOT[5])), "files"),
    "an init twice": (built(boot=(*BOOT, BOOT[1])), "files"),
    "a link twice": (built(root=(*ROOT, ROOT[6])), "files"),
    "a folder over a file": (and_then(folder("rootfs"), folder("rootfs/usr-bin-su")), "files"),
}
SOUND: dict[str, Eif] = {
    "folders that come twice": built(root=(*ROOT, folder("rootfs/dev"))),
    "a third ramdisk beside the second": and_then(folder("rootfs/etc"), Member("rootfs/etc/hosts")),
    "one ramdisk": image(ramdisks=[packed(archive(*BOOT, *ROOT))]).having(Part(KERNEL, kernel())),
    "the root": built(root=(folder("."), *ROOT)),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound(run: Terminal, tmp_path: Path, name: str) -> None:
    assert run("image", "verify", kept(tmp_path, SOUND[name])).code == 0


def test_what_an_application_may_not_replace_is_named(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "verify", kept(tmp_path, BROKEN["another cmdline"][0]))
    line = "layout: ramdisk1 has cmdline, which takes effect outside of the application: cmd, env, rootfs"
    assert f"FAILED  {line}" in ran.out


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_failed_check(run: Terminal, tmp_path: Path, name: str) -> None:
    made, check = BROKEN[name]
    ran = run("image", "verify", kept(tmp_path, made), "--json")
    assert (ran.code, ran.json["verdict"]) == (3, "broken")
    assert [each["name"] for each in ran.json["checks"] if each["status"] == "failed"] == [check]
    assert run("image", "verify", kept(tmp_path, made)).out.splitlines()[-1] == "BROKEN"


@pytest.mark.parametrize(
    "made",
    [replace(GOOD, crc=0), GOOD.signed(SIGNER).having(Part(KERNEL, kernel(b"x"))), GOOD.having(Part(CMDLINE, b"a\nb"))],
)
def test_what_cannot_be_measured_is_worth_nothing(run: Terminal, tmp_path: Path, made: Eif) -> None:
    ran = run("image", "verify", kept(tmp_path, made), "--json")
    assert ran.code == 3
    assert ran.json["error"]["offset"] is not None or ran.json["error"]["code"] == "wrong_payload"


def test_the_copy_of_the_command_line_is_compared(run: Terminal, tmp_path: Path) -> None:
    made = built(boot=(*BOOT, Member("cmdline", CMDLINE_TEXT.encode())))
    ran = run("image", "verify", kept(tmp_path, made))
    assert (ran.code, "as the init will ask" in ran.out) == (0, True)


def test_an_aarch64_kernel_is_not_asked(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "verify", kept(tmp_path, replace(GOOD, flags=1)), "--json")
    assert ran.code == 0
    assert [each["status"] for each in ran.json["checks"] if each["name"] == "kernel"] == ["n/a"]


def test_against_measurements(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path)
    (tmp_path / "m.json").write_text(run("image", "measure", file, "--json").out)
    assert run("image", "verify", file, "--measurements", str(tmp_path / "m.json")).code == 0
    other = kept(tmp_path, built(root=ROOT[:-1]), "other.eif")
    ran = run("image", "verify", other, "--measurements", str(tmp_path / "m.json"))
    assert ran.code == 1
    assert ran.out.splitlines()[-1] == "NOT AS EXPECTED"
    assert "the measurements" in ran.out


def test_against_a_signed_release(run: Terminal, tmp_path: Path) -> None:
    file, history, key = kept(tmp_path), str(tmp_path / "releases.jsonl"), str(tmp_path / "key.pem")
    pin = run("release", "keygen", key).out.strip()
    add = ("--repository", "https://example.org", "--commit", "a" * 40, "--release", "1.0", "--product", "x")
    assert run("release", "add", history, "--key", key, "--from-eif", file, *add).code == 0
    options = ("--release", history, "--key", pin, "--product", "x")
    ran = run("image", "verify", file, *options)
    assert ran.code == 0
    assert "1.0, signed by" in ran.out
    fields = replace(GOOD, memory=1)  # another file with the same registers
    ran = run("image", "verify", kept(tmp_path, fields, "same.eif"), *options, "--json")
    assert ran.code == 1
    assert "the file is another one" in ran.json["checks"][-1]["text"]
    other = kept(tmp_path, built(root=ROOT[:-1]), "other.eif")
    assert run("image", "verify", other, *options).code == 1
    wrong = run("release", "keygen", str(tmp_path / "other.pem")).out.strip()
    ran = run("image", "verify", file, "--release", history, "--key", wrong, "--product", "x", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (3, "wrong_key")


def test_against_a_policy(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path)
    model = ("--model", "sha384:" + "ab" * 48)
    toml = tmp_path / "enclave.toml"
    toml.write_bytes(TOML)

    def policy(name: str, *options: str) -> str:
        path = str(tmp_path / name)
        assert run("policy", "init", "--output", path, *model, *options).code == 0
        return path

    good = policy("good.toml", "--from-eif", file, "--configuration", str(toml))
    ran = run("image", "verify", file, "--policy", good, "--json")
    assert ran.code == 0
    assert [each["name"] for each in ran.json["checks"]][-3:] == ["release", "signer", "configuration"]
    assert digest_text(configuration_digest(TOML)) in ran.json["checks"][-1]["text"]
    assert "VERIFIED" in run("image", "verify", file, "--policy", good).out
    another = policy("another.toml", "--from-eif", file, "--configuration", "sha384:" + "cd" * 48)
    assert run("image", "verify", file, "--policy", another).code == 1
    any_of_them = policy("any.toml", "--from-eif", file, "--ignore-configuration", "for a test")
    assert "any is accepted: for a test" in run("image", "verify", file, "--policy", any_of_them).out
    signed = kept(tmp_path, GOOD.signed(SIGNER), "signed.eif")
    ran = run("image", "verify", signed, "--policy", good)
    assert ran.code == 1
    assert "expected an image that is not signed" in ran.out
    with_signer = policy("signed.toml", "--from-eif", signed, "--configuration", str(toml))
    assert run("image", "verify", signed, "--policy", with_signer).code == 0
    assert run("image", "verify", file, "--policy", with_signer).code == 1
    without = kept(tmp_path, built(root=ROOT[:5]), "without.eif")
    ran = run("image", "verify", without, "--policy", good)
    assert ran.code == 1
    assert "not judged" in ran.out


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (f'require = ["{SIGNER.pcr8().hex()}"]', 0),
        (f'require = ["{"ab" * 48}"]', 1),
        ('ignore = "any signer"', 0),
        ("forbid = true", 1),
    ],
)
def test_a_policys_own_rule_for_the_signer(run: Terminal, tmp_path: Path, rule: str, code: int) -> None:
    file, policy = kept(tmp_path), tmp_path / "policy.toml"
    options = ("--ignore-model", "for a test", "--ignore-configuration", "for a test")
    assert run("policy", "init", "--from-eif", file, "--output", str(policy), *options).code == 0
    before, table, after = policy.read_text().partition("[pcrs.8]")
    policy.write_text(before + table + after.replace("forbid = true", rule, 1))
    signed = kept(tmp_path, GOOD.signed(SIGNER), "signed.eif")
    assert run("image", "verify", signed, "--policy", str(policy)).code == code


@pytest.mark.parametrize(
    "options",
    [
        ("--release", "r.jsonl"),
        ("--key", "ed25519:" + "ab" * 32),
        ("--product", "x"),
        ("--measurements", "m.json", "--policy", "p.toml"),
    ],
)
def test_a_reference_is_one(run: Terminal, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run("image", "verify", kept(tmp_path), *options).code == 2


# --- diff
# ------------------------------------------------------------------------------------------------


def test_the_same_differ_in_nothing(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path)
    ran = run("image", "diff", file, file)
    assert (ran.code, ran.out) == (0, "the images are the same\n")
    assert run("image", "diff", file, file, "--json").json["same"] is True


def test_what_differs_is_said_with_its_registers(run: Terminal, tmp_path: Path) -> None:
    changed = (*ROOT[1:8], Member("rootfs/new"), ROOT[0], replace(ROOT[8], data=b"another", uid=1000))
    other = replace(built(root=changed), memory=2 << 30).signed(SIGNER)
    before, after = kept(tmp_path), kept(tmp_path, other, "other.eif")
    ran = run("image", "diff", before, after)
    assert ran.code == 1
    for said in (
        "header: default memory 1073741824 bytes -> 2147483648 bytes (not measured)",
        "ramdisk1: changed",
        "in PCR0 PCR2",
        "+ rootfs/new (file, 0 bytes)",
        "~ rootfs/usr-bin-su: content",
        "owner 0 -> 1000",
        "the files come in another order",
        "signature: added",
        "PCR8: none -> ",
    ):
        assert said in ran.out
    assert "PCR1:" not in ran.out
    seen = run("image", "diff", before, after, "--json").json
    assert list(seen["registers"]) == ["PCR0", "PCR2", "PCR8"]
    assert [section["name"] for section in seen["sections"]] == ["ramdisk1", "signature"]
    assert seen["sections"][0]["files"]["changed"][0]["path"] == "rootfs/usr-bin-su"
    back = run("image", "diff", after, before)
    assert "- rootfs/new" in back.out
    assert "signature: removed" in back.out


def test_a_long_list_is_cut_and_the_rest_is_packing(run: Terminal, tmp_path: Path) -> None:
    before = kept(tmp_path)
    many = kept(tmp_path, built(root=(*ROOT, *(Member(f"n{number}") for number in range(30)))), "many.eif")
    assert "and 10 more (--full)" in run("image", "diff", before, many).out
    assert "+ n29 (file, 0 bytes)" in run("image", "diff", before, many, "--full").out
    kernel, cmdline, metadata, boot, root = GOOD.parts
    boot = replace(boot, data=boot.data + bytes(-len(boot.data) % 4))
    before = kept(tmp_path, Eif((kernel, cmdline, metadata, boot, root)))
    plain = replace(root, data=archive(*(replace(each, inode=7) for each in ROOT)))
    packing = kept(tmp_path, Eif((kernel, metadata, cmdline, boot, plain)), "plain.eif")
    ran = run("image", "diff", before, packing)
    assert "packed otherwise; inode numbers differ" in ran.out
    assert "the sections stand in another order" in ran.out
    broken = kept(tmp_path, Eif((kernel, cmdline, metadata, boot, replace(root, data=b"no archive"))), "broken.eif")
    assert "of the second image it cannot be listed further" in run("image", "diff", before, broken).out
    metadata_alone = GOOD.having(Part(METADATA, GOOD.data(METADATA)[0] + b" "))
    before, after = kept(tmp_path), kept(tmp_path, metadata_alone, "m.eif")
    assert "every register is the same" in run("image", "diff", before, after).out


def test_which_of_two_is_broken_is_said(run: Terminal, tmp_path: Path) -> None:
    broken = kept(tmp_path, replace(GOOD, crc=0), "broken.eif")
    ran = run("image", "diff", kept(tmp_path), broken)
    assert ran.code == 2
    assert "broken.eif: the file is damaged, at byte 544 [wrong_crc]" in ran.err


# --- extract
# ------------------------------------------------------------------------------------------------


def test_sections_become_files(run: Terminal, tmp_path: Path) -> None:
    made, out = GOOD.signed(SIGNER), tmp_path / "parts"
    ran = run("image", "extract", kept(tmp_path, made), "--output", str(out))
    assert ran.code == 0
    names = ["kernel", "cmdline.txt", "metadata.json", "ramdisk0", "ramdisk1", "signature.cbor"]
    assert ran.out == "".join(f"wrote {out / name}\n" for name in names)
    assert [(out / name).read_bytes() for name in names] == [part.data for part in made.parts]
    again = run("image", "extract", str(tmp_path / "enclave.eif"), "--output", str(out))
    assert (again.code, "File exists" in again.err) == (2, True)


def test_one_section_and_one_that_is_not_there(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path)
    assert run("image", "extract", file, "-o", str(tmp_path / "a"), "--section", "cmdline").code == 0
    assert os.listdir(tmp_path / "a") == ["cmdline.txt"]
    ran = run("image", "extract", file, "-o", str(tmp_path / "b"), "--section", "ramdisk2")
    assert (ran.code, (tmp_path / "b").exists()) == (2, False)
    assert "it has kernel, cmdline, metadata, ramdisk0, ramdisk1, files" in ran.err


def test_files_are_unpacked(run: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "root"
    ran = run("image", "extract", kept(tmp_path), "-o", str(out), "--section", "files", "--json")
    assert ran.json == {"wrote": [str(out)], "entries": 10, "left_out": ["rootfs/dev/null"]}
    toml = out / "rootfs/etc/strongroom/enclave.toml"
    assert toml.read_bytes() == TOML
    assert toml.stat().st_mtime == 1_000_000
    assert os.readlink(out / "rootfs/etc/mtab") == "/proc/mounts"
    assert stat.S_IMODE((out / "init").stat().st_mode) & 0o700 == 0o700
    assert not (out / "rootfs/usr-bin-su").stat().st_mode & stat.S_ISUID
    assert not (out / "rootfs/dev/null").exists()
    both = tmp_path / "both"
    parts = ("--section", "files", "--section", "kernel")
    ran = run("image", "extract", str(tmp_path / "enclave.eif"), "-o", str(both), *parts)
    assert "left out 1 devices, pipes or sockets: rootfs/dev/null" in ran.err
    assert sorted(os.listdir(both)) == ["files", "kernel"]


def test_names_of_one_file_are_one(run: Terminal, tmp_path: Path) -> None:
    first = Member("a", b"", links=2, inode=9)
    root = [Member("c", b"old", inode=9), first, replace(first, name="b", data=b"shared"), replace(first, name="d")]
    out = tmp_path / "root"
    assert run("image", "extract", kept(tmp_path, built(root=root)), "-o", str(out), "--section", "files").code == 0
    assert [(out / name).read_bytes() for name in "abcd"] == [b"shared", b"shared", b"old", b"shared"]
    assert (out / "a").samefile(out / "b")
    assert (out / "a").samefile(out / "d")


ESCAPES: dict[str, Sequence[Member]] = {
    "through a link": (link("out", "/tmp"), Member("out/strongroom-escape", b"x")),
    "through a link to a folder within": (folder("in"), link("out", "in"), Member("out/x", b"x")),
    "through a file": (Member("a"), Member("a/b")),
    "into no folder": (Member("a/b"),),
    "a folder in place of a link": (link("out", "/tmp"), folder("out")),
    "a file in place of a folder": (folder("a"), Member("a", b"x")),
    "a link in place of a folder": (folder("a"), link("a", "/tmp")),
    "a path that leads out": (Member("../escape", b"x"),),
    "a file twice": (Member("a"), Member("a")),
    "another ramdisk's file": (Member("init"),),
    "names of a device": (replace(device("a", 1, 3), links=2), replace(device("b", 1, 3), links=2)),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_is_written_outside(run: Terminal, tmp_path: Path, name: str) -> None:
    file, out = kept(tmp_path, built(root=ESCAPES[name])), tmp_path / "root"
    ran = run("image", "extract", file, "-o", str(out), "--section", "files", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "unsafe_path")
    assert not Path("/tmp/strongroom-escape").exists()
    assert os.listdir(tmp_path) == ["enclave.eif"]


def test_one_file_is_printed(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path)
    assert run("image", "extract", file, "--file", CONFIGURATION_PATH).out.encode() == TOML
    twice = kept(tmp_path, built(root=(*ROOT, replace(ROOT[5], data=b"later"))), "twice.eif")
    ran = run("image", "extract", twice, "--file", CONFIGURATION_PATH)
    assert (ran.code, ran.out) == (2, "")
    assert "[unsafe_path]" in ran.err


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("/etc/none", "no_such_file", "no such file"),
        ("/etc", "not_a_file", "got directory"),
        ("/etc/mtab", "not_a_file", "symlink, to '/proc/mounts'"),
        ("/dev/null", "not_a_file", "character device"),
        ("/empty", "not_a_file", "got one of 2 names of a file"),
    ],
)
def test_what_is_no_file_is_said(run: Terminal, tmp_path: Path, path: str, code: str, said: str) -> None:
    file = kept(tmp_path, built(root=(*ROOT, Member("rootfs/empty", links=2))))
    ran = run("image", "extract", file, "--file", path)
    assert ran.code == 2
    assert f"[{code}]" in ran.err
    assert said in ran.err


@pytest.mark.parametrize(
    "options",
    [(), ("-o", "x", "--file", "/y"), ("--file", "/x", "--section", "kernel"), ("--file", "/x", "--json")],
)
def test_extract_makes_a_folder_or_prints_a_file(run: Terminal, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run("image", "extract", kept(tmp_path), *options).code == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="devices and owners are for root")
def test_root_makes_devices_and_owners(run: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "root"
    root = (*ROOT, replace(ROOT[8], name="rootfs/owned", uid=1000, gid=1001), Member("pipe", mode=stat.S_IFIFO | 0o600))
    ran = run("image", "extract", kept(tmp_path, built(root=root)), "-o", str(out), "--section", "files", "--as-root")
    if "Operation not permitted" in ran.err:
        pytest.skip("this root may not make devices")
    assert ran.code == 0
    found = (out / "rootfs/owned").lstat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1000, 1001, 0o4755)
    assert (out / "rootfs/dev/null").lstat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO((out / "pipe").lstat().st_mode)
    assert stat.S_IMODE((out / "rootfs/etc").stat().st_mode) == 0o555


def test_as_root_is_for_root(run: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = run("image", "extract", kept(tmp_path), "-o", str(tmp_path / "x"), "--section", "files", "--as-root")
    assert (ran.code, "for root alone" in ran.err) == (2, True)


@pytest.mark.parametrize("command", ["measure", "describe", "verify", "diff", "extract", "policy"])
def test_help_has_examples(run: Terminal, command: str) -> None:
    ran = run("image", command, "--help")
    assert ran.code == 0
    assert f"strongroom image {command}" in ran.out
    assert "Exit codes: 0" in ran.out
