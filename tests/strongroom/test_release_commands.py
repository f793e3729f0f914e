"""``strongroom release``: from a key to a history that a client checks, and what each refusal looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from attestation.manifest import ModelManifest
from attestation.measure import read_image
from attestation.reference import configuration_digest
from attestation.release_heads import MemoryHeads
from attestation.release_signing import PublicKey
from emulator.kms_endpoint import kms_emulator
from strongroom.options import out
from strongroom.release_commands import release as group
from strongroom.release_file import ReleaseFile, write_key
from tests.eif_files import image as broken
from tests.gguf_files import TEXT, Gguf
from tests.release_files import ED25519, NAME, ONE, P384, TWO, verified
from tests.sound_images import sound as eif
from tests.terminal import Ran, Terminal


def registers(name: str) -> tuple[str, ...]:
    """Those of an image of its own: a history has each image once. PCR0 repeats the digits of the release's name."""
    return ("--pcr0", name.replace(".", "") * 48, "--pcr1", "02" * 48, "--pcr2", "03" * 48)


REGISTERS = registers("1.0")
SOURCE = ("--repository", "https://example.org/a.git", "--commit", "ab" * 20)
PIN = str(ED25519.public_key)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run, with the publisher's key."""
    write_key(tmp_path / "key.pem", ED25519)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def release(strongroom: Terminal, folder: Path) -> Publisher:
    return Publisher(strongroom)


