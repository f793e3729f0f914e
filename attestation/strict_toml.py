"""TOML read strictly: each field by its type, no field unknown, every error with the field's path.

For the policy, whose author is a person: an error says which field, what was expected there and what was got.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping

from attestation.errors import PolicyError

MAX_TEXT = 500
"""Characters of one text."""


MAX_KEY_PARTS = 16
"""Dots of a dotted key. The parser's work grows with their square and more."""

_STRING_OR_COMMENT = re.compile(r"""(?s)"(?:[^"\\\n]++|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""")


def read(text: str) -> Table:
    """The whole of a TOML ``text``. Raises PolicyError ``malformed_policy``, never anything else."""
    try:
        if any(line.count(".") > MAX_KEY_PARTS for line in _STRING_OR_COMMENT.sub("", text).split("\n")):
            raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts")
        return Table("", tomllib.loads(text))
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise PolicyError("malformed_policy", f"not TOML: {error}") from error


class Table:
    """One table of the file. Each field is taken by its type; what nobody took is unknown, and an error.

    Whatever takes a field, and :meth:`finish`, raises PolicyError with the field's path.
    """

    def __init__(self, path: str, values: Mapping[str, object]) -> None:
        self._path = path
        self._values = dict(values)
        self._taken: set[str] = set()

    def field(self, key: str) -> str:
        safe = ascii(key)[1:-1]
        return f"{self._path}.{safe}" if self._path else safe

    def has(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def finish(self) -> None:
        for key in self._values:
            if key not in self._taken:
                raise PolicyError("unknown_field", "no such field", field=self.field(key))

    def one_of(self, *keys: str) -> str:
        """Which one of ``keys`` is there: none is a missing field, two are a contradiction."""
        present = [key for key in keys if key in self._values]
        if len(present) == 1:
            return present[0]
        raise PolicyError(
            "contradiction" if present else "missing_field",
            "exactly one of these must be given",
            field=self._path,
            expected=" or ".join(keys),
            got=" and ".join(present) or next(filter(None, map(self._like, keys)), "none"),
        )

    def table(self, key: str) -> Table:
        self._require(key, f"there is no such table: add [{self.field(key)}]")
        value = self._take(key)
        if not isinstance(value, dict):
            raise wrong_value(self.field(key), "a table", type(value).__name__)
        return Table(self.field(key), value)

    def tables(self, key: str) -> list[Table]:
        self._require(key, f"there is no such table: add [[{self.field(key)}]], one or more")
        value = self._take(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise wrong_value(self.field(key), "tables", type(value).__name__)
        return [Table(f"{self.field(key)}[{position}]", item) for position, item in enumerate(value)]

    def integer(self, key: str) -> int:
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong_value(self.field(key), "an integer", type(value).__name__)
        if not -(1 << 63) <= value < 1 << 63:  # Python reads more digits than it prints
            raise wrong_value(self.field(key), "an integer of 64 bits", "more")
        return value

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if not isinstance(value, bool):
            raise wrong_value(self.field(key), "true or false", type(value).__name__)
        return value

    def true(self, key: str) -> None:
        if self._take(key) is not True:
            raise wrong_value(self.field(key), "true", type(self._values[key]).__name__)

    def text(self, key: str, *, longest: int = MAX_TEXT) -> str:
        return printable(self.field(key), self._take(key), longest)

    def texts(self, key: str, *, longest: int = MAX_TEXT) -> list[tuple[str, str]]:
        """The texts of a list, each with its field's path and of at most ``longest`` characters."""
        value = self._take(key)
        if not isinstance(value, list):
            raise wrong_value(self.field(key), "a list of texts", type(value).__name__)
        if not value:
            raise PolicyError("empty_list", "an empty list accepts nothing", field=self.field(key))
        items = [(f"{self.field(key)}[{position}]", item) for position, item in enumerate(value)]
        return [(field, printable(field, item, longest)) for field, item in items]

    def hexadecimal(self, key: str, size: int) -> bytes:
        return self.octets(self.field(key), self.text(key), size)

    @staticmethod
    def octets(field: str, text: str, size: int) -> bytes:
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * size}}}", text):
            raise wrong_value(field, f"{2 * size} hexadecimal digits", ascii(text))
        return bytes.fromhex(text)

    def _take(self, key: str) -> object:
        self._require(key, "every field must be given")
        self._taken.add(key)
        return self._values[key]

    def _require(self, key: str, message: str) -> None:
        if key not in self._values:
            like = self._like(key)
            raise PolicyError("missing_field", message, field=self.field(key), expected=key, got=like or "none")

    def _like(self, key: str) -> str | None:
        """A field that nobody has asked for and that may be ``key`` with a slip in it; safe to print."""
        others = [other for other in self._values if other not in self._taken and len(other) <= 2 * len(key)]
        like = difflib.get_close_matches(key, others, n=1, cutoff=0.8)
        return f"{ascii(like[0])[1:-1]} (a slip?)" if like else None


def printable(field: str, value: object, longest: int = MAX_TEXT) -> str:
    """``value`` as a text that says something and is safe to print. Raises PolicyError."""
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.strip() or not value.isprintable():
        got = ascii(value) if isinstance(value, str) else type(value).__name__
        raise wrong_value(field, f"a text of one line, 1 to {longest} characters", got)
    return value


def missing(field: str) -> PolicyError:
    return PolicyError("missing_field", "every field must be given", field=field, got="none")


def wrong_value(field: str, expected: str, got: object) -> PolicyError:
    return PolicyError("wrong_value", "not a value for this field", field=field, expected=expected, got=got)
