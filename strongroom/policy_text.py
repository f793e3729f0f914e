"""A policy in words: what it asks of an enclave, and what somebody should know before they rely on it.

Pure: a policy in, sentences out. The numbers are those of PROTOCOL.md section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from attestation.appraisal import field_text, registers_text
from attestation.commitment import MAX_DOCUMENT, MAX_EVIDENCE
from attestation.document import MAX_FIELD
from attestation.envelope import EnvelopeError, EnvelopePurpose, require_header
from attestation.policy import AppraisalPolicy
from attestation.reference import PCR_CONFIGURATION, PCR_INSTANCE, PCR_MODEL, PCR_ROLE, PCR_SIGNER, digest_text
from attestation.releases import time_text
from attestation.rules import (
    ChannelBinding,
    DigestRule,
    DocumentBinding,
    Forbid,
    Ignore,
    KeyRule,
    Manifests,
    Measures,
    Released,
    Require,
    SignedReleases,
    WrappedKeyFile,
)
from attestation.verifier import MIN_NONCE, NONCE_SIZE

TRUST_ON_FIRST_USE = "trusted on first use"
"""Begins the name of a release whose registers were taken from Evidence, and by which it is known later."""

FIRST_USE = "trust_on_first_use"
"""The code of the warning for such a release."""

LONG_AGE = timedelta(hours=1)
SOON = timedelta(days=14)
"""A maximum age, and a time until an expiry, that are worth a warning."""

_UNITS = ((3600, "hour"), (60, "minute"), (1, "second"))
_ACCOUNT = re.compile(r"arn:[a-z-]+:iam::[0-9]{12}:root")
_REGISTERS = {
    PCR_ROLE: "the IAM role of the parent instance",
    PCR_INSTANCE: "the parent instance's id",
    PCR_SIGNER: "the image's signing certificate",
}


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under one heading. ``steps`` are the checklist's; none for what is not checked."""

    steps: tuple[int, ...]
    title: str
    sentences: tuple[str, ...]

    @property
    def numbers(self) -> str:
        """``4`` or ``1-3``."""
        first, last = (self.steps[0], self.steps[-1]) if self.steps else ("", "")
        return f"{first}" if first == last else f"{first}-{last}"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to know of a policy. ``code`` is stable; a note is no cause for worry, a warning may be one."""

    code: str
    text: str
    is_note: bool = False

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "text": self.text}


# --- What it asks -------------------------------------------------------------------------------------------------


def explain(policy: AppraisalPolicy) -> tuple[Section, ...]:
    """What an enclave must prove for ``policy`` to accept it, and what KMS must say of its keys, by the steps of the
    checklist; and last what is not checked.

    Digests are whole. A sentence that begins with a dash belongs to the list that the one before it announces.
    """
    return (
        Section((1, 2, 3), "form", (_form(policy), "Nothing in it is unknown, doubled, left over or out of bounds.")),
        Section((4, 5), "origin", tuple(_origin(policy))),
        Section((6,), "nonce", (_nonce(policy),)),
        Section((7,), "freshness", tuple(_freshness(policy))),
        Section((8, 9), "binding", tuple(_binding(policy))),
        Section((10,), "debug mode", (_debug(policy),)),
        Section((11,), "image", tuple(_image(policy))),
        Section((12,), "model", tuple(_model(policy))),
        Section((13,), "configuration", tuple(_configuration(policy))),
        Section((14,), "other PCRs and module", tuple(_others(policy))),
        Section((15,), "entropy", (_entropy(policy),)),
        *(_keys(policy) if policy.kms else ()),
        Section((), "Not checked", tuple(_unchecked(policy))),
    )


def _is_channel(policy: AppraisalPolicy) -> bool:
    return isinstance(policy.binding, ChannelBinding)


def _form(policy: AppraisalPolicy) -> str:
    document = "an attestation document of the Nitro Secure Module, a COSE_Sign1 under ES384"
    if _is_channel(policy):
        channel = "beside it the commitment to the keys of a Strongroom channel"
        return f"What arrives is Evidence of at most {MAX_EVIDENCE} bytes: {document}, and {channel}."
    return f"What arrives is {document}, of at most {MAX_DOCUMENT} bytes, from any Nitro enclave."


def _origin(policy: AppraisalPolicy) -> Iterator[str]:
    fingerprint = f"(SHA-256 {policy.anchor.fingerprint})"
    if policy.anchor.is_emulated:
        yield f"The document's certificate leads to the emulator's root that this policy names {fingerprint}."
        yield "EMULATED: whoever holds that root's key can sign any document, and no hardware vouches for one."
    else:
        yield f"The document's certificate leads to AWS's root for Nitro Enclaves {fingerprint}."
    yield "Every certificate on the way is valid at the time of the verdict."
    yield "That certificate's key has signed the document, and nothing in it was altered since."


def _nonce(policy: AppraisalPolicy) -> str:
    size = f"{NONCE_SIZE} random bytes" if _is_channel(policy) else f"{MIN_NONCE} to {MAX_FIELD} bytes"
    return f"The document answers this very request: it carries the nonce that was sent with it, {size}."


def _freshness(policy: AppraisalPolicy) -> Iterator[str]:
    age, leeway = timedelta(seconds=policy.max_age_seconds), timedelta(seconds=policy.leeway_seconds)
    yield f"The document is at most {_duration(age)} old, and not from the future."
    if leeway:
        late, ahead = _duration(age + leeway), _duration(leeway)
        yield f"Clocks may disagree: by the client's, one that is {late} old or {ahead} ahead is still accepted."


def _binding(policy: AppraisalPolicy) -> Iterator[str]:
    if _is_channel(policy):
        yield "The document was made for a channel and binds the commitment that came with it; it carries no other key."
        yield "The commitment is whole, and PCR16 and PCR17 say the same of model and configuration as it does."
    else:
        yield "Does not apply: a bare document commits to no channel and opens none. Step 14 judges what it carries."


def _debug(policy: AppraisalPolicy) -> str:
    if policy.accept_debug is None:
        return "The enclave is not in debug mode, in which its host reads its memory."
    return f"An enclave in debug mode is accepted, although its host reads its memory: {policy.accept_debug}"


def _image(policy: AppraisalPolicy) -> Iterator[str]:
    releases = policy.releases
    if isinstance(releases, SignedReleases):
        history, current = releases.history, releases.history.current
        yield (
            f"The publisher of {current.name} has signed the release, with the key {history.key}: entry"
            f" {current.sequence} of {releases.file}, which counts until {time_text(current.expires)}."
        )
        fewest = releases.minimum_sequence
        yield f"A history that is older than one that was seen before, or has fewer entries than {fewest}, is refused."
    if len(policy.accepted_releases) == 1:
        yield "The image is this release, with all of its registers:"
    else:
        yield "The image is one of these releases, with all registers of that one:"
    for release in policy.accepted_releases:
        yield f"- {release.name}: {registers_text(release.pcrs.as_registers())}"


def _model(policy: AppraisalPolicy) -> Iterator[str]:
    rule = policy.model
    if isinstance(rule, Manifests):
        yield f"PCR{PCR_MODEL} commits to one of these manifests, of version {rule.minimum_version} or newer:"
        for name, manifest in rule.files:
            old = "" if manifest.version >= rule.minimum_version else "; too old, and refused"
            yield f"- {name}: {manifest.name}, version {manifest.version}, {digest_text(manifest.digest())}{old}"
    else:
        named = [(release.name, release.models) for release in policy.accepted_releases]
        yield from _committed("model manifest", PCR_MODEL, rule, named)


def _configuration(policy: AppraisalPolicy) -> Iterator[str]:
    named = [(release.name, release.configurations) for release in policy.accepted_releases]
    return _committed("configuration", PCR_CONFIGURATION, policy.configuration, named)


def _committed(what: str, index: int, rule: DigestRule, named: list[tuple[str, tuple[bytes, ...]]]) -> Iterator[str]:
    if isinstance(rule, Ignore):
        yield "Not checked: see the end."
    elif isinstance(rule, Released):
        yield f"PCR{index} commits to a {what} that the matched release names:"
        for release, digests in named:
            yield f"- {release}: {_one_of(map(digest_text, digests)) or 'none, so that none is accepted'}"
    else:
        yield f"PCR{index} commits to the {what} {_one_of(map(digest_text, rule.values))}."


def _others(policy: AppraisalPolicy) -> Iterator[str]:
    for index, rule in sorted(policy.pcrs.items()):
        if not isinstance(rule, Ignore):
            yield f"{_register_name(policy, index)} {_held(rule)}."
    yield "Every register that this policy does not name is zero, or not in the document."
    if not isinstance(policy.module_id, Ignore):
        yield f"The module id is {_one_of(policy.module_id.values)}."
    if isinstance(policy.binding, DocumentBinding):
        for name, field in (("public key", policy.binding.public_key), ("user data", policy.binding.user_data)):
            if isinstance(field, Forbid):
                yield f"The document carries no {name}."
            elif not isinstance(field, Ignore):
                yield f"The document's {name} is {_one_of(map(field_text, field.values))}."


def _held(rule: Require[bytes] | Measures | Forbid) -> str:
    match rule:
        case Forbid():
            return "is zero, or not in the document"
        case Measures():
            return f"was extended once, with the text {_one_of(rule.texts)}"
        case Require():
            return f"holds {_one_of(value.hex() for value in rule.values)}"


def _entropy(policy: AppraisalPolicy) -> str:
    if not _is_channel(policy):
        return "Does not apply: a bare document does not say where its enclave's randomness comes from."
    if policy.anchor.is_emulated:
        return "The enclave's randomness may be its host's, who can then know its keys: this is EMULATED."
    return "The enclave's randomness is the Nitro Secure Module's, and not its host's, who could then know its keys."


_PROTECTED = {EnvelopePurpose.MODEL: "the model", EnvelopePurpose.PROMPT: "prompts that wait"}


def _keys(policy: AppraisalPolicy) -> Iterator[Section]:
    """What KMS must say, for nothing to be released without it."""
    keys = [(_PROTECTED[purpose], rule) for purpose, rule in policy.kms.items()]
    named = (
        "KMS is asked at every verification: without its answer, or when it says something else, no prompt is sent.",
        "What it describes is in use, encrypts, was made in KMS and never left it, and is this key:",
        *(f"- for {what}: {rule.key.text}" for what, rule in keys),
    )
    yield Section((16,), "KMS key", named)
    yield Section((17,), "copies of the key", ("It is a key of one region: no copy has a policy of its own.",))
    opens = (
        "The key policy opens it to the releases of step 11 and to nothing else: all registers of one release together,"
        " under a configuration of step 13, and for prompts with a model of step 12.",
        "It opens what was sealed for this purpose and context alone:",
        *(f"- {what}: {rule.context}" for what, rule in keys),
    )
    yield Section((18,), "key policy", opens)
    yield Section((19,), "grants", ("No grant lets anybody decrypt beside the key policy.",))
    yield Section((20,), "who may change it", tuple(_changers(keys)))
    yield Section((21,), "wrapped key", tuple(_wrapped_keys(policy)))


def _changers(keys: list[tuple[str, KeyRule]]) -> Iterator[str]:
    for what, rule in keys:
        if rule.administrators:
            yield f"Of the key for {what}: nobody can change this later but these, whom the policy trusts with it:"
            yield from (f"- {arn}" for arn in rule.administrators)
        else:
            yield f"Of the key for {what}: LOCKED, so that nobody can ever change this."


def _wrapped_keys(policy: AppraisalPolicy) -> Iterator[str]:
    for rule in policy.kms.values():
        if isinstance(rule.wrapped_key, Ignore):
            yield "The model's is not checked: see the end."
        elif isinstance(rule.wrapped_key, WrappedKeyFile):
            name, least = rule.wrapped_key.file, rule.minimum_version
            yield f"The model's, in {name}, is under its key, for its context, and of version {least} or newer."
        else:
            yield f"Each prompt that waits has one of its own, sealed as version {rule.minimum_version}."


def _unchecked(policy: AppraisalPolicy) -> Iterator[str]:
    if policy.accept_debug is not None:
        yield f"- The image of an enclave in debug mode, where nothing is measured: {policy.accept_debug}"
    for ignored in _ignored(policy):
        yield f"- {ignored.what[0].upper()}{ignored.what[1:]}: {ignored.reason}"
    if policy.kms:
        yield "- KMS itself, which must do what it says; and what becomes of a key's policy until it is asked again."
    yield "- Whether a certificate was revoked: AWS's attestation process says that nobody asks; leaves live for hours."


# --- What to know of it -------------------------------------------------------------------------------------------


def warnings(policy: AppraisalPolicy, now: datetime) -> list[Remark]:
    """What makes ``policy`` weaker than it could be at ``now`` (with a time zone), and what is only worth knowing."""
    return list(_remarks(policy, now))


def _remarks(policy: AppraisalPolicy, now: datetime) -> Iterator[Remark]:
    if policy.anchor.is_emulated:
        text = "the anchor is an emulator's root: whoever holds its key can sign anything, and no hardware vouches"
        yield Remark("emulated_anchor", text)
    if policy.accept_debug is not None:
        text = f"an enclave in debug mode is accepted, although its host reads its memory: {policy.accept_debug}"
        yield Remark("debug_accepted", text)
    for ignored in _ignored(policy):
        text = f"not checked: {ignored.what}: {ignored.reason}"
        # A module id is not known before the enclave's start, so that nobody could pin one ahead.
        yield Remark(f"ignored_{ignored.code}", text, is_note=ignored.code == "module_id")
    if policy.max_age_seconds > LONG_AGE.total_seconds():
        age = _duration(timedelta(seconds=policy.max_age_seconds))
        yield Remark("long_maximum_age", f"documents may be {age} old, although they are made when they are asked for")
    releases = policy.accepted_releases
    if isinstance(policy.pcrs.get(PCR_SIGNER), Forbid | Ignore):
        unsigned = ", ".join(release.name for release in releases if release.pcrs.pcr8 is None)
        yield Remark("unsigned_image", f"no PCR8, so nobody's signature under the image is asked for: {unsigned}")
    for release in releases:
        if release.name.startswith(TRUST_ON_FIRST_USE):
            yield first_use(release.name)
    if policy.expires is not None and now >= policy.expires:
        text = f"the signed releases have expired, at {time_text(policy.expires)}: no enclave is accepted"
        yield Remark("releases_expired", text)
    elif policy.expires is not None and policy.expires - now <= SOON:
        text = f"the signed releases expire within {SOON.days} days, at {time_text(policy.expires)}"
        yield Remark("releases_expire_soon", text)
    yield from _remarks_on_keys(policy)
    if len(releases) > 1:
        names = ", ".join(release.name for release in releases)
        yield Remark("rollout", f"{len(releases)} releases are accepted: {names}", is_note=True)


def _remarks_on_keys(policy: AppraisalPolicy) -> Iterator[Remark]:
    for purpose, rule in policy.kms.items():
        what = _PROTECTED[purpose]
        if refused := _refused(purpose, rule):
            yield Remark("refused_wrapped_key", f"no prompt is sent: {refused}")
        for account in filter(_ACCOUNT.fullmatch, rule.administrators):
            text = f"whoever the IAM policies of {account} name may change what the key for {what} opens to"
            yield Remark("account_administers", text)
        if rule.administrators:
            text = f"these may change what the key for {what} opens to: {', '.join(rule.administrators)}"
            yield Remark("changeable_key", text, is_note=True)


def _refused(purpose: EnvelopePurpose, rule: KeyRule) -> str | None:
    """Why step 21 would fail; None where it would not."""
    if not isinstance(rule.wrapped_key, WrappedKeyFile):
        return None
    name, header = rule.wrapped_key.file, rule.wrapped_key.header
    if header is None:
        return f"there is no {name}, in which the model's wrapped key should be"
    try:
        require_header(
            header, purpose=purpose, key=rule.key, context=rule.context, minimum_version=rule.minimum_version
        )
    except EnvelopeError as error:
        return f"the model's wrapped key, {name}: {error.message}; expected {error.expected}, got {error.got}"
    return None


def first_use(release: str) -> Remark:
    """The warning for a ``release`` that was taken from Evidence."""
    return Remark(
        FIRST_USE,
        f"{release}: taken from what an enclave said of itself, which proves what ran and not that it is any good;"
        " compare the registers with a build of your own, or with what the publisher signs",
    )


@dataclass(frozen=True, slots=True)
class _Ignored:
    code: str
    what: str
    reason: str


def _ignored(policy: AppraisalPolicy) -> Iterator[_Ignored]:
    """What the policy ignores, in the order of the checklist."""
    fields: list[tuple[str, str, object]] = [
        ("model", "the model (PCR16)", policy.model),
        ("configuration", "the configuration (PCR17)", policy.configuration),
    ]
    fields += ((f"pcr{index}", _register_name(policy, index), rule) for index, rule in sorted(policy.pcrs.items()))
    fields.append(("module_id", "the module id", policy.module_id))
    if isinstance(policy.binding, DocumentBinding):
        fields.append(("public_key", "the document's public key", policy.binding.public_key))
        fields.append(("user_data", "the document's user data", policy.binding.user_data))
    for purpose, key in policy.kms.items():
        fields.append(("wrapped_key", f"the wrapped key of {_PROTECTED[purpose]}", key.wrapped_key))
    for code, what, rule in fields:
        if isinstance(rule, Ignore):
            yield _Ignored(code, what, rule.reason)


# --- Words --------------------------------------------------------------------------------------------------------


def _register_name(policy: AppraisalPolicy, index: int) -> str:
    name = f"PCR{index}"
    if index in _REGISTERS:
        name += f" ({_REGISTERS[index]})"
    if index == PCR_SIGNER and any(release.pcrs.pcr8 is not None for release in policy.accepted_releases):
        name += ", for a release that names none,"
    return name


def _one_of(texts: Iterable[str]) -> str:
    return " or ".join(texts)


def _duration(length: timedelta) -> str:
    """In the largest unit that divides it."""
    seconds = int(length.total_seconds())
    size, unit = next(each for each in _UNITS if seconds % each[0] == 0)
    return f"{seconds // size} {unit}{'' if seconds == size else 's'}"
