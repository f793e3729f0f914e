"""A key's ARN and its policy, read strictly.

Sources: the grammar of the IAM JSON policy language (IAM User Guide), and "Creating a key policy" (KMS Developer Guide:
32,768 bytes, printable Latin-1, the elements that a key policy must have). What the grammar does not have is refused:
a reader who skips an element that he does not know judges another policy than KMS does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn, TypeVar

from attestation import strict_json
from attestation.errors import EvidenceError, StrongroomError
from attestation.strict_json import Json

T = TypeVar("T")

MAX_POLICY: Final = 32_768
"""Bytes of a key policy."""
MAX_DEPTH: Final = 6
"""Of a policy: document, statements, statement, conditions, keys, values."""
VERSIONS: Final = ("2012-10-17", "2008-10-17")
"""Of the policy language. The older one has no policy variables; it is what a policy without ``Version`` has."""
DEFAULT_VERSION: Final = "2008-10-17"

_CHARACTERS: Final = re.compile(r"[\t\n\r\x20-\xff]*")
_KEY_ARN: Final = re.compile(
    r"arn:aws(?:-[a-z]{1,8}){0,3}:kms:(?:[a-z]{1,16}-){2,3}[0-9]{1,2}:[0-9]{12}:key/[A-Za-z0-9-]{1,128}"
)
_KMS_HOST: Final = (
    r"kms(-fips)?\.{region}\.(amazonaws\.com(\.cn)?|api\.aws)"
    r"|vpce-[a-z0-9-]+\.kms\.{region}\.vpce\.amazonaws\.com(\.cn)?"
)
_CODE: Final = "malformed_key_policy"


class KeyPolicyError(StrongroomError):
    """A key's ARN, policy, grant or metadata that cannot be judged, or a request that nobody could make. Codes:
    ``bad_key_arn``, ``policy_too_large``, ``malformed_key_policy``, ``unknown_element``, ``unknown_operator``,
    ``malformed_key_answer``, ``bad_principal`` and ``bad_action``; of policies that are made here ``same_principal``,
    ``bad_context``, ``no_release``, ``unpinned_register`` and ``unlockable_policy``.
    """

    exit_code = 2


@dataclass(frozen=True, slots=True)
class KeyArn:
    """The full ARN of one key. Nothing else names a key: an alias may lead to another one tomorrow, and a bare key id
    means another key in another account or region. Construction raises KeyPolicyError with ``bad_key_arn``.
    """

    partition: str
    """``aws``, ``aws-cn``, ``aws-us-gov`` and so on."""
    region: str
    """``us-east-1`` and so on."""
    account: str
    """12 digits."""
    key_id: str
    """1 to 128 letters, digits and hyphens; ``mrk-`` begins that of a multi-Region key."""

    def __post_init__(self) -> None:
        if not _KEY_ARN.fullmatch(self.text):
            raise _not_an_arn(self.text)

    @classmethod
    def parse(cls, text: str) -> KeyArn:
        """Raises KeyPolicyError with ``bad_key_arn`` for anything but a full key ARN: aliases, wildcards, key ids, and
        ARNs of other services.
        """
        match text.split(":"):
            case ["arn", partition, "kms", region, account, resource] if resource.startswith("key/"):
                return cls(partition, region, account, resource.removeprefix("key/"))
        raise _not_an_arn(text)

    @property
    def text(self) -> str:
        return f"arn:{self.partition}:kms:{self.region}:{self.account}:key/{self.key_id}"


def is_kms_host(host: str, region: str) -> bool:
    """Whether ``host``, in lower case, is the name of an endpoint of AWS's KMS in ``region``, a VPC endpoint's included
    (AWS General Reference, KMS endpoints; VPC guide).
    """
    return re.fullmatch(_KMS_HOST.format(region=re.escape(region)), host) is not None


def _not_an_arn(text: str) -> KeyPolicyError:
    expected = "arn:aws:kms:REGION:ACCOUNT:key/ID"
    return KeyPolicyError("bad_key_arn", "not the full ARN of a KMS key", expected=expected, got=ascii(text[:200]))


class Effect(Enum):
    """What a statement does where it applies."""

    ALLOW = "Allow"
    DENY = "Deny"


class PrincipalKind(Enum):
    """The kinds of principals; EVERYONE is ``"Principal": "*"``, which means what ``{"AWS": "*"}`` does and more."""

    EVERYONE = "*"
    AWS = "AWS"
    SERVICE = "Service"
    FEDERATED = "Federated"
    CANONICAL_USER = "CanonicalUser"


@dataclass(frozen=True, slots=True)
class Principal:
    """One entry of a Principal element. What an ``AWS`` value may name is judged in ``decision``: KMS shows the unique
    id of a principal that was deleted since, so that a policy with strange ones must still be readable.
    """

    kind: PrincipalKind
    """Under which of them ``value`` stands in the policy."""
    value: str
    """As written: an ARN, 12 digits of an account, the name of a service, ``*``."""


EVERYONE: Final = Principal(PrincipalKind.EVERYONE, "*")


@dataclass(frozen=True, slots=True)
class Condition:
    """One key of one operator (IAM User Guide, "IAM JSON policy elements: Condition")."""

    operator: str
    """``StringEquals`` and so on, as written: with its quantifier and ``IfExists``. IAM may have none such."""
    key: str
    """The condition key, as written; compared without regard to case."""
    values: tuple[str, ...]
    """Alternatives, one or more, as written; numbers and booleans are the texts of JSON."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement (IAM User Guide, "IAM JSON policy elements reference"). Of each pair one member is empty, and the
    other is what was written. Building one with neither or both, or with a condition that stands there twice, in
    whatever case, raises ValueError.
    """

    sid: str | None
    """Its name, for people. None: it has none."""
    effect: Effect
    """What it does to a request that every other part of it matches."""
    principals: tuple[Principal, ...] = ()
    """Whom it is about."""
    not_principals: tuple[Principal, ...] = ()
    """It is about everybody but these."""
    actions: tuple[str, ...] = ()
    """What they do: ``kms:Decrypt`` and so on, with ``*`` and ``?``; compared without regard to case."""
    not_actions: tuple[str, ...] = ()
    """It is about every action but these."""
    resources: tuple[str, ...] = ()
    """On what they do it: ``*``, which in a key policy is the key itself, or patterns of ARNs."""
    not_resources: tuple[str, ...] = ()
    """It is about everything but these."""
    conditions: tuple[Condition, ...] = ()
    """All of them must hold."""

    def __post_init__(self) -> None:
        for element, one, other in (
            ("Principal", self.principals, self.not_principals),
            ("Action", self.actions, self.not_actions),
            ("Resource", self.resources, self.not_resources),
        ):
            if bool(one) == bool(other):
                raise ValueError(f"a statement has either {element} or Not{element}")
        for principals in (self.principals, self.not_principals):
            if EVERYONE in principals and len(principals) > 1:
                raise ValueError('"*" as a principal stands alone')
        operators = dict.fromkeys(condition.operator for condition in self.conditions)
        keys = [(condition.operator.lower(), condition.key.lower()) for condition in self.conditions]
        if len(set(keys)) < len(keys) or _twice(operators) is not None:
            raise ValueError("a condition on one key with one operator stands there twice")

    def _as_json(self) -> dict[str, Json]:
        conditions: dict[str, dict[str, Json]] = {}
        for condition in self.conditions:
            conditions.setdefault(condition.operator, {})[condition.key] = _one_or_list(condition.values)
        elements: dict[str, Json] = {
            "Sid": self.sid,
            "Effect": self.effect.value,
            "Principal": _principals_as_json(self.principals),
            "NotPrincipal": _principals_as_json(self.not_principals),
            "Action": _one_or_list(self.actions),
            "NotAction": _one_or_list(self.not_actions),
            "Resource": _one_or_list(self.resources),
            "NotResource": _one_or_list(self.not_resources),
            "Condition": {**conditions} or None,
        }
        return {element: value for element, value in elements.items() if value is not None}


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """The policy of one key. Building one without a statement, or of an unknown version, raises ValueError."""

    statements: tuple[Statement, ...]
    """One or more, in the order of the policy."""
    version: str = VERSIONS[0]
    """Of the policy language, one of VERSIONS."""
    id: str | None = None
    """The policy's name, for people. None: it has none."""

    def __post_init__(self) -> None:
        if not self.statements or self.version not in VERSIONS:
            raise ValueError(f"a key policy has statements, and version {' or '.join(VERSIONS)}")

    @classmethod
    def parse(cls, text: str) -> KeyPolicy:
        """Reads what GetKeyPolicy answers. Raises KeyPolicyError, with the path of what is wrong:
        ``policy_too_large``, ``malformed_key_policy`` or ``unknown_element``, and never anything else.
        """
        if not _CHARACTERS.fullmatch(text):
            raise KeyPolicyError(_CODE, "the policy has characters that no key policy may have")
        data = text.encode()
        if len(data) > MAX_POLICY:
            raise KeyPolicyError(
                "policy_too_large", "the key policy is too large", expected=f"at most {MAX_POLICY} bytes", got=len(data)
            )
        try:
            document = strict_json.decode_foreign(data, code=_CODE, max_depth=MAX_DEPTH)
        except EvidenceError as error:
            raise KeyPolicyError(_CODE, f"the policy: {ascii(error.message)[1:-1]}") from error
        fields = _Fields(document, "policy", {"Version", "Id", "Statement"})
        statements = fields.value("Statement")
        listed = statements if isinstance(statements, list) else [statements]
        return cls(
            statements=tuple(_statement(each, f"Statement[{index}]") for index, each in enumerate(listed))
            or _refuse("Statement", "at least one", "none"),
            version=fields.one_of("Version", VERSIONS, DEFAULT_VERSION),
            id=fields.text("Id"),
        )

    def encode(self) -> str:
        """The policy as JSON for PutKeyPolicy, every element at its place; indented while it fits. Raises
        KeyPolicyError with ``policy_too_large``.
        """
        document: dict[str, Json] = {"Version": self.version}
        if self.id is not None:
            document["Id"] = self.id
        document["Statement"] = [statement._as_json() for statement in self.statements]
        text = json.dumps(document, indent=2, ensure_ascii=False)
        if len(text.encode()) > MAX_POLICY:
            text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        if (size := len(text.encode())) > MAX_POLICY:
            raise KeyPolicyError(
                "policy_too_large", "the key policy is too large", expected=f"at most {MAX_POLICY} bytes", got=size
            )
        return text


