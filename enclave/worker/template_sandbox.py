"""Where chat templates run: Jinja's sandbox, with bounds on what an expression can make out of little, and with what
templates expect to be there (transformers, ``apply_chat_template``).

What goes wrong inside comes out as the exception that it is; :mod:`enclave.worker.prompt` gives it a type.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, Final, NoReturn

import jinja2
import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RANGE: Final = 4096
MAX_FACTOR: Final = 4096
"""Elements or characters that a multiplication may make."""

# A confined process imports nothing any more, and Jinja imports these when they are first needed: for a template's
# string literals, its extensions, and its first failure.
codecs.lookup("unicode-escape")
_LATE_IMPORTS: Final = (jinja2.ext, jinja2.debug)


class Refusal(Exception):
    """The template called ``raise_exception``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def compile_template(source: str, *, to_json: Callable[..., str]) -> jinja2.Template:
    """``to_json`` is the filter ``tojson``. Raises whatever Jinja and Python's compiler raise."""
    # The settings are those under which chat templates are written.
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals.pop("lipsum")
    environment.globals.update(range=_bounded_range, raise_exception=_refuse)
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def _refuse(reason: object) -> NoReturn:
    raise Refusal(str(reason))


def _bounded_range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"a range of more than {MAX_RANGE}")
    return numbers


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` tells those who train which text is the model's. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where an expression cannot make much out of little either."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            size = _repeated(left, right) if operator == "*" else MAX_FACTOR + 1
            if size > MAX_FACTOR:
                raise SecurityError(f"{operator} would make too much")
        elif operator == "**" and (abs(left) > MAX_FACTOR or not -64 <= right <= 64):
            raise SecurityError("** would make too much")
        apply: Callable[[Any, Any], Any] = self.binop_table[operator]
        return apply(left, right)


def _repeated(left: Any, right: Any) -> int:
    """Elements of ``text * count`` or ``list * count``, either way round."""
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    if not isinstance(count, int) or not isinstance(sequence, str | list | tuple):
        return MAX_FACTOR + 1
    return len(sequence) * count
