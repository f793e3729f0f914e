"""What follows from a model's family for its answers, and with which tokens its turns end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import llama_cpp
import pytest

from attestation.gguf import read_header
from attestation.model_family import CallFormat, Family, ModelFamily, model_family
from enclave.generation import InvalidRequest
from enclave.worker.answer_format import answer_format
from enclave.worker.prompt import ChatTemplate, Prompt
from enclave.worker.tokenizer import Tokenizer
from enclave.worker.tool_calls import DEEPSEEK, LLAMA, SYNTAXES
from tests.gguf_files import ARRAY, CONTROL, I32, NORMAL, TEXT, U32, USER_DEFINED, Gguf, Value, tiny_model
from tests.vocabularies import vocabulary
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, JsonFormat, NamedTool, Tool

VECTORS: Final = Path(__file__).parents[4] / "shared" / "vectors" / "gguf"
DISTILL: Final = VECTORS / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"


def turns(before: str, behind: str, opening: str, *, more: str = "") -> str:
    """A template of the usual kind."""
    return (
        f"{{% for m in messages %}}{before.replace('ROLE', '{{ m.role }}')}{{{{ m.content }}}}{behind}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}{more}"
    )


CALLS = "{# <tool_call> #}"
CHATML = turns("<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n")
LLAMA3 = turns("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "", more='{# "parameters": #}')
GEMMA = turns("<start_of_turn>ROLE\n", "<end_of_turn>\n", "<start_of_turn>model\n")
DEEPSEEK_R1 = turns("<｜ROLE｜>", "<｜end▁of▁sentence｜>", "<｜Assistant｜>")


# --- What a request's answer is ------------------------------------------------------------------------------------

PLAIN = model_family("llama", "smollm", CHATML)
CALLER = model_family("qwen2", "qwen2", CHATML + CALLS)
THINKER = model_family("qwen3", "qwen2", CHATML + CALLS + "{{ enable_thinking }}<think>")
HI = (ChatMessage("user", "Hi"),)
CLOCK = Tool("clock", "What time is it?")


def test_text_is_read_as_text() -> None:
    form = answer_format(ChatRequest(HI), PLAIN, Prompt(()))
    assert (form.grammar, form.marks) == (None, frozenset())
    assert not form.reply.is_constrained
    form = answer_format(CompletionRequest("<think>", echo=True), THINKER, Prompt(()))
    assert (form.grammar, form.marks) == (None, frozenset())


def test_json_and_calls_that_have_to_be_are_governed_by_a_grammar() -> None:
    for request in (
        ChatRequest(HI, response_format=JsonFormat()),
        ChatRequest(HI, response_format=JsonFormat('{"type": "string"}'), tools=(CLOCK,), tool_choice="none"),
        ChatRequest(HI, tools=(CLOCK,), tool_choice="required"),
        ChatRequest(HI, tools=(CLOCK,), tool_choice=NamedTool("clock")),
    ):
        for family in (PLAIN, CALLER):
            form = answer_format(request, family, Prompt(()))
            assert form.grammar is not None
            assert form.reply.is_constrained
        thinking = answer_format(request, THINKER, Prompt((), opens_reasoning=True)).reply
        assert (thinking.is_constrained, thinking.forced) == (False, None)


def test_a_model_that_reasons_by_itself_is_let_to_where_it_is_to() -> None:
    def forced(prompt: Prompt, **options: Any) -> str | None:
        request = ChatRequest(HI, response_format=JsonFormat(), **options)
        return answer_format(request, THINKER, prompt).reply.forced

    assert forced(Prompt(())) == "<think>\n"
    assert forced(Prompt((), ends_reasoning=True)) is None
    assert forced(Prompt(()), reasoning_tokens=0) is None
    assert forced(Prompt((), opens_reasoning=True), reasoning_tokens=0) == "\n</think>\n\n"


def test_a_budget_for_reasoning_is_refused_where_the_model_does_not_reason() -> None:
    for family in (PLAIN, CALLER):
        with pytest.raises(InvalidRequest, match="reasoning_effort") as caught:
            answer_format(ChatRequest(HI, reasoning_tokens=1), family, Prompt(()))
        assert caught.value.got == "1 tokens"
        assert answer_format(ChatRequest(HI, reasoning_tokens=0), family, Prompt(())).reply.forced is None
    assert answer_format(ChatRequest(HI, reasoning_tokens=1), THINKER, Prompt(())).marks


def test_calls_a_model_makes_by_itself_are_read_where_it_is_known_how() -> None:
    form = answer_format(ChatRequest(HI, tools=(CLOCK,)), CALLER, Prompt(()))
    assert form.grammar is None
    assert form.marks == {"<tool_call>", "</tool_call>"}
    assert answer_format(ChatRequest(HI, tools=(CLOCK,)), THINKER, Prompt(())).marks == {
        "<tool_call>", "</tool_call>", "<think>", "</think>"
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="by itself is not known"):
        answer_format(ChatRequest(HI, tools=(CLOCK,)), PLAIN, Prompt(()))


def test_what_contradicts_itself_is_refused() -> None:
    for request, match in (
        (ChatRequest(HI, tools=(CLOCK,), response_format=JsonFormat()), "response_format"),
        (ChatRequest(HI, stop=("}",), response_format=JsonFormat()), "before its JSON is whole"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            answer_format(request, CALLER, Prompt(()))


def test_every_way_of_calling_is_read() -> None:
    assert SYNTAXES.keys() == set(CallFormat)


def test_the_marks_of_calls_are_all_that_may_be_tokens() -> None:
    names = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    assert DEEPSEEK.marks == {f"<｜tool▁{name}｜>" for name in names}
    assert LLAMA.marks == {"<|python_tag|>"}


# --- Ends of turns --------------------------------------------------------------------------------------------------


def gguf_with(specials: Sequence[tuple[str, int]], *, eos: str) -> Gguf:
    """The tiny model with a vocabulary in which these stand behind the bytes."""
    model = tiny_model()
    metadata: dict[str, tuple[int, Value]] = {key: (kind, value) for key, kind, value in model.metadata}
    _, tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    texts = [*tokens[1][:257], *(text for text, _ in specials)]
    metadata["tokenizer.ggml.tokens"] = (ARRAY, (TEXT, texts))
    kinds = [NORMAL] * 257 + [kind for _, kind in specials]
    metadata["tokenizer.ggml.token_type"] = (ARRAY, (I32, kinds))
    metadata["tokenizer.ggml.eos_token_id"] = (U32, texts.index(eos))
    metadata["tokenizer.ggml.bos_token_id"] = (U32, 257)
    return Gguf([(key, kind, value) for key, (kind, value) in metadata.items()], [])


def ends(path: Path, template: str) -> set[str]:
    """The texts of the tokens with which an answer ends."""
    with vocabulary(path) as vocab:
        tokenizer = Tokenizer(vocab, template)
        own = tokenizer.turn_ends(ChatTemplate(template, bos="", eos="", mark_starts=tokenizer.mark_starts))
        tokens = range(llama_cpp.llama_vocab_n_tokens(vocab))
        end = [token for token in tokens if llama_cpp.llama_vocab_is_eog(vocab, token) or token in own]
        return {llama_cpp.llama_vocab_get_text(vocab, token).decode() for token in end}


@pytest.mark.parametrize(
    ("template", "specials", "eos", "expected"),
    [
        (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eot_id|>",
                  "<|eom_id|>"), "<|end_of_text|>", {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}),
        (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", {"<|endoftext|>", "<|im_end|>"}),
        (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", {"<eos>", "<end_of_turn>"}),
        (DEEPSEEK_R1, ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜user｜>", "<｜assistant｜>"),
         "<｜end▁of▁sentence｜>", {"<｜end▁of▁sentence｜>"}),
        # What llama.cpp knows nothing of.
        (turns("<|turn|>ROLE:", "<|/turn|>", ""), ("<s>", "<e>", "<|turn|>", "<|/turn|>"), "<e>", {"<e>", "<|/turn|>"}),
        (turns("<|ROLE|>", "", ""), ("<s>", "<e>", "<|user|>", "<|assistant|>"), "<e>", {"<e>", "<|user|>"}),
        # One that does not say.
        (turns("[ROLE]", "\n", ""), ("<s>", "<e>"), "<e>", {"<e>"}),
        ("{{ messages[0].content }}", ("<s>", "<e>"), "<e>", {"<e>"}),
        ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}", ("<s>", "<e>"), "<e>", {"<e>"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_the_ends_of_each_family_s_turns_end_an_answer(
    tmp_path: Path, kind: int, template: str, specials: tuple[str, ...], eos: str, expected: set[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_with([(text, kind) for text in specials], eos=eos).encode())
    assert ends(path, template) == expected


@pytest.mark.skipif(not DISTILL.exists(), reason="../shared/vectors/gguf is not here")
def test_the_ends_of_qwen2_s_own_vocabulary() -> None:
    found = ends(VECTORS / "ggml-vocab-qwen2.gguf", CHATML)
    assert {"<|im_end|>", "<|endoftext|>"} <= found
    assert "<|im_start|>" not in found


@pytest.mark.model
def test_the_ends_of_smollm2(smollm2: Path) -> None:
    with smollm2.open("rb") as file:
        header = read_header(file)
    template = header.text("tokenizer.chat_template") or ""
    read = model_family(header.text("general.architecture"), header.text("tokenizer.ggml.pre"), template)
    assert read == ModelFamily(Family.SMOLLM, False, False, None)
    assert {"<|im_end|>"} <= ends(smollm2, template)
