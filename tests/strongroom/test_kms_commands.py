"""``strongroom kms``: from no key to one that only the measured image can use, against a KMS that really decides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from attestation.bundle import Bundle
from attestation.envelope import EnvelopePurpose, encryption_context
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.releases import append
from attestation.rules import Ignore, KeyRule, Release, SignedReleases
from attestation.secret import Secret
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.kms_faults import Alter, Refuse
from strongroom.kms.key_policies import is_alike
from tests.attested import CONFIGURATION, IMAGE, MODEL, Attested, policy_for, write_policy
from tests.key_policies import ACCOUNT
from tests.kms_clients import ANCHOR, Desk, Recipient, kms_client, refused
from tests.pki import forge
from tests.release_files import ED25519, ISSUED, NAME, ONE, verified
from tests.terminal import Ran, Terminal

PARENT, CLIENT, ADMIN, OTHER = (
    f"arn:aws:iam::{ACCOUNT}:role/{name}" for name in ("parent", "client", "admin", "other")
)
SESSION = f"arn:aws:sts::{ACCOUNT}:assumed-role/parent/i-0123456789abcdef0"
ROLES = ("--user", PARENT, "--sealer", CLIENT)
FOR_PROMPTS = ("--use", "prompt", "--context", "production")
BY_ADMIN = ("--administrator", ADMIN)
IN_CONTEXT = tuple(
    word
    for name, value in encryption_context(EnvelopePurpose.PROMPT, "production", 1).items()
    for word in ("--encryption-context", f"{name}={value}")
)
OLD = Release("old", IMAGE)
NEW = Release("new", PcrSet(b"\x21" * 48, b"\x22" * 48, b"\x23" * 48))


class KeyDesk(Desk):
    """That of somebody who administers keys, in a folder with policy.toml."""

    def __init__(
        self, terminal: Terminal, emulator: KmsEmulator, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(terminal, emulator, monkeypatch)
        self.folder = folder
        self.accept(OLD)
        self.become("assumed-role/admin/me")

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> Ran:
        return super().__call__("kms", *arguments, stdin=stdin)

    def accept(self, *releases: Release, key: str | None = None, administrators: tuple[str, ...] = (ADMIN,)) -> None:
        """Writes policy.toml."""
        policy = replace(policy_for(MODEL, CONFIGURATION), releases=releases)
        if key is not None:
            rule = KeyRule(KeyArn.parse(key), "production", 1, administrators, None)
            policy = replace(policy, kms={EnvelopePurpose.PROMPT: rule})
        self.write(policy)

    def write(self, policy: AppraisalPolicy) -> None:
        write_policy(policy, self.folder)

    def generated(self, *options: str) -> KeyPolicy:
        ran = self("policy", "generate", *FOR_PROMPTS, *ROLES, *BY_ADMIN, *options)
        assert ran.code == 0, ran.err
        return KeyPolicy.parse(ran.out)

    def create(self, *options: str) -> str:
        """A key of prompts, which policy.toml then names."""
        ran = self("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN, *options)
        assert ran.code == 0, ran.err
        arn = ran.out.strip()
        self.accept(OLD, key=arn)
        return arn

    def policy_of(self, key: str) -> KeyPolicy:
        with kms_client(self.emulator, self.emulator.principal("assumed-role/admin/me")) as client:
            return KeyPolicy.parse(client.get_key_policy(KeyId=key)["Policy"])

    def sids(self, key: str) -> list[str | None]:
        return [statement.sid for statement in self.policy_of(key).statements]

    def file(self, name: str, content: KeyPolicy | str) -> str:
        (self.folder / name).write_text(content if isinstance(content, str) else content.encode())
        return name


@pytest.fixture(scope="module")
def emulator() -> Iterator[KmsEmulator]:
    with kms_emulator(anchor=ANCHOR) as running:
        yield running


@pytest.fixture
def desk(
    strongroom: Terminal, emulator: KmsEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KeyDesk]:
    monkeypatch.chdir(tmp_path)
    yield KeyDesk(strongroom, emulator, tmp_path, monkeypatch)
    emulator.faults.clear()


@pytest.fixture
def key(desk: KeyDesk) -> str:
    return desk.create()


@pytest.fixture(scope="module")
def enclave() -> Attested:
    return Attested()


def rules(ran: Ran) -> dict[str, set[str]]:
    """The rules that were broken, by the key policy."""
    return {each["policy"]: {finding["rule"] for finding in each["findings"]} for each in ran.json["key_policies"]}


@pytest.mark.parametrize(
    "command",
    [
        ("policy", "generate"),
        ("policy", "lint"),
        ("policy", "check"),
        ("key", "create"),
        ("key", "rotate-image"),
        ("key", "lock"),
    ],
)
def test_every_command_has_examples(desk: KeyDesk, command: tuple[str, str]) -> None:
    ran = desk(*command, "--help")
    assert ran.code == 0
    assert f"strongroom kms {' '.join(command)}" in ran.out.partition("Example")[2]


# --- policy generate ----------------------------------------------------------------------------------------------


def test_what_is_generated_passes(desk: KeyDesk) -> None:
    made = desk.generated()
    assert [statement.sid for statement in made.statements] == ["Release old", "Seal", "Administer", "Read"]
    ran = desk("policy", "lint", desk.file("key.json", made), "--policy", "policy.toml", *FOR_PROMPTS, *BY_ADMIN)
    assert ran.code == 0
    assert ran.out.splitlines()[-2:] == [
        f"key.json: no errors, no warnings; MUTABLE-BY({ADMIN})",
        "held against policy.toml",
    ]


def test_a_policy_that_names_the_key_says_what_it_is_for(desk: KeyDesk, key: str) -> None:
    ran = desk("policy", "generate", *ROLES)
    assert KeyPolicy.parse(ran.out) == desk.policy_of(key)
    assert "changeable" in ran.err
    assert desk("policy", "generate", *ROLES, "--context", "staging").code == 2
    assert desk("policy", "generate", *ROLES, "--use", "model").code == 2
    ran = desk("policy", "generate", *ROLES, "--administrator", OTHER)
    assert (ran.code, ran.out) == (1, "")
    assert "refused_key_policy" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--use", "prompt"), "--context"),
        (("--context", "production"), "--use prompt, or --use model"),
        ((*FOR_PROMPTS, "--administrator", PARENT), "same_principal"),
        ((*FOR_PROMPTS, "--administrator", f"arn:aws:iam::{ACCOUNT}:root"), "bad_principal"),
        (("--use", "prompt", "--context", "No"), "bad_context"),
    ],
)
def test_what_is_not_generated(desk: KeyDesk, options: tuple[str, ...], said: str) -> None:
    ran = desk("policy", "generate", *ROLES, *options)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_a_policy_that_accepts_any_model(desk: KeyDesk) -> None:
    desk.write(replace(policy_for(MODEL, CONFIGURATION), model=Ignore("any will do")))
    ran = desk("policy", "generate", *FOR_PROMPTS, *ROLES)
    assert ran.code == 2
    assert "unpinned_register" in ran.err


def test_signed_releases_that_have_expired(desk: KeyDesk) -> None:
    line = append(b"", signer=ED25519, name=NAME, releases=[ONE], issued=ISSUED, expires=ISSUED + timedelta(days=1))
    (desk.folder / "releases.jsonl").write_bytes(line)
    releases = SignedReleases("releases.jsonl", 1, verified(line))
    desk.write(replace(policy_for(MODEL, CONFIGURATION), releases=releases))
    ran = desk("policy", "generate", *FOR_PROMPTS, *ROLES)
    assert (ran.code, ran.out) == (3, "")
    assert "expired_release" in ran.err


# --- policy lint --------------------------------------------------------------------------------------------------


DEFAULT = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "Enable IAM User Permissions",
                "Effect": "Allow",
                "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:root"},
                "Action": "kms:*",
                "Resource": "*",
            }
        ],
    }
)


def test_the_policy_that_aws_writes_has_errors(desk: KeyDesk) -> None:
    ran = desk("policy", "lint", "-", stdin=DEFAULT.encode())
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].startswith("error    root_delegation, Enable IAM User Permissions: ")
    assert any(line.startswith("         -> name the roles") for line in lines)
    assert lines[-1] == "held against no appraisal policy: only the shape of each statement"
    ran = desk("policy", "lint", "-", "--json", stdin=DEFAULT.encode())
    assert ran.code == 1
    assert ran.json["held_against"] is None
    assert rules(ran) == {"-": {"root_delegation", "untrusted_administrator"}}
    (entry,) = ran.json["key_policies"]
    assert entry["mutability"] == f"MUTABLE-BY(arn:aws:iam::{ACCOUNT}:root)"
    assert entry["findings"][0].keys() == {"severity", "rule", "statement", "why", "fix"}


def test_without_an_appraisal_policy_the_shape_is_judged(desk: KeyDesk) -> None:
    made = desk.generated()
    assert desk("policy", "lint", desk.file("key.json", made), *BY_ADMIN).code == 0
    desk.accept(NEW)
    ran = desk("policy", "lint", "key.json", "--policy", "policy.toml", *FOR_PROMPTS, *BY_ADMIN, "--json")
    assert ran.code == 1
    assert rules(ran) == {"key.json": {"unknown_release", "release_without_statement", "changeable", "can_destroy"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "FILE and --key"),
        (("key.json", "--key", f"arn:aws:kms:us-east-1:{ACCOUNT}:key/x"), "FILE and --key"),
        (("nothing.json",), "nothing.json"),
        (("broken.json",), "malformed_key_policy"),
        (("long.json",), "too_large"),
        (("key.json", "--policy", "policy.toml"), "--use"),
        (("--key", "alias/prompts"), "not the full ARN"),
    ],
)
def test_what_cannot_be_linted(desk: KeyDesk, arguments: tuple[str, ...], said: str) -> None:
    desk.file("key.json", DEFAULT)
    (desk.folder / "broken.json").write_bytes(b"\xff")
    desk.file("long.json", " " * 40_000)
    ran = desk("policy", "lint", *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_a_key_with_its_grants(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    ran = desk("policy", "lint", "--key", key, "--policy", "policy.toml", "--json")
    assert (ran.code, rules(ran)) == (0, {key: {"changeable", "can_destroy"}})
    desk.become("root")
    assert desk("policy", "lint", "--key", key).code == 4
    ran = desk("policy", "lint", "--key", f"{key[:-1]}!")
    assert ran.code == 2
    open_key = emulator.create_key(DEFAULT)
    with kms_client(emulator) as client:
        client.create_grant(KeyId=open_key, GranteePrincipal=OTHER, Operations=["Decrypt"])
    ran = desk("policy", "lint", "--key", open_key, "--json")
    assert ran.code == 1
    assert rules(ran) == {open_key: {"root_delegation", "untrusted_administrator", "grant_opens"}}


def test_the_copies_of_a_key_are_judged_too(desk: KeyDesk, emulator: KmsEmulator) -> None:
    desk.become("root")
    primary = emulator.create_key(DEFAULT, multi_region=True)
    with kms_client(emulator) as client:
        replica = client.replicate_key(KeyId=primary, ReplicaRegion="eu-central-1")["ReplicaKeyMetadata"]["Arn"]
    for named in (primary, replica):
        found = rules(desk("policy", "lint", "--key", named, "--json"))
        assert found.keys() == {primary, replica}
        assert all("multi_region" in each and "unseen_copy" not in each for each in found.values())


@pytest.mark.parametrize(
    "command",
    [("policy", "lint", "--key"), ("policy", "lint", "--json", "--key"), ("key", "rotate-image", "--dry-run")],
)
def test_a_kms_that_is_not_aws_own_is_named(desk: KeyDesk, key: str, emulator: KmsEmulator, command: Any) -> None:
    ran = desk(*command, key, "--policy", "policy.toml")
    assert ran.code == 0, ran.err
    assert ran.err.startswith(f"asking {emulator.endpoint}, which is not AWS's own KMS\n")


def test_a_disabled_key_is_found_and_its_policy_can_be_changed(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    """To disable a key, close it to a release and enable it again is what one does about a bad release."""
    with kms_client(emulator, emulator.principal("assumed-role/admin/me")) as client:
        client.disable_key(KeyId=key)
    ran = desk("policy", "lint", "--key", key, "--policy", "policy.toml", "--json")
    assert (ran.code, rules(ran)) == (1, {key: {"not_enabled", "changeable", "can_destroy"}})
    desk.accept(NEW, key=key)
    ran = desk("key", "rotate-image", key, "--finish")
    assert ran.code == 0, ran.err
    assert "not_enabled" in ran.err


def test_another_key_than_the_policy_names(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    other = emulator.create_key(DEFAULT)
    ran = desk("policy", "lint", "--key", other, "--policy", "policy.toml", "--use", "prompt")
    assert ran.code == 2
    assert "wrong_key" in ran.err
    assert desk("policy", "lint", "--key", other, "--policy", "policy.toml").code == 2


# --- policy check -------------------------------------------------------------------------------------------------


@pytest.fixture
def document(desk: KeyDesk, enclave: Attested) -> str:
    (desk.folder / "document.cbor").write_bytes(enclave.nsm.attestation(nonce=b"\x00" * 32))
    return "document.cbor"


EMULATED = ("--anchor", "root.der")


def test_what_kms_would_decide_and_why(desk: KeyDesk, document: str) -> None:
    desk.file("key.json", desk.generated())
    asking = ("policy", "check", "--document", document, "--policy-file", "key.json", *EMULATED)
    ran = desk(*asking, "--principal", SESSION, *IN_CONTEXT)
    assert ran.code == 0
    assert ran.out.startswith("allowed by Statement[0] 'Release old'\n")
    ran = desk(*asking, "--principal", SESSION)
    assert ran.code == 1
    assert "denied: nothing allows it" in ran.out
    assert "StringEquals kms:EncryptionContext:strongroom:purpose: expected 'prompt'; got nothing" in ran.out
    ran = desk(*asking, "--principal", CLIENT, "--action", "kms:GenerateDataKey", *IN_CONTEXT, "--json")
    assert ran.code == 0
    assert (ran.json["allowed"], ran.json["by"], ran.json["verified"]) == (True, "Statement[1] 'Seal'", True)
    assert [each["applies"] for each in ran.json["considered"]] == [False, True, False, False]
    assert ran.json["considered"][0]["why_not"]


def test_another_image_is_denied(desk: KeyDesk, document: str) -> None:
    desk.accept(NEW)
    desk.file("key.json", desk.generated())
    ran = desk(
        *("policy", "check", "--document", document, "--policy-file", "key.json", "--unverified"),
        *("--principal", SESSION, *IN_CONTEXT),
    )
    assert ran.code == 1
    assert ran.out.startswith("UNVERIFIED: ")
    assert f"PCR0: expected '{NEW.pcrs.pcr0.hex()}'; got '{IMAGE.pcr0.hex()}'" in ran.out


def test_a_key_that_kms_keeps_and_evidence_of_a_channel(desk: KeyDesk, key: str, enclave: Attested) -> None:
    nonce = bytes(32)
    bundle = Bundle(enclave.evidence(nonce), nonce, forge.NOW, "http://127.0.0.1:8080")
    (desk.folder / "evidence.json").write_bytes(bundle.encode())
    ran = desk(
        *("policy", "check", "--document", "evidence.json", "--key", key, *EMULATED, "--json"),
        *("--principal", SESSION, *IN_CONTEXT),
    )
    assert (ran.code, ran.json["by"]) == (0, "Statement[0] 'Release old'")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--principal", SESSION), 3, "untrusted_chain"),
        (("--principal", SESSION, *EMULATED, "--unverified"), 2, "--anchor"),
        (("--principal", "me", *EMULATED), 2, "--key"),
        (("--principal", f"arn:aws:iam::{ACCOUNT}:group/x", *EMULATED), 2, "bad_principal"),
        (("--principal", SESSION, *EMULATED, "--action", "Decrypt"), 2, "bad_action"),
        (("--principal", SESSION, *EMULATED, "--encryption-context", "production"), 2, "NAME=VALUE"),
    ],
)
def test_what_cannot_be_checked(desk: KeyDesk, document: str, options: tuple[str, ...], code: int, said: str) -> None:
    desk.file("key.json", DEFAULT)
    ran = desk("policy", "check", "--document", document, "--policy-file", "key.json", *options)
    assert ran.code == code
    assert said in ran.err


def test_a_check_needs_a_key_policy(desk: KeyDesk, document: str) -> None:
    ran = desk("policy", "check", "--document", document, "--principal", SESSION, *EMULATED)
    assert ran.code == 2
    assert "name --policy-file, or --key" in ran.err


# --- key create ---------------------------------------------------------------------------------------------------


def test_a_key_that_only_the_measured_image_can_use(
    desk: KeyDesk, key: str, emulator: KmsEmulator, enclave: Attested
) -> None:
    assert is_alike(desk.policy_of(key), desk.generated("--policy", "policy.toml"))
    context = encryption_context(EnvelopePurpose.PROMPT, "production", 1)
    with kms_client(emulator, emulator.principal("assumed-role/client/me")) as client:
        made = client.generate_data_key(KeyId=key, KeySpec="AES_256", EncryptionContext=context)
        with refused("AccessDeniedException"):
            client.decrypt(KeyId=key, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=context)
    for name in ("root", "assumed-role/admin/me", "assumed-role/parent/i-1"):
        with kms_client(emulator, emulator.principal(name)) as client, refused("AccessDeniedException"):
            client.decrypt(KeyId=key, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=context)
    recipient = Recipient(nsm=enclave.nsm)
    with kms_client(emulator, emulator.principal("assumed-role/parent/i-1")) as client:
        answer = client.decrypt(
            KeyId=key, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=context, Recipient=recipient.member()
        )
    assert recipient.open(answer["CiphertextForRecipient"]) == Secret(made["Plaintext"])


def test_what_is_said_of_a_new_key(desk: KeyDesk) -> None:
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN, "--region", "us-east-1", "--json")
    assert ran.code == 0
    arn = KeyArn.parse(ran.json["key"])
    assert (arn.region, arn.account) == ("us-east-1", ACCOUNT)
    assert ran.json["mutability"] == f"MUTABLE-BY({ADMIN})"
    assert {finding["rule"] for finding in ran.json["findings"]} == {"changeable", "can_destroy"}


def number_of_keys(emulator: KmsEmulator) -> int:
    with kms_client(emulator) as client:
        return len(client.list_keys(Limit=1000)["Keys"])


def test_a_key_that_opens_to_nobody_yet_and_then_to_an_image(desk: KeyDesk) -> None:
    """An image is measured with the ARN of its key: the key comes first."""
    roles = ("--sealer", CLIENT, "--reader", OTHER)
    ran = desk("key", "create", "--closed", *FOR_PROMPTS, *roles, *BY_ADMIN)
    assert ran.code == 0, ran.err
    key = ran.out.strip()
    assert desk.sids(key) == ["Seal", "Administer", "Read"]
    desk.accept(OLD, key=key)
    assert desk("key", "rotate-image", key).code == 2
    assert desk("key", "rotate-image", key, "--user", PARENT).code == 0
    assert len(desk.sids(key)) == 4
    assert desk("policy", "lint", "--key", key, "--policy", "policy.toml").code == 0


@pytest.mark.parametrize("missing", ["use", "context", "administrator"])
def test_what_a_closed_key_needs(desk: KeyDesk, missing: str) -> None:
    options = {"use": ("--use", "prompt"), "context": ("--context", "production"), "administrator": BY_ADMIN}
    given = [argument for name, arguments in options.items() if name != missing for argument in arguments]
    ran = desk("key", "create", "--closed", *given)
    assert (ran.code, f"--{missing}" in ran.err) == (2, True)
    ran = desk("key", "create", "--closed", *FOR_PROMPTS, *ROLES, *BY_ADMIN)
    assert (ran.code, "--user" in ran.err) == (2, True)


def test_a_dry_run_makes_nothing(desk: KeyDesk, emulator: KmsEmulator) -> None:
    before = number_of_keys(emulator)
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN, "--dry-run")
    assert ran.code == 0
    assert KeyPolicy.parse(ran.out) == desk.generated()
    assert "nothing was made" in ran.err
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN, "--dry-run", "--json")
    assert ran.json["key"] is None
    assert KeyPolicy.parse(json.dumps(ran.json["key_policy"])) == desk.generated()
    assert number_of_keys(emulator) == before


def test_what_is_not_created(desk: KeyDesk, emulator: KmsEmulator) -> None:
    before = number_of_keys(emulator)
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES)
    assert (ran.code, "--administrator" in ran.err) == (2, True)
    desk.become("assumed-role/other/me")  # whose policy it would be, and who could not change it
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN)
    assert (ran.code, "MalformedPolicyDocumentException" in ran.err) == (4, True)
    assert number_of_keys(emulator) == before


@pytest.mark.parametrize(
    ("operation", "change", "code", "said"),
    [
        ("CreateKey", {"KeyMetadata": {}}, 3, "bad_kms_answer"),
        ("GetKeyPolicy", {"Policy": DEFAULT}, 4, "policy_not_kept"),
    ],
)
def test_a_kms_that_makes_something_else(
    desk: KeyDesk, emulator: KmsEmulator, operation: str, change: Mapping[str, Any], code: int, said: str
) -> None:
    emulator.faults.inject(Alter(lambda answer: {**answer, **change}), operation=operation)
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err


def test_a_kms_that_makes_another_kind_of_key(desk: KeyDesk, emulator: KmsEmulator) -> None:
    def imported(answer: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**answer, "KeyMetadata": {**answer["KeyMetadata"], "Origin": "EXTERNAL"}}

    emulator.faults.inject(Alter(imported), operation="DescribeKey")
    ran = desk("key", "create", *FOR_PROMPTS, *ROLES, *BY_ADMIN)
    assert (ran.code, ran.out) == (1, "")
    assert "made arn:aws:kms:" in ran.err
    assert "foreign_material" in ran.err
    assert "nothing was" not in ran.err


# --- key rotate-image ---------------------------------------------------------------------------------------------


def rotate(desk: KeyDesk, key: str, *options: str) -> Ran:
    return desk("key", "rotate-image", key, *options)


def test_a_rollout(desk: KeyDesk, key: str) -> None:
    before = desk.policy_of(key)
    desk.accept(OLD, NEW, key=key)
    tried = rotate(desk, key, "--dry-run")
    assert tried.code == 0
    assert '+      "Sid": "Release new",' in tried.out
    assert tried.out.endswith("nothing was changed: --dry-run\n")
    assert desk.policy_of(key) == before

    ran = rotate(desk, key)
    assert ran.code == 0
    assert ran.out.endswith(f"changed the policy of {key}: MUTABLE-BY({ADMIN})\n")
    assert desk.sids(key) == ["Release new", "Release old", "Seal", "Administer", "Read"]
    assert rotate(desk, key).out == "nothing to change\n"

    desk.accept(NEW, key=key)
    ran = rotate(desk, key)  # not yet: the old release is still in the key policy
    assert ran.code == 1
    assert "--finish removes it" in ran.err
    assert len(desk.sids(key)) == 5
    ran = rotate(desk, key, "--finish", "--json")
    assert (ran.code, ran.json["changed"]) == (0, True)
    assert '-      "Sid": "Release old",' in ran.json["difference"]
    assert desk.sids(key) == ["Release new", "Seal", "Administer", "Read"]
    assert desk("policy", "lint", "--key", key, "--policy", "policy.toml").code == 0
    assert rotate(desk, key, "--finish", "--json").json["changed"] is False


def test_a_rollout_to_a_key_that_opens_to_nobody_yet(desk: KeyDesk, emulator: KmsEmulator) -> None:
    bare = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": ADMIN},
                "Action": ["kms:PutKeyPolicy", "kms:GetKeyPolicy", "kms:DescribeKey", "kms:ListGrants"],
                "Resource": "*",
            }
        ],
    }
    key = emulator.create_key(json.dumps(bare))
    options = (*FOR_PROMPTS, *BY_ADMIN)
    ran = rotate(desk, key, *options)
    assert (ran.code, "name --user" in ran.err) == (2, True)
    ran = rotate(desk, key, "--use", "prompt", *BY_ADMIN)
    assert (ran.code, "--context" in ran.err) == (2, True)
    assert rotate(desk, key, *options, "--user", PARENT).code == 0
    assert desk.sids(key) == ["Release old", None]


def test_a_rollout_keeps_no_error(desk: KeyDesk, emulator: KmsEmulator) -> None:
    open_key = emulator.create_key(DEFAULT)
    desk.become("root")
    ran = rotate(desk, open_key, *FOR_PROMPTS, *BY_ADMIN, "--user", PARENT)
    assert ran.code == 1
    assert "root_delegation" in ran.err
    assert "nothing was changed" in ran.err
    desk.accept(OLD, key=open_key, administrators=())
    assert rotate(desk, open_key, "--user", PARENT).code == 1


def test_a_rollout_that_kms_refuses_or_does_not_keep(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    desk.accept(OLD, NEW, key=key)
    emulator.faults.inject(Refuse("MalformedPolicyDocumentException", "no"), operation="PutKeyPolicy", times=1)
    ran = rotate(desk, key)
    assert (ran.code, "kms_refused" in ran.err) == (4, True)
    before = desk.policy_of(key).encode()
    answers = iter([before, before])
    emulator.faults.inject(Alter(lambda answer: {**answer, "Policy": next(answers)}), operation="GetKeyPolicy", times=2)
    ran = rotate(desk, key)
    assert ran.code == 4
    assert "policy_not_kept" in ran.err
    assert len(desk.sids(key)) == 5


# --- key lock -----------------------------------------------------------------------------------------------------


def lock(desk: KeyDesk, key: str, *options: str, typed: str = "") -> Ran:
    return desk("key", "lock", key, *options, stdin=f"{typed}\n".encode() if typed else b"")


def test_a_lock_is_for_ever_and_says_so_twice(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    ran = lock(desk, key, typed=KeyArn.parse(key).key_id)
    assert ran.code == 0
    assert ran.err.lower().count("cannot be undone") == 2
    assert "judge the key again in 5 minutes" in " ".join(ran.err.split())
    assert ran.out.endswith(f"changed the policy of {key}: LOCKED\n")
    assert '-        "kms:PutKeyPolicy",' in ran.out
    for name in ("root", "assumed-role/admin/me", "assumed-role/parent/i-1"):
        with kms_client(emulator, emulator.principal(name)) as client, refused("AccessDeniedException"):
            client.put_key_policy(KeyId=key, Policy=DEFAULT, BypassPolicyLockoutSafetyCheck=True)
    desk.accept(OLD, key=key, administrators=())
    ran = desk("policy", "lint", "--key", key, "--policy", "policy.toml", "--json")
    assert (ran.code, rules(ran)) == (0, {key: {"can_destroy"}})
    assert ran.json["key_policies"][0]["mutability"] == "LOCKED"
    ran = lock(desk, key)
    assert (ran.code, ran.out) == (0, "nothing to change\n")
    assert "undone" not in ran.err
    desk.accept(OLD, NEW, key=key, administrators=())
    assert rotate(desk, key).code == 4


def test_a_dry_run_locks_nothing(desk: KeyDesk, key: str) -> None:
    ran = lock(desk, key, "--dry-run")
    assert ran.code == 0
    assert ran.out.endswith("nothing was changed: --dry-run\n")
    assert "LOCKED" in ran.err
    assert "5 minutes" not in ran.err
    assert "kms:PutKeyPolicy" in desk.policy_of(key).encode()


def test_a_lock_asks_for_the_id(desk: KeyDesk, key: str) -> None:
    ran = lock(desk, key, typed="yes")
    assert ran.code == 1
    assert "not_confirmed" in ran.err
    assert lock(desk, key).code == 130
    assert "kms:PutKeyPolicy" in desk.policy_of(key).encode()


def test_a_program_may_lock(desk: KeyDesk, key: str) -> None:
    ran = lock(desk, key, "--yes-i-know-it-cannot-be-undone", "--json")
    assert ran.code == 0
    assert (ran.json["changed"], ran.json["mutability"]) == (True, "LOCKED")
    assert ran.err.lower().count("cannot be undone") == 2


def test_a_key_with_errors_is_not_locked(desk: KeyDesk, key: str) -> None:
    desk.accept(NEW, key=key)
    ran = lock(desk, key, "--yes-i-know-it-cannot-be-undone")
    assert ran.code == 1
    assert "unknown_release" in ran.err
    assert "kms:PutKeyPolicy" in desk.policy_of(key).encode()


def test_a_key_that_could_still_be_changed_is_not_locked(desk: KeyDesk, key: str, emulator: KmsEmulator) -> None:
    kept = emulator.kms.keys.all(ACCOUNT, "us-east-1")
    (mine,) = (each for each in kept if each.arn == key)
    policy = desk.policy_of(key).encode()
    mine.policy = DEFAULT
    with kms_client(emulator) as client:
        client.create_grant(KeyId=key, GranteePrincipal=OTHER, Operations=["CreateGrant", "DescribeKey"])
    mine.policy = policy
    ran = lock(desk, key, "--yes-i-know-it-cannot-be-undone")
    assert ran.code == 1
    assert "still_changeable" in ran.err
    assert OTHER in ran.err


def test_patterns_are_not_locked(desk: KeyDesk, emulator: KmsEmulator) -> None:
    open_key = emulator.create_key(DEFAULT)
    desk.become("root")
    ran = lock(desk, open_key, *FOR_PROMPTS, "--yes-i-know-it-cannot-be-undone")
    assert ran.code == 2
    assert "unlockable_policy" in ran.err
