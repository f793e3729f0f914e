"""``image policy``: an image's own word becomes a policy that accepts it, and a key policy that opens to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from attestation.envelope import EnvelopePurpose
from attestation.image_files import MAX_CONFIGURATION, ImageFileError
from attestation.keypolicy.document import KeyPolicy
from attestation.policy import AppraisalPolicy
from attestation.ramdisk import RamdiskError
from attestation.reference import PCR_ROLE, PCR_SIGNER, configuration_digest, once_extended
from attestation.release_heads import MemoryHeads
from attestation.rules import Forbid, Ignore, Require
from emulator.pki import ensure_development_root
from parent.start_command import configuration_of
from strongroom.files import write_new
from tests.cpio_files import Member, archive, folder, link, packed
from tests.eif_files import Eif
from tests.sound_images import BOOT, SIGNER, sound
from tests.terminal import Terminal

CONFIGURATION = "rootfs/etc/strongroom/enclave.toml"
MANIFEST = "ab" * 48
KEY = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE, PUBLISHER, ADMINISTRATOR = (f"arn:aws:iam::111122223333:role/{name}" for name in ("parent", "publisher", "admin"))
CONDITION = ("--use", "model", "--context", "production", "--user", ROLE)


def toml(*, nsm: str = "device:/dev/nsm", entropy: str = "nsm-hwrng", manifest: str = f"sha384:{MANIFEST}") -> str:
    return f"""version = 1
[nsm]
address = "{nsm}"
entropy = "{entropy}"
[model]
store = "vsock:3:5006"
manifest = "{manifest}"
"""


KMS = f"""[kms]
region = "eu-central-1"
[kms.model]
key = "{KEY}"
context = "production"
minimum_version = 1
"""


def built(configuration: str | bytes | None, *more: Sequence[Member]) -> Eif:
    """``more`` is appended to the application's ramdisk, and then in ramdisks of its own."""
    root = [Member("cmd"), folder("rootfs"), folder("rootfs/etc"), folder("rootfs/etc/strongroom")]
    if configuration is not None:
        data = configuration if isinstance(configuration, bytes) else configuration.encode()
        root.append(Member(CONFIGURATION, data))
    disks = [BOOT, (*root, *(more[0] if more else ())), *more[1:]]
    return sound(*(packed(archive(*disk)) for disk in disks))


def kept(path: Path, of: Eif) -> str:
    (path / "enclave.eif").write_bytes(of.encode())
    return str(path / "enclave.eif")


def written(path: Path) -> AppraisalPolicy:
    return AppraisalPolicy.load(path / "policy.toml", heads=MemoryHeads())


def options(path: Path, name: str = "policy.toml") -> tuple[str, str]:
    return "--out", str(path / name)


def test_an_image_for_nitro(strongroom: Terminal, tmp_path: Path) -> None:
    made = built(toml())
    ran = strongroom("image", "policy", kept(tmp_path, made), *options(tmp_path), "--role", ROLE)
    assert ran.code == 0
    policy = written(tmp_path)
    assert not policy.anchor.is_emulated
    [release] = policy.accepted_releases
    assert (release.name, tuple(release.pcrs.as_registers().values())) == ("enclave.eif", made.registers())
    assert policy.model == Require((bytes.fromhex(MANIFEST),))
    assert policy.configuration == Require((configuration_digest(toml().encode()),))
    assert isinstance(policy.pcrs[PCR_SIGNER], Forbid)
    assert not isinstance(policy.pcrs[PCR_ROLE], Ignore)
    assert "enclave.toml" in (tmp_path / "policy.toml").read_text()
    verified = strongroom("image", "verify", str(tmp_path / "enclave.eif"), "--policy", str(tmp_path / "policy.toml"))
    assert verified.code == 0
    assert strongroom("policy", "check", str(tmp_path / "policy.toml")).code == 0