def _one_or_list(values: tuple[str, ...]) -> Json:
    match values:
        case ():
            return None
        case (value,):
            return value
        case _:
            return list(values)


def _principals_as_json(principals: tuple[Principal, ...]) -> Json:
    if principals == (EVERYONE,):
        return "*"
    kinds = {principal.kind: None for principal in principals}
    return {
        kind.value: _one_or_list(tuple(principal.value for principal in principals if principal.kind is kind))
        for kind in kinds
    } or None


def _refuse(path: str, expected: str, got: Json) -> NoReturn:
    text = got if isinstance(got, str) else json.dumps(got)
    raise KeyPolicyError(_CODE, f"{path}: not of the policy grammar", expected=expected, got=ascii(text[:100]))


class _Fields:
    """The members of a JSON object at ``path``, every one of them among ``known``."""

    def __init__(self, value: Json, path: str, known: set[str] | None = None) -> None:
        if not isinstance(value, dict) or not value:
            _refuse(path, "an object that is not empty", value)
        if known is not None and (unknown := value.keys() - known):
            raise KeyPolicyError(
                "unknown_element",
                f"{path}: an element that no key policy has",
                expected=" ".join(sorted(known)),
                got=ascii(min(unknown)[:100]),
            )
        self.members = value
        self._path = path

    def value(self, name: str) -> Json:
        if name not in self.members:
            _refuse(self._path, f"an element {name}", "none")
        return self.members[name]

    def text(self, name: str) -> str | None:
        return _text(self.members[name], f"{self._path}.{name}") if name in self.members else None

    def one_of(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.members.get(name, default)
        if value not in choices or not isinstance(value, str):
            _refuse(f"{self._path}.{name}", " or ".join(choices), value)
        return value

    def either(self, name: str, read: Callable[[Json, str], tuple[T, ...]]) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """What stands under ``name`` and under ``Not`` + name, of which exactly one is there."""
        present = [each for each in (name, f"Not{name}") if each in self.members]
        if len(present) != 1:
            _refuse(self._path, f"either {name} or Not{name}", " and ".join(present) or "none")
        values = read(self.members[present[0]], f"{self._path}.{present[0]}")
        return (values, ()) if present == [name] else ((), values)


def _statement(value: Json, path: str) -> Statement:
    pairs = {f"{prefix}{name}" for prefix in ("", "Not") for name in ("Principal", "Action", "Resource")}
    fields = _Fields(value, path, {"Sid", "Effect", "Condition", *pairs})
    principals, not_principals = fields.either("Principal", _principals)
    actions, not_actions = fields.either("Action", _texts)
    resources, not_resources = fields.either("Resource", _texts)
    return Statement(
        sid=fields.text("Sid"),
        effect=Effect(fields.one_of("Effect", tuple(effect.value for effect in Effect))),
        principals=principals,
        not_principals=not_principals,
        actions=actions,
        not_actions=not_actions,
        resources=resources,
        not_resources=not_resources,
        conditions=tuple(_conditions(fields.members["Condition"], f"{path}.Condition"))
        if "Condition" in fields.members
        else (),
    )


def _principals(value: Json, path: str) -> tuple[Principal, ...]:
    if value == "*":
        return (EVERYONE,)
    kinds = {kind.value: kind for kind in PrincipalKind if kind is not PrincipalKind.EVERYONE}
    fields = _Fields(value, path, set(kinds))
    return tuple(
        Principal(kinds[name], each)
        for name, member in fields.members.items()
        for each in _texts(member, f"{path}.{name}")
    )


def _conditions(value: Json, path: str) -> Iterator[Condition]:
    for operator, keys in _spelled_once(value, path).items():
        where = f"{path}.{_text(operator, path)}"
        for key, values in _spelled_once(keys, where).items():
            yield Condition(operator, _text(key, where), _texts(values, f"{where}.{key}", _scalar))


def _spelled_once(value: Json, path: str) -> dict[str, Json]:
    """The members of an object whose names differ by more than case. AWS compares the keys of conditions without
    regard to case, and says nowhere whether of two spellings both count, or the last.
    """
    members = _Fields(value, path).members
    if (twice := _twice(members)) is not None:
        _refuse(path, "each name in one spelling", twice)
    return members


def _twice(names: Iterable[str]) -> str | None:
    """A name that was there before in other letters, if there is one."""
    found = set[str]()
    for name in names:
        if name.lower() in found:
            return name
        found.add(name.lower())
    return None


def _texts(value: Json, path: str, read: Callable[[Json, str], str] | None = None) -> tuple[str, ...]:
    """One text, or a list of at least one: an empty list would say nothing, or everything behind a negation."""
    listed = value if isinstance(value, list) else [value]
    return tuple((read or _text)(each, path) for each in listed) or _refuse(path, "at least one value", "none")


def _text(value: Json, path: str) -> str:
    # An escape of JSON can write what the document itself may not have.
    if not isinstance(value, str) or not _CHARACTERS.fullmatch(value):
        _refuse(path, "a text of printable characters", value)
    return value


def _scalar(value: Json, path: str) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float) else _text(value, path)
