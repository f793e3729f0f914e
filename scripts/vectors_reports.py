"""Reports: what a program reads of a verdict, whole, for one of each kind. PROTOCOL.md section 3."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from attestation.envelope import EnvelopePurpose
from attestation.errors import AppraisalError, EvidenceError, PolicyError
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts, judge_key
from attestation.manifest import ManifestFile, ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.rules import DocumentBinding, Forbid, Ignore, Manifests, Measures, Released, Require
from attestation.verifier import authenticate, verify, verify_archived, verify_document
from tests.key_facts import KEYS, all_facts, facts, with_keys
from tests.key_policies import allow, grant
from tests.pki import forge

Report = Callable[[], dict[str, Any]]

_FIELD = 'purpose = "document"\n[binding.user_data]\nforbid = true\n[binding.public_key]\nrequire = [{}]'
_MODEL = f'"sha384:{forge.COMMITMENT.model.hex()}"'
_OTHER = {3: forge.measured("a role"), 9: forge.measured("more")}
_MANIFEST = ModelManifest("one", (ManifestFile("one.gguf", 1, bytes(48)),), "{{ template }}", version=3)


def files() -> Mapping[str, bytes]:
    return {f"{name}.json": (json.dumps(report(), indent=1) + "\n").encode() for name, report in _reports()}


def _reports() -> Iterator[tuple[str, Report]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "root.der").write_bytes(forge.ROOT_DER)
        policy = AppraisalPolicy.parse(forge.POLICY, Path(folder))
    debug = replace(policy, accept_debug="a test of the debug mode")
    documents = replace(policy, binding=DocumentBinding(Forbid(), Require((b"user data",))))
    released = replace(
        policy,
        releases=(
            replace(
                policy.accepted_releases[0],
                models=(forge.COMMITMENT.model,),
                configurations=(forge.COMMITMENT.configuration,),
            ),
        ),
        model=Released(),
        configuration=Released(),
    )
    strict = replace(
        policy,
        model=Manifests((("one.manifest", _MANIFEST), ("newer.manifest", replace(_MANIFEST, version=4))), 4),
        pcrs={**policy.pcrs, 4: Measures(("i-another", "i-a-third"))},
        module_id=Require(("i-another", "i-a-third")),
    )
    lenient = replace(
        policy,
        model=Ignore("any model"),
        configuration=Ignore("any configuration"),
        pcrs={**policy.pcrs, 3: Ignore("any role")},
    )
    good, seconds = forge.evidence(), timedelta(seconds=1)

    def judged(by: AppraisalPolicy, evidence: bytes = good, at: timedelta = timedelta(0)) -> Report:
        return _said(lambda: verify(evidence, policy=by, nonce=forge.NONCE, at=forge.NOW + at))

    def of(**changes: object) -> bytes:
        return forge.evidence(forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes)))

    yield "accepted", judged(policy)
    yield "accepted-lenient", judged(lenient, of(pcrs={**forge.PCRS, 3: _OTHER[3]}))
    yield "accepted-released", judged(released)
    yield "accepted-debug", judged(debug, of(pcrs=forge.DEBUG_PCRS))
    yield "refused-debug", judged(strict, of(pcrs={**forge.DEBUG_PCRS, **_OTHER}))
    yield "refused-image", judged(policy, of(pcrs={**forge.PCRS, 1: _OTHER[9], 8: _OTHER[3]}))
    yield "refused-released", judged(released, of(pcrs={**forge.PCRS, 0: _OTHER[9]}))
    yield from _of_keys(policy)
    yield "untrusted-cbor", judged(policy, good + b"\x00")
    yield "untrusted-cose", judged(policy, forge.evidence(forge.document(protected=b"\xa1\x01\x26")))
    yield "untrusted-field", judged(policy, of(module_id=""))
    yield "untrusted-chain", judged(policy, good, timedelta(hours=4))
    yield "untrusted-signature", judged(policy, forge.evidence(forge.document(signature=bytes(96))))
    yield "untrusted-nonce", judged(policy, of(nonce=None))
    yield "untrusted-stale", judged(policy, good, 421 * seconds)
    yield "untrusted-future", judged(policy, of(timestamp=int((forge.NOW.timestamp() + 121) * 1000)))
    yield "untrusted-public-key", judged(policy, of(public_key=b"key"))
    yield "untrusted-no-user-data", judged(policy, of(user_data=None))
    yield (
        "untrusted-commitment",
        judged(policy, forge.evidence(commitment=replace(forge.COMMITMENT, lifetime=1).encode())),
    )
    yield "untrusted-registers", judged(policy, of(pcrs={**forge.PCRS, 16: _OTHER[9]}))

    def document(by: AppraisalPolicy, **changes: object) -> Report:
        made = forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes))
        return _said(lambda: verify_document(made, policy=by, nonce=forge.NONCE, at=forge.NOW))

    bare = {index: value for index, value in forge.PCRS.items() if index < 16}
    yield "document-accepted", document(documents, user_data=b"user data")
    anything = replace(policy, binding=DocumentBinding(Ignore("any key"), Ignore("any data")))
    yield "document-lenient", document(anything, user_data=b"user data", public_key=b"key")
    yield "document-refused", document(documents, user_data=None, public_key=b"", pcrs=bare)
    yield "archived", _said(lambda: verify_archived(good, policy=policy))
    yield (
        "archived-document",
        _said(
            lambda: verify_archived(
                forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, user_data=b"user data")), policy=documents
            )
        ),
    )

    def authentic() -> dict[str, Any]:
        result = authenticate(forge.document(), anchor=policy.anchor, at=forge.NOW)
        return {"labels": sorted(result.labels), "checks": [check.as_json() for check in result.checks]}

    yield "authentic", authentic
    yield "policy-errors", lambda: {name: _policy_error(text) for name, text in _BROKEN.items()}


def _of_keys(policy: AppraisalPolicy) -> Iterator[tuple[str, Report]]:
    """Of policies that name KMS keys: with the Evidence, without it, and of Evidence that proves nothing."""
    both = with_keys(policy, *EnvelopePurpose)
    lenient = with_keys(policy, EnvelopePurpose.MODEL, administrators=(), wrapped_key=Ignore("the operator keeps it"))
    older = with_keys(policy, EnvelopePurpose.MODEL, minimum_version=4, administrators=())
    open_to_all = {
        KEYS[EnvelopePurpose.MODEL]: facts(
            policy, EnvelopePurpose.MODEL, more=[allow("kms:Decrypt")], grants=[grant("Decrypt")], multi_region=True
        )
    }
    locked = {KEYS[EnvelopePurpose.MODEL]: facts(policy, EnvelopePurpose.MODEL, administrators=())}

    def judged(by: AppraisalPolicy, keys: Mapping[KeyArn, KeyFacts], evidence: bytes | None = None) -> Report:
        answer = forge.evidence() if evidence is None else evidence
        return _said(lambda: verify(answer, policy=by, nonce=forge.NONCE, at=forge.NOW, keys=keys))

    def alone(**changes: Any) -> Report:
        said = facts(policy, EnvelopePurpose.PROMPT, **changes)
        return _said(lambda: judge_key(both, EnvelopePurpose.PROMPT, said, at=forge.NOW))

    yield "accepted-keys", judged(both, all_facts(both))
    yield "accepted-keys-lenient", judged(lenient, locked)
    yield "refused-keys", judged(older, open_to_all)
    yield "untrusted-keys", judged(both, all_facts(both), forge.evidence(forge.document(signature=bytes(96))))
    yield "key", alone()
    yield "key-refused", alone(enabled=False, state="PendingDeletion")


_BROKEN = {
    "no release": forge.POLICY.replace("[[release]]", "[[other]]"),
    "register of the release": forge.POLICY + "[pcrs.0]\nforbid = true\n",
    "register that is none": forge.POLICY + "[pcrs.32]\nforbid = true\n",
    "register by name": forge.POLICY + "[pcrs.role]\nforbid = true\n",
    "released by nobody": forge.POLICY.replace(
        f'require = ["sha384:{forge.COMMITMENT.model.hex()}"]', "released = true"
    ),
    "digest": forge.POLICY.replace("sha384:", "sha256:"),
    "digits": forge.POLICY.replace('purpose = "channel"', _FIELD.format('"0g"')),
    "zero": forge.POLICY.replace(forge.PCRS[0].hex(), "0" * 96),
    "age": forge.POLICY.replace("= 300", "= 0"),
    "anchor": forge.POLICY.replace('"EMULATED"', '"ANYTHING"'),
    "rule": forge.POLICY.replace("[pcrs.3]\nforbid = true", '[pcrs.3]\nforbid = true\nignore = "why"'),
    "unknown": forge.POLICY.replace("[debug]\nforbid = true", "[debug]\nforbid = true\nmore = 1"),
}


def _policy_error(text: str) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "root.der").write_bytes(forge.ROOT_DER)
        try:
            AppraisalPolicy.parse(text, Path(folder))
        except PolicyError as error:
            return error.as_json()
    raise AssertionError("a broken policy was read")


def _said(judge: Callable[[], Any]) -> Report:
    def report() -> dict[str, Any]:
        try:
            said: dict[str, Any] = judge().as_json()
        except (EvidenceError, AppraisalError) as error:
            said = {
                "verdict": "refused",
                "labels": sorted(error.labels),
                "error": error.as_json(),
                "checks": [check.as_json() for check in error.checks],
            }
        return said

    return report