class Publisher:
    """The commands, with the key, the product and the file that they mostly take."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal

    def __call__(self, command: str, *arguments: str, signing: Sequence[str] = ("--key", "key.pem")) -> Ran:
        return self.terminal("release", command, "releases.jsonl", *arguments, *signing, "--product", NAME)

    def add(self, name: str, *arguments: str) -> Ran:
        return self("add", "--release", name, *(arguments or (*registers(name), *SOURCE)))

    def check(self, *arguments: str, key: str = PIN) -> Ran:
        return self("check", *arguments, signing=("--key", key))


# --- Help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", group.commands)
def test_every_command_has_an_example(strongroom: Terminal, name: str) -> None:
    ran = strongroom("release", name, "--help")
    assert ran.code == 0
    assert f"Usage: strongroom release {name} " in ran.out
    _, _, example = ran.out.partition("\n  Example:\n")
    assert f"strongroom release {name} " in example
    options = {option for parameter in group.commands[name].params for option in parameter.opts}
    words = example.partition("\n\n")[0].split()
    assert {word for word in words if word.startswith("--")} <= options


# --- Keys ----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once(strongroom: Terminal, folder: Path) -> None:
    ran = strongroom("release", "keygen", "new.pem")
    assert ran.code == 0
    key = PublicKey.parse(ran.out.strip())
    assert strongroom("release", "pin", "--key", "new.pem", "--json").json == {"key": str(key), "key_id": key.key_id}
    again = strongroom("release", "keygen", "new.pem")
    assert (again.code, again.out) == (2, "")
    assert again.err == "strongroom: new.pem: File exists; keys are never replaced: choose another name\n"
    assert strongroom("release", "pin", "--key", "new.pem").out == ran.out


def test_exactly_one_key(strongroom: Terminal, folder: Path) -> None:
    for options in ((), ("--key", "key.pem", "--kms-key", "arn:aws:kms:eu-central-1:000000000000:key/x")):
        ran = strongroom("release", "pin", *options)
        assert ran.code == 2
        assert "--kms-key" in ran.err


def test_a_key_of_kms(release: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    with kms_emulator() as kms:
        arn = kms.create_key(spec="ECC_NIST_P384", usage="SIGN_VERIFY")
        for name, value in kms.environment(kms.principal("root")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        pin = release.terminal("release", "pin", "--kms-key", arn).out.strip()
        added = release("add", "--release", "1.0", *REGISTERS, *SOURCE, signing=("--kms-key", arn))
        refused = release("refresh", signing=("--kms-key", arn.rpartition("/")[2]))
    assert pin.startswith("ecdsa-p384:")
    assert added.code == 0
    assert release.check(key=pin).code == 0
    assert release.check().code == 3
    assert (refused.code, "bad_key_arn" in refused.err) == (2, True)


# --- Signing -------------------------------------------------------------------------------------------------------


def test_a_history_from_its_beginning_to_a_check(release: Publisher, folder: Path) -> None:
    added = release.add("1.0")
    assert added.code == 0
    assert "signed entry 1 of releases.jsonl" in added.out
    assert PIN in added.out
    assert release.add("2.0").code == 0
    assert release("withdraw", "1.0").code == 0
    refreshed = release("refresh", "--expires", "7", "--json").json
    assert (refreshed["changed"], refreshed["sequence"]) == (True, 4)
    issued, expires = (datetime.fromisoformat(refreshed[key]) for key in ("issued", "expires"))
    assert expires - issued == timedelta(days=7)

    shown = release.check()
    assert shown.code == 0
    assert "VERIFIED" in shown.out
    for line in (f"key     {PIN}", "1      ", "+ 1.0", "+ 2.0", "- 1.0", "the expiry", "unsigned", "20202020…202020"):
        assert line in shown.out
    assert "20" * 48 in release.check("--full").out
    body = release.check("--json").json
    assert [each["name"] for each in body["releases"]] == ["2.0"]
    assert [each["releases"] for each in body["entries"]] == [["1.0"], ["1.0", "2.0"], ["2.0"], ["2.0"]]
    assert (
        body["digest"]
        == refreshed["digest"]
        == f"sha384:{verified(Path('releases.jsonl').read_bytes()).head.digest.hex()}"
    )


@pytest.mark.parametrize("columns", [40, 60, 90, 130, 200])
def test_a_check_fits_its_terminal(
    release: Publisher, folder: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    release.add("1.0", *REGISTERS, *SOURCE, "--model", "sha384:" + "0a" * 48, "--model", "sha384:" + "0b" * 48)
    release.add("2.0")
    monkeypatch.setattr(out, "width", columns)
    shown = release.check().out
    whole = ("key ", "head ")  # somebody may want to copy them
    assert all(len(line) <= columns for line in shown.splitlines() if not line.startswith(whole))
    for words in ("0a0a0a0a…0a0a0a", "0b0b0b0b…0b0b0b", "unsigned", "+ 2.0", "VERIFIED"):
        assert words in shown


def test_repeating_a_command_changes_nothing(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    release.add("2.0")
    release("withdraw", "2.0")
    before = Path("releases.jsonl").read_bytes()
    for ran in (release.add("1.0"), release("withdraw", "2.0")):
        assert ran.code == 0
        assert "nothing to change in releases.jsonl" in ran.out
    assert release.add("1.0", *REGISTERS, *SOURCE, "--json").json["changed"] is False
    assert Path("releases.jsonl").read_bytes() == before


def test_everything_taken_back(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    withdrawn = release("withdraw", "1.0")
    assert "these count: no release" in withdrawn.out
    assert "all have been taken back" in release.check().out


def test_everything_about_a_release(release: Publisher, folder: Path) -> None:
    Path("model.gguf").write_bytes(Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode())
    Path("enclave.toml").write_bytes(b"version = 1\n")
    Path("enclave.eif").write_bytes(eif().encode())
    added = release.add(
        "1.0",
        *("--from-eif", "enclave.eif", "--repository", "r", "--commit", "AB" * 32),
        *("--model", "model.gguf", "--model", "sha384:" + "0A" * 48),
        *("--configuration", "enclave.toml", "--configuration", "sha384:" + "0b" * 48),
    )
    assert added.code == 0, added.err
    [image] = verified(Path("releases.jsonl").read_bytes()).current.releases
    assert image.pcrs == read_image(Path("enclave.eif")).measurements
    assert image.image == hashlib.sha384(Path("enclave.eif").read_bytes()).digest()
    assert image.source.commit == "ab" * 32
    assert image.models == (ModelManifest.from_gguf(Path("model.gguf")).digest(), b"\x0a" * 48)
    assert image.configurations == (configuration_digest(b"version = 1\n"), b"\x0b" * 48)


def test_nobody_signs_for_a_broken_image(release: Publisher) -> None:
    """Its registers may be those of another one, which boots otherwise."""
    Path("enclave.eif").write_bytes(broken().encode())
    ran = release.add("1.0", "--from-eif", "enclave.eif", *SOURCE)
    assert (ran.code, "[broken_image]" in ran.err) == (2, True)


def test_what_nitro_cli_printed(release: Publisher, folder: Path) -> None:
    Path("enclave.eif").write_bytes(b"an image")
    measurements = {"HashAlgorithm": "Sha384 { ... }", **{f"PCR{index}": f"{index + 1:096x}" for index in (0, 1, 2, 8)}}
    Path("measurements.json").write_text(json.dumps({"Measurements": measurements}))
    ran = release.add("1.0", "--from-measurements", "measurements.json", "--image", "enclave.eif", *SOURCE)
    assert ran.code == 0, ran.err
    [image] = verified(Path("releases.jsonl").read_bytes()).current.releases
    assert image.pcrs.as_registers() == {index: (index + 1).to_bytes(48) for index in (0, 1, 2, 8)}
    assert image.image == hashlib.sha384(b"an image").digest()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((*SOURCE,), "--from-eif"),
        ((*REGISTERS[:4], *SOURCE), "--pcr2"),
        ((*REGISTERS, "--from-measurements", "key.pem", *SOURCE), "--from-eif"),
        (("--from-eif", "key.pem", "--from-measurements", "key.pem", *SOURCE), "--from-eif"),
        (("--from-eif", "key.pem", *SOURCE), "eif"),
        (("--from-measurements", "key.pem", *SOURCE), "malformed_measurements"),
        (("--from-eif", "none.eif", *SOURCE), "none.eif"),
        ((*REGISTERS, "--pcr8", "ab", *SOURCE), "96 hexadecimal digits"),
        ((*REGISTERS[:5], "00" * 48, *SOURCE), "unusable_statement"),
        ((*REGISTERS, *SOURCE[:3], "main"), "40 or 64 hexadecimal digits"),
        ((*REGISTERS, *SOURCE[:2]), "--commit"),
        ((*REGISTERS, *SOURCE[2:]), "--repository"),
        ((*REGISTERS, *SOURCE, "--model", "none.gguf"), "none.gguf"),
        ((*REGISTERS, *SOURCE, "--model", "sha384:00"), "96 hexadecimal digits"),
        ((*REGISTERS, *SOURCE, "--model", "key.pem"), "gguf"),
        ((*REGISTERS, *SOURCE, "--configuration", "large"), "too large"),
        ((*REGISTERS, *SOURCE, "--expires", "401"), "400"),
        ((*REGISTERS, "--repository", " ", "--commit", "ab" * 20), "unusable_statement"),
    ],
)
def test_what_is_no_release(release: Publisher, folder: Path, arguments: tuple[str, ...], word: str) -> None:
    Path("large").write_bytes(bytes((1 << 20) + 1))
    ran = release.add("1.0", *arguments)
    assert ran.code in (2, 3), ran
    assert word.lower() in ran.err.lower()
    assert not Path("releases.jsonl").exists()


def test_the_image_is_stated_once(release: Publisher, folder: Path) -> None:
    Path("enclave.eif").write_bytes(eif().encode())
    ran = release.add("1.0", "--from-eif", "enclave.eif", "--image", "enclave.eif", *SOURCE)
    assert (ran.code, "leave --image out" in ran.err) == (2, True)


def test_refusals_of_the_file(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    before = Path("releases.jsonl").read_bytes()
    for ran, code in (
        (release.add("1.0", *REGISTERS, "--pcr8", "09" * 48, *SOURCE), "release_exists"),
        (release("withdraw", "3.0"), "no_such_release"),
    ):
        assert (ran.code, code in ran.err) == (2, True), ran
    Path("releases.jsonl").write_bytes(before[:-1])
    for ran in (release.add("2.0"), release("withdraw", "1.0"), release("refresh")):
        assert (ran.code, "malformed_release" in ran.err) == (3, True)
    assert Path("releases.jsonl").read_bytes() == before[:-1]


# --- Checking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["", " x", "\udcff", "a\nb", "x" * 129])
def test_a_product_that_nothing_can_be_called(release: Publisher, product: str) -> None:
    ran = release.terminal("release", "check", "releases.jsonl", "--key", PIN, "--product", product)
    assert (ran.code, ran.out) == (2, "")


def test_an_expired_history(release: Publisher, folder: Path) -> None:
    """Long ago, whatever the machine's clock says now."""
    file = ReleaseFile(Path("releases.jsonl"), ED25519, NAME, MemoryHeads())
    for image in (ONE, TWO):
        file.add(image, at=datetime(2020, 1, 1, tzinfo=UTC), validity=timedelta(days=1))
    ran = release.check()
    assert ran.code == 3
    assert "+ 2.0" in ran.out
    assert "VERIFIED" not in ran.out
    assert "expired_release" in ran.err
    assert release.check("--json").json["error"]["code"] == "expired_release"


