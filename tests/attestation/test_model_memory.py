"""What a model takes in memory: the account, the shape that it is made from, and the work that it is made for. Whether
llama.cpp takes as much is asked in ``tests/enclave/worker/test_memory.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.gguf import TENSOR_TYPES, read_header
from attestation.model_memory import (
    CANDIDATE,
    CELL_STEP,
    ENGINE,
    HELD_TOKEN,
    KERNEL,
    KERNEL_SHARE,
    MIB,
    SERVER,
    VOCABULARY_ENTRY,
    EngineMemory,
    KvType,
    ModelShape,
    SizingError,
    Work,
    engine_memory,
    kernel_beside,
)
from tests.gguf_files import ARRAY, I32, TEXT, U32, Gguf, grouped, joined, with_entry, without

KINDS = {name: (number, elements, size) for number, (name, elements, size) in TENSOR_TYPES.items()}
SMALL = ModelShape(
    architecture="llama",
    weights=1 << 30,
    repacked=0,
    rows=((64, 64),),
    embedding=64,
    width=192,
    vocabulary=1000,
    entries=1500,
    trained_context=4096,
)
DISTILL = ModelShape(
    architecture="qwen2",
    weights=1_117_320_800,
    repacked=625_508_352,
    rows=((256, 256),) * 28,
    embedding=1536,
    width=8960,
    vocabulary=151_936,
    entries=151_936 + 151_387,
    trained_context=131_072,
)
"""The 1.5 B distill of DeepSeek-R1."""


def mib(memory: EngineMemory) -> Mapping[str, float]:
    return {part.name: part.size / MIB for part in memory.parts}


def sizes(shape: ModelShape, work: Work) -> Mapping[str, int]:
    return {part.name: part.size for part in engine_memory(shape, work).parts}


def shape_of(file: Gguf) -> ModelShape:
    return ModelShape.of(read_header(BytesIO(file.encode())))


# --- The account ------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_model_in_the_shape_of_the_1_5_b_distill() -> None:
    """Against what llama.cpp says of one: 112 MiB for 4,096 tokens, 596.5 MiB repacked; 33.26 and 34.26 MiB to compute
    in with steps of 256 tokens, 68.51 with steps of 512, and 2.32 MiB of logits.
    """
    one = mib(engine_memory(DISTILL, Work(4096, cells=4096, batch=256)))
    four = mib(engine_memory(DISTILL, Work(4096, batch=256)))
    assert (one["key-value cache"], four["key-value cache"]) == (112, 448)
    assert mib(engine_memory(DISTILL, Work(4096, 1, kv_type=KvType.Q8_0)))["key-value cache"] == 59.5
    assert one["repacked weights"] == pytest.approx(596.5, abs=0.1)
    assert 34.26 + 2.32 <= one["compute"] <= 34.26 + 2.32 + 5
    assert one["compute"] == four["compute"]
    assert 33.26 + 2.32 <= mib(engine_memory(DISTILL, Work(batch=256)))["compute"] <= one["compute"] - 1
    assert 68.51 + 2.32 <= mib(engine_memory(DISTILL, Work(4096, batch=512)))["compute"] <= 2 * one["compute"]


def test_the_targets_of_the_1_5_b_distill() -> None:
    shared, whole = (engine_memory(DISTILL, work) for work in (Work(4096, cells=4096), Work(4096)))
    assert shared.resident < 2.0 * 1024 * MIB
    assert whole.resident < 2.4 * 1024 * MIB
    without_copy = engine_memory(DISTILL, Work(4096, cells=4096, repack=False))
    assert shared.resident - without_copy.resident == DISTILL.repacked


def test_sums() -> None:
    memory = engine_memory(DISTILL, Work())
    assert [part.name for part in memory.parts] == [
        "weights",
        "repacked weights",
        "key-value cache",
        "compute",
        "vocabulary",
        "sampling",
        "engine",
        "server",
    ]
    assert memory.total == sum(part.size for part in memory.parts)
    assert memory.resident == memory.total - SERVER
    assert memory.allocated == memory.resident - DISTILL.weights


@given(st.integers(0, 1 << 45))
def test_the_kernel_has_its_share_of_all(used: int) -> None:
    part = kernel_beside(used)
    share = part.size - KERNEL
    assert share * KERNEL_SHARE >= used + part.size > (share - 1) * KERNEL_SHARE
    assert (part.name, part.rule) == ("kernel", "64 MiB and 1/32 of the memory")


@pytest.mark.parametrize(
    ("work", "streams"),
    [
        (Work(CELL_STEP), (4, CELL_STEP)),
        (Work(CELL_STEP + 1), (4, 2 * CELL_STEP)),
        (Work(300, 2), (2, 512)),
        (Work(1024, 4, cells=4096), (4, 1024)),
        (Work(1024, 4, cells=4095), (1, 4096)),
        (Work(1024, 4, cells=1025), (1, 1280)),
        (Work(1024, 4, cells=1024), (1, 1024)),
        (Work(1024, 1, cells=1024), (1, 1024)),
    ],
)
def test_cells_come_in_steps_for_each_sequence_or_for_all(work: Work, streams: tuple[int, int]) -> None:
    assert work.streams == streams
    count, cells = streams
    found = sizes(SMALL, work)
    assert found["key-value cache"] == count * cells * 2 * 128
    assert found["sampling"] == 1000 * CANDIDATE + count * cells * HELD_TOKEN


def test_rules_are_said() -> None:
    rules = {part.name: part.rule for part in engine_memory(DISTILL, Work(4096, cells=8000)).parts}
    assert rules["key-value cache"] == "8192 tokens, shared by 4, 28 layers, f16"
    assert rules["compute"] == "512 tokens a step: activations and mask; 4 rows of logits"
    assert rules["vocabulary"] == "303323 tokens and merges"
    assert "reorders" in rules["repacked weights"]
    assert engine_memory(DISTILL, Work(repack=False)).process[0].rule == "none: repack = false"
    assert engine_memory(SMALL, Work()).process[0].rule == "none of a type for it"
    kv = engine_memory(DISTILL, Work(512, 2, kv_type=KvType.Q8_0)).process[1]
    assert kv.rule == "2 x 512 tokens, 28 layers, q8_0"


@pytest.mark.parametrize(
    ("work", "tokens"),
    [(Work(4096), 512), (Work(64, 1, batch=4096), 256), (Work(4096, 3), 513), (Work(64, 4, batch=4096), 1024)],
)
def test_a_step_has_a_token_of_each_sequence_and_none_beyond_the_cells(work: Work, tokens: int) -> None:
    assert engine_memory(SMALL, work).process[2].rule.startswith(f"{tokens} tokens a step")


def test_computing_takes_the_worse_of_a_layer_and_the_logits() -> None:
    layer, logits = sizes(SMALL, Work(256, 1, batch=256))["compute"], sizes(SMALL, Work(256, 64, batch=64))["compute"]
    assert layer == 2 * 256 * 256 + 4 * 256 * (3 * 192 + 4 * 64 + 16) + 2 * 256 * 192 + 4 * 1000
    assert logits == 2 * 64 * 256 + 4 * 64 * (1000 + 4 * 64 + 16) + 2 * 64 * 192 + 4 * 64 * 1000


def test_what_does_not_depend_on_the_work() -> None:
    found = sizes(SMALL, Work())
    assert (found["vocabulary"], found["engine"], found["server"]) == (1500 * VOCABULARY_ENTRY, ENGINE, SERVER)


def test_a_prompt_s_share_grows_with_the_context_until_no_longer_prompt_is_read() -> None:
    shape = replace(SMALL, trained_context=1 << 20)
    found = {
        context: sizes(shape, Work(context, 1))["engine"] // MIB for context in (4096, 8192, 16384, 1 << 17, 1 << 20)
    }
    assert found == {4096: 64, 8192: 68, 16384: 104, 1 << 17: 608, 1 << 20: 608}


@given(st.integers(64, 4096), st.integers(1, 64), st.sampled_from(KvType), st.data())
def test_sharing_cells_takes_no_more(context: int, parallel: int, kind: KvType, data: st.DataObject) -> None:
    cells = data.draw(st.integers(context, context * parallel))
    whole, shared = (Work(context, parallel, each, kind) for each in (None, cells))
    one, other = sizes(SMALL, shared)["key-value cache"], sizes(SMALL, whole)["key-value cache"]
    assert one <= other
    count, each = shared.streams
    assert count * each >= cells
    assert each >= context


def test_a_context_beyond_the_model_s_is_refused() -> None:
    with pytest.raises(SizingError) as caught:
        engine_memory(SMALL, Work(4097))
    assert caught.value.code == "context_exceeded"
    assert (caught.value.expected, caught.value.got) == ("<= 4096", "4097")
    assert engine_memory(SMALL, Work(4096)).weights.size == SMALL.weights


@pytest.mark.parametrize(
    ("context", "parallel", "cells", "batch", "expected"),
    [
        (1024, 4, 1023, 256, "1024..4096"),
        (1024, 4, 4097, 256, "1024..4096"),
        (1024, 4, None, 3, ">= 4"),
    ],
)
def test_work_that_no_engine_takes(context: int, parallel: int, cells: int | None, batch: int, expected: str) -> None:
    with pytest.raises(SizingError) as caught:
        Work(context, parallel, cells, batch=batch)
    assert (caught.value.code, caught.value.expected, caught.value.exit_code) == ("wrong_work", expected, 2)
    assert Work(1024, 4, 1024, batch=4).batch == 4


# --- The shape --------------------------------------------------------------------------------------------------------


def test_the_shape_of_a_model_is_what_its_file_says() -> None:
    file = grouped()
    shape = shape_of(file)
    assert shape.rows == ((128, 128), (128, 128))
    assert (shape.embedding, shape.width, shape.trained_context) == (256, 512, 4096)
    assert (shape.vocabulary, shape.entries) == (262, 263)
    assert shape.weights == len(file.encode())
    assert shape.repacked == sum(
        len(data) for name, kind, _, data in file.tensors if kind == KINDS["Q4_K"][0] and name != "token_embd.weight"
    )


def test_a_table_of_tokens_that_is_the_output_too_is_repacked() -> None:
    file = grouped(tied=True)
    assert shape_of(file).repacked - shape_of(grouped()).repacked == len(file.tensors[0][3])


def test_rows_that_cannot_be_taken_by_eight_are_not_repacked() -> None:
    file = grouped()
    number, _, size = KINDS["Q4_K"]
    file.tensors.append(("odd.weight", number, (256, 7), bytes(7 * size)))
    assert shape_of(file).repacked == shape_of(grouped()).repacked


def test_joined_matrices_are_sized_by_the_metadata() -> None:
    assert shape_of(joined()).rows == ((128, 128),) * 2
    assert shape_of(joined(key_length=96, value_length=32)).rows == ((192, 64),) * 2
    assert shape_of(without(joined(), "llama.attention.head_count_kv")).rows == ((256, 256),) * 2


@pytest.mark.parametrize(
    "file",
    [
        without(grouped(), "llama.block_count"),
        without(grouped(), "llama.embedding_length"),
        without(grouped(), "llama.context_length"),
        without(grouped(), "tokenizer.ggml.tokens"),
        without(grouped(), "general.architecture"),
        with_entry(grouped(), "llama.block_count", U32, 0),
        with_entry(grouped(), "llama.block_count", U32, 0xFFFF_FFFF),
        with_entry(grouped(), "llama.block_count", TEXT, "two"),
        with_entry(joined(), "llama.attention.head_count_kv", ARRAY, (I32, [2, 1])),
        joined(head_count_kv=0),
        joined(head_count=1000),
        Gguf(),
    ],
    ids=lambda file: None,
)
def test_what_a_model_does_not_say_is_an_error(file: Gguf) -> None:
    with pytest.raises(SizingError) as caught:
        shape_of(file)
    assert caught.value.code == "unknown_shape"
    assert caught.value.exit_code == 2


def test_what_a_file_says_of_itself_is_repeated_short_and_plain() -> None:
    name = "\x1b[2J" + "x" * 1000
    with pytest.raises(SizingError) as caught:
        shape_of(with_entry(grouped(), "general.architecture", TEXT, name))
    assert caught.value.message == f"the model does not say \\x1b[2J{'x' * 76}"
    file = with_entry(grouped(), "llama.block_count", U32, 3)
    with pytest.raises(SizingError) as caught:
        shape_of(file)
    assert (caught.value.got, caught.value.message[:7]) == ("architecture llama", "layer 2")


def test_a_model_without_merges_has_only_tokens() -> None:
    assert shape_of(without(grouped(), "tokenizer.ggml.merges")).entries == 262


def test_the_bytes_of_a_row() -> None:
    sizes: dict[Any, int] = {kind: kind.size(64) for kind in KvType}
    assert sizes == {"f16": 128, "q8_0": 68, "q4_0": 36}
    assert KvType.Q8_0.size(33) == 68


def with_experts(count: int, *, used: int | None) -> Gguf:
    """Feed-forwards of several experts, 96 wide, in place of the model's own."""
    file = grouped()
    number, _, size = KINDS["F32"]
    file.tensors.append(("blk.0.ffn_up_exps.weight", number, (256, 96, count), bytes(256 * 96 * count * size)))
    return file if used is None else with_entry(file, "llama.expert_used_count", U32, used)


@pytest.mark.parametrize(
    ("count", "used", "width"),
    [(16, 8, 768), (16, None, 1536), (16, 0, 1536), (8, 16, 768), (16, 2, 512), (1, 1, 512)],
)
def test_of_experts_those_count_that_are_chosen(count: int, used: int | None, width: int) -> None:
    assert shape_of(with_experts(count, used=used)).width == width


def test_what_is_unseen_has_its_weights_twice_and_the_most_of_all_else() -> None:
    shape = ModelShape.unseen(1 << 30)
    assert (shape.weights, shape.repacked) == (1 << 30, 1 << 30)
    for field in ("embedding", "width", "vocabulary", "entries", "trained_context"):
        assert getattr(shape, field) >= getattr(DISTILL, field)
    seen, unseen = (engine_memory(each, Work(2048)) for each in (DISTILL, ModelShape.unseen(DISTILL.weights)))
    assert seen.resident < unseen.resident


def test_a_shape_says_what_is_held_and_not_more() -> None:
    assert engine_memory(replace(SMALL, repacked=1000), Work(repack=False)).process[0].size == 0
    assert engine_memory(replace(SMALL, repacked=1000), Work()).process[0].size == 1000
