"""The Appraisal Policy: what a relying party accepts, read from ``policy.toml``.

Nothing is optional in silence. A field is required, forbidden, or ignored with a written reason; one that is absent,
unknown or contradictory is a PolicyError that names it. So is a policy that would accept anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeAlias, TypeVar

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor, Trust
from attestation.document import MAX_CERTIFICATE, PCR_COUNT
from attestation.errors import PolicyError
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
    ZERO_PCR,
    PcrSet,
)
from attestation.strict_toml import Table, missing, printable, wrong_value

VERSION = 1
MAX_POLICY = 1_048_576
"""Bytes of a policy file."""

MAX_AGE = 86_400
MAX_LEEWAY = 600
"""Seconds: the largest that a policy may ask for. A leeway is for clocks, not for keeping old documents alive."""

_DIGEST = "sha384:"
_JUDGED_ELSEWHERE = MappingProxyType(
    {
        PCR_IMAGE: "release",
        PCR_BOOT: "release",
        PCR_APPLICATION: "release",
        PCR_MODEL: "model",
        PCR_CONFIGURATION: "configuration",
    }
)

T = TypeVar("T", bytes, str)


@dataclass(frozen=True, slots=True)
class Require(Generic[T]):
    """One of these values and no other. Never empty."""

    values: tuple[T, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise PolicyError("empty_list", "an empty list accepts nothing", field="require")
        for value in self.values:
            if isinstance(value, str):
                printable("require", value)


@dataclass(frozen=True, slots=True)
class Forbid:
    """The register must be zero: nothing was ever measured into it."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """Any value, for the reason that stands in every report."""

    reason: str

    def __post_init__(self) -> None:
        printable("ignore", self.reason)


RegisterRule: TypeAlias = Require[bytes] | Forbid | Ignore
DigestRule: TypeAlias = Require[bytes] | Ignore
NameRule: TypeAlias = Require[str] | Ignore


@dataclass(frozen=True, slots=True)
class Release:
    """A named image. Its registers are compared together, so that no two releases can be mixed."""

    name: str
    pcrs: PcrSet

    def __post_init__(self) -> None:
        printable("release.name", self.name)


@dataclass(frozen=True, slots=True)
class AppraisalPolicy:
    """What is accepted. Building one that contradicts itself raises PolicyError."""

    anchor: Anchor
    max_age_seconds: int
    leeway_seconds: int
    accept_debug: str | None
    """The written reason for accepting an enclave in debug mode, whose memory its host can read. None: refused."""
    releases: tuple[Release, ...]
    model: DigestRule
    """Digests of model manifests; PCR16 follows from them."""
    configuration: DigestRule
    """Digests of configurations; PCR17 follows from them."""
    pcrs: Mapping[int, RegisterRule]
    """Rules for further registers; one that has none must be zero. PCR8's is for releases that do not name PCR8."""
    module_id: NameRule

    def __post_init__(self) -> None:
        object.__setattr__(self, "pcrs", MappingProxyType(dict(self.pcrs)))
        _require_bounds("freshness.max_age_seconds", self.max_age_seconds, 1, MAX_AGE)
        _require_bounds("freshness.leeway_seconds", self.leeway_seconds, 0, MAX_LEEWAY)
        if self.accept_debug is not None:
            printable("debug.accept", self.accept_debug)
        if not self.releases:
            raise PolicyError("missing_field", "at least one release must be named", field="release", got="none")
        names: set[str] = set()
        for position, release in enumerate(self.releases):
            field = f"release[{position}]"
            if release.name in names:
                raise PolicyError(
                    "contradiction", "two releases have one name", field=f"{field}.name", got=release.name
                )
            names.add(release.name)
            for index, register in release.pcrs.as_registers().items():
                if register == ZERO_PCR:
                    raise PolicyError(
                        "contradiction",
                        "zero is what an enclave in debug mode reports, and measures nothing",
                        field=f"{field}.pcr{index}",
                        expected="a measurement",
                        got="zero",
                    )
        self._require_register_rules()

    def _require_register_rules(self) -> None:
        for index in self.pcrs:
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
        unsigned = [release.name for release in self.releases if release.pcrs.pcr8 is None]
        if unsigned and PCR_SIGNER not in self.pcrs:
            raise missing(f"pcrs.{PCR_SIGNER}")
        if not unsigned and PCR_SIGNER in self.pcrs:
            raise PolicyError(
                "contradiction",
                "every release names its pcr8, so this rule would never be asked",
                field=f"pcrs.{PCR_SIGNER}",
                expected="a release without pcr8, or no such rule",
            )

    @classmethod
    def load(cls, path: Path) -> AppraisalPolicy:
        """Reads ``path``; the names of files in it are relative to its folder. Raises PolicyError."""
        data = _read(path, MAX_POLICY, "unreadable_policy", field=None)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PolicyError("malformed_policy", f"{path} is not UTF-8 text") from error
        return cls.parse(text, path.parent)

    @classmethod
    def parse(cls, text: str, directory: Path) -> AppraisalPolicy:
        """``directory`` is where the names of files in ``text`` start. Raises PolicyError, never anything else."""
        try:
            top = Table("", tomllib.loads(text))
        except (ValueError, RecursionError) as error:
            raise PolicyError("malformed_policy", f"not TOML: {error}") from error
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
            releases=tuple(_release(table) for table in top.tables("release")),
            model=_digest_rule(top.table("model")),
            configuration=_digest_rule(top.table("configuration")),
            pcrs=_register_rules(top.table("pcrs")),
            module_id=_name_rule(top.table("module_id")),
        )
        top.finish()
        return policy

    def emit(self, *, root: str | None = None) -> str:
        """The policy as commented TOML; ``parse`` gives an equal policy back.

        ``root`` is the file name, relative to the policy's folder, under which the caller keeps ``anchor.der``: needed
        under an EMULATED anchor, and only there.
        """
        if self.anchor.is_emulated != (root is not None):
            raise ValueError("a file for the root belongs to an EMULATED anchor, and to no other")
        lines = [_HEADER, f"version = {VERSION}", "", *_emit_anchor(self.anchor, root)]
        lines += [
            "",
            "# Documents are signed when they are asked for: an old one says nothing about now. The leeway is for",
            "# clocks that disagree.",
            "[freshness]",
            f"max_age_seconds = {self.max_age_seconds}",
            f"leeway_seconds = {self.leeway_seconds}  # at most {MAX_LEEWAY}",
            "",
            "# The host reads the memory of an enclave in debug mode.",
            "[debug]",
            "forbid = true" if self.accept_debug is None else f"accept = {_quoted(self.accept_debug)}",
            "",
            "# The measured images that may run. The registers of one release belong together.",
        ]
        for release in self.releases:
            lines += ["[[release]]", f"name = {_quoted(release.name)}"]
            lines += [f'pcr{index} = "{value.hex()}"' for index, value in release.pcrs.as_registers().items()]
            lines.append("")
        lines += ["# The model manifest's digest, committed to PCR16.", "[model]", *_emit_rule(self.model, _DIGEST)]
        lines += ["", "# The digest of enclave.toml, committed to PCR17.", "[configuration]"]
        lines += [*_emit_rule(self.configuration, _DIGEST), ""]
        lines.append("# Further registers. One that has no rule here must be zero.")
        for index, rule in sorted(self.pcrs.items()):
            note = _REGISTER_NOTES.get(index)
            lines += [f"[pcrs.{index}]" + (f"  # {note}" if note else ""), *_emit_rule(rule), ""]
        lines += ["# The name that the hypervisor gave to this enclave; it changes at every start.", "[module_id]"]
        lines += _emit_rule(self.module_id)
        return "\n".join(lines) + "\n"


