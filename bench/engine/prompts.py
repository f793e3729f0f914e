"""Prompts of stated lengths, each another one from its first word on, so that no cache knows any of it."""

from __future__ import annotations

import random
from typing import Final

from bench.engine.load import Ask, Message

SUBJECTS: Final = (
    "tides", "bread", "glaciers", "violins", "bees", "bridges", "volcanoes", "paper", "chess", "coffee",
    "deserts", "lenses", "rivers", "clocks", "forests", "salt", "kites", "magnets", "silk", "thunder",
)  # fmt: skip
_COMMON: Final = (
    "the water of this river comes from high mountain snow and many small lakes where birds rest in spring while "
    "people from the old town work on boats or walk along the road with their children after school every day when "
    "weather is good they talk about food music family and what news brought from other places far away across that sea"
)
WORDS: Final = tuple(_COMMON.split())
"""One token each, with the space before it, in the vocabularies of SmolLM2 and of Qwen2."""
_FRAME: Final = 40
"""Tokens, about, of the sentence that asks, and of a chat template."""


def essay(number: int, tokens: int, *, answer: int) -> Ask:
    """Asks for something long. The prompt has about ``tokens`` tokens, of which the servers' own usage says how many
    they are; 40 at least.
    """
    return Ask((_numbered(number), {"role": "user", "content": _text(number, tokens)}), answer)


def _numbered(number: int) -> Message:
    """What stands first in a prompt: two have no more in common than the template's opening."""
    return {"role": "system", "content": f"{number} is the number of this conversation."}


def _text(number: int, tokens: int) -> str:
    generator = random.Random(number)
    subject = SUBJECTS[number % len(SUBJECTS)]
    words = " ".join(generator.choices(WORDS, k=max(0, tokens - _FRAME)))
    notes = f"Here are some notes: {words}. " if words else ""
    return f"{notes}Write a long and detailed essay about {subject}. Begin with its history and do not stop early."


def second_turn(first: Ask, answer: str, number: int, tokens: int, *, reply: int) -> Ask:
    """The conversation goes on, with a message of ``tokens`` words."""
    words = " ".join(random.Random(-number).choices(WORDS, k=tokens))
    more: tuple[Message, ...] = ({"role": "assistant", "content": answer}, {"role": "user", "content": words})
    return Ask((*first.messages, *more), reply)


NATURAL: Final = (
    "The lighthouse stood at the end of the stone pier. Every evening the keeper climbed its ninety steps, filled the "
    "lamp with oil, trimmed the wick and lit it. When the fog came in from the sea he rang the bell as well, one "
    "stroke every half minute, until the morning. Ships that passed in the night answered with their horns, and the "
    "keeper wrote the time of each in a book. The book lay on a desk beside the window, with a pen and a bottle of ink."
)
"""Our own; for what guesses tokens from text that has been."""


def repetition(number: int, *, answer: int) -> Ask:
    """Natural text, which the answer says again in part: what speculation by n-grams gains from."""
    return Ask(
        (
            _numbered(number),
            {
                "role": "user",
                "content": f"{NATURAL}\n\nWrite the text above again, word for word, and then go on "
                f"with the story of the keeper's {SUBJECTS[number % len(SUBJECTS)]}.",
            },
        ),
        answer,
    )
