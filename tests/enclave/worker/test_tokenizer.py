"""Texts become tokens within bounds: of time, of memory and of llama.cpp's stack. What they become is llama.cpp's own
answer.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import llama_cpp
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from attestation.model_memory import PROMPT_BYTE
from enclave.generation import InvalidRequest
from enclave.worker.pre_tokenizer import _ACROSS_KINDS, _BY_KIND, _UNBOUNDED, MAX_BLANKS, MAX_RUN, RunBound
from enclave.worker.prompt import ChatTemplate, Segment
from enclave.worker.tokenizer import Tokenizer
from enclave.worker.user_defined import Cutter, UserDefined
from tests.gguf_files import ARRAY, BOOL, F32, I32, TEXT, USER_DEFINED, Gguf, tiny_model, with_entry
from tests.vocabularies import vocabulary
from vsockrpc.chat import ChatMessage, ChatRequest

QWEN2 = Path(__file__).parents[4] / "shared" / "vectors" / "gguf" / "ggml-vocab-qwen2.gguf"
DEFINED = ("<think>", "</think>", "<b>", "</b>", "\n\n", "\n\n\n", "\n\n\n\n", "  ", "aba", "bab>", "<b", "é<", "<<é>>")
BYTE, UNKNOWN, NORMAL, CONTROL = 6, 2, 1, 3


def with_defined(texts: Sequence[str] = DEFINED) -> Gguf:
    file = tiny_model()
    entries = {key: value for key, _, value in file.metadata}
    tokens, kinds = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    assert isinstance(tokens, tuple)
    assert isinstance(kinds, tuple)
    with_entry(file, "tokenizer.ggml.tokens", ARRAY, (TEXT, [*tokens[1], *texts]))
    return with_entry(file, "tokenizer.ggml.token_type", ARRAY, (I32, [*kinds[1], *[USER_DEFINED] * len(texts)]))


def sentence_pieces() -> Gguf:
    """A vocabulary in which a blank is three tokens: it has none for what stands for one."""
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_of, "a", *DEFINED]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL, *[USER_DEFINED] * len(DEFINED)]
    file = tiny_model()
    with_entry(file, "tokenizer.ggml.model", TEXT, "llama")
    with_entry(file, "tokenizer.ggml.tokens", ARRAY, (TEXT, tokens))
    with_entry(file, "tokenizer.ggml.token_type", ARRAY, (I32, kinds))
    with_entry(file, "tokenizer.ggml.scores", ARRAY, (F32, [0.0] * len(tokens)))
    with_entry(file, "tokenizer.ggml.add_bos_token", BOOL, False)
    return file


def llama_s_own(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = 8 + 16 * len(data)
    tokens = (ctypes.c_int32 * room)()
    return tokens[: llama_cpp.llama_tokenize(vocab, data, len(data), tokens, room, False, False)]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.tokens([Segment(text, trusted=False)])


@pytest.fixture(scope="module", params=["bytes", "sentence pieces", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    if request.param == "bytes":
        path.write_bytes(with_entry(with_defined(), "tokenizer.ggml.add_bos_token", BOOL, False).encode())
    elif request.param == "sentence pieces":
        path.write_bytes(sentence_pieces().encode())
    elif QWEN2.exists():
        path = QWEN2
    else:
        pytest.skip("../shared/vectors/gguf is not here")
    with vocabulary(path) as vocab:
        yield Tokenizer(vocab, "", "qwen2")


# --- User defined tokens ----------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.one_of(st.sampled_from([*DEFINED, "<", "b", "a", ">", " ", "\n", "think", "é", "<|endoftext|>"]), st.text()),
    max_size=12,
).map("".join)


@given(TEXTS)
def test_a_text_s_tokens_are_llama_s_own(tokenizer: Tokenizer, text: str) -> None:
    """No template gives the user defined ones a meaning."""
    own = llama_s_own(tokenizer._vocabulary, text)
    assume(tokenizer._meaningful_ids.isdisjoint(own))
    assert plain(tokenizer, text) == own


def test_a_text_of_nothing_but_user_defined_tokens_is_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(with_defined().encode())
    with vocabulary(path) as vocab:
        for template in ("", "<b>"):  # there the text is cut once more
            tokenizer = Tokenizer(vocab, template)
            begun = process_time()
            plain(tokenizer, "<b>x" * 2**16)
            assert process_time() - begun < 10  # 0.3 s; llama.cpp by itself takes minutes


@given(st.lists(st.sampled_from(["<x>", "ab", "a", "<xy>", " ", "\n", "\t"]), max_size=10).map("".join))
def test_blanks_beside_a_token_go_where_it_strips_them(text: str) -> None:
    defined = [UserDefined(7, "<x>", strips_left=True), UserDefined(8, "<xy>", strips_right=True), UserDefined(9, "ab")]
    parts = Cutter(defined).cut(text)
    names = {7: "<x>", 8: "<xy>", 9: "ab"}
    expected = re.sub(r"\s*(<x>)", r"\1", re.sub(r"(<xy>)\s*", r"\1", text))
    assert "".join(part if isinstance(part, str) else names[part] for part in parts) == expected
    assert all(part for part in parts)


def test_the_longest_goes_first_wherever_it_stands() -> None:
    cutter = Cutter([UserDefined(1, "ab"), UserDefined(2, "bcd"), UserDefined(3, "é"), UserDefined(4, "")])
    assert cutter.cut("abcdabé") == ["a", 2, 1, 3]
    assert cutter.cut("") == []


def test_many_tokens_and_many_places_for_them_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclave.worker.tokenizer.MAX_COMPARISONS", 100_000)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(with_defined([f"<unused{number}>" for number in range(1000)]).encode())
    with vocabulary(path) as vocab:
        tokenizer = Tokenizer(vocab, "")
        assert len(plain(tokenizer, "<" * 50)) == 51
        assert len(plain(tokenizer, "<unused7>" * 5000)) == 5001
        with pytest.raises(InvalidRequest, match="too many characters with which tokens"):
            plain(tokenizer, "<" * 500)


# --- More tokens than bytes -------------------------------------------------------------------------------------------


def test_more_tokens_than_bytes_have_room(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(sentence_pieces().encode())
    with vocabulary(path) as vocab:
        assert len(plain(Tokenizer(vocab, ""), " a" * 100)) == 3 * 101 + 100


def test_far_more_tokens_than_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclave.worker.tokenizer.MAX_TOKENS_PER_BYTE", 1)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(sentence_pieces().encode())
    with vocabulary(path) as vocab, pytest.raises(InvalidRequest, match="too many tokens"):
        plain(Tokenizer(vocab, ""), " a" * 100)


# --- Runs -------------------------------------------------------------------------------------------------------------

UNITS = (
    *(
        "Z",
        "z",
        "7",
        "!",
        "中",
        "é",
        ".",
        "_",
        "/",
        "１",
        "а",
        "👍",
        "\u0301",
        "\u0085",
        "\u00a0",
        "\ufdd0",
        "-_",
        "中。",
    ),
    *("あ・", "e\u0301", "Zz", "Z7", "7!", "中!", "、々", "中→", "1①", "\x1c!", "'s"),
)
BLANKS = (" ", "\n", " \n", "\t", "a b ")
RUNS = (*(unit * MAX_RUN + "\n" * MAX_RUN for unit in "Z1!中"), " " * MAX_RUN + "1", "\n" * MAX_RUN + "Z")
EXPRESSIONS = frozenset(
    {"llama-bpe", "qwen2", "qwen35", "laguna", "gpt-2", "smollm", "gemma4", "kimi-k2", "tekken", "gpt-4o", "default"}
    | {"deepseek-v3", "spark2_5", "falcon", "jais-2", "granite-embed-multi-97m", "tiny_aya", "chameleon", "bailingmoe"}
    | {"seed-coder", "minicpm5"}
) | (_ACROSS_KINDS - {"gpt3-finnish", "poro-chat"})
"""One name for each set of them. The others are tried with less."""
ATTACK = """
import resource, sys
from pathlib import Path
from enclave.generation import InvalidRequest
from enclave.worker.prompt import Segment
from enclave.worker.tokenizer import Tokenizer
from tests.enclave.worker.test_tokenizer import BLANKS, EXPRESSIONS, RUNS, UNITS
from tests.vocabularies import vocabulary

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in map(Path, sys.argv[1:]):
    with vocabulary(path) as vocab:
        name = path.stem.removeprefix("ggml-vocab-")
        tokenizer = Tokenizer(vocab, "", name)
        refused = 0
        for unit in UNITS + BLANKS + RUNS if name in EXPRESSIONS else (*UNITS[:5], " ", "\\n"):
            try:
                tokenizer.tokens([Segment(unit * (65536 // len(unit.encode())), trusted=False)])
            except InvalidRequest:
                refused += 1
        print(name, refused, flush=True)
"""


def refusals(*paths: Path) -> dict[str, int]:
    """For each vocabulary, named after its pre-tokenizer, how many texts of 64 KiB are refused. Nothing dies of the
    others.
    """
    run = subprocess.run(
        [sys.executable, "-B", "-c", ATTACK, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[3],
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr[-500:])
    return {name: int(count) for name, count in map(str.split, run.stdout.splitlines())}


@pytest.mark.parametrize("names", [_UNBOUNDED, _BY_KIND - {""}, _ACROSS_KINDS], ids=["unbounded", "kinds", "across"])
def test_no_text_overflows_the_stack(names: frozenset[str], tmp_path: Path) -> None:
    for name in names:
        file = with_entry(tiny_model(), "tokenizer.ggml.pre", TEXT, name)
        (tmp_path / f"{name}.gguf").write_bytes(file.encode())
    found = refusals(*sorted(tmp_path.iterdir()))
    assert found.keys() == names
    assert all(bool(count) != (names is _UNBOUNDED) for count in found.values())


def test_no_text_overflows_the_stack_with_a_real_vocabulary() -> None:
    if not QWEN2.exists():
        pytest.skip("../shared/vectors/gguf is not here")
    assert list(refusals(QWEN2).values()) == [0]


PROSE = "Ein Satz, der so weitergeht wie viele Sätze; 12.5 % von ihnen sind (noch) länger.\n\n    return {x: [1, 2]}\n"


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "deepseek-v3", "bloom", "deepseek-llm", None])
def test_ordinary_text_is_of_short_runs(pre: str | None) -> None:
    bound = RunBound(pre, has_expressions=True)
    bound.check(PROSE * 1000)
    bound.check("中文没有空格，但是有标点。" * 1000 + "\n" if pre not in ("bloom", "deepseek-llm") else "")
    bound.check(("-" * 200 + "\n") * 100)
    bound.check("x" * MAX_RUN + "." + " " * MAX_BLANKS + "7" * (MAX_RUN - MAX_BLANKS - 1))
    with pytest.raises(InvalidRequest, match="without a break"):
        bound.check(PROSE + "x" * (MAX_RUN + 1) + PROSE)


def test_what_is_not_known_is_one_run() -> None:
    with pytest.raises(InvalidRequest, match="without a break"):
        RunBound("superbpe", has_expressions=True).check(PROSE * 50)
    RunBound("superbpe", has_expressions=False).check("x" * 2**16)


# --- Memory, and a conversation that is rendered again ----------------------------------------------------------------


def test_marks_in_a_text_take_no_more_than_the_text() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}", bos="", eos="", mark_starts=frozenset("<[")
    )
    request = ChatRequest((ChatMessage("user", "<" * 2**20 + "😀"),))
    tracemalloc.start()
    try:
        prompt = template.render(request)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [segment.text for segment in prompt.segments] == [request.messages[0].content]
    assert peak < 48 * 2**20  # four bytes a character, twice as many characters, five times; it was 525 MiB


COSTLY = """
import sys
from pathlib import Path
from enclave.worker.prompt import ChatTemplate
from enclave.worker.tokenizer import Tokenizer
from tests.vocabularies import vocabulary
from vsockrpc.chat import ChatMessage, ChatRequest

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
with vocabulary(Path(sys.argv[1])) as vocab:
    tokenizer = Tokenizer(vocab, TEMPLATE, "qwen2")
    template = ChatTemplate(TEMPLATE, bos="", eos="", mark_starts=tokenizer.mark_starts)
    for text in ("x", sys.argv[2] * (2**20 // len(sys.argv[2].encode())) + sys.argv[3]):
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        tokenizer.tokens(template.render(ChatRequest((ChatMessage("user", text),))).segments)
        print(peak() - before)
"""


@pytest.mark.parametrize(("unit", "end"), [("1", "😀"), ("<", "😀"), ("1<", ""), ("<|im_end|>1111", "😀")])
def test_a_prompt_stays_within_its_account(unit: str, end: str) -> None:
    if not QWEN2.exists():
        pytest.skip("../shared/vectors/gguf is not here")
    command = [sys.executable, "-B", "-c", COSTLY, str(QWEN2), unit, end]
    root = Path(__file__).parents[3]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root)
    assert int(run.stdout.split()[-1]) <= PROMPT_BYTE * 2**20


def test_a_text_that_comes_again_is_not_read_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict[str, list[int]]()
    segments = [Segment("some text\n\n", trusted=False), Segment("more", trusted=False)]
    tokens = tokenizer.tokens(segments, known)
    monkeypatch.setattr(tokenizer, "_tokenize", None)
    assert tokenizer.tokens(segments, known) == tokens
    assert tokenizer.tokens(segments[1:], known) == tokens[-len(known["more"]) :]