def test_what_stands_there_stays(strongroom: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, built(toml()))
    (tmp_path / "policy.toml").write_text("mine")
    assert strongroom("image", "policy", file, *options(tmp_path)).code == 2
    (tmp_path / "key.json").write_text("mine")
    condition = ("--kms-condition", str(tmp_path / "key.json"), *CONDITION)
    assert strongroom("image", "policy", file, *options(tmp_path, "other.toml"), *condition).code == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["enclave.eif", "key.json", "policy.toml"]
    assert (tmp_path / "policy.toml").read_text() == (tmp_path / "key.json").read_text() == "mine"


def test_an_equal_policy_stays_and_is_no_error(strongroom: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, built(toml(nsm="vsock:3:5008", entropy="host")))
    condition = ("--kms-condition", str(tmp_path / "key.json"), *CONDITION)
    first = strongroom("image", "policy", file, *options(tmp_path), *condition)
    assert first.code == 0
    assert f"wrote {tmp_path}/policy.toml\n" in first.out
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = strongroom("image", "policy", file, *options(tmp_path), *condition)
    assert again.code == 0
    assert again.out.splitlines()[0] == f"unchanged {tmp_path}/policy.toml"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    as_json = strongroom("image", "policy", file, *options(tmp_path), *condition, "--json").json
    assert (as_json["policy"], as_json["wrote"]) == (str(tmp_path / "policy.toml"), [])
    (tmp_path / "key.json").unlink()
    assert strongroom("image", "policy", file, *options(tmp_path), *condition, "--json").json["wrote"] == [
        str(tmp_path / "key.json")
    ]


def test_another_image_s_policy_is_refused_and_nothing_is_written(strongroom: Terminal, tmp_path: Path) -> None:
    assert strongroom("image", "policy", kept(tmp_path, built(toml())), *options(tmp_path)).code == 0
    before = (tmp_path / "policy.toml").read_text()
    file = kept(tmp_path, built(toml(manifest="sha384:" + "cd" * 48)))
    condition = ("--kms-condition", str(tmp_path / "key.json"), *CONDITION)
    ran = strongroom("image", "policy", file, *options(tmp_path), *condition)
    assert ran.code == 2
    assert "File exists" in ran.err
    assert (tmp_path / "policy.toml").read_text() == before
    assert not (tmp_path / "key.json").exists()


def test_a_signed_image_pins_its_signer(strongroom: Terminal, tmp_path: Path) -> None:
    ran = strongroom("image", "policy", kept(tmp_path, built(toml()).signed(SIGNER)), *options(tmp_path), "--json")
    assert ran.json["releases"][0]["pcrs"]["8"] == SIGNER.pcr8().hex()
    assert PCR_SIGNER not in written(tmp_path).pcrs


@pytest.mark.parametrize("given", [False, True])
def test_an_image_for_an_emulated_nsm_says_emulated(strongroom: Terminal, tmp_path: Path, given: bool) -> None:
    file = kept(tmp_path, built(toml(nsm="vsock:3:5008", entropy="host")))
    root: tuple[str, ...] = ()
    if given:
        (tmp_path / "my.der").write_bytes(ensure_development_root().certificate_der)
        root = ("--root", str(tmp_path / "my.der"))
    ran = strongroom("image", "policy", file, *options(tmp_path), *root)
    assert ran.code == 0
    policy = written(tmp_path)
    assert policy.anchor.is_emulated
    assert policy.anchor.der == ensure_development_root().certificate_der
    assert (tmp_path / ("my.der" if given else "development-root.der")).exists()
    assert "nsm-hwrng" not in ran.err


def test_a_root_is_for_an_emulated_nsm_alone(strongroom: Terminal, tmp_path: Path) -> None:
    (tmp_path / "my.der").write_bytes(ensure_development_root().certificate_der)
    file = kept(tmp_path, built(toml()))
    ran = strongroom("image", "policy", file, *options(tmp_path), "--root", str(tmp_path / "my.der"))
    assert (ran.code, (tmp_path / "policy.toml").exists()) == (2, False)


