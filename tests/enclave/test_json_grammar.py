"""Grammars from JSON schemas: what they admit is valid, and what cannot be guaranteed is refused."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enclave import gbnf
from enclave.generation import InvalidRequest
from enclave.json_grammar import BARE, HERMES, LLAMA, CallStyle, json_grammar, tool_call_grammar
from tests.gbnf import Reader
from tests.json_schemas import REALISTIC, schemas
from vsockrpc.chat import NamedTool, Tool


def reader_of(schema: Any) -> Reader:
    return Reader.of(json_grammar(json.dumps(schema)))


def admits(schema: Any, *texts: str) -> list[bool]:
    reader = reader_of(schema)
    return [reader.admits(text) for text in texts]


def validate(text: str, schema: Any) -> None:
    """Strictly: one reading of the text, and every format that is known."""
    value = json.loads(text, parse_constant=pytest.fail)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a character


def refusal(schema: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        json_grammar(schema if isinstance(schema, str) else json.dumps(schema))
    assert caught.value.code == "invalid_request"
    return str(caught.value)


# --- What is admitted is valid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REALISTIC)
def test_what_a_realistic_schema_s_grammar_admits_is_valid(name: str) -> None:
    schema, documents = REALISTIC[name]
    reader = reader_of(schema)
    for seed in range(60):
        validate(reader.derived(random.Random(seed)), schema)
    for document in documents:
        for form in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
            text = json.dumps(document, ensure_ascii=False, **form)
            validate(text, schema)
            assert reader.admits(text)


@given(schema=schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_what_a_grammar_admits_is_valid(schema: Any, seed: int) -> None:
    try:
        grammar = json_grammar(json.dumps(schema))
    except InvalidRequest as error:
        assert error.code == "invalid_request"
        return
    reader, source = Reader.of(grammar), random.Random(seed)
    for _ in range(5):
        text = reader.derived(source)
        validate(text, schema)
        assert reader.admits(text)
