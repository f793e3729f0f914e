"""llama.cpp as the engine process has it: its libraries, and a tiny model's memory and logits, row by row."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from attestation.model_memory import KvType
from enclave.worker.kv_cache import Copy, Edit, Truncate
from enclave.worker.llama import DecodeFailed, Llama, LlamaRefused
from enclave.worker.sampler import Logits
from enclave.worker.scheduler import Row
from tests.engines import engine_settings
from tests.gguf_files import ASSISTANT, EOS, USER, tiny_model
from vsockrpc.chat import CompletionRequest

LOADED = """
import enclave.worker.llama
paths = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print(*(path.rpartition("/")[2].partition(".so")[0] for path in paths))
"""


def test_each_library_is_loaded_once() -> None:
    """A second copy of ggml has tables of its own, which nobody fills: threads that it starts compute zeros."""
    run = subprocess.run([sys.executable, "-B", "-c", LOADED], check=True, stdout=subprocess.PIPE, text=True)
    loaded = Counter(name for name in run.stdout.split() if name.startswith(("libggml", "libllama")))
    assert loaded == dict.fromkeys(("libggml", "libggml-base", "libggml-cpu", "libllama"), 1)


# --- A model ---------------------------------------------------------------------------------------------------------

SLOTS = 3
SETTINGS = engine_settings(context=64, parallel=SLOTS, batch=32)
SHARED = engine_settings(context=64, parallel=SLOTS, batch=32, cells=100)
PROMPT = list(b"a prompt of some letters")
OTHER = list(b"something else")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    return path


@pytest.fixture(scope="module", params=[SETTINGS, SHARED], ids=["cells of its own", "cells in common"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Llama:
    return Llama(str(tiny), request.param, threads=1)


@pytest.fixture
def llama(model: Llama) -> Llama:
    """With an empty memory."""
    for slot in range(SLOTS):
        model._edit(Truncate(slot, 0))
    return model


def row(tokens: Sequence[int], *, request: int = 0, slot: int = 0, start: int = 0, samples: bool = True) -> Row:
    return Row(request, slot, start, tokens, samples)


def alike(one: Logits, other: Logits) -> bool:
    return bool(np.allclose(one, other, atol=1e-3))


def logits_of(
    llama: Llama, tokens: Sequence[int], edits: Sequence[Edit] = (), *, slot: int = 0, start: int = 0
) -> Logits:
    """The last token's."""
    return llama.decode(edits, [row(tokens, slot=slot, start=start)])[0].copy()


def test_another_prompt_is_not_alike(llama: Llama) -> None:
    """What the others compare can differ: by the whole prompt, by its order, by one token and by one place."""
    expected = logits_of(llama, PROMPT)
    for other in (OTHER, [*PROMPT[-2::-1], PROMPT[-1]], [PROMPT[0] + 1, *PROMPT[1:]], PROMPT[1:]):
        assert not alike(logits_of(llama, other, [Truncate(0, 0)]), expected)


def test_only_rows_that_sample_have_logits(llama: Llama) -> None:
    rows = [
        row(PROMPT[:5], request=7),
        row(OTHER[:5], request=8, slot=1, samples=False),
        row(PROMPT[:2], request=3, slot=2),
    ]
    found = llama.decode((), rows)
    assert found.keys() == {7, 3}
    assert all(each.shape == (llama.vocabulary_size,) and np.isfinite(each).all() for each in found.values())


def test_sequences_side_by_side_are_what_they_are_alone(llama: Llama) -> None:
    alone = [logits_of(llama, PROMPT), logits_of(llama, OTHER, slot=1)]
    for slot in range(2):
        llama._edit(Truncate(slot, 0))
    together = llama.decode((), [row(PROMPT, request=0), row(OTHER[:-6], request=1, slot=2, samples=False)])
    assert alike(together[0], alone[0])
    rest = llama.decode((), [row(OTHER[-6:], request=1, slot=2, start=len(OTHER) - 6)])
    assert alike(rest[1], alone[1])


def test_a_prompt_in_parts_is_the_prompt(llama: Llama) -> None:
    whole = logits_of(llama, PROMPT)
    for at, token in enumerate(PROMPT[:-1]):
        assert llama.decode((), [row([token], slot=1, start=at, samples=False)]) == {}
    assert alike(logits_of(llama, PROMPT[-1:], slot=1, start=len(PROMPT) - 1), whole)