def test_random_numbers_of_the_host_are_warned_of(strongroom: Terminal, tmp_path: Path) -> None:
    ran = strongroom("image", "policy", kept(tmp_path, built(toml(entropy="host"))), *options(tmp_path))
    assert ran.code == 0
    assert "entropy is not nsm-hwrng" in ran.err


def test_an_image_of_others_is_told_what_to_do(strongroom: Terminal, tmp_path: Path) -> None:
    ran = strongroom("image", "policy", kept(tmp_path, built(None)), *options(tmp_path))
    assert ran.code == 2
    assert "[no_configuration]" in ran.err
    assert "strongroom policy init --from-eif" in ran.err
    assert not (tmp_path / "policy.toml").exists()


@pytest.mark.parametrize(
    "configuration",
    [
        b"\xff",
        "version = ",
        "version = 1",
        toml(manifest="sha384:ab"),
        toml(manifest="AB" * 48),
        toml().replace("address", "adress"),
        toml() + KMS.replace("arn:", "alias:"),
        toml() + KMS + KMS.partition("\n[kms.model]")[2].replace("production", "x").join(("\n[kms.prompts]", "")),
        b"#" * ((1 << 20) + 1),
    ],
)
def test_a_configuration_that_cannot_be_read(strongroom: Terminal, tmp_path: Path, configuration: str | bytes) -> None:
    ran = strongroom("image", "policy", kept(tmp_path, built(configuration)), *options(tmp_path), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "bad_configuration")
    assert not (tmp_path / "policy.toml").exists()


@pytest.mark.parametrize(
    "more",
    [
        [Member(CONFIGURATION, toml().encode())],
        [Member(CONFIGURATION, b"#" * (MAX_CONFIGURATION + 1))],
        [link("rootfs/alias", "etc/strongroom"), Member("rootfs/alias/enclave.toml", toml().encode())],
    ],
    ids=["twice", "too large", "by another way"],
)
@pytest.mark.parametrize("is_beside", [False, True])
def test_an_image_of_which_nobody_can_say_what_it_reads(
    strongroom: Terminal, tmp_path: Path, more: list[Member], is_beside: bool
) -> None:
    file = kept(tmp_path, built(toml()))
    assert strongroom("image", "policy", file, *options(tmp_path)).code == 0
    file = kept(tmp_path, built(toml(), *([[], more] if is_beside else [more])))
    ran = strongroom("image", "policy", file, *options(tmp_path, "other.toml"), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "broken_image")
    assert not (tmp_path / "other.toml").exists()
    seen = strongroom("image", "verify", file, "--policy", str(tmp_path / "policy.toml"), "--json")
    assert seen.code == 3
    assert {"name": "configuration", "status": "failed"}.items() <= seen.json["checks"][-1].items()
    with pytest.raises(RamdiskError):
        configuration_of(Path(file))


def test_start_reads_the_configuration_that_the_policy_pins(tmp_path: Path) -> None:
    assert configuration_of(Path(kept(tmp_path, built(toml())))) == toml().encode()
    with pytest.raises(ImageFileError) as caught:
        configuration_of(Path(kept(tmp_path, built(None))))
    assert caught.value.code == "no_such_file"


def test_the_keys_of_the_configuration_are_those_of_the_policy(strongroom: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, built(toml() + KMS))
    assert strongroom("image", "policy", file, *options(tmp_path)).code == 0
    rule = written(tmp_path).kms[EnvelopePurpose.MODEL]
    assert (rule.key.text, rule.context, rule.administrators) == (KEY, "production", ())
    named = ("--kms-model-key", KEY, "--kms-context", "production", "--kms-administrator", ADMINISTRATOR)
    assert strongroom("image", "policy", file, *options(tmp_path, "b.toml"), *named).code == 0
    other = ("--kms-model-key", KEY.replace("1234abcd", "5678abcd"), "--kms-context", "production")
    ran = strongroom("image", "policy", file, *options(tmp_path, "c.toml"), *other)
    assert (ran.code, "names other KMS keys" in ran.err) == (2, True)


