"""Sizes of an engine that belong together, under a name: ``--profile`` of ``strongroom init`` and ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """Keys of ``[engine]`` in ``enclave.toml``. What a person says beside it comes first."""

    about: str
    """What it is for, as ``--help`` says it."""
    context: int
    parallel: int
    prompt_tokens: int
    answer_tokens: int


PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        "reference": Profile(
            "prompts of 2,048 tokens and answers of 512, four at once",
            context=2048 + 512,
            parallel=4,
            prompt_tokens=2048,
            answer_tokens=512,
        ),
    }
)