_HEADER = """\
# What this client accepts from an enclave: its Appraisal Policy.
#
# Every field must be here. A rule is one of
#   require = [...]              one of these values, and no other
#   forbid = true                must be zero (registers only)
#   ignore = "written reason"    any value; the reason stands in every report
"""

_REGISTER_NOTES = {
    PCR_ROLE: "the IAM role of the parent instance",
    PCR_INSTANCE: "the parent instance's id",
    PCR_SIGNER: "the image's signing certificate, for releases without pcr8",
}


def _quoted(text: str) -> str:
    # A printable text (the parser takes no other) is written alike in JSON and in TOML.
    return json.dumps(text, ensure_ascii=False)


def _emit_anchor(anchor: Anchor, root: str | None) -> Iterator[str]:
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


def _emit_rule(rule: RegisterRule | NameRule, prefix: str = "") -> list[str]:
    if isinstance(rule, Forbid):
        return ["forbid = true"]
    if isinstance(rule, Ignore):
        return [f"ignore = {_quoted(rule.reason)}"]
    texts = (value if isinstance(value, str) else prefix + value.hex() for value in rule.values)
    return ["require = [", *(f"    {_quoted(text)}," for text in texts), "]"]


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
        der = _read(directory / name, MAX_CERTIFICATE, "unreadable_anchor", field=table.field("root"))
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
            raise PolicyError(
                error.code, error.message, field=table.field("root"), expected=error.expected, got=error.got
            ) from error
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