def test_no_keys_in_the_table(strongroom: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, built(toml() + '[kms]\nregion = "eu-central-1"\n'))
    assert strongroom("image", "policy", file, *options(tmp_path)).code == 0
    assert written(tmp_path).kms == {}


def test_a_key_policy_opens_to_this_image(strongroom: Terminal, tmp_path: Path) -> None:
    made = built(toml())
    condition = ("--kms-condition", str(tmp_path / "key.json"), *CONDITION, "--sealer", PUBLISHER)
    ran = strongroom(
        "image",
        "policy",
        kept(tmp_path, made),
        *options(tmp_path),
        *condition,
        "--administrator",
        ADMINISTRATOR,
        "--json",
    )
    assert ran.code == 0
    assert ran.json["wrote"] == [str(tmp_path / "key.json"), str(tmp_path / "policy.toml")]
    text = (tmp_path / "key.json").read_text()
    KeyPolicy.parse(text)
    for value in (*made.registers()[1:], once_extended(configuration_digest(toml().encode()))):
        assert value.hex() in text
    assert ADMINISTRATOR in text
    [opening] = [each for each in json.loads(text)["Statement"] if each["Action"] == "kms:Decrypt"]
    condition_keys = {key for operator in opening["Condition"].values() for key in operator}
    assert {"kms:RecipientAttestation:ImageSha384", "kms:RecipientAttestation:PCR1"} <= condition_keys


def test_the_keys_of_the_configuration_say_what_the_key_policy_is_for(strongroom: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, built(toml() + KMS))
    condition = ("--kms-condition", str(tmp_path / "key.json"), "--user", ROLE)
    assert strongroom("image", "policy", file, *options(tmp_path), *condition).code == 0
    assert "production" in (tmp_path / "key.json").read_text()
    wrong = ("--kms-condition", str(tmp_path / "other.json"), "--user", ROLE, "--context", "test")
    ran = strongroom("image", "policy", file, *options(tmp_path, "b.toml"), *wrong)
    assert (ran.code, "the policy's context is production, not test" in ran.err) == (2, True)
    untrusted = ("--kms-condition", str(tmp_path / "other.json"), "--user", ROLE, "--administrator", ADMINISTRATOR)
    ran = strongroom("image", "policy", file, *options(tmp_path, "b.toml"), *untrusted, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "refused_key_policy")
    assert not (tmp_path / "b.toml").exists()


@pytest.mark.parametrize("missing", [("--user", ROLE), ("--use", "model"), ("--context", "production")])
def test_what_a_key_policy_needs(strongroom: Terminal, tmp_path: Path, missing: tuple[str, str]) -> None:
    given = [*zip(CONDITION[::2], CONDITION[1::2], strict=True)]
    given.remove(missing)
    condition = ("--kms-condition", str(tmp_path / "key.json"), *(each for pair in given for each in pair))
    assert strongroom("image", "policy", kept(tmp_path, built(toml())), *options(tmp_path), *condition).code == 2
    assert [each.name for each in tmp_path.iterdir()] == ["enclave.eif"]


def test_what_is_for_a_key_policy_alone(strongroom: Terminal, tmp_path: Path) -> None:
    ran = strongroom("image", "policy", kept(tmp_path, built(toml())), *options(tmp_path), "--user", ROLE)
    assert (ran.code, "are for --kms-condition" in ran.err) == (2, True)


def test_all_is_written_or_nothing(strongroom: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".toml":
            raise OSError(28, "No space left on device", str(path))
        write_new(path, data)

    monkeypatch.setattr("strongroom.policy_init.write_new", full)
    condition = ("--kms-condition", str(tmp_path / "key.json"), *CONDITION)
    assert strongroom("image", "policy", kept(tmp_path, built(toml())), *options(tmp_path), *condition).code == 4
    assert [each.name for each in tmp_path.iterdir()] == ["enclave.eif"]
