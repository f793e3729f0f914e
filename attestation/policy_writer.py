"""Writes an Appraisal Policy as commented TOML; :meth:`AppraisalPolicy.parse` gives an equal policy back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from attestation.chain import Anchor
from attestation.envelope import EnvelopePurpose
from attestation.policy import MAX_LEEWAY, VERSION, AppraisalPolicy
from attestation.reference import PCR_INSTANCE, PCR_ROLE, PCR_SIGNER, digest_text
from attestation.rules import (
    Binding,
    ChannelBinding,
    DigestRule,
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
    SignedReleases,
)

_HEADER = """\
# What this client accepts from an enclave: its Appraisal Policy.
#
# Every field must be here. A rule is one of
#   require = [...]              one of these values, and no other
#   measures = [...]             registers only: extended once, from zero, with one of these texts
#   released = true              model and configuration only: what the matched release names
#   forbid = true                must be zero, or absent
#   ignore = "written reason"    any value; the reason stands in every report
"""

_KEY_NOTES = {
    EnvelopePurpose.MODEL: "The KMS key that wraps the key of the encrypted model.",
    EnvelopePurpose.PROMPT: "The KMS key that prompts are sealed to which wait for an enclave.",
}
_REGISTER_NOTES = {
    PCR_ROLE: "the IAM role of the parent instance",
    PCR_INSTANCE: "the parent instance's id",
    PCR_SIGNER: "the image's signing certificate, for releases without pcr8",
}


def write_policy(policy: AppraisalPolicy, *, root: str | None = None, notes: Sequence[str] = ()) -> str:
    """The text of ``policy.toml``.

    ``root`` is the file name, relative to the policy's folder, under which the caller keeps ``anchor.der``: needed
    under an EMULATED anchor, and only there (else ValueError). Each of ``notes`` becomes a comment at the top.
    """
    if policy.anchor.is_emulated != (root is not None):
        raise ValueError("a file for the root belongs to an EMULATED anchor, and to no other")
    return "\n".join(_lines(policy, root, notes)) + "\n"


def _lines(policy: AppraisalPolicy, root: str | None, notes: Sequence[str]) -> Iterator[str]:
    yield _HEADER + "".join(f"#\n# {note}\n" for note in notes)
    yield f"version = {VERSION}"
    yield ""
    yield from _anchor(policy.anchor, root)
    yield ""
    yield "# Documents are signed when they are asked for: an old one says nothing about now. The leeway is for"
    yield "# clocks that disagree."
    yield "[freshness]"
    yield f"max_age_seconds = {policy.max_age_seconds}"
    yield f"leeway_seconds = {policy.leeway_seconds}  # at most {MAX_LEEWAY}"
    yield ""
    yield "# The host reads the memory of an enclave in debug mode."
    yield "[debug]"
    yield "forbid = true" if policy.accept_debug is None else f"accept = {_quoted(policy.accept_debug)}"
    yield ""
    yield from _binding(policy.binding)
    yield ""
    yield from _releases(policy.releases)
    yield "# The model manifest's digest, committed to PCR16."
    yield "[model]"
    yield from _model(policy.model)
    yield ""
    yield "# The digest of enclave.toml, committed to PCR17."
    yield "[configuration]"
    yield from _digests(policy.configuration)
    yield ""
    yield "# Further registers. One that has no rule here must be zero."
    for index, rule in sorted(policy.pcrs.items()):
        note = _REGISTER_NOTES.get(index)
        yield f"[pcrs.{index}]" + (f"  # {note}" if note else "")
        yield from _values(rule)
        yield ""
    yield "# The name that the hypervisor gave to this enclave; it changes at every start."
    yield "[module_id]"
    yield from _names(policy.module_id)
    for purpose, key in policy.kms.items():
        yield ""
        yield from _key(purpose, key)


def _key(purpose: EnvelopePurpose, rule: KeyRule) -> Iterator[str]:
    yield f"# {_KEY_NOTES[purpose]}"
    yield "# What KMS says of it is judged with every verdict: it must release to the releases above and to nothing"
    yield "# else, and nobody may change that but the administrators named here."
    yield f"[kms.{purpose.table}]"
    yield f'key = "{rule.key.text}"'
    yield f'context = "{rule.context}"'
    yield f"minimum_version = {rule.minimum_version}"
    if rule.administrators:
        yield from _list("administrators", rule.administrators)
    else:
        yield "locked = true"
    if rule.wrapped_key is not None:
        yield f"[kms.{purpose.table}.wrapped_key]"
        yield (
            _ignore(rule.wrapped_key)
            if isinstance(rule.wrapped_key, Ignore)
            else f"file = {_quoted(rule.wrapped_key.file)}"
        )


def _anchor(anchor: Anchor, root: str | None) -> Iterator[str]:
    if root is None:
        yield "# The Evidence must lead to AWS's root certificate for Nitro Enclaves, which ships with the verifier."
    else:
        yield "# The Evidence must lead to this emulator's root. It proves that the protocol works, and nothing about"
        yield "# hardware: whoever holds the root's key can sign anything. Reports say EMULATED."
    yield "[anchor]"
    yield f'trust = "{anchor.trust.value}"'
    if root is not None:
        yield f"root = {_quoted(root)}"
        yield f'root_sha256 = "{anchor.fingerprint}"'


def _binding(binding: Binding) -> Iterator[str]:
    if isinstance(binding, ChannelBinding):
        yield "# The document must bind the keys of a Strongroom channel, which a prompt is then sealed to."
        yield "[binding]"
        yield 'purpose = "channel"'
    else:
        yield "# A bare document, of any Nitro enclave: what it must carry. It opens no channel."
        yield "[binding]"
        yield 'purpose = "document"'
        for name, rule in (("public_key", binding.public_key), ("user_data", binding.user_data)):
            yield f"[binding.{name}]"
            yield from _values(rule)


def _releases(releases: tuple[Release, ...] | SignedReleases) -> Iterator[str]:
    if isinstance(releases, SignedReleases):
        yield "# The measured images that may run are those that a publisher has signed, in a history whose last entry"
        yield "# counts. What was seen of it is remembered: an older history, or another one, is refused."
        yield "[releases]"
        yield f"history = {_quoted(releases.file)}"
        yield f'key = "{releases.history.key}"'
        yield f"name = {_quoted(releases.history.current.name)}"
        yield f"minimum_sequence = {releases.minimum_sequence}  # what a client goes by that has never seen it"
        yield ""
        return
    yield "# The measured images that may run. The registers of one release belong together."
    for release in releases:
        yield from _release(release)
        yield ""


def _release(release: Release) -> Iterator[str]:
    yield "[[release]]"
    yield f"name = {_quoted(release.name)}"
    for index, value in release.pcrs.as_registers().items():
        yield f'pcr{index} = "{value.hex()}"'
    for name, digests in (("models", release.models), ("configurations", release.configurations)):
        if digests:
            yield from _list(name, [digest_text(digest) for digest in digests])


def _model(rule: ModelRule) -> Iterator[str]:
    if isinstance(rule, Manifests):
        yield from _list("manifests", [name for name, _ in rule.files])
        yield f"minimum_version = {rule.minimum_version}"
    else:
        yield from _digests(rule)


def _digests(rule: DigestRule) -> Iterator[str]:
    if isinstance(rule, Ignore):
        yield _ignore(rule)
    elif isinstance(rule, Released):
        yield "released = true"
    else:
        yield from _list("require", [digest_text(value) for value in rule.values])


def _values(rule: RegisterRule | FieldRule) -> Iterator[str]:
    if isinstance(rule, Ignore):
        yield _ignore(rule)
    elif isinstance(rule, Forbid):
        yield "forbid = true"
    elif isinstance(rule, Measures):
        yield from _list("measures", rule.texts)
    else:
        yield from _list("require", [value.hex() for value in rule.values])


def _names(rule: NameRule) -> Iterator[str]:
    if isinstance(rule, Ignore):
        yield _ignore(rule)
    else:
        yield from _list("require", rule.values)


def _ignore(rule: Ignore) -> str:
    return f"ignore = {_quoted(rule.reason)}"


def _list(name: str, texts: Sequence[str]) -> Iterator[str]:
    yield f"{name} = ["
    for text in texts:
        yield f"    {_quoted(text)},"
    yield "]"


def _quoted(text: str) -> str:
    # A printable text (the parser takes no other) is written alike in JSON and in TOML.
    return json.dumps(text, ensure_ascii=False)
