"""The rules of an Appraisal Policy, as values: what may be said of one register, digest, field or name.

A rule requires, forbids, or ignores with a written reason. There is no fourth way, and no rule is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeAlias, TypeVar

from attestation.document import MAX_FIELD
from attestation.envelope import CONTEXT_NAME, MAX_VERSION, EnvelopeHeader
from attestation.errors import PolicyError
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ModelManifest
from attestation.reference import DIGEST_SIZE, ZERO_PCR, PcrSet, once_extended
from attestation.releases import ReleaseHistory
from attestation.strict_toml import printable, wrong_value

T = TypeVar("T", bytes, str)


@dataclass(frozen=True, slots=True)
class Require(Generic[T]):
    """One of these values and no other. Raises PolicyError for an empty list, and for a text that is not printable."""

    values: tuple[T, ...]
    """One or more: bytes as they stand in the document (a register's 48, a digest's 48), or texts of 1 to 500 printable
    characters.
    """

    def __post_init__(self) -> None:
        _require_some("require", self.values)
        for value in self.values:
            if isinstance(value, str):
                printable("require", value)


@dataclass(frozen=True, slots=True)
class Forbid:
    """Nothing may be there: a register is zero, a field absent."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """Any value, for the reason that stands in every report. Raises PolicyError for a reason that says nothing."""

    reason: str
    """1 to 500 printable characters on one line."""

    def __post_init__(self) -> None:
        printable("ignore", self.reason)


@dataclass(frozen=True, slots=True)
class Measures:
    """The register was extended once, from zero, with one of these texts (UTF-8).

    So AWS fills PCR3 with the ARN of the parent's IAM role, and PCR4 with its instance id. Raises PolicyError for an
    empty list, and for a text that is not printable.
    """

    texts: tuple[str, ...]
    """One or more, each of 1 to 500 printable characters."""

    def __post_init__(self) -> None:
        _require_some("measures", self.texts)
        for text in self.texts:
            printable("measures", text)

    @property
    def values(self) -> tuple[bytes, ...]:
        """The register's values, 48 bytes each."""
        return tuple(once_extended(text.encode()) for text in self.texts)


@dataclass(frozen=True, slots=True)
class Released:
    """One of the digests that the matched release names beside its image."""


@dataclass(frozen=True, slots=True)
class Manifests:
    """One of these model manifests, if its ``version`` is at least ``minimum_version``.

    Raises PolicyError for an empty list, and when every manifest is older than that.
    """

    files: tuple[tuple[str, ModelManifest], ...]
    """Each manifest behind the name of its file, relative to the policy's folder. Those that are older than
    ``minimum_version`` may stand here, and are not accepted.
    """
    minimum_version: int
    """In the publisher's own count of versions."""

    def __post_init__(self) -> None:
        _require_some("manifests", self.files)
        newest = max(manifest.version for _, manifest in self.files)
        if newest < self.minimum_version:
            raise PolicyError(
                "contradiction",
                "every manifest is older than the minimum version: this rule accepts nothing",
                field="minimum_version",
                expected=f"at most {newest}",
                got=self.minimum_version,
            )

    @property
    def accepted(self) -> tuple[tuple[str, ModelManifest], ...]:
        """Those that are not older than the minimum version. Never empty."""
        return tuple((name, manifest) for name, manifest in self.files if manifest.version >= self.minimum_version)


RegisterRule: TypeAlias = Require[bytes] | Measures | Forbid | Ignore
"""What may be said of one register."""
FieldRule: TypeAlias = Require[bytes] | Forbid | Ignore
"""What may be said of what a bare document carries."""
DigestRule: TypeAlias = Require[bytes] | Released | Ignore
"""What may be said of a configuration."""
ModelRule: TypeAlias = DigestRule | Manifests
"""What may be said of a model."""
NameRule: TypeAlias = Require[str] | Ignore
"""What may be said of a module's name."""


@dataclass(frozen=True, slots=True)
class ChannelBinding:
    """The document opens a Strongroom channel: it carries no key of its own, and its ``user_data`` binds the commitment
    beside it (PROTOCOL.md section 2).
    """


@dataclass(frozen=True, slots=True)
class DocumentBinding:
    """A bare document, of any Nitro enclave: what it carries is judged by these rules.

    Raises PolicyError for a value that no document can carry.
    """

    public_key: FieldRule
    """For the document's ``public_key``: a key that the enclave has made, as it encodes it."""
    user_data: FieldRule
    """For its ``user_data``: whatever else the enclave has signed."""

    def __post_init__(self) -> None:
        for name, rule in (("public_key", self.public_key), ("user_data", self.user_data)):
            for value in rule.values if isinstance(rule, Require) else ():
                if len(value) > MAX_FIELD:
                    raise PolicyError(
                        "wrong_value",
                        "longer than any document's field",
                        field=f"binding.{name}",
                        expected=f"at most {MAX_FIELD} bytes",
                        got=f"{len(value)} bytes",
                    )


