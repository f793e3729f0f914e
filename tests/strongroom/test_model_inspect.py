"""``strongroom model inspect``: what it says of a model, of one that is broken, and of one that nobody can read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest

from attestation.envelope import MAGIC
from attestation.gguf import read_header
from attestation.model_memory import KvType, ModelShape, Work, engine_memory, kernel_beside
from tests.gguf_files import ARRAY, I32, TEXT, U32, Gguf, grouped, tiny_model, with_entry, without
from tests.terminal import Ran, Terminal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspected(strongroom: Terminal, model: Gguf | bytes, *options: str) -> Ran:
    Path("model.gguf").write_bytes(model if isinstance(model, bytes) else model.encode())
    return strongroom("model", "inspect", "model.gguf", *options)


@pytest.mark.usefixtures("folder")
def test_a_model_is_described_and_accounted(strongroom: Terminal) -> None:
    ran = inspected(strongroom, grouped(), "--context", "300", "--parallel", "2")
    assert (ran.code, ran.err) == (0, "")
    lines = {line[:18].strip(): line[18:].strip() for line in ran.out.splitlines()}
    assert lines["name"] == "tiny"
    assert lines["architecture"] == "llama"
    assert lines["parameters"].endswith(f"M in {len(grouped().tensors)} tensors")
    assert lines["Q4_K"].endswith("12 of the tensors")
    assert lines["F32"].endswith("6 of the tensors")
    assert lines["trained context"] == "4096 tokens"
    assert lines["tokenizer"] == "262 tokens, 1 merges"
    assert lines["chat template"].endswith(" characters")
    assert lines["family"] == "unknown: plain text, but for what its chat template shows"
    assert lines["reasoning"] == "none"
    assert lines["tool calls"] == "only where tool_choice asks for one"
    assert lines["end of text"] == "258 <|end|>"
    assert lines["key-value cache"] == "1 MiB  2 x 512 tokens, 2 layers, f16"
    assert lines["the engine"].endswith("resident at its peak, weights included")
    assert lines["an enclave"].endswith("its image comes on top (strongroom image size)")
    assert max(map(len, ran.out.splitlines())) <= 120


@pytest.mark.usefixtures("folder")
def test_the_same_for_programs(strongroom: Terminal) -> None:
    options = ("--context", "1024", "--cells", "2000", "--kv-type", "q8_0", "--no-repack", "--batch", "64", "--json")
    said = inspected(strongroom, grouped(), *options).json
    header = read_header(BytesIO(grouped().encode()))
    memory = engine_memory(ModelShape.of(header), Work(1024, 4, 2000, kv_type=KvType.Q8_0, repack=False, batch=64))
    assert said["memory"] == {
        "parts": [{"name": part.name, "bytes": part.size, "rule": part.rule} for part in memory.parts],
        "engine_bytes": memory.resident,
        "engine_and_server_bytes": memory.total,
        "enclave_bytes_beside_its_image": memory.total + kernel_beside(memory.total).size,
    }
    assert (said["name"], said["architecture"], said["memory_unknown"]) == ("tiny", "llama", None)
    assert (said["tokens"], said["merges"], said["trained_context"]) == (262, 1, 4096)
    assert (said["chat_template"], said["file_bytes"]) == (True, header.size)
    assert said["end_tokens"] == [{"kind": "eos", "id": 258, "text": "<|end|>"}]
    assert sum(each["parameters"] for each in said["tensors"]) == said["parameters"]
    assert [each["bytes"] for each in said["tensors"]] == sorted(
        (each["bytes"] for each in said["tensors"]), reverse=True
    )
    assert sum(each["count"] for each in said["tensors"]) == len(header.tensors)


@pytest.mark.usefixtures("folder")
def test_how_its_answers_are_read_is_told(strongroom: Terminal) -> None:
    unknown = inspected(strongroom, tiny_model(), "--json").json
    assert [unknown[name] for name in ("family", "reasons", "tool_calls")] == ["unknown", False, None]
    model = with_entry(tiny_model(chat_template="<think> <tool_call>"), "general.architecture", TEXT, "qwen3")
    said = inspected(strongroom, model, "--json").json
    assert [said[name] for name in ("family", "reasons", "tool_calls")] == ["qwen3", True, "hermes"]
    lines = inspected(strongroom, model).out.splitlines()
    for line in (
        "family            qwen3",
        "reasoning         between <think> and </think>",
        "tool calls        in the way of hermes",
    ):
        assert line in lines


@pytest.mark.usefixtures("folder")
def test_every_end_token_is_named(strongroom: Terminal) -> None:
    model = with_entry(
        with_entry(tiny_model(), "tokenizer.ggml.eot_token_id", U32, 261), "tokenizer.ggml.eom_token_id", U32, 999
    )
    out = inspected(strongroom, model).out
    assert "end of text       258 <|end|>\nend of turn       261 <|assistant|>\nend of message    999\n" in out
    said = inspected(strongroom, model, "--json").json["end_tokens"]
    assert [(each["kind"], each["text"]) for each in said] == [
        ("eos", "<|end|>"),
        ("eot", "<|assistant|>"),
        ("eom", None),
    ]


@pytest.mark.usefixtures("folder")
def test_what_a_file_does_not_say_is_said(strongroom: Terminal) -> None:
    model = Gguf()
    ran = inspected(strongroom, model)
    assert ran.code == 0
    for line in (
        "architecture      not said",
        "parameters        0 in 0 tensors",
        "trained context   not said",
        "tokenizer         0 tokens, 0 merges",
        "chat template     none",
        "end tokens        not said",
    ):
        assert line in ran.out.splitlines()
    assert "its memory cannot be told: " in ran.out
    assert "unknown_shape" in ran.out
    said = inspected(strongroom, model, "--json").json
    assert (said["memory"], said["memory_unknown"]["code"]) == (None, "unknown_shape")


@pytest.mark.usefixtures("folder")
def test_what_a_file_says_is_one_line_without_control_characters(strongroom: Terminal) -> None:
    model = with_entry(tiny_model(), "general.name", TEXT, "\x1b[2Jname\n" + "x" * 200)
    (line,) = (line for line in inspected(strongroom, model).out.splitlines() if line.startswith("name"))
    assert line == f"name              ?[2Jname?{'x' * 70}…"
    model = with_entry(tiny_model(), "tokenizer.ggml.eos_token_id", U32, 0)
    assert "end of text       0 " in inspected(strongroom, model).out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("tokenizer.ggml.eos_token_id", TEXT, "end"),
        ("tokenizer.ggml.eos_token_id", I32, -1),
        ("tokenizer.ggml.tokens", ARRAY, (I32, [1, 2])),
        ("general.architecture", TEXT, "another"),
        ("llama.context_length", TEXT, "long"),
    ],
)
def test_whatever_a_file_says_it_is_shown(
    strongroom: Terminal, key: str, kind: int, value: str | int | tuple[int, list[int]]
) -> None:
    for options in ((), ("--json",)):
        assert inspected(strongroom, with_entry(tiny_model(), key, kind, value), *options).code == 0


@pytest.mark.usefixtures("folder")
def test_a_broken_file_says_what_is_wrong(strongroom: Terminal) -> None:
    ran = inspected(strongroom, tiny_model().encode()[:-4096])
    assert (ran.code, ran.out) == (2, "")
    assert "the file ends before tensor" in ran.err
    assert "[truncated_gguf]; expected" in ran.err
    assert inspected(strongroom, b"PK\x03\x04", "--json").json["error"]["code"] == "not_gguf"


@pytest.mark.usefixtures("folder")
def test_an_encrypted_model_says_so(strongroom: Terminal) -> None:
    ran = inspected(strongroom, MAGIC + bytes(1000))
    assert (ran.code, ran.out) == (2, "")
    assert "model.gguf is encrypted" in ran.err
    assert inspected(strongroom, MAGIC + bytes(1000), "--json").json["error"]["code"] == "model_encrypted"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--context", "5000"), "context_exceeded"),
        (("--context", "1000", "--cells", "999"), "wrong_work"),
        (("--parallel", "17", "--batch", "16"), "wrong_work"),
        (("--kv-type", "f32"), "usage"),
    ],
)
def test_what_no_engine_holds_is_an_error(strongroom: Terminal, options: tuple[str, ...], code: str) -> None:
    ran = inspected(strongroom, grouped(), *options, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, code)


def test_its_help_has_an_example(strongroom: Terminal) -> None:
    assert "strongroom model inspect " in strongroom("model", "inspect", "--help").out
    assert "strongroom model inspect " in strongroom("model", "--help").out


@pytest.mark.usefixtures("folder")
def test_a_model_without_a_template_has_none(strongroom: Terminal) -> None:
    model = without(tiny_model(), "tokenizer.chat_template")
    assert "chat template     none" in inspected(strongroom, model).out
    assert inspected(strongroom, model, "--json").json["chat_template"] is False
