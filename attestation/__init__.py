"""What a relying party must trust: Evidence -> Claims -> Verdict, and the measurements it is held against.

    from datetime import UTC, datetime
    from attestation import AppraisalPolicy, verify

    policy = AppraisalPolicy.load("policy.toml")
    result = verify(evidence, policy=policy, nonce=nonce, at=datetime.now(UTC))
    print(result.release, result.claims.module_id)

``evidence`` is what the enclave sent, ``nonce`` the 32 fresh bytes that it answers. ``verify`` returns a result, or
raises EvidenceError or AppraisalError with every check in it. It does no I/O; only what is called ``load`` reads files.

These names are the verifier's and its policy's. What reference values are computed from has modules of its own, such as
``attestation.process_image`` for the files of an emulated enclave; so has what KMS says of a key,
``attestation.keypolicy``.
"""

TYPE_CHECKING = False  # as in typing, which is not loaded for it
if TYPE_CHECKING:
    from attestation.anchors import AWS_NITRO_G1
    from attestation.bundle import Bundle
    from attestation.chain import Anchor, ChainCache, Trust
    from attestation.checks import Check, Label, Status
    from attestation.commitment import Commitment, Entropy
    from attestation.document import MAX_FIELD, AttestationDocument
    from attestation.envelope import EnvelopeError, EnvelopeHeader, EnvelopePurpose
    from attestation.errors import AppraisalError, EvidenceError, PolicyError, StrongroomError
    from attestation.gguf import ModelError
    from attestation.keypolicy.document import KeyArn, KeyPolicyError
    from attestation.keyrelease import KeyFacts, KeyRelease, judge_key
    from attestation.manifest import ManifestFile, ModelManifest
    from attestation.policy import AppraisalPolicy
    from attestation.policy_writer import write_policy
    from attestation.reference import PcrSet
    from attestation.release_heads import FileHeads, HeadError, HeadMemory, MemoryHeads
    from attestation.release_signing import Algorithm, PublicKey, ReleaseError
    from attestation.releases import Head, ReleaseHistory
    from attestation.rules import (
        Binding,
        ChannelBinding,
        DigestRule,
        DocumentBinding,
        FieldRule,
        Forbid,
        Ignore,
        KeyRule,
        Manifests,
        Measures,
        ModelRule,
        NameRule,
        RegisterRule,
        Release,
        Released,
        ReleasesInForce,
        Require,
        SignedReleases,
        WrappedKeyFile,
    )
    from attestation.verifier import (
        MIN_NONCE,
        NONCE_SIZE,
        ArchivedResult,
        AttestationResult,
        AuthenticDocument,
        DocumentResult,
        authenticate,
        verify,
        verify_archived,
        verify_document,
    )
else:
    # Loaded when first asked for. An enclave's processes import this package before they have shut out what nobody
    # measured (enclave/imports.py), and its engine never loads cryptography.
    _NAMES = {
        "anchors": "AWS_NITRO_G1",
        "bundle": "Bundle",
        "chain": "Anchor ChainCache Trust",
        "checks": "Check Label Status",
        "commitment": "Commitment Entropy",
        "document": "AttestationDocument MAX_FIELD",
        "envelope": "EnvelopeError EnvelopeHeader EnvelopePurpose",
        "errors": "AppraisalError EvidenceError PolicyError StrongroomError",
        "gguf": "ModelError",
        "keypolicy.document": "KeyArn KeyPolicyError",
        "keyrelease": "KeyFacts KeyRelease judge_key",
        "manifest": "ManifestFile ModelManifest",
        "policy": "AppraisalPolicy",
        "policy_writer": "write_policy",
        "reference": "PcrSet",
        "release_heads": "FileHeads HeadError HeadMemory MemoryHeads",
        "release_signing": "Algorithm PublicKey ReleaseError",
        "releases": "Head ReleaseHistory",
        "rules": (
            "Binding ChannelBinding DigestRule DocumentBinding FieldRule Forbid Ignore KeyRule Manifests Measures "
            "ModelRule NameRule RegisterRule Release Released ReleasesInForce Require SignedReleases WrappedKeyFile"
        ),
        "verifier": (
            "MIN_NONCE NONCE_SIZE ArchivedResult AttestationResult AuthenticDocument DocumentResult "
            "authenticate verify verify_archived verify_document"
        ),
    }
    _HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


__all__ = [
    "AWS_NITRO_G1",
    "MAX_FIELD",
    "MIN_NONCE",
    "NONCE_SIZE",
    "Algorithm",
    "Anchor",
    "AppraisalError",
    "AppraisalPolicy",
    "ArchivedResult",
    "AttestationDocument",
    "AttestationResult",
    "AuthenticDocument",
    "Binding",
    "Bundle",
    "ChainCache",
    "ChannelBinding",
    "Check",
    "Commitment",
    "DigestRule",
    "DocumentBinding",
    "DocumentResult",
    "Entropy",
    "EnvelopeError",
    "EnvelopeHeader",
    "EnvelopePurpose",
    "EvidenceError",
    "FieldRule",
    "FileHeads",
    "Forbid",
    "Head",
    "HeadError",
    "HeadMemory",
    "Ignore",
    "KeyArn",
    "KeyFacts",
    "KeyPolicyError",
    "KeyRelease",
    "KeyRule",
    "Label",
    "ManifestFile",
    "Manifests",
    "Measures",
    "MemoryHeads",
    "ModelError",
    "ModelManifest",
    "ModelRule",
    "NameRule",
    "PcrSet",
    "PolicyError",
    "PublicKey",
    "RegisterRule",
    "Release",
    "ReleaseError",
    "ReleaseHistory",
    "Released",
    "ReleasesInForce",
    "Require",
    "SignedReleases",
    "Status",
    "StrongroomError",
    "Trust",
    "WrappedKeyFile",
    "authenticate",
    "judge_key",
    "verify",
    "verify_archived",
    "verify_document",
    "write_policy",
]
