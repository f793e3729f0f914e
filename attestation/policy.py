"""The Appraisal Policy: what a relying party accepts, read from ``policy.toml``.

Nothing is optional in silence. A field is required, forbidden, or ignored with a written reason; one that is absent,
unknown or contradictory is a PolicyError that names it. So is a policy that would accept anything. PROTOCOL.md
section 3.1 specifies the file; ``policy_writer`` writes one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from attestation import strict_toml
from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor, Trust
from attestation.document import MAX_CERTIFICATE, PCR_COUNT
from attestation.envelope import EnvelopePurpose
from attestation.errors import PolicyError
from attestation.keypolicy.document import KeyArn
from attestation.reference import (
    DIGEST_SIZE,
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_CONFIGURATION,
    PCR_IMAGE,
    PCR_INSTANCE,
    PCR_MODEL,
    PCR_ROLE,
    PCR_SIGNER,
    PcrSet,
)
from attestation.release_signing import PublicKey, ReleaseError
from attestation.releases import MAX_ENTRIES, MAX_HISTORY, ReleaseHistory
from attestation.rule_reader import (
    DIGEST_RULES,
    FIELD_RULES,
    NAME_RULES,
    REGISTER_RULES,
    digests,
    read_file,
    read_key_rules,
    read_model_rule,
    read_rule,
    require_bounds,
)
from attestation.rules import (
    Binding,
    ChannelBinding,
    DigestRule,
    DocumentBinding,
    Ignore,
    KeyRule,
    Manifests,
    ModelRule,
    NameRule,
    RegisterRule,
    Release,
    Released,
    ReleasesInForce,
    Require,
    SignedReleases,
)
from attestation.strict_toml import Table, missing, printable, wrong_value

if TYPE_CHECKING:  # where heads are kept is a matter of the system: files and locks
    from attestation.release_heads import HeadMemory

VERSION = 1
MAX_POLICY = 1_048_576
"""Bytes of a policy file."""

MAX_AGE = 86_400
MAX_LEEWAY = 600
"""Seconds: the largest that a policy may ask for. A leeway is for clocks, not for keeping old documents alive."""

_JUDGED_ELSEWHERE = MappingProxyType(
    {
        PCR_IMAGE: "release",
        PCR_BOOT: "release",
        PCR_APPLICATION: "release",
        PCR_MODEL: "model",
        PCR_CONFIGURATION: "configuration",
    }
)


@dataclass(frozen=True, slots=True)
class AppraisalPolicy:
    """What is accepted. Building one that contradicts itself raises PolicyError."""

    anchor: Anchor
    """The root that every document must lead to."""
    max_age_seconds: int
    """How old a document may be, 1 to 86,400 seconds. AWS's leaf certificates end after three hours anyway."""
    leeway_seconds: int
    """By how much the clocks of enclave and verifier may differ, 0 to 600 seconds, in either direction."""
    accept_debug: str | None
    """The written reason for accepting an enclave in debug mode, whose memory its host can read. None: refused."""
    binding: Binding
    """What a document must be bound to, and so whether the policy judges channels or bare documents."""
    releases: tuple[Release, ...] | SignedReleases
    """Written in the policy, or signed by a publisher; :attr:`accepted_releases` is what both come to."""
    model: ModelRule
    """What PCR16 commits to: digests of model manifests."""
    configuration: DigestRule
    """What PCR17 commits to: digests of configurations."""
    pcrs: Mapping[int, RegisterRule]
    """Rules for further registers; one that has none must be zero. PCR8's is for releases that do not name PCR8."""
    module_id: NameRule
    """For the name that the hypervisor gives to an enclave at its start."""
    kms: Mapping[EnvelopePurpose, KeyRule] = field(default_factory=dict)
    """KMS keys that protect the model, or prompts that wait. What KMS says of each is part of every verdict."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pcrs", MappingProxyType(dict(self.pcrs)))
        object.__setattr__(self, "kms", MappingProxyType(dict(self.kms)))
        require_bounds("freshness.max_age_seconds", self.max_age_seconds, 1, MAX_AGE, "seconds")
        require_bounds("freshness.leeway_seconds", self.leeway_seconds, 0, MAX_LEEWAY, "seconds")
        if self.accept_debug is not None:
            printable("debug.accept", self.accept_debug)
        releases = self.accepted_releases
        if not releases:
            raise PolicyError("missing_field", "at least one release must be named", field="release", got="none")
        for position, release in enumerate(releases):
            for other in releases[:position]:
                if other.name == release.name:
                    raise PolicyError(
                        "contradiction",
                        "two releases have one name",
                        field=f"release[{position}].name",
                        got=release.name,
                    )
                if other.pcrs.is_ambiguous_beside(release.pcrs):
                    raise PolicyError(
                        "contradiction",
                        "one enclave could be either of two releases: let one of them name it, with all that may run",
                        field=f"release[{position}]",
                        expected="another image, or another signer",
                        got=f"the image of {other.name}",
                    )
        self._require_released("model", self.model, [release.models for release in releases])
        self._require_released("configuration", self.configuration, [release.configurations for release in releases])
        self._require_register_rules()
        if self.kms:
            self._require_releasable()

    def _require_released(self, field: str, rule: ModelRule, named: list[tuple[bytes, ...]]) -> None:
        if isinstance(rule, Released) and not any(named):
            raise PolicyError(
                "contradiction",
                "no release names one: this rule accepts nothing",
                field=f"{field}.released",
                expected=f"a release with {field}s",
                got="none",
            )
        if not isinstance(rule, Released) and any(named) and not isinstance(self.releases, SignedReleases):
            raise PolicyError(
                "contradiction",
                f"a release names {field}s that would never be asked for",
                field=f"{field}",
                expected="released = true, or no such list",
            )

    def _require_releasable(self) -> None:
        """A key can be held to this policy only if the policy says all that the key's own must ask for."""
        if not isinstance(self.binding, ChannelBinding):
            raise PolicyError(
                "contradiction", "KMS keys belong to a channel", field="kms", expected='binding.purpose = "channel"'
            )
        for name, rule in (("model", self.model), ("configuration", self.configuration)):
            if isinstance(rule, Ignore):
                raise PolicyError(
                    "contradiction",
                    "a KMS key is released to named digests",
                    field=f"{name}.ignore",
                    expected="a rule that names some, or no [kms]",
                )
        self._require_key_rules()
        if not any(self.models_of(each) and self.configurations_of(each) for each in self.accepted_releases):
            raise PolicyError(
                "contradiction",
                "no release names both models and configurations: no key is released",
                field="kms",
                expected="a release that names both",
                got="none",
            )

    def _require_key_rules(self) -> None:
        """One key serves one purpose, else neither would be released to the enclaves of this policy alone; and a
        model's wrapped key is judged or ignored, never forgotten.
        """
        purposes: dict[KeyArn, EnvelopePurpose] = {}
        for purpose, rule in self.kms.items():
            where = f"kms.{purpose.table}"
            other = purposes.setdefault(rule.key, purpose)
            if other is not purpose:
                raise PolicyError(
                    "contradiction",
                    "one key for two purposes: what is sealed for one would be opened for the other",
                    field=f"{where}.key",
                    expected="a key of its own",
                    got=f"that of kms.{other.table}",
                )
            if purpose is EnvelopePurpose.MODEL and rule.wrapped_key is None:
                raise missing(f"{where}.wrapped_key")
            if purpose is EnvelopePurpose.PROMPT and rule.wrapped_key is not None:
                raise PolicyError(
                    "unknown_field", "each prompt has a wrapped key of its own", field=f"{where}.wrapped_key"
                )

    def _require_register_rules(self) -> None:
        for index, rule in self.pcrs.items():
            if isinstance(rule, Require) and any(len(value) != DIGEST_SIZE for value in rule.values):
                raise wrong_value(f"pcrs.{index}.require", f"registers of {DIGEST_SIZE} bytes", "others")
            if index in _JUDGED_ELSEWHERE or not 0 <= index < PCR_COUNT:
                elsewhere = _JUDGED_ELSEWHERE.get(index)
                raise PolicyError(
                    "unknown_field",
                    "this register is not judged here",
                    field=f"pcrs.{index}",
                    expected=f"[{elsewhere}]" if elsewhere else f"registers up to {PCR_COUNT - 1}",
                    got=index,
                )
        for index in (PCR_ROLE, PCR_INSTANCE):
            if index not in self.pcrs:
                raise missing(f"pcrs.{index}")
        unsigned = [release.name for release in self.accepted_releases if release.pcrs.pcr8 is None]
        if unsigned and PCR_SIGNER not in self.pcrs:
            raise missing(f"pcrs.{PCR_SIGNER}")
        if not unsigned and PCR_SIGNER in self.pcrs:
            raise PolicyError(
                "contradiction",
                "every release names its pcr8, so this rule would never be asked",
                field=f"pcrs.{PCR_SIGNER}",
                expected="a release without pcr8, or no such rule",
            )

    @property
    def accepted_releases(self) -> tuple[Release, ...]:
        """Those that count now. Never empty."""
        return self.releases_in_force(None).releases

    @property
    def accepted_models(self) -> tuple[bytes, ...]:
        """Every manifest's digest that some release may run, each once. Empty where any may."""
        return _each_once(self.models_of(release) for release in self.accepted_releases)

    @property
    def accepted_configurations(self) -> tuple[bytes, ...]:
        """The same for configurations."""
        return _each_once(self.configurations_of(release) for release in self.accepted_releases)

    def models_of(self, release: Release) -> tuple[bytes, ...]:
        """The manifests' digests that may run in one release. Empty where any may."""
        if isinstance(self.model, Manifests):
            return tuple(manifest.digest() for _, manifest in self.model.accepted)
        return _named(self.model, release.models)

    def configurations_of(self, release: Release) -> tuple[bytes, ...]:
        """The same for configurations."""
        return _named(self.configuration, release.configurations)

    @property
    def expires(self) -> datetime | None:
        """From when on these are accepted no more. None: they stand in the policy itself, and stay."""
        return self.releases_in_force(None).expires

    def releases_in_force(self, at: datetime | None) -> ReleasesInForce:
        """Those that count now; or, for what is archived, those that counted ``at`` its time, as far as was stated."""
        if isinstance(self.releases, SignedReleases):
            return self.releases.in_force(at)
        return ReleasesInForce(self.releases)

    @classmethod
    def load(cls, path: Path | str, *, heads: HeadMemory | None = None) -> AppraisalPolicy:
        """Reads ``path``; the names of files in it are relative to its folder.

        ``heads`` remembers signed histories, so that an older one is refused: a policy that names one needs it. Raises
        PolicyError; ReleaseError and HeadError for a history.
        """
        path = Path(path)
        data = read_file(path, MAX_POLICY, "unreadable_policy", field=None)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PolicyError("malformed_policy", f"{path} is not UTF-8 text") from error
        return cls.parse(text, path.parent, heads=heads)

    @classmethod
    def parse(cls, text: str, directory: Path, *, heads: HeadMemory | None = None) -> AppraisalPolicy:
        """``directory`` is where the names of files in ``text`` start. Raises as :meth:`load`."""
        top = strict_toml.read(text)
        version = top.integer("version")
        if version != VERSION:
            raise PolicyError(
                "unknown_version", "another version of policies", field="version", expected=VERSION, got=version
            )
        anchor = _anchor(top.table("anchor"), directory)
        freshness = top.table("freshness")
        max_age, leeway = freshness.integer("max_age_seconds"), freshness.integer("leeway_seconds")
        freshness.finish()
        policy = cls(
            anchor=anchor,
            max_age_seconds=max_age,
            leeway_seconds=leeway,
            accept_debug=_debug(top.table("debug")),
            binding=_binding(top.table("binding")),
            releases=_releases(top, directory, heads),
            model=read_model_rule(top.table("model"), directory),
            configuration=read_rule(top.table("configuration"), DIGEST_RULES),
            pcrs=_register_rules(top.table("pcrs")),
            module_id=read_rule(top.table("module_id"), NAME_RULES),
            kms=read_key_rules(top.table("kms"), directory) if top.has("kms") else {},
        )
        top.finish()
        return policy


