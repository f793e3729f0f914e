"""What a model says of itself: which family it is of, how it reasons and how it calls tools. Read from a GGUF's
metadata and from the chat template that it is used with.

A model of no family that is known here still answers, as plain text: nothing is guessed about it that its template
does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

REASONING_START: Final = "<think>"
REASONING_END: Final = "</think>"
"""Every family here whose models reason in the open writes these marks."""


class Family(StrEnum):
    """Models that are read alike."""

    LLAMA = "llama"
    """Llama 3 and its successors."""
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    GEMMA = "gemma"
    DEEPSEEK_R1_DISTILL = "deepseek-r1-distill"
    SMOLLM = "smollm"
    UNKNOWN = "unknown"


class CallFormat(StrEnum):
    """A way in which models write calls of tools."""

    HERMES = "hermes"
    """Qwen's and SmolLM's too."""
    LLAMA = "llama"
    DEEPSEEK = "deepseek"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How a model's answers are to be read."""

    family: Family
    """What it is taken for."""
    reasons: bool
    """It may begin with its reasoning, between the marks."""
    opens_reasoning: bool
    """It does so by itself where the template has not begun for it, if it is to reason at all."""
    calls: CallFormat | None
    """How it calls tools by itself; None where its template does not show that."""


def model_family(architecture: str | None, pre_tokenizer: str | None, template: str) -> ModelFamily:
    """``architecture`` is the metadata's ``general.architecture``, ``pre_tokenizer`` its ``tokenizer.ggml.pre``."""
    family = _family(architecture or "", pre_tokenizer or "", template)
    is_distill = family is Family.DEEPSEEK_R1_DISTILL
    reasons = is_distill or REASONING_START in template or REASONING_END in template
    opens = reasons and (is_distill or "enable_thinking" in template)
    return ModelFamily(family, reasons, opens, _call_format(template))


def _family(architecture: str, pre_tokenizer: str, template: str) -> Family:
    """By the architecture, which several families share: then by the vocabulary, whose rules are a family's own. The
    distills have the architecture and the rules of what they were made from, and DeepSeek's template.
    """
    if architecture in ("qwen2", "qwen3", "llama"):
        if pre_tokenizer.startswith("deepseek-r1") or "<｜Assistant｜>" in template:
            return Family.DEEPSEEK_R1_DISTILL
        if architecture == "llama":
            return _LLAMAS.get(pre_tokenizer, Family.UNKNOWN)
    return _ARCHITECTURES.get(architecture, Family.UNKNOWN)


_ARCHITECTURES: Final = {
    "qwen2": Family.QWEN2,
    "qwen2moe": Family.QWEN2,
    "qwen3": Family.QWEN3,
    "qwen3moe": Family.QWEN3,
    "gemma": Family.GEMMA,
    "gemma2": Family.GEMMA,
    "gemma3": Family.GEMMA,
    "smollm3": Family.SMOLLM,
}
_LLAMAS: Final = {"llama-bpe": Family.LLAMA, "llama3": Family.LLAMA, "llama-v3": Family.LLAMA, "smollm": Family.SMOLLM}


def _call_format(template: str) -> CallFormat | None:
    """The template writes old calls as the model would."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return CallFormat.HERMES
    if "<｜tool▁call▁begin｜>" in template and "```json" in template:
        return CallFormat.DEEPSEEK
    if "<|start_header_id|>" in template and '"parameters": ' in template:
        return CallFormat.LLAMA
    return None