Binding: TypeAlias = ChannelBinding | DocumentBinding
"""What a policy judges: channels, or bare documents."""


@dataclass(frozen=True, slots=True)
class Release:
    """A named image, and what may run in it. Its registers are compared together, so that no two releases can be mixed.

    ``models`` (digests of manifests) and ``configurations`` (digests) are asked for by the rule :class:`Released`
    alone, which no empty tuple satisfies. Raises PolicyError for a register of zero, which is what an enclave in debug
    mode reports, and for digests that are not 48 bytes.
    """

    name: str
    """The policy's own, 1 to 500 printable characters: results and reports show it."""
    pcrs: PcrSet
    """What a document's registers must be, all of them."""
    models: tuple[bytes, ...] = ()
    configurations: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        printable("release.name", self.name)
        for index, register in self.pcrs.as_registers().items():
            if register == ZERO_PCR:
                raise PolicyError(
                    "contradiction",
                    "zero is what an enclave in debug mode reports, and measures nothing",
                    field=f"release.pcr{index}",
                    expected="a measurement",
                    got="zero",
                )
        for digest in (*self.models, *self.configurations):
            if len(digest) != DIGEST_SIZE:
                raise PolicyError(
                    "wrong_value", "not a digest", field="release", expected=f"{DIGEST_SIZE} bytes", got=len(digest)
                )


@dataclass(frozen=True, slots=True)
class ReleasesInForce:
    """What was accepted at some time, and from when to when: without end where a policy itself says it."""

    releases: tuple[Release, ...]
    """None, where nothing had been stated yet."""
    issued: datetime | None = None
    """From when on they count, UTC."""
    expires: datetime | None = None
    """From when on they count no more, UTC."""


@dataclass(frozen=True, slots=True)
class SignedReleases:
    """The releases of a history that a publisher has signed, and where a policy says to find it.

    Raises PolicyError when everything in it has been taken back.
    """

    file: str
    """The history's name, relative to the policy's folder."""
    minimum_sequence: int
    """The number of entries that the history has at least: what a client goes by that has never seen it."""
    history: ReleaseHistory
    """Verified when the policy was read; its last entry counts."""

    def __post_init__(self) -> None:
        if not self.history.current.releases:
            raise PolicyError(
                "no_release", "the publisher has taken every release back", field="releases.history", got="none"
            )

    def in_force(self, at: datetime | None) -> ReleasesInForce:
        """By the last statement; or, for what is archived, by the last that had been issued ``at`` that time."""
        statements = [entry.statement for entry in self.history.entries]
        if at is not None:
            statements = [statement for statement in statements if statement.issued <= at]
        if not statements:
            return ReleasesInForce(())
        releases = tuple(
            Release(image.name, image.pcrs, image.models, image.configurations) for image in statements[-1].releases
        )
        return ReleasesInForce(releases, statements[-1].issued, statements[-1].expires)


@dataclass(frozen=True, slots=True)
class WrappedKeyFile:
    """A wrapped key that is in use: an envelope, or the beginning of one. Raises PolicyError for a name that is not
    printable.
    """

    file: str
    """Relative to the policy's folder, 1 to 500 printable characters."""
    header: EnvelopeHeader | None
    """None while there is no such file: the model is still to be encrypted, and no prompt is released."""

    def __post_init__(self) -> None:
        printable("wrapped_key.file", self.file)


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What is accepted of a KMS key that protects a model or prompts. Raises PolicyError for values out of bounds, for
    an administrator that is no ARN, and for one named twice.
    """

    key: KeyArn
    """Which key, in which account and region."""
    context: str
    """The name in the encryption context, 1 to 64 of ``a-z 0-9 . _ -``."""
    minimum_version: int
    """Of wrapped keys, 1 to 2^32 - 1; older ones are refused."""
    administrators: tuple[str, ...]
    """ARNs of those who may change what the key releases to. Empty: nobody may, the key's policy is locked."""
    wrapped_key: WrappedKeyFile | Ignore | None
    """Of a model, whose wrapped key lasts. None for prompts: each has its own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(CONTEXT_NAME, self.context):
            raise wrong_value("context", "1 to 64 of a-z 0-9 . _ -", ascii(self.context[:80]))
        if not 1 <= self.minimum_version <= MAX_VERSION:
            raise wrong_value("minimum_version", f"1 to {MAX_VERSION}", self.minimum_version)
        for position, arn in enumerate(self.administrators):
            if not _PRINCIPAL.fullmatch(arn):
                raise wrong_value(
                    f"administrators[{position}]", "the ARN of one principal, without wildcards", ascii(arn)
                )
            if arn in self.administrators[:position]:
                raise PolicyError("contradiction", "named twice", field=f"administrators[{position}]", got=arn)


_PRINCIPAL = re.compile(r"arn:aws[a-z-]*:(?:iam|sts)::[0-9]{12}:[!-)+->@-~]+")


def _require_some(field: str, values: tuple[object, ...]) -> None:
    if not values:
        raise PolicyError("empty_list", "an empty list accepts nothing", field=field)