def _anchor(table: Table, directory: Path) -> Anchor:
    trust = table.text("trust")
    if trust == Trust.AWS_NITRO_G1:
        for key in ("root", "root_sha256"):
            if table.has(key):
                raise PolicyError(
                    "contradiction",
                    f"the root of {trust} ships with the verifier",
                    field=table.field(key),
                    expected="no such field",
                )
        anchor = AWS_NITRO_G1
    elif trust == Trust.EMULATED:
        name, fingerprint = table.text("root"), table.hexadecimal("root_sha256", 32).hex()
        der = read_file(directory / name, MAX_CERTIFICATE, "unreadable_anchor", field=table.field("root"))
        got = hashlib.sha256(der).hexdigest()
        if got != fingerprint:
            raise PolicyError(
                "wrong_anchor",
                f"{name} is not the root that this policy names",
                field=table.field("root_sha256"),
                expected=fingerprint,
                got=got,
            )
        try:
            anchor = Anchor.emulated(der)
        except PolicyError as error:
            raise error.at(table.field("root")) from error
    else:
        raise PolicyError(
            "unknown_value", "no such anchor", field=table.field("trust"), expected=" or ".join(Trust), got=ascii(trust)
        )
    table.finish()
    return anchor


def _debug(table: Table) -> str | None:
    reason = None
    if table.one_of("forbid", "accept") == "accept":
        reason = table.text("accept")
    else:
        table.true("forbid")
    table.finish()
    return reason


