"""policy.toml: what is unknown, missing, contradictory or wrong is named, and nothing is optional in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor
from attestation.envelope import MAX_OPENING
from attestation.errors import PolicyError
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ManifestFile, ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.reference import PcrSet, once_extended
from attestation.rules import (
    DocumentBinding,
    Forbid,
    Ignore,
    KeyRule,
    Manifests,
    Measures,
    Release,
    Released,
    Require,
    WrappedKeyFile,
)
from tests.key_facts import HEADER, key_rule, with_keys
from tests.key_policies import MODEL as MODEL_PURPOSE
from tests.key_policies import PROMPT as PROMPT_PURPOSE
from tests.pki import forge
from tests.policies import policies

A = "a" * 96
DOCUMENT = 'purpose = "document"\n[binding.public_key]\nforbid = true\n[binding.user_data]\nforbid = true'
REQUIRED = 'purpose = "document"\n[binding.user_data]\nforbid = true\n[binding.public_key]\nrequire = '
MODEL = forge.POLICY[forge.POLICY.index("[model]") : forge.POLICY.index("[configuration]")].rstrip("\n")
MANIFEST = '[model]\nmanifests = ["one.manifest"]\nminimum_version = 3'
ONE = ModelManifest("one", (ManifestFile("one.gguf", 1, bytes(48)),), "{{ template }}", version=3)
RELEASE_ONE = forge.POLICY[forge.POLICY.index("[[release]]") : forge.POLICY.index('[[release]]\nname = "two"')]
RELEASE_TWO = forge.POLICY[forge.POLICY.index('[[release]]\nname = "two"') : forge.POLICY.index("[model]")]
ANCHOR = forge.POLICY[forge.POLICY.index("[anchor]") : forge.POLICY.index("[freshness]")]


def _error(text: str, folder: Path) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        AppraisalPolicy.parse(text, folder)
    return caught.value


def test_it_is_read(policy: AppraisalPolicy) -> None:
    assert policy.anchor == Anchor.emulated(forge.ROOT_DER)
    assert (policy.max_age_seconds, policy.leeway_seconds, policy.accept_debug) == (300, 120, None)
    assert [release.name for release in policy.accepted_releases] == ["one", "two"]
    assert policy.accepted_releases[0].pcrs == PcrSet(forge.PCRS[0], forge.PCRS[1], forge.PCRS[2])
    assert policy.model == Require((forge.COMMITMENT.model,))
    assert policy.pcrs == {3: Forbid(), 4: Require((forge.PCRS[4],)), 8: Forbid()}
    assert policy.module_id == Ignore("it changes at every start")


def test_aws_needs_no_file(policy_folder: Path) -> None:
    text = forge.POLICY.replace(ANCHOR, '[anchor]\ntrust = "AWS-NITRO-G1"\n')
    assert AppraisalPolicy.parse(text, policy_folder).anchor is AWS_NITRO_G1


@pytest.mark.parametrize(
    "line",
    [line for line in forge.POLICY.splitlines() if " = " in line and not line.startswith("pcr8")],
    ids=lambda line: line.partition(" =")[0],
)
def test_every_field_must_be_there(line: str, policy_folder: Path) -> None:
    assert _error(forge.POLICY.replace(line + "\n", "", 1), policy_folder).code == "missing_field"


@pytest.mark.parametrize(
    "table",
    ["anchor", "freshness", "debug", "binding", "model", "configuration", "pcrs.3", "pcrs.4", "pcrs.8", "module_id"],
)
def test_every_table_must_be_there(table: str, policy_folder: Path) -> None:
    lines = forge.POLICY.splitlines()
    start = lines.index(f"[{table}]")
    end = next((number for number in range(start + 1, len(lines)) if lines[number].startswith("[")), len(lines))
    error = _error("\n".join(lines[:start] + lines[end:]), policy_folder)
    assert (error.code, error.field) == ("missing_field", table)


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        # the file
        ("version = 1", "version = 2", "unknown_version", "version"),
        ("version = 1", 'version = "1"', "wrong_value", "version"),
        ("version = 1", "version = true", "wrong_value", "version"),
        ("version = 1", "version = 1\nmore = 1", "unknown_field", "more"),
        ("version = 1", "version = ", "malformed_policy", None),
        ("version = 1", "version = 1\nversion = 1", "malformed_policy", None),
        ("[debug]\nforbid = true", "[debug]\nforbid = true\nmore.more = 1", "unknown_field", "debug.more"),
        # the anchor
        ('"EMULATED"', '"ANYTHING"', "unknown_value", "anchor.trust"),
        ('"EMULATED"', '"emulated"', "unknown_value", "anchor.trust"),
        ('"EMULATED"', '"AWS-NITRO-G1"', "contradiction", "anchor.root"),
        ('"EMULATED"', "[]", "wrong_value", "anchor.trust"),
        ('"EMULATED"\nroot = "root.der"', '"AWS-NITRO-G1"', "contradiction", "anchor.root_sha256"),
        ('"root.der"', '"absent.der"', "unreadable_anchor", "anchor.root"),
        ('"root.der"', '"."', "unreadable_anchor", "anchor.root"),
        ('"root.der"', '"large.der"', "unreadable_anchor", "anchor.root"),
        ('"root.der"', '"leaf.der"', "wrong_anchor", "anchor.root_sha256"),
        ('root_sha256 = "', 'root_sha256 = "0', "wrong_value", "anchor.root_sha256"),
        ("[freshness]", "more = 1\n[freshness]", "unknown_field", "anchor.more"),
        # freshness
        ("= 300", "= 0", "wrong_value", "freshness.max_age_seconds"),
        ("= 300", "= 86401", "wrong_value", "freshness.max_age_seconds"),
        ("= 300", "= 300.0", "wrong_value", "freshness.max_age_seconds"),
        ("= 120", "= -1", "wrong_value", "freshness.leeway_seconds"),
        ("= 120", "= 601", "wrong_value", "freshness.leeway_seconds"),
        ("[debug]", "more = 1\n[debug]", "unknown_field", "freshness.more"),
        # debug
        ("[debug]\nforbid = true", "[debug]\nforbid = false", "wrong_value", "debug.forbid"),
        ("[debug]\nforbid = true", '[debug]\nforbid = true\naccept = "why"', "contradiction", "debug"),
        ("[debug]\nforbid = true", '[debug]\naccept = ""', "wrong_value", "debug.accept"),
        ("[debug]\nforbid = true", '[debug]\naccept = "  "', "wrong_value", "debug.accept"),
        ("[debug]\nforbid = true", "[debug]\naccept = true", "wrong_value", "debug.accept"),
        ("[debug]\nforbid = true", '[debug]\nignore = "why"', "missing_field", "debug"),
        # binding
        ('purpose = "channel"', 'purpose = "anything"', "unknown_value", "binding.purpose"),
        ('purpose = "channel"', "purpose = 1", "wrong_value", "binding.purpose"),
        ('purpose = "channel"', 'purpose = "channel"\nmore = 1', "unknown_field", "binding.more"),
        ('purpose = "channel"', 'purpose = "document"', "missing_field", "binding.public_key"),
        ('purpose = "channel"', f"{DOCUMENT}\nmore = 1", "unknown_field", "binding.user_data.more"),
        ('purpose = "channel"', DOCUMENT.replace("forbid", "require"), "wrong_value", "binding.public_key.require"),
        ('purpose = "channel"', f"{REQUIRED}[]", "empty_list", "binding.public_key.require"),
        ('purpose = "channel"', f'{REQUIRED}["0"]', "wrong_value", "binding.public_key.require[0]"),
        ('purpose = "channel"', f'{REQUIRED}["{"00" * 1025}"]', "wrong_value", "binding.public_key.require[0]"),
        # releases
        (RELEASE_ONE + RELEASE_TWO, "", "missing_field", "release"),
        (RELEASE_ONE + RELEASE_TWO, "[release]\n", "wrong_value", "release"),
        ("version = 1", "version = 1\nrelease = []", "malformed_policy", None),
        (RELEASE_TWO, RELEASE_ONE, "contradiction", "release[1].name"),
        (forge.PCRS[0].hex(), "0" * 96, "contradiction", "release[0].pcr0"),
        (forge.PCRS[2].hex(), "0" * 96, "contradiction", "release[0].pcr2"),
        (forge.measured("signer").hex(), "0" * 96, "contradiction", "release[1].pcr8"),
        (forge.PCRS[0].hex(), "0" * 95, "wrong_value", "release[0].pcr0"),
        (forge.PCRS[1].hex(), "g" * 96, "wrong_value", "release[0].pcr1"),
        (forge.PCRS[2].hex(), " " + "a" * 96, "wrong_value", "release[0].pcr2"),
        (f'pcr2 = "{forge.PCRS[2].hex()}"', f'pcr2 = "{A}"\npcr3 = "{A}"', "unknown_field", "release[0].pcr3"),
        ('name = "one"', 'name = ""', "wrong_value", "release[0].name"),
        ('name = "two"', 'name = "2"\n[[release]]\nname = "two"', "missing_field", "release[1].pcr0"),
        (RELEASE_TWO, RELEASE_ONE.replace('"one"', '"again"'), "contradiction", "release[1]"),
        ('name = "one"', f'name = "one"\nmodels = ["sha384:{A}"]', "contradiction", "model"),
        ('name = "one"', f'name = "one"\nconfigurations = ["sha384:{A}"]', "contradiction", "configuration"),
        ('name = "one"', r'name = "\u001b[2K"', "wrong_value", "release[0].name"),
        ('name = "one"', f'name = "{"x" * 501}"', "wrong_value", "release[0].name"),
        # model and configuration
        (f'"sha384:{forge.COMMITMENT.model.hex()}"', "", "empty_list", "model.require"),
        (f'["sha384:{forge.COMMITMENT.model.hex()}"]', f'"sha384:{A}"', "wrong_value", "model.require"),
        (f"sha384:{forge.COMMITMENT.model.hex()}", A, "wrong_value", "model.require[0]"),
        (f"sha384:{forge.COMMITMENT.model.hex()}", f"sha256:{A}", "wrong_value", "model.require[0]"),
        (f"sha384:{forge.COMMITMENT.model.hex()}", "sha384:", "wrong_value", "model.require[0]"),
        ("[model]\n", '[model]\nignore = "why"\n', "contradiction", "model"),
        ("[model]\n", "[model]\nforbid = true\n", "unknown_field", "model.forbid"),
        ("[configuration]\n", "[configuration]\nmore = 1\n", "unknown_field", "configuration.more"),
        (MODEL, "[model]\nreleased = true", "contradiction", "model.released"),
        (MODEL, "[model]\nreleased = false", "wrong_value", "model.released"),
        (MODEL, '[model]\nmanifests = ["one.manifest"]', "missing_field", "model.minimum_version"),
        (MODEL, "[model]\nminimum_version = 1\nmanifests = []", "empty_list", "model.manifests"),
        (MODEL, f"{MANIFEST}\nmore = 1", "unknown_field", "model.more"),
        (MODEL, MANIFEST.replace("= 3", "= 4"), "contradiction", "model.minimum_version"),
        (MODEL, MANIFEST.replace("= 3", "= -1"), "wrong_value", "model.minimum_version"),
        (MODEL, MANIFEST.replace("one", "absent"), "unreadable_manifest", "model.manifests[0]"),
        (MODEL, MANIFEST.replace("one.manifest", "leaf.der"), "malformed_manifest", "model.manifests[0]"),
        ('name = "one"', 'name = "one"\nmodels = []', "empty_list", "release[0].models"),
        ('name = "one"', 'name = "one"\nconfigurations = ["00"]', "wrong_value", "release[0].configurations[0]"),
        # registers
        ("[pcrs.3]\nforbid = true", '[pcrs.3]\nforbid = true\nignore = "why"', "contradiction", "pcrs.3"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nforbid = false", "wrong_value", "pcrs.3.forbid"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nignore = true", "wrong_value", "pcrs.3.ignore"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nrequire = []", "empty_list", "pcrs.3.require"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nmeasures = []", "empty_list", "pcrs.3.measures"),
        ("[pcrs.3]\nforbid = true", '[pcrs.3]\nmeasures = [""]', "wrong_value", "pcrs.3.measures[0]"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nrequire = [1]", "wrong_value", "pcrs.3.require[0]"),
        ("[pcrs.3]\nforbid = true", "[pcrs.3]\nforbid = true\nmore = 1", "unknown_field", "pcrs.3.more"),
        ("[pcrs.3]\nforbid = true", "[pcrs]\n3 = true", "wrong_value", "pcrs.3"),
        ("[module_id]", "[pcrs.0]\nforbid = true\n[module_id]", "unknown_field", "pcrs.0"),
        ("[module_id]", "[pcrs.16]\nforbid = true\n[module_id]", "unknown_field", "pcrs.16"),
        ("[module_id]", "[pcrs.32]\nforbid = true\n[module_id]", "unknown_field", "pcrs.32"),
        ("[module_id]", "[pcrs.09]\nforbid = true\n[module_id]", "unknown_field", "pcrs.09"),
        ("[module_id]", "[pcrs.role]\nforbid = true\n[module_id]", "unknown_field", "pcrs.role"),
        (RELEASE_ONE, "", "contradiction", "pcrs.8"),
        # module
        ("[module_id]\n", "[module_id]\nforbid = true\n", "unknown_field", "module_id.forbid"),
        ("[module_id]\n", '[module_id]\nrequire = ["a"]\n', "contradiction", "module_id"),
        ('ignore = "it changes at every start"', "require = []", "empty_list", "module_id.require"),
        ('ignore = "it changes at every start"', 'require = [""]', "wrong_value", "module_id.require[0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, code: str, field: str | None, policy_folder: Path) -> None:
    (policy_folder / "leaf.der").write_bytes(forge.GOOD_CHAIN.certificate)
    (policy_folder / "large.der").write_bytes(bytes(1025))
    (policy_folder / "one.manifest").write_bytes(ONE.encode())
    assert old in forge.POLICY
    error = _error(forge.POLICY.replace(old, new, 1), policy_folder)
    assert (error.code, error.field) == (code, field)
    assert error.as_json()["field"] == field
    assert str(error).isprintable() or code == "malformed_policy"


# --- KMS keys ---------------------------------------------------------------------------------------------------------

MODEL_KEY = """
[kms.model]
key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
context = "production"
minimum_version = 3
administrators = ["arn:aws:iam::111122223333:role/admin", "arn:aws:sts::111122223333:assumed-role/admin/me"]
[kms.model.wrapped_key]
file = "model.sealed"
"""
PROMPTS_KEY = """
[kms.prompts]
key = "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
context = "a"
minimum_version = 1
locked = true
"""
KEYS = MODEL_KEY + PROMPTS_KEY
ADMINISTRATORS = MODEL_KEY.splitlines()[5]


@pytest.fixture(scope="module")
def key_folder(policy_folder: Path) -> Path:
    envelope = HEADER.encode() + bytes(MAX_OPENING)
    (policy_folder / "model.sealed").write_bytes(envelope)
    (policy_folder / "cut.sealed").write_bytes(HEADER.encode()[:-1])
    (policy_folder / "empty.sealed").write_bytes(b"")
    (policy_folder / "folder.sealed").mkdir()
    return policy_folder


def test_keys_are_read(key_folder: Path) -> None:
    policy = AppraisalPolicy.parse(forge.POLICY + KEYS, key_folder)
    assert policy.kms == {
        MODEL_PURPOSE: KeyRule(
            HEADER.key,
            "production",
            3,
            ("arn:aws:iam::111122223333:role/admin", "arn:aws:sts::111122223333:assumed-role/admin/me"),
            WrappedKeyFile("model.sealed", HEADER),
        ),
        PROMPT_PURPOSE: KeyRule(
            KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"),
            "a",
            1,
            (),
            None,
        ),
    }
    written = write_policy(policy, root="root.der")
    assert AppraisalPolicy.parse(written, key_folder) == policy
    assert "locked = true" in written
    assert max(len(line) for line in written.splitlines() if line.startswith("#")) <= 120


def test_a_policy_names_no_key_unless_it_says_so(policy: AppraisalPolicy) -> None:
    assert policy.kms == {}
    assert "kms" not in write_policy(policy, root="root.der")


def test_a_wrapped_key_may_be_a_header_alone_or_not_there_yet(key_folder: Path) -> None:
    (key_folder / "header.sealed").write_bytes(HEADER.encode())
    for name, header in (("header.sealed", HEADER), ("absent.sealed", None), ("absent/model.sealed", None)):
        policy = AppraisalPolicy.parse(forge.POLICY + MODEL_KEY.replace("model.sealed", name), key_folder)
        assert policy.kms[MODEL_PURPOSE].wrapped_key == WrappedKeyFile(name, header)
        assert AppraisalPolicy.parse(write_policy(policy, root="root.der"), key_folder) == policy


def test_a_wrapped_key_may_be_ignored_with_a_reason(key_folder: Path) -> None:
    text = MODEL_KEY.replace('file = "model.sealed"', 'ignore = "the operator keeps it"')
    policy = AppraisalPolicy.parse(forge.POLICY + text, key_folder)
    assert policy.kms[MODEL_PURPOSE].wrapped_key == Ignore("the operator keeps it")
    assert AppraisalPolicy.parse(write_policy(policy, root="root.der"), key_folder) == policy


@pytest.mark.parametrize(
    "line",
    [line for line in KEYS.splitlines() if " = " in line and "minimum" not in line] + ["minimum_version = 3"],
    ids=lambda line: line.partition(" =")[0],
)
def test_every_field_of_a_key_must_be_there(line: str, key_folder: Path) -> None:
    text = KEYS.replace(line + "\n", "", 1)
    error = _error(forge.POLICY + text, key_folder)
    assert error.code == "missing_field"
    assert (error.field or "").startswith("kms.")


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        (KEYS, "[kms]\n", "missing_field", "kms.model"),
        (KEYS, "kms = 1\n", "unknown_field", "module_id.kms"),
        (KEYS, "[kms]\nmodel = 1\n", "wrong_value", "kms.model"),
        (PROMPTS_KEY, "[kms.prompt]\n", "unknown_field", "kms.prompt"),
        # the key
        ("key = ", "key = 1 #", "wrong_value", "kms.model.key"),
        ("key/1234abcd", "alias/1234abcd", "wrong_value", "kms.model.key"),
        ("key/1234abcd", "key/*", "wrong_value", "kms.model.key"),
        ("arn:aws:kms:us-east-1:111122223333:key/1234abcd", "1234abcd", "wrong_value", "kms.model.key"),
        ("us-east-1", "", "wrong_value", "kms.model.key"),
        ("0987dcba-09fe-87dc-65ba-ab0987654321", HEADER.key.key_id, "contradiction", "kms.prompts.key"),
        # context and version
        ('"production"', '""', "wrong_value", "kms.model.context"),
        ('"production"', '"Production"', "wrong_value", "kms.model.context"),
        ('"production"', '"*"', "wrong_value", "kms.model.context"),
        ('"production"', f'"{"a" * 65}"', "wrong_value", "kms.model.context"),
        ('"production"', "1", "wrong_value", "kms.model.context"),
        ('"a"', '"a b"', "wrong_value", "kms.prompts.context"),
        ("minimum_version = 3", "minimum_version = 0", "wrong_value", "kms.model.minimum_version"),
        ("minimum_version = 3", "minimum_version = 4294967296", "wrong_value", "kms.model.minimum_version"),
        ("minimum_version = 3", 'minimum_version = "3"', "wrong_value", "kms.model.minimum_version"),
        ("minimum_version = 3", "minimum_version = true", "wrong_value", "kms.model.minimum_version"),
        # who may change it
        ("locked = true", "locked = false", "wrong_value", "kms.prompts.locked"),
        ("locked = true", 'locked = true\nadministrators = ["a"]', "contradiction", "kms.prompts"),
        (ADMINISTRATORS, "administrators = []", "empty_list", "kms.model.administrators"),
        (ADMINISTRATORS, 'administrators = "a"', "wrong_value", "kms.model.administrators"),
        (ADMINISTRATORS, "administrators = [1]", "wrong_value", "kms.model.administrators[0]"),
        ("role/admin\"", 'role/*"', "wrong_value", "kms.model.administrators[0]"),
        ("role/admin\"", 'role/adm?n"', "wrong_value", "kms.model.administrators[0]"),
        ("role/admin\"", 'role/a dmin"', "wrong_value", "kms.model.administrators[0]"),
        ("arn:aws:iam::111122223333:role/admin\"", '111122223333"', "wrong_value", "kms.model.administrators[0]"),
        ("arn:aws:iam::111122223333:role/admin\"", '*"', "wrong_value", "kms.model.administrators[0]"),
        ("assumed-role/admin/me", "", "wrong_value", "kms.model.administrators[1]"),
        ("arn:aws:sts::111122223333:assumed-role/admin/me", "arn:aws:iam::111122223333:role/admin", "contradiction",
         "kms.model.administrators[1]"),
        # the wrapped key
        ("[kms.model.wrapped_key]\nfile", "wrapped_key", "wrong_value", "kms.model.wrapped_key"),
        ('file = "model.sealed"', "", "missing_field", "kms.model.wrapped_key"),
        ('file = "model.sealed"', 'file = "model.sealed"\nignore = "why"', "contradiction", "kms.model.wrapped_key"),
        ('file = "model.sealed"', 'file = "model.sealed"\nmore = 1', "unknown_field", "kms.model.wrapped_key.more"),
        ('file = "model.sealed"', 'ignore = "why"\nmore = 1', "unknown_field", "kms.model.wrapped_key.more"),
        ('file = "model.sealed"', 'ignore = " "', "wrong_value", "kms.model.wrapped_key.ignore"),
        ("model.sealed", "", "wrong_value", "kms.model.wrapped_key.file"),
        ("model.sealed", ".", "unreadable_wrapped_key", "kms.model.wrapped_key.file"),
        ("model.sealed", "folder.sealed", "unreadable_wrapped_key", "kms.model.wrapped_key.file"),
        ("model.sealed", "model.sealed/more", "unreadable_wrapped_key", "kms.model.wrapped_key.file"),
        ("model.sealed", "x" * 300, "unreadable_wrapped_key", "kms.model.wrapped_key.file"),
        ("model.sealed", "root.der", "malformed_envelope", "kms.model.wrapped_key.file"),
        ("model.sealed", "cut.sealed", "truncated_envelope", "kms.model.wrapped_key.file"),
        ("model.sealed", "empty.sealed", "truncated_envelope", "kms.model.wrapped_key.file"),
        ("locked = true", 'locked = true\n[kms.prompts.wrapped_key]\nfile = "model.sealed"', "unknown_field",
         "kms.prompts.wrapped_key"),
        ("locked = true", "locked = true\nmore = 1", "unknown_field", "kms.prompts.more"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_key_is_named(old: str, new: str, code: str, field: str, key_folder: Path) -> None:
    assert old in KEYS
    error = _error(forge.POLICY + KEYS.replace(old, new, 1), key_folder)
    assert (error.code, error.field) == (code, field)
    assert str(error).isprintable()


CONFIGURATION = forge.POLICY[forge.POLICY.index("[configuration]") : forge.POLICY.index("[pcrs.3]")]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('purpose = "channel"', DOCUMENT, "kms"),
        (MODEL, '[model]\nignore = "why"', "model.ignore"),
        (CONFIGURATION, '[configuration]\nignore = "why"\n', "configuration.ignore"),
    ],
)
def test_a_key_takes_a_policy_that_says_all_that_it_must_ask_for(
    old: str, new: str, field: str, key_folder: Path
) -> None:
    assert old in forge.POLICY
    error = _error(forge.POLICY.replace(old, new, 1) + KEYS, key_folder)
    assert (error.code, error.field) == ("contradiction", field)


def test_a_key_takes_a_release_in_which_something_runs(policy: AppraisalPolicy) -> None:
    one, other = policy.accepted_releases
    releases = (replace(one, models=(b"\x01" * 48,)), replace(other, configurations=(b"\x02" * 48,)))
    apart = replace(policy, releases=releases, model=Released(), configuration=Released())
    with pytest.raises(PolicyError) as caught:
        with_keys(apart, PROMPT_PURPOSE)
    assert (caught.value.code, caught.value.field) == ("contradiction", "kms")


def test_what_may_run_in_a_release(policy: AppraisalPolicy) -> None:
    """Each digest once; none where the policy would take any."""
    m, c = b"\x01" * 48, b"\x02" * 48
    one, other = policy.accepted_releases
    assert (policy.accepted_models, policy.accepted_configurations) == (
        (forge.COMMITMENT.model,),
        (forge.COMMITMENT.configuration,),
    )
    released = replace(
        policy,
        releases=(replace(one, models=(m,), configurations=(c, m)), replace(other, models=(c, m), configurations=(c,))),
        model=Released(),
        configuration=Released(),
    )
    assert (released.accepted_models, released.accepted_configurations) == ((m, c), (c, m))
    assert released.models_of(released.accepted_releases[1]) == (c, m)
    older = replace(ONE, version=2)
    manifests = replace(policy, model=Manifests((("older", older), ("one", ONE)), minimum_version=3))
    assert manifests.accepted_models == manifests.models_of(one) == (ONE.digest(),)
    anything = replace(policy, model=Ignore("a test"), configuration=Ignore("a test"))
    assert anything.accepted_models == anything.accepted_configurations == ()


def test_no_program_names_a_key_as_no_file_could(policy: AppraisalPolicy) -> None:
    prompts, model = key_rule(PROMPT_PURPOSE), key_rule(MODEL_PURPOSE)
    makers: list[tuple[str, Callable[[], object]]] = [
        ("context", lambda: replace(prompts, context="A")),
        ("context", lambda: replace(prompts, context="")),
        ("minimum_version", lambda: replace(prompts, minimum_version=0)),
        ("minimum_version", lambda: replace(prompts, minimum_version=1 << 32)),
        ("administrators[0]", lambda: replace(prompts, administrators=("*",))),
        ("administrators[1]", lambda: replace(prompts, administrators=prompts.administrators * 2)),
        ("wrapped_key.file", lambda: WrappedKeyFile("", None)),
        ("kms.model.wrapped_key", lambda: replace(policy, kms={MODEL_PURPOSE: replace(model, wrapped_key=None)})),
        ("kms.prompts.wrapped_key", lambda: replace(policy, kms={PROMPT_PURPOSE: model})),
        ("kms.model.key", lambda: replace(policy, kms={PROMPT_PURPOSE: replace(prompts, key=model.key),
                                                       MODEL_PURPOSE: model})),
    ]  # fmt: skip
    for field, make in makers:
        with pytest.raises(PolicyError) as caught:
            make()
        assert caught.value.field == field


def test_the_keys_do_not_change_under_their_owner(policy: AppraisalPolicy) -> None:
    keys = {PROMPT_PURPOSE: key_rule(PROMPT_PURPOSE)}
    mine = replace(policy, kms=keys)
    del keys[PROMPT_PURPOSE]
    assert mine.kms.keys() == {PROMPT_PURPOSE}


def test_a_root_that_is_none_is_named(policy_folder: Path) -> None:
    (policy_folder / "leaf.der").write_bytes(forge.GOOD_CHAIN.certificate)
    fingerprint = hashlib.sha256(forge.GOOD_CHAIN.certificate).hexdigest()
    text = forge.POLICY.replace("root.der", "leaf.der").replace(hashlib.sha256(forge.ROOT_DER).hexdigest(), fingerprint)
    error = _error(text, policy_folder)
    assert (error.code, error.field) == ("bad_anchor", "anchor.root")


def test_aws_root_under_the_emulators_name_is_refused(policy_folder: Path) -> None:
    (policy_folder / "aws.der").write_bytes(AWS_NITRO_G1.der)
    text = forge.POLICY.replace("root.der", "aws.der")
    error = _error(text.replace(hashlib.sha256(forge.ROOT_DER).hexdigest(), AWS_NITRO_G1.fingerprint), policy_folder)
    assert (error.code, error.field) == ("bad_anchor", "anchor.root")


def test_signed_releases_need_no_rule_for_pcr8(policy_folder: Path) -> None:
    text = forge.POLICY.replace(RELEASE_ONE, "").replace("[pcrs.8]\nforbid = true\n", "")
    assert AppraisalPolicy.parse(text, policy_folder).pcrs.keys() == {3, 4}


def test_a_model_is_named_by_its_manifest(policy_folder: Path) -> None:
    (policy_folder / "one.manifest").write_bytes(ONE.encode())
    policy = AppraisalPolicy.parse(forge.POLICY.replace(MODEL, MANIFEST), policy_folder)
    assert policy.model == Manifests((("one.manifest", ONE),), minimum_version=3)
    text = write_policy(policy, root="root.der", notes=["a note"])
    assert "# a note\n" in text
    assert AppraisalPolicy.parse(text, policy_folder) == policy


def test_a_minimum_version_may_be_anything_that_a_version_may(policy_folder: Path) -> None:
    last = replace(ONE, version=2**63 - 1)
    (policy_folder / "one.manifest").write_bytes(last.encode())
    for minimum in (0, 2**63 - 1):
        text = forge.POLICY.replace(MODEL, MANIFEST.replace("= 3", f"= {minimum}"))
        rule = AppraisalPolicy.parse(text, policy_folder).model
        assert isinstance(rule, Manifests)
        assert rule.minimum_version == minimum


def test_a_field_may_be_as_long_as_a_documents(policy_folder: Path) -> None:
    text = forge.POLICY.replace('purpose = "channel"', f'{REQUIRED}["{"ab" * 1024}"]')
    binding = AppraisalPolicy.parse(text, policy_folder).binding
    assert binding == DocumentBinding(Require((b"\xab" * 1024,)), Forbid())


def test_a_role_is_named_by_its_arn(policy_folder: Path) -> None:
    arn = "arn:aws:iam::123456789012:role/enclave"
    text = forge.POLICY.replace("[pcrs.3]\nforbid = true", f'[pcrs.3]\nmeasures = ["{arn}"]')
    rule = AppraisalPolicy.parse(text, policy_folder).pcrs[3]
    assert isinstance(rule, Measures)
    assert rule.values == (once_extended(arn.encode()),)


# --- files ------------------------------------------------------------------------------------------------------------


def test_it_is_loaded_with_its_root_beside_it(policy: AppraisalPolicy, policy_folder: Path) -> None:
    path = policy_folder / "policy.toml"
    path.write_text(forge.POLICY)
    assert AppraisalPolicy.load(path) == policy


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "unreadable_policy"),
        (b"\xff", "malformed_policy"),
        (b"#" * 1_048_577, "unreadable_policy"),
        (b"", "missing_field"),
    ],
    ids=["absent", "not text", "too large", "empty"],
)
def test_a_file_that_is_no_policy(content: bytes | None, code: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        AppraisalPolicy.load(path)
    assert caught.value.code == code


# --- built by a program -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"releases": ()},
        {"max_age_seconds": 0},
        {"leeway_seconds": 601},
        {"accept_debug": ""},
        {"pcrs": {}},
        {"model": Released()},
        {"configuration": Released()},
        {"pcrs": {3: Forbid(), 4: Forbid()}},
        {"pcrs": {3: Forbid(), 4: Forbid(), 8: Forbid(), 17: Forbid()}},
        {"pcrs": {3: Forbid(), 4: Forbid(), 8: Forbid(), -1: Forbid()}},
        {"pcrs": {3: Forbid(), 4: Require((b"short",)), 8: Forbid()}},
    ],
    ids=str,
)
def test_no_program_builds_a_policy_that_no_file_could_say(policy: AppraisalPolicy, change: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        replace(policy, **change)


def test_no_rule_is_empty() -> None:
    makers: list[Callable[[], object]] = [
        lambda: Require[bytes](()),
        lambda: Ignore(""),
        lambda: Require(("",)),
        lambda: Ignore("a\nb"),
        lambda: Measures(()),
        lambda: Measures(("",)),
        lambda: Manifests((), 0),
        lambda: DocumentBinding(Require((bytes(1025),)), Forbid()),
        lambda: Release("one", PcrSet(bytes(48), b"1" * 48, b"2" * 48)),
        lambda: Release("one", PcrSet(b"0" * 48, b"1" * 48, b"2" * 48), models=(b"short",)),
    ]
    for make in makers:
        with pytest.raises(PolicyError):
            make()


def test_a_policy_does_not_change_under_its_owner(policy: AppraisalPolicy) -> None:
    rules: dict[int, Any] = dict(policy.pcrs)
    mine = replace(policy, pcrs=rules)
    rules[9] = Ignore("later")
    assert 9 not in mine.pcrs


@given(policy=policies())
def test_what_is_written_is_read_back(policy: AppraisalPolicy, policy_folder: Path) -> None:
    text = write_policy(policy, root="root.der" if policy.anchor.is_emulated else None)
    assert AppraisalPolicy.parse(text, policy_folder) == policy


def test_a_written_policy_names_its_root(policy: AppraisalPolicy) -> None:
    with pytest.raises(ValueError, match="root"):
        write_policy(policy)
    with pytest.raises(ValueError, match="root"):
        write_policy(replace(policy, anchor=AWS_NITRO_G1), root="root.der")


@given(st.text(max_size=200) | st.sampled_from(["[" * 5000, "a = " + "[" * 100_000, "a = " + "9" * 5000]))
def test_any_text_gives_the_typed_error(policy_folder: Path, text: str) -> None:
    no_comment_hides_this = "\n = "
    for whole in (text, forge.POLICY + text + no_comment_hides_this):
        with pytest.raises(PolicyError):
            AppraisalPolicy.parse(whole, policy_folder)
