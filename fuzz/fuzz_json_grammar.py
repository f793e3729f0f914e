"""A foreign JSON schema, which has to become a grammar within its bounds, or be refused."""

from __future__ import annotations

from enclave.generation import InvalidRequest
from enclave.grammar.gbnf import MAX_GRAMMAR_CHARACTERS
from enclave.grammar.json_grammar import BARE, json_grammar, tool_call_grammar
from vsockrpc.chat import Tool


def one_input(data: bytes) -> None:
    schema = data.decode("utf-8", "surrogateescape")
    try:
        grammar = json_grammar(schema)
    except InvalidRequest:
        return
    assert grammar.startswith("root ::= ")
    assert len(grammar) <= MAX_GRAMMAR_CHARACTERS + 64
    assert grammar.isascii()
    try:
        tool_call_grammar((Tool("f", "", schema),), None, BARE, parallel=True)
    except InvalidRequest:
        return


def seeds() -> list[bytes]:
    return [
        b'{"type":"object","properties":{"a":{"type":"string","maxLength":20},"b":{"$ref":"#"}},"required":["a"]}',
        b'{"type":"array","items":{"anyOf":[{"type":"integer","minimum":-3,"exclusiveMaximum":10},{"const":"x"}]}}',
        b'{"type":"array","prefixItems":[{"type":"boolean"},{"type":"null"}],"minItems":1,"maxItems":4,"items":true}',
        b'{"type":"string","pattern":"^(?:[a-z]+|\\\\d{2,3}?)[^\\\\s]$","minLength":1}',
        b'{"type":"string","format":"date-time"}',
        b'{"type":"number","exclusiveMinimum":-0.5,"maximum":12.25}',
        b'{"oneOf":[{"type":"object","properties":{"k":{"const":"a"}},"required":["k"]},{"enum":["a",null,[1,{"b":2}]]}]}',
        b'{"allOf":[{"$ref":"#/$defs/x"},{"required":["q"]}],"$defs":{"x":{"properties":{"q":{}},"type":"object"}}}',
        b'{"type":"object","properties":{"ab":{}},"additionalProperties":{"type":["integer","null"]}}',
        b'{"$schema":"http://json-schema.org/draft-07/schema#","title":"t","default":1}',
        b"true",
    ]
