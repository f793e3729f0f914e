"""Made-up models: they have the real ones' shapes, and a small one, made the same way, is loaded by llama.cpp and is
pinned as any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest

from attestation.gguf import GgufArray, GgufHeader, ModelError, read_header
from attestation.manifest import ModelManifest
from bench import synthesize
from bench.model_shapes import SHAPES, Shape, tensors
from bench.synthesize import SynthesisError, Vocabulary
from tests.gguf_files import ARRAY, CHAT_TEMPLATE, TEXT, Gguf, tiny_model

BASE = 262
"""Tokens of the tests' tiny vocabulary."""
TOKENS = 300
SPECIAL = {270: "<｜User｜>", 271: "<think>"}
QWEN = Shape(
    name="Tiny-Qwen",
    architecture="qwen2",
    layers=8,
    width=256,
    feed_forward=512,
    heads=4,
    kv_heads=2,
    context=512,
    rope_base=10000.0,
    rms_epsilon=1e-6,
    vocabulary=TOKENS,
    special=SPECIAL,
    bos=257,
    eos=258,
    padding=258,
)
LLAMA = Shape(
    name="Tiny-Llama",
    architecture="llama",
    layers=2,
    width=512,
    feed_forward=768,
    heads=4,
    kv_heads=1,
    context=512,
    rope_base=500000.0,
    rms_epsilon=1e-5,
    vocabulary=BASE,
    special={},
    bos=257,
    eos=258,
    padding=258,
)


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(Gguf(tiny_model().metadata).encode())
    return path


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, vocabulary_file: Path) -> Make:
    def make(shape: Shape, name: str = "model.gguf", seed: int = 0) -> Path:
        path, seen = tmp_path / name, [0]
        size = synthesize.synthesize(
            shape,
            path,
            vocabulary=Vocabulary.read(vocabulary_file),
            chat_template=CHAT_TEMPLATE,
            seed=seed,
            progress=lambda done, total: seen.append(done),
        )
        assert size == path.stat().st_size >= seen[-1]
        assert seen == sorted(seen)
        return path

    return make


def header_of(path: Path) -> GgufHeader:
    with path.open("rb") as file:
        return read_header(file)


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "f32", "parameters", "size"),
    [
        ("1.5b", 339, 141, 1_777_088_000, 1_111_370_240),
        ("7b", 339, 141, 7_615_616_512, 4_677_120_000),
        ("8b", 292, 66, 8_030_261_312, 4_912_898_304),
        ("14b", 579, 241, 14_770_033_664, 8_982_142_976),
    ],
)
def test_a_shape_is_the_real_one(name: str, count: int, f32: int, parameters: int, size: int) -> None:
    made = list(tensors(SHAPES[name]))
    kinds = Counter(tensor.kind for tensor in made)
    assert (len(made), kinds["F32"]) == (count, f32)
    assert sum(tensor.elements for tensor in made) == parameters
    assert sum(tensor.size for tensor in made) == size
    assert len({tensor.name for tensor in made}) == count


def test_half_of_the_values_and_of_the_ways_down_are_finer() -> None:
    finer = [tensor.name for tensor in tensors(SHAPES["1.5b"]) if tensor.kind == "Q6_K"]
    layers = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, *range(24, 28)]
    assert finer == [
        *(f"blk.{layer}.{name}.weight" for layer in layers for name in ("attn_v", "ffn_down")),
        "output.weight",
    ]


# --- A model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [QWEN, LLAMA], ids=lambda shape: shape.architecture)
def test_llama_cpp_computes_with_it_and_a_manifest_pins_it(make: Make, shape: Shape) -> None:
    path = make(shape)
    manifest = ModelManifest.from_gguf(path)
    assert manifest.chat_template == CHAT_TEMPLATE
    assert manifest.files[0].sha384 == hashlib.sha384(path.read_bytes()).digest()
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    try:
        prompt = model.tokenize(b"some text", add_bos=True)
        assert prompt[0] == shape.bos
        answer = [token for token, _ in zip(model.generate(prompt, temp=0.0), range(4), strict=False)]
        assert len(set(answer)) > 1
        logits = [float(value) for row in model.scores[: len(prompt)] for value in row]
    finally:
        model.close()
    assert all(map(math.isfinite, logits))
    assert 0.5 < math.sqrt(math.fsum(value**2 for value in logits) / len(logits)) < 2


def test_the_same_arguments_give_the_same_bytes(make: Make) -> None:
    first = make(LLAMA).read_bytes()
    assert make(LLAMA, "again.gguf").read_bytes() == first
    assert make(LLAMA, "other.gguf", seed=1).read_bytes() != first


def test_it_says_of_itself_what_the_shape_says(make: Make) -> None:
    header = header_of(make(QWEN))
    assert header.metadata["qwen2.attention.head_count_kv"] == 2
    assert header.metadata["qwen2.rope.dimension_count"] == 64
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray("text", TOKENS)
    assert [(tensor.name, tensor.kind, tensor.dimensions) for tensor in header.tensors] == [
        (tensor.name, tensor.kind, tensor.dimensions) for tensor in tensors(QWEN)
    ]


