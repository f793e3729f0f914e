"""``strongroom model encrypt``: what it writes boots the enclaves that the policy accepts, and is closed to others."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attestation.anchors import AWS_NITRO_G1
from attestation.envelope import MODEL_RECORD, EnvelopeHeader
from attestation.keypolicy.document import KeyPolicy
from attestation.manifest import ModelManifest
from attestation.policy_writer import write_policy as policy_text
from attestation.reference import digest_text
from attestation.rules import Require
from strongroom import model_commands
from tests.attested import write_policy
from tests.gguf_files import TEXT, Gguf
from tests.kms_house import WEIGHTS, WEIGHTS_CANARY, HouseDesk, kms_house
from tests.sealing import CONTEXT, FLOOR, MODEL, OTHER_KEY, PROMPT
from tests.terminal import Ran, Terminal


@pytest.fixture
async def desk(strongroom: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HouseDesk]:
    """A folder with a model in it, in which somebody who may seal sits; the enclave has not booted."""
    folder, house = tmp_path / "desk", tmp_path / "house"
    folder.mkdir()
    house.mkdir()
    monkeypatch.chdir(folder)
    async with kms_house(house, started=False) as home:
        monkeypatch.setenv("STRONGROOM_POLICY", str(home.behind.write_policy()))
        Path("tiny.gguf").write_bytes(WEIGHTS)
        yield HouseDesk(home, strongroom, monkeypatch)


def encrypted(desk: HouseDesk, *options: str | Path, model: str = "tiny.gguf") -> Ran:
    return desk("model", "encrypt", model, "--out", "tiny.sealed", *options)


def refused(ran: Ran, code: int, error: str) -> None:
    """The exit code, and the error's; and nothing was written."""
    assert ran.code == code, ran.err
    assert f"[{error}]" in ran.err
    assert ran.out == ""
    assert os.listdir() == ["tiny.gguf"]


# --- What is written --------------------------------------------------------------------------------------------------


async def test_an_enclave_boots_from_what_is_written(desk: HouseDesk) -> None:
    ran = encrypted(desk)
    assert ran.code == 0, ran.err
    assert ran.out == "wrote tiny.sealed\nwrote tiny.sealed.manifest\n"
    assert "EMULATED" in ran.err
    assert desk.asked == ["DescribeKey", "GetKeyPolicy", "ListGrants", "GenerateDataKey"]
    envelope = Path("tiny.sealed").read_bytes()
    assert WEIGHTS_CANARY not in envelope
    manifest = ModelManifest.decode(Path("tiny.sealed.manifest").read_bytes())
    assert manifest == desk.home.behind.manifest
    header, _ = EnvelopeHeader.split(envelope)
    assert (header.key, header.context, header.version, header.record) == (
        desk.home.keys[MODEL],
        CONTEXT,
        FLOOR,
        MODEL_RECORD,
    )
    desk.home.behind.encrypt_store(envelope)
    await desk.home.behind.start()
    model = desk.home.behind.enclave.model
    assert os.pread(model.fd, len(WEIGHTS) + 1, 0) == WEIGHTS
    await desk.home.behind.stop()


async def test_the_same_for_programs(desk: HouseDesk) -> None:
    ran = encrypted(desk, "--json", "--version", str(FLOOR + 2))
    assert (ran.code, ran.err) == (0, "")
    said = ran.json
    assert (said["model"], said["manifest"]) == ("tiny.sealed", "tiny.sealed.manifest")
    assert (said["version"], said["digest"]) == (FLOOR + 2, digest_text(desk.home.behind.manifest.digest()))
    assert (said["verdict"], said["purpose"], said["key"]) == ("accepted", "model", desk.home.keys[MODEL].text)
    assert {check["step"] for check in said["checks"]} == {16, 17, 18, 19, 20, 21}
    assert EnvelopeHeader.split(Path("tiny.sealed").read_bytes())[0].version == FLOOR + 2
    desk.home.behind.encrypt_store(Path("tiny.sealed").read_bytes())
    await desk.home.behind.start()
    await desk.home.behind.stop()


async def test_two_encryptions_share_nothing(desk: HouseDesk) -> None:
    assert encrypted(desk).code == 0
    assert desk("model", "encrypt", "tiny.gguf", "--out", "again.sealed").code == 0
    one, other = (Path(name).read_bytes() for name in ("tiny.sealed", "again.sealed"))
    assert len(one) == len(other)
    assert EnvelopeHeader.split(one)[0].wrapped != EnvelopeHeader.split(other)[0].wrapped
    assert one[-4000:] != other[-4000:]


async def test_an_enclave_of_another_configuration_does_not_boot_from_it(desk: HouseDesk, tmp_path: Path) -> None:
    """KMS would release the key, were its policy wider; the terms name another."""
    other = replace(desk.home.policy, configuration=Require((b"\x77" * 48,)))
    desk.home.open_keys(other)
    (tmp_path / "other").mkdir()
    ran = encrypted(desk, "--policy", write_policy(other, tmp_path / "other"))
    assert ran.code == 0, ran.err
    desk.home.behind.encrypt_store(Path("tiny.sealed").read_bytes())
    assert (await desk.home.behind.halt())["code"] == "kms_denied"
    desk.home.open_keys()
    halted = await desk.home.behind.halt()
    assert (halted["code"], halted["expected"]) == ("wrong_configuration", digest_text(b"\x77" * 48))