def _binding(table: Table) -> Binding:
    purpose = table.text("purpose")
    binding: Binding
    if purpose == "channel":
        binding = ChannelBinding()
    elif purpose == "document":
        public_key, user_data = (read_rule(table.table(name), FIELD_RULES) for name in ("public_key", "user_data"))
        binding = DocumentBinding(public_key, user_data)
    else:
        raise PolicyError(
            "unknown_value",
            "no such purpose",
            field=table.field("purpose"),
            expected="channel or document",
            got=ascii(purpose),
        )
    table.finish()
    return binding


def _named(rule: DigestRule, released: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if isinstance(rule, Ignore):
        return ()
    return released if isinstance(rule, Released) else rule.values


def _each_once(digests: Iterable[tuple[bytes, ...]]) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(digests)))


def _releases(top: Table, directory: Path, heads: HeadMemory | None) -> tuple[Release, ...] | SignedReleases:
    if not top.has("releases"):
        return tuple(_release(table) for table in top.tables("release"))
    top.one_of("release", "releases")
    table = top.table("releases")
    file, name, minimum = table.text("history"), table.text("name"), table.integer("minimum_sequence")
    require_bounds(table.field("minimum_sequence"), minimum, 1, MAX_ENTRIES, "entries")
    field = table.field("key")
    try:
        key = PublicKey.parse(table.text("key"))
    except ReleaseError as error:
        raise PolicyError(error.code, error.message, field=field, expected=error.expected, got=error.got) from error
    table.finish()
    if heads is None:
        raise PolicyError(
            "no_memory",
            "a signed history can be rolled back unless its head is remembered",
            field=table.field("history"),
            expected="a memory of heads",
            got="none",
        )
    data = read_file(directory / file, MAX_HISTORY, "unreadable_history", field=table.field("history"))
    head = heads.recall(key, name)
    try:
        history = ReleaseHistory.verify(data, key=key, name=name, minimum_sequence=minimum, head=head)
        # Before anything is judged by it: that everything was taken back is worth remembering most.
        heads.remember(history)
    except ReleaseError as error:
        raise error.of(file) from error
    return SignedReleases(file, minimum, history)


def _release(table: Table) -> Release:
    pcr8 = table.hexadecimal("pcr8", DIGEST_SIZE) if table.has("pcr8") else None
    pcr0, pcr1, pcr2 = (table.hexadecimal(key, DIGEST_SIZE) for key in ("pcr0", "pcr1", "pcr2"))
    models, configurations = (digests(table, key) if table.has(key) else () for key in ("models", "configurations"))
    name, pcrs = table.text("name"), PcrSet(pcr0, pcr1, pcr2, pcr8)
    table.finish()
    try:
        return Release(name, pcrs, models, configurations)
    except PolicyError as error:
        raise error.at(table.field((error.field or "").removeprefix("release."))) from error


def _register_rules(table: Table) -> Mapping[int, RegisterRule]:
    rules: dict[int, RegisterRule] = {}
    for key in table:
        if not re.fullmatch(r"0|[1-9][0-9]?", key):
            raise PolicyError("unknown_field", "not a register", field=table.field(key), expected="a number, 0 to 31")
        rules[int(key)] = read_rule(table.table(key), REGISTER_RULES)
    table.finish()
    return rules