# --- The vocabulary ---------------------------------------------------------------------------------------------------


def test_special_tokens_take_their_places_and_the_rest_is_unused(make: Make) -> None:
    read = Vocabulary.read(make(QWEN))
    assert read.tokens[:BASE] == Vocabulary.read(make(LLAMA, "llama.gguf")).tokens
    assert (read.tokens[270], read.kinds[270]) == ("<｜User｜>".encode(), synthesize.CONTROL)
    assert (read.tokens[271], read.kinds[271]) == (b"<think>", synthesize.USER_DEFINED)
    assert (read.tokens[299], read.kinds[299]) == (b"[PAD299]", synthesize.UNUSED)
    assert read.merges == ("Ġ t".encode(),)
    assert read.fitted(QWEN) == read


def test_qwens_vocabulary_is_cut_as_deepseeks() -> None:
    read = Vocabulary("qwen2", (b"a", b"[PAD1]"), (1, 4), (), None).fitted(QWEN)
    assert read.pre == "deepseek-r1-qwen"
    assert read.kinds[:2] == (synthesize.NORMAL, synthesize.UNUSED)


def test_a_larger_vocabulary_is_refused(make: Make) -> None:
    with pytest.raises(SynthesisError) as caught:
        Vocabulary.read(make(QWEN)).fitted(LLAMA)
    assert (caught.value.code, caught.value.got) == ("unfit_vocabulary", str(TOKENS))


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"])
def test_a_file_without_a_byte_pair_encoding_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(Gguf([entry for entry in tiny_model().metadata if entry[0] != key]).encode())
    with pytest.raises(SynthesisError, match="no byte-pair encoding"):
        Vocabulary.read(path)


def test_a_type_for_each_token(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    metadata = [entry for entry in tiny_model().metadata if entry[0] != "tokenizer.ggml.tokens"]
    path.write_bytes(Gguf([*metadata, ("tokenizer.ggml.tokens", ARRAY, (TEXT, ["a"]))]).encode())
    with pytest.raises(SynthesisError) as caught:
        Vocabulary.read(path)
    assert (caught.value.expected, caught.value.got) == ("1", str(BASE))


def test_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(SynthesisError) as caught:
        Vocabulary.read(tmp_path / "absent")
    assert caught.value.code == "no_vocabulary"
    (tmp_path / "other").write_bytes(b"\x7fELF")
    with pytest.raises(ModelError):
        Vocabulary.read(tmp_path / "other")


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vectors beside the repository, and with a tiny shape."""
    monkeypatch.setattr(synthesize, "VOCABULARY", tmp_path / "absent.gguf")
    monkeypatch.setattr(synthesize, "TEMPLATE", tmp_path / "absent.jinja")
    monkeypatch.setattr(synthesize, "SHAPES", {"tiny": LLAMA})


@pytest.mark.usefixtures("alone")
def test_the_command_writes_a_model(tmp_path: Path, vocabulary_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    command = ["--shape", "tiny", "--out", str(out), "--vocabulary", str(vocabulary_file)]
    assert synthesize.main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["size"] == out.stat().st_size
    assert said["tensors"] == len(list(tensors(LLAMA)))
    assert header_of(out).text("tokenizer.chat_template") == CHAT_TEMPLATE
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    assert synthesize.main([*command, "--template", str(template)]) == 0
    assert "made up" in capsys.readouterr().out
    assert header_of(out).text("tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.usefixtures("alone")
def test_what_is_missing_is_said(tmp_path: Path, vocabulary_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--shape", "tiny", "--out", str(tmp_path / "absent" / "model.gguf"), "--json"]
    named = ["--vocabulary", str(vocabulary_file)]
    for arguments, code in (
        (out, "no_vocabulary"),
        ([*out, *named], "unwritable_model"),
        ([*out, *named, "--template", str(tmp_path / "absent")], "no_chat_template"),
    ):
        assert synthesize.main(arguments) == 2
        assert json.loads(capsys.readouterr().err)["error"]["code"] == code


def test_what_does_not_fit_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SynthesisError) as caught:
        make(LLAMA)
    assert caught.value.code == "unwritable_model"
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.gguf"]


def test_progress_is_said_when_it_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter([0.0, 1.9, 2.0, 2.0, 3.9])
    progress = synthesize.Narrator(lambda: next(moments))
    for done in (1 << 20, 2 << 20, 3 << 20):
        progress(done, 4 << 20)
    assert capsys.readouterr().err == "synthesize: 2 of 4 MiB\n"


def test_the_help_shows_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        synthesize.main(["--help"])
    assert caught.value.code == 0
    assert synthesize.EXAMPLE in capsys.readouterr().out