# --- What is not ------------------------------------------------------------------------------------------------------


async def test_another_key_than_the_policys(desk: HouseDesk) -> None:
    refused(encrypted(desk, "--key", OTHER_KEY.text), 2, "wrong_key")
    refused(encrypted(desk, "--key", desk.home.keys[PROMPT].text), 2, "wrong_key")
    assert desk.asked == []
    assert encrypted(desk, "--key", desk.home.keys[MODEL].text).code == 0


@pytest.mark.parametrize("left", [(), (PROMPT,)])
async def test_a_policy_without_a_key_for_models(desk: HouseDesk, tmp_path: Path, left: Any) -> None:
    rules = {purpose: rule for purpose, rule in desk.home.policy.kms.items() if purpose in left}
    (tmp_path / "other").mkdir()
    policy = write_policy(replace(desk.home.policy, kms=rules), tmp_path / "other")
    ran = encrypted(desk, "--policy", policy)
    refused(ran, 2, "missing_field")
    assert "add [kms.model]" in ran.err


@pytest.mark.parametrize("name", ["tiny.sealed", "tiny.sealed.manifest"])
async def test_files_that_are_there(desk: HouseDesk, name: str) -> None:
    Path(name).write_text("precious")
    ran = encrypted(desk)
    assert ran.code == 2
    assert name in ran.err
    assert "File exists" in ran.err
    assert sorted(os.listdir()) == sorted(["tiny.gguf", name])
    assert Path(name).read_text() == "precious"
    assert desk.asked == []


async def test_another_model_than_the_policy_accepts(desk: HouseDesk) -> None:
    other = Gguf([("tokenizer.chat_template", TEXT, "{{ other }}")]).encode()
    Path("tiny.gguf").write_bytes(other)
    ran = encrypted(desk)
    refused(ran, 2, "model_not_accepted")
    assert digest_text(desk.home.behind.manifest.digest()) in ran.err
    assert desk.asked == []


async def test_a_file_that_is_no_model(desk: HouseDesk) -> None:
    for content in (b"", b"GGUF", b"strongroom/1 envelope\n" + bytes(1000)):
        Path("tiny.gguf").write_bytes(content)
        ran = encrypted(desk)
        assert ran.code == 2
        assert ran.out == ""
        assert os.listdir() == ["tiny.gguf"]
    assert encrypted(desk, model="nothing.gguf").code == 2
    assert desk.asked == []


@pytest.mark.parametrize("version", ["0", "-1", "x", str(1 << 32), str(FLOOR - 1)])
async def test_a_version_that_no_enclave_would_take(desk: HouseDesk, version: str) -> None:
    ran = encrypted(desk, "--version", version)
    assert ran.code == 2
    assert "--version" in ran.err
    assert os.listdir() == ["tiny.gguf"]
    assert desk.asked == []


async def test_no_credentials(desk: HouseDesk) -> None:
    desk.have_no_credentials()
    ran = encrypted(desk)
    refused(ran, 4, "kms_unavailable")
    assert "Unable to locate credentials" in ran.err
    ran = encrypted(desk, "--json")
    assert (ran.code, ran.json["error"]["code"], ran.err) == (4, "kms_unavailable", "")


async def test_credentials_that_may_not_seal(desk: HouseDesk) -> None:
    for name in ("assumed-role/stranger/me", "assumed-role/administrator/me", "arn:aws:iam::444455556666:user/eve"):
        desk.become(name)
        refused(encrypted(desk), 4, "kms_refused")


async def test_a_key_that_releases_to_somebody_else(desk: HouseDesk) -> None:
    key = desk.home.keys[MODEL]
    found = desk.home.world.emulator.kms.keys.find(key.text, account=key.account, region=key.region).key
    document = json.loads(found.policy)
    stranger = {"AWS": "arn:aws:iam::111122223333:role/stranger"}
    document["Statement"].append({"Effect": "Allow", "Principal": stranger, "Action": "kms:Decrypt", "Resource": "*"})
    found.policy = KeyPolicy.parse(json.dumps(document)).encode()
    ran = encrypted(desk)
    assert ran.code == 1
    assert "[open_key_policy]" in ran.err
    assert "GenerateDataKey" not in desk.asked
    assert os.listdir() == ["tiny.gguf"]


async def test_a_manifest_that_cannot_be_written_takes_the_model_back(
    desk: HouseDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(model_commands, "write_new", full)
    ran = encrypted(desk)
    assert ran.code == 4
    assert "No space left" in ran.err
    assert os.listdir() == ["tiny.gguf"]


async def test_help_has_an_example(desk: HouseDesk) -> None:
    assert "strongroom model encrypt " in desk("model", "encrypt", "--help").out
    assert "strongroom model encrypt " in desk("model", "--help").out


async def test_a_policy_of_aws_and_a_kms_that_is_not_aws_own(
    desk: HouseDesk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text(policy_text(replace(desk.home.policy, anchor=AWS_NITRO_G1)))
    refused(encrypted(desk, "--policy", policy), 3, "foreign_kms")
    assert desk.asked == []