def _release(table: Table) -> Release:
    pcr8 = table.hexadecimal("pcr8", DIGEST_SIZE) if table.has("pcr8") else None
    pcr0, pcr1, pcr2 = (table.hexadecimal(key, DIGEST_SIZE) for key in ("pcr0", "pcr1", "pcr2"))
    release = Release(table.text("name"), PcrSet(pcr0, pcr1, pcr2, pcr8))
    table.finish()
    return release


def _register_rules(table: Table) -> Mapping[int, RegisterRule]:
    rules: dict[int, RegisterRule] = {}
    for key in table:
        if not re.fullmatch(r"0|[1-9][0-9]?", key):
            raise PolicyError("unknown_field", "not a register", field=table.field(key), expected="a number, 0 to 31")
        rules[int(key)] = _register_rule(table.table(key))
    table.finish()
    return rules


def _register_rule(table: Table) -> RegisterRule:
    rule: RegisterRule
    match table.one_of("require", "forbid", "ignore"):
        case "require":
            rule = Require(tuple(table.octets(field, text, DIGEST_SIZE) for field, text in table.texts("require")))
        case "forbid":
            table.true("forbid")
            rule = Forbid()
        case _:
            rule = Ignore(table.text("ignore"))
    table.finish()
    return rule


def _digest_rule(table: Table) -> DigestRule:
    rule: DigestRule
    if table.one_of("require", "ignore") == "require":
        digests = []
        for field, text in table.texts("require"):
            if not text.startswith(_DIGEST):
                raise wrong_value(field, f"{_DIGEST} and 96 hexadecimal digits", ascii(text))
            digests.append(table.octets(field, text.removeprefix(_DIGEST), DIGEST_SIZE))
        rule = Require(tuple(digests))
    else:
        rule = Ignore(table.text("ignore"))
    table.finish()
    return rule


def _name_rule(table: Table) -> NameRule:
    rule: NameRule
    if table.one_of("require", "ignore") == "require":
        rule = Require(tuple(text for _, text in table.texts("require")))
    else:
        rule = Ignore(table.text("ignore"))
    table.finish()
    return rule


def _require_bounds(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PolicyError("wrong_value", "out of bounds", field=field, expected=f"{low} to {high} seconds", got=value)


def _read(path: Path, limit: int, code: str, *, field: str | None) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise PolicyError(code, f"cannot read {path}: {error}", field=field) from error
    if len(data) > limit:
        raise PolicyError(code, f"{path} is too large", field=field, expected=f"at most {limit} bytes")
    return data
