"""Which family a model is of, how it reasons and how it calls tools: by its metadata and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from attestation.model_family import CallFormat, Family, ModelFamily, model_family

DISTILL: Final = (
    Path(__file__).parents[3] / "shared" / "vectors" / "gguf" / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"
)
HERMES, DEEPSEEK = CallFormat.HERMES, CallFormat.DEEPSEEK
CALLS: Final = "{# <tool_call> #}"
CHATML: Final = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3: Final = '<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{# "parameters": #}'
GEMMA: Final = "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
DEEPSEEK_R1: Final = "<｜User｜>{{ m.content }}<｜Assistant｜>"


@pytest.mark.parametrize(
    ("architecture", "pre", "template", "family", "reasons", "opens", "calls"),
    [
        ("llama", "llama-bpe", LLAMA3, Family.LLAMA, False, False, CallFormat.LLAMA),
        ("llama", "smollm", CHATML, Family.SMOLLM, False, False, None),
        ("smollm3", "smollm3", CHATML + "{{ enable_thinking }}<think>", Family.SMOLLM, True, True, None),
        ("qwen2", "qwen2", CHATML + CALLS, Family.QWEN2, False, False, HERMES),
        ("qwen3", "qwen2", CHATML + CALLS + "{{ enable_thinking }}</think>", Family.QWEN3, True, True, HERMES),
        ("qwen3", "qwen2", CHATML + CALLS + "</think>", Family.QWEN3, True, False, HERMES),
        ("gemma2", "default", GEMMA, Family.GEMMA, False, False, None),
        ("gemma3", "default", GEMMA, Family.GEMMA, False, False, None),
        ("qwen2", "deepseek-r1-qwen", CHATML, Family.DEEPSEEK_R1_DISTILL, True, True, None),
        ("qwen2", "qwen2", DEEPSEEK_R1, Family.DEEPSEEK_R1_DISTILL, True, True, None),
        ("llama", "llama-bpe", DEEPSEEK_R1, Family.DEEPSEEK_R1_DISTILL, True, True, None),
        ("llama", "default", CHATML, Family.UNKNOWN, False, False, None),
        ("phi3", "default", "<|end|>", Family.UNKNOWN, False, False, None),
        (None, None, "", Family.UNKNOWN, False, False, None),
        # Calls of these are written in other ways.
        ("qwen3moe", "qwen2", CALLS + "<function=", Family.QWEN3, False, False, None),
        ("glm4", "glm4", CALLS + "<arg_key>", Family.UNKNOWN, False, False, None),
        ("qwen3", "qwen2", "<｜tool▁call▁begin｜>```json", Family.QWEN3, False, False, DEEPSEEK),
        ("llama", "llama-bpe", "<|start_header_id|>", Family.LLAMA, False, False, None),
        ("deepseek2", "deepseek-v3", "<｜tool▁call▁begin｜><｜tool▁sep｜>", Family.UNKNOWN, False, False, None),
    ],
)  # fmt: skip
def test_a_family_and_what_follows_from_it(
    architecture: str | None,
    pre: str | None,
    template: str,
    family: Family,
    reasons: bool,
    opens: bool,
    calls: CallFormat | None,
) -> None:
    assert model_family(architecture, pre, template) == ModelFamily(family, reasons, opens, calls)


@pytest.mark.skipif(not DISTILL.exists(), reason="../shared/vectors/gguf is not here")
def test_the_distills_reason_and_call_in_deepseek_s_way() -> None:
    read = model_family("qwen2", "deepseek-r1-qwen", DISTILL.read_text())
    assert read == ModelFamily(Family.DEEPSEEK_R1_DISTILL, True, True, DEEPSEEK)
