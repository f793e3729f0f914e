"""docs/openai.md has every parameter of the gateway, with its bounds, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from strongroom.openai_answers import LEAST_LOGPROB, count_of
from strongroom.openai_api import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    COMPLETION_TOKENS,
    MAX_CACHE_KEY_CHARACTERS,
    NEUTRAL,
    REASONING_TOKENS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    ApiError,
    Call,
    parse_chat,
    parse_completion,
)
from vsockrpc import chat

PAGE = (Path(__file__).parents[2] / "docs/openai.md").read_text()
ROWS = {
    name: (of, bounds, does, other)
    for name, of, bounds, does, other in re.findall(
        r"^\| `(\w+)` \| (chats|completions|both) \| (.+?) \| (.+?) \| (.*?) ?\|$", PAGE, re.MULTILINE
    )
}
PARSERS: Mapping[str, tuple[Callable[[object], Call[Any]], dict[str, object]]] = {
    "chats": (parse_chat, {"messages": [{"role": "user", "content": "hello"}]}),
    "completions": (parse_completion, {"prompt": "hello"}),
}
NUMBERS = {
    name: found
    for name, (_, bounds, _, _) in ROWS.items()
    if (found := re.fullmatch(r"(above |0, or )?(-?[\d.]+) to ([\d,]+)", bounds))
}


def of_both(name: str) -> list[str]:
    of = ROWS[name][0]
    return ["chats", "completions"] if of == "both" else [of]


def accepts(kind: str, fields: dict[str, object]) -> bool:
    parse, body = PARSERS[kind]
    try:
        parse(body | fields)
    except ApiError as error:
        if error.param not in fields:
            raise
        return False
    return True


def number(text: str) -> int | float:
    plain = text.replace(",", "")
    return float(plain) if "." in plain else int(plain)


@pytest.mark.parametrize(("kind", "served"), [("chats", CHAT_PARAMETERS), ("completions", COMPLETION_PARAMETERS)])
def test_every_parameter_is_told_and_no_other(kind: str, served: frozenset[str]) -> None:
    assert {name for name in ROWS if kind in of_both(name)} == served


def test_the_bounds_of_numbers_are_read() -> None:
    """Else an empty list would pass."""
    assert len(NUMBERS) == 13


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_are_those_of_the_code(name: str) -> None:
    beside_them, low, high = NUMBERS[name].groups()
    beside = {"logprobs": True} if name == "top_logprobs" else {}
    for kind in of_both(name):
        assert accepts(kind, {**beside, name: number(high)})
        assert not accepts(kind, {**beside, name: number(high) + 1})
        assert accepts(kind, {**beside, name: number(low)}) is (beside_them != "above ")
        assert not accepts(kind, {**beside, name: number(low) - 1})
        if "." in low:
            assert not accepts(kind, {**beside, name: number(low) * 0.99})
            assert accepts(kind, {**beside, name: 0}) is (beside_them == "0, or ")


def test_bounds_in_words() -> None:
    assert accepts("completions", {"logprobs": 20})
    assert not accepts("completions", {"logprobs": 21})
    for text, numbers in {
        ROWS["messages"][1]: [1, chat.MAX_CHAT_MESSAGES],
        ROWS["stop"][1]: [chat.MAX_STOPS, chat.MAX_STOP_CHARACTERS],
        ROWS["logit_bias"][1]: [chat.MAX_BIASES],
        ROWS["logit_bias"][2]: [-chat.MAX_BIAS, chat.MAX_BIAS],
        ROWS["tools"][1]: [chat.MAX_TOOLS],
        ROWS["tools"][2]: [chat.MAX_SCHEMA_CHARACTERS, chat.MAX_DESCRIPTION_CHARACTERS],
        ROWS["response_format"][2]: [chat.MAX_SCHEMA_CHARACTERS],
        ROWS["prompt_cache_key"][1]: [MAX_CACHE_KEY_CHARACTERS],
        ROWS["max_tokens"][3]: [COMPLETION_TOKENS, 0],
    }.items():
        assert [number(found) for found in re.findall(r"-?\d[\d,]*", text)] == numbers, text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("reasoning_effort", [*REASONING_TOKENS]),
        ("truncation", sorted(chat.TRUNCATIONS, reverse=True)),
        ("tool_choice", [*chat.TOOL_MODES]),
    ],
)
def test_the_values_of_a_parameter(name: str, values: list[str]) -> None:
    assert re.findall(r"`(\w+)`", ROWS[name][1]) == values


def test_the_budgets_of_efforts() -> None:
    told = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert {effort: number(tokens) for effort, tokens in told} == dict(REASONING_TOKENS)


def listed(beginning: str) -> set[str]:
    [line] = re.findall(rf"^{beginning}: (.+)$", PAGE, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", line))


def test_what_is_not_served_is_told() -> None:
    assert listed("Without effect, and not passed on") == WITHOUT_EFFECT
    assert listed("Not served, and accepted where the value asks for nothing") == NEUTRAL.keys()
    assert listed("Not served") == UNSUPPORTED - NEUTRAL.keys()


def test_numbers_of_answers() -> None:
    assert f"{count_of(29)}".replace("'", '"') in PAGE
    assert f"has {LEAST_LOGPROB:g}." in PAGE
