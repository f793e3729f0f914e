"""Grammars from JSON schemas in llama.cpp's hands: it takes each of them, and admits token by token what they mean."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llama_cpp
import numpy as np
import pytest

from enclave.grammar.json_grammar import HERMES, json_grammar, tool_call_grammar
from enclave.worker.llama import Llama
from enclave.worker.sampler import Candidates
from enclave.worker.scheduler import Row
from tests.engines import engine_settings
from tests.gbnf import Reader
from tests.gguf_files import tiny_model
from tests.json_schemas import REALISTIC
from tests.vocabularies import vocabulary
from vsockrpc.chat import ChatMessage, ChatRequest, Tool

VOCABULARY = Path(__file__).parents[3] / "../shared/vectors/gguf/ggml-vocab-qwen2.gguf"


class Judge:
    """A vocabulary without a model."""

    def __init__(self, vocabulary: Any) -> None:
        self.vocabulary = vocabulary
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.candidates = Candidates(self.size)
        self.end = next(token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocabulary, token))

    def takes(self, grammar: str) -> Any:
        sampler = llama_cpp.llama_sampler_init_grammar(self.vocabulary, grammar.encode(), b"root")
        assert sampler, "llama.cpp refuses the grammar"
        return sampler

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, False)
        return tokens[:count]

    def admits(self, grammar: str, text: str) -> bool:
        """All tokens of ``text``, and then the end."""
        sampler = self.takes(grammar)
        try:
            for token in self.tokens(text):
                if not self.candidates.allows(sampler, token):
                    return False
                llama_cpp.llama_sampler_accept(sampler, token)
            return self.candidates.allows(sampler, self.end)
        finally:
            llama_cpp.llama_sampler_free(sampler)


@pytest.fixture(scope="module", params=["tiny", "qwen2"])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    path = VOCABULARY
    if request.param == "tiny":
        path = tmp_path_factory.mktemp("vocabulary") / "tiny.gguf"
        path.write_bytes(tiny_model().encode())
    elif not path.exists():
        pytest.skip("no ../shared/vectors/gguf/ggml-vocab-qwen2.gguf")
    with vocabulary(path) as opened:
        yield Judge(opened)


@pytest.mark.parametrize("name", REALISTIC)
def test_llama_cpp_admits_what_fits_and_nothing_else(judge: Judge, name: str) -> None:
    schema, documents = REALISTIC[name]
    grammar = json_grammar(json.dumps(schema))
    reader = Reader.of(grammar)
    source = random.Random(7)
    texts = [json.dumps(document, ensure_ascii=False) for document in documents]
    texts += [json.dumps(document, ensure_ascii=False, indent=2) for document in documents]
    texts += [text for _ in range(8) if len(text := reader.derived(source, length=80)) < 400]
    for text in texts:
        assert judge.admits(grammar, text), text
        broken = list(text)
        broken[source.randrange(len(text))] = source.choice('"{}[]:,x0\\é')
        for other in ("".join(broken), text[:-1], text + " ", text + "}"):
            assert judge.admits(grammar, other) == reader.admits(other), other


def test_llama_cpp_takes_the_largest_grammars(judge: Judge) -> None:
    large: list[Any] = [
        {"type": "object", "properties": {f"property {each}": {"type": "string"} for each in range(256)}},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string", "maxLength": 65536}},
            "maxItems": 1024,
        },
        {"type": "string", "format": "email", "maxLength": 40},
        {"enum": [str(each) * 7 for each in range(1000)]},
    ]
    for schema in large:
        llama_cpp.llama_sampler_free(judge.takes(json_grammar(json.dumps(schema))))
    llama_cpp.llama_sampler_free(judge.takes(json_grammar(None)))


def test_llama_cpp_admits_calls_of_tools(judge: Judge) -> None:
    tool = Tool("f", "", '{"type":"object","properties":{"größe":{"type":"integer"}},"required":["größe"]}')
    grammar = tool_call_grammar((tool, Tool("g")), None, HERMES, parallel=True)
    first = '<tool_call>\n{"name": "f", "arguments": {"größe": 1}}\n</tool_call>'
    assert judge.admits(grammar, first)
    assert judge.admits(grammar, first + '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>')
    assert not judge.admits(grammar, first.replace("1", "null"))
    assert not judge.admits(grammar, "Hello")


# --- A model -------------------------------------------------------------------------------------------------------

ASKED: dict[str, tuple[str, Any]] = {
    "person": (
        "Describe a person as JSON.",
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 30},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "mood": {"enum": ["glad", "sad", "größer"]},
            },
            "required": ["name", "age", "mood"],
            "additionalProperties": False,
        },
    ),
    "places": (
        "List places with coordinates as JSON.",
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "lat": {"type": "number", "minimum": -90, "maximum": 90},
                    "seen": {"type": "string", "format": "date"},
                },
                "required": ["lat", "seen"],
            },
            "minItems": 1,
            "maxItems": 3,
        },
    ),
    "shape": (
        "Describe a shape as JSON.",
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
                    "required": ["kind", "radius"],
                },
                {
                    "type": "object",
                    "properties": {"kind": {"const": "square"}, "side": {"type": "integer", "minimum": 1}},
                    "required": ["kind", "side"],
                },
            ]
        },
    ),
    "words": (
        "List words as JSON.",
        {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "minItems": 2, "maxItems": 4},
    ),
    "object": ("Write a short JSON object about a cat.", {"type": "object"}),
}
TOKENS = 160


@pytest.fixture(scope="module")
def llama(smollm2: Path) -> Llama:
    return Llama(str(smollm2), engine_settings(context=512, parallel=1, batch=256), threads=2)


@pytest.mark.model
@pytest.mark.parametrize("name", ASKED)
def test_a_model_s_answers_are_valid_wherever_they_end(llama: Llama, name: str) -> None:
    question, schema = ASKED[name]
    grammar = json_grammar(None if name == "object" else json.dumps(schema))
    ends = 0
    for seed in range(2):
        text = _answer(llama, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", grammar, seed)
        if text is not None:
            ends += 1
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    assert ends or name == "object"


def _answer(llama: Llama, prompt: str, grammar: str, seed: int) -> str | None:
    """None where the answer did not end by itself."""
    request = ChatRequest(messages=(ChatMessage("user", ""),), temperature=1.0, seed=seed)
    tokens = llama.tokenizer("")._tokenize(prompt, special=True)
    sampler = llama.sampler(request, tokens, grammar=grammar)
    llama_cpp.llama_memory_clear(llama._memory, False)
    pieces = bytearray()
    try:
        at, rows = 0, tokens
        for _ in range(TOKENS):
            [logits] = llama.decode((), [Row(0, 0, at, rows, samples=True)]).values()
            at += len(rows)
            token = llama.sample(sampler, np.asarray(logits), is_constrained=True)
            if llama.ends(token):
                return pieces.decode()
            pieces += llama.piece(token)
            rows = [token]
    finally:
        sampler.close()
    return None
