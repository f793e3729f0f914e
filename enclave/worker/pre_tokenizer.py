"""How long a text's runs may be: llama.cpp cuts a text into words before it makes tokens of it, and for many
vocabularies with ``std::regex``, whose matcher calls itself once for each character of a match. One long word
overflows the stack (ggml-org/llama.cpp #15594, #26965, #27783), and with it dies what decodes for everybody.

Which expressions a vocabulary has, its ``tokenizer.ggml.pre`` decides (llama.cpp's src/llama-vocab.cpp), and for which
of them there is code in their stead that does not recur src/unicode.cpp. Both were read as they are in 0.3.36 of
llama-cpp-python. 16,000 characters of a match go well in a stack of 8 MiB, 32,000 do not.
"""

from __future__ import annotations

import re
import string
from typing import Final

from enclave.generation import InvalidRequest

MAX_RUN: Final = 4096
"""Characters. A match spans two runs at most, the second one of ends of lines, and one character more."""
MAX_BLANKS: Final = 256
"""In a row, where an expression (deepseek-llm's) tries each of them as a beginning: 4,000 take 0.4 s."""

_UNBOUNDED: Final = frozenset(
    # llama3's, of which there is code
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
    | {"dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"}
    # qwen2's and qwen35's
    | {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"}
    | {"laguna", "qwen35"}
    # gpt2's
    | {"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum"}
    | {"modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion"}
    | {"granite-docling"}
    # a digit alone, which is a match of one character, and gpt2's
    | {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
    # lines, and Kimi's own
    | {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "kimi-k2"}
)
_BY_KIND: Final = frozenset(
    {"", "default", "deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4", "spark2_5", "falcon", "jais-2", "tekken"}
    | {"gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "granite-embed-multi-97m", "tiny_aya", "cohere2moe"}
    | {"chameleon", "bailingmoe", "bailingmoe2", "llada-moe", "seed-coder", "ufakzeka", "minicpm5"}
)
"""A match is of one kind of character: letters with their marks, digits, blanks or the rest."""
_ACROSS_KINDS: Final = frozenset(
    {"bloom", "gpt3-finnish", "poro-chat", "viking", "exaone-moe", "deepseek-llm", "deepseek-coder", "youtu", "afmoe"}
)
"""A match may go on across kinds, but not over the commonest punctuation."""

_BLANK: Final = r" \t\n\v\f\r\u3000"  # what C++ and Unicode agree on
_POINT: Final = (
    re.escape(string.punctuation) + "，。；：？！「」『』（）《》【】…—“”‘’"
)  # in none of the expressions' ranges
_BLANKS: Final = re.compile(r"\s+")
_REST: Final = re.compile(rf"[^{_BLANK}\w]+")  # an underscore, which is a \w, is replaced before
_LETTERS: Final = re.compile(rf"[^{_BLANK}{_POINT}0-9]+")
_DIGITS: Final = re.compile(rf"[^{_BLANK}{_POINT}A-Za-z]+")
_STRETCHES: Final = re.compile(r"[^.,!?()|\n\r]+")
_WHOLE: Final = re.compile(r".+", re.DOTALL)


class RunBound:
    """The bound on the runs of a person's text."""

    def __init__(self, pre_tokenizer: str | None, *, has_expressions: bool) -> None:
        """``pre_tokenizer`` is the metadata's ``tokenizer.ggml.pre``; of a kind that is not known here a whole text is
        one run. ``has_expressions``: the vocabulary is one of byte pairs; others know no words.
        """
        self._runs: tuple[tuple[re.Pattern[str], int], ...] = ((_WHOLE, MAX_RUN),)
        name = pre_tokenizer or ""
        if not has_expressions or name in _UNBOUNDED:
            self._runs = ()
        elif name in _BY_KIND:
            self._runs = tuple((runs, MAX_RUN) for runs in (_LETTERS, _DIGITS, _REST, _BLANKS))
        elif name in _ACROSS_KINDS:
            self._runs = (_STRETCHES, MAX_RUN), (_REST, MAX_RUN), (_BLANKS, MAX_BLANKS)

    def check(self, text: str) -> None:
        """Raises InvalidRequest for a text with a longer run."""
        if len(text) <= MAX_BLANKS or not self._runs:
            return
        text = text.replace("_", "-")
        for runs, most in self._runs:
            longest = max((run.end() - run.start() for run in runs.finditer(text)), default=0)
            if longest > most:
                raise InvalidRequest(
                    "a text is too long without a break for the model's tokenizer",
                    expected=f"<= {most} characters of one kind in a row",
                    got=longest,
                )