def test_a_check_that_remembers(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    older = Path("releases.jsonl").read_bytes()
    release("refresh")
    for _ in range(2):
        assert release.check().code == 0
    Path("releases.jsonl").write_bytes(older)
    rolled_back = release.check()
    assert (rolled_back.code, rolled_back.out) == (3, "")
    assert "releases.jsonl: the history has 1 entry, and 2 were seen before: fetch the newest one" in rolled_back.err
    assert release.check("--no-memory").code == 0
    minimum = release.check("--minimum-sequence", "2", "--no-memory", "--json")
    assert (minimum.code, minimum.json["error"]["code"]) == (3, "rolled_back")


def test_a_check_and_a_policy_remember_as_one(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    older = Path("releases.jsonl").read_bytes()
    release("refresh")
    source = ("--from-release", "releases.jsonl", "--key", PIN, "--product", NAME)
    ignored = ("--ignore-model", "a test", "--ignore-configuration", "a test")
    assert release.terminal("policy", "init", *source, *ignored, "--minimum-sequence", "1").code == 0
    Path("releases.jsonl").write_bytes(older)
    assert "rolled_back" in release.check().err


def test_a_memory_that_cannot_be_kept(release: Publisher, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release.add("1.0")
    monkeypatch.setenv("STRONGROOM_HOME", str(folder / "key.pem"))
    ran = release.check()
    assert (ran.code, ran.out) == (4, "")
    assert "what was seen of release histories cannot be kept" in ran.err
    assert "STRONGROOM_HOME" in ran.err
    assert release.check("--no-memory").code == 0


def test_a_file_that_was_cut_off(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    path = Path("releases.jsonl")
    path.write_bytes(path.read_bytes()[:100])
    for ran in (release.check(), release("refresh")):
        assert (ran.code, "releases.jsonl: the last line has no end: the file was cut off" in ran.err) == (3, True)


def test_an_image_is_hashed_once_for_its_statement(
    release: Publisher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured and what is stated are one reading: nobody can change the file between two."""
    Path("enclave.eif").write_bytes(eif().encode())
    opened = []
    real = Path.open

    def counting(path: Path, *arguments: Any, **named: Any) -> Any:
        opened.append(path.name)
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", counting)
    assert release.add("1.0", "--from-eif", "enclave.eif", *SOURCE).code == 0
    assert opened.count("enclave.eif") == 1


def test_what_a_check_refuses(release: Publisher, folder: Path) -> None:
    release.add("1.0")
    assert "wrong_key" in release.check(key=str(P384.public_key)).err
    other = release.terminal("release", "check", "releases.jsonl", "--key", PIN, "--product", "other")
    assert (other.code, "wrong_name" in other.err) == (3, True)
    for key in ("ed25519:ab", "key.pem"):
        assert release.check(key=key).code == 2
    Path("releases.jsonl").unlink()
    assert release.check().code == 2