def test_what_is_cut_off_is_gone(llama: Llama) -> None:
    expected = logits_of(llama, PROMPT)
    logits_of(llama, OTHER, slot=1)
    cut = logits_of(llama, PROMPT, [Truncate(1, 0)], slot=1)
    assert alike(cut, expected)
    logits_of(llama, OTHER, slot=1, start=len(PROMPT))
    again = logits_of(llama, PROMPT[10:], [Truncate(1, 10)], slot=1, start=10)
    assert alike(again, expected)


def test_what_is_copied_goes_on_in_both(llama: Llama) -> None:
    logits_of(llama, PROMPT)
    expected = logits_of(llama, OTHER[:3], start=len(PROMPT))
    edits: list[Edit] = [Truncate(0, len(PROMPT)), Copy(0, 2)]
    found = llama.decode(
        edits,
        [row(OTHER[:3], request=5, slot=2, start=len(PROMPT)), row(PROMPT[:4], request=6, start=len(PROMPT))],
    )
    assert alike(found[5], expected)
    assert alike(found[6], logits_of(llama, PROMPT[:4], [Truncate(0, len(PROMPT))], start=len(PROMPT)))


def test_a_neighbour_changes_nothing(llama: Llama) -> None:
    rows = [row(PROMPT, request=0), row(OTHER[:8], request=1, slot=1)]
    one = llama.decode((), rows)[0].copy()
    edits = [Truncate(0, 0), Truncate(1, 0)]
    rows = [row(PROMPT, request=0), row(list(b"\xff" * 8), request=1, slot=1)]
    assert alike(llama.decode(edits, rows)[0], one)


def test_more_than_there_are_cells_for_is_an_error(tiny: Path) -> None:
    llama = Llama(str(tiny), engine_settings(context=64, parallel=1, batch=64), threads=1)
    llama.decode((), [row(PROMPT * 2)])
    cells = 256  # what 64 are rounded up to
    with pytest.raises(DecodeFailed):
        for start in range(len(PROMPT) * 2, cells + 64, 32):
            llama.decode((), [row([65] * 32, start=start)])


def test_a_warm_up_leaves_nothing(llama: Llama) -> None:
    expected = logits_of(llama, PROMPT)
    llama._edit(Truncate(0, 0))
    llama.warm_up()
    assert alike(logits_of(llama, PROMPT), expected)


def test_the_vocabulary(llama: Llama) -> None:
    assert (llama.bos, llama.eos) == ("<|begin|>", "<|end|>")
    assert llama.vocabulary_size == 262
    assert llama.can_truncate
    assert llama.piece(ord("a")) == b"a"
    assert llama.piece(256) == b" t"
    assert llama.piece(ASSISTANT) == b""  # a control token
    assert llama.piece(USER) == b"<|user|>"  # one that was never declared special
    assert llama.ends(EOS)
    assert not llama.ends(ord("a"))
    assert llama.tokenizer("").tokens([]) == [257]


def test_a_sampler_chooses_from_a_row(llama: Llama) -> None:
    sampler = llama.sampler(CompletionRequest(prompt="", temperature=0), PROMPT)
    logits = llama.decode((), [row(PROMPT)])[0]
    assert llama.sample(sampler, logits, is_constrained=False) == int(logits.argmax())
    sampler.close()


# --- What llama.cpp does not take ------------------------------------------------------------------------------------


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LlamaRefused) as caught:
        Llama(str(path), SETTINGS, threads=1)
    assert caught.value.code == "model_refused"


def test_a_context_longer_than_the_model_s(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_model(context=128).encode())
    with pytest.raises(LlamaRefused) as caught:
        Llama(str(path), engine_settings(context=129), threads=1)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("context_exceeded", "<= 128", "129")


@pytest.mark.parametrize("kind", KvType)
def test_every_kind_of_keys_and_values_is_one_or_a_typed_error(tiny: Path, kind: KvType) -> None:
    """The tiny model's heads are narrower than a block of the quantised ones."""
    settings = engine_settings(context=64, parallel=SLOTS, batch=32, kv_type=kind)
    if kind is KvType.F16:
        assert Llama(str(tiny), settings, threads=1).can_truncate
        return
    with pytest.raises(LlamaRefused) as caught:
        Llama(str(tiny), settings, threads=1)
    assert caught.value.code == "model_refused"
