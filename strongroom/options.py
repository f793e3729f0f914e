"""What commands share: their options, their consoles, and how they load a policy."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from attestation.envelope import EnvelopePurpose
from attestation.errors import PolicyError
from attestation.model_memory import DEFAULT_WORK, MAX_CONTEXT, MAX_PARALLEL, MIN_CONTEXT
from attestation.policy import AppraisalPolicy
from attestation.release_heads import FileHeads, HeadError, HeadMemory
from attestation.rules import KeyRule
from strongroom.profiles import PROFILES
from strongroom.render import open_console

DEFAULT_URL = "http://127.0.0.1:8080"
F = TypeVar("F", bound=Callable[..., Any])

out = open_console()
err = open_console(stderr=True)


class Octets(click.ParamType[bytes]):
    """Hexadecimal digits, of as many bytes as ``sizes`` has: a range of them, or a few."""

    name = "hex"

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        digits = str(value)
        if not re.fullmatch(r"[0-9A-Fa-f]+", digits):
            self.fail(f"not hexadecimal; expected {self._expected()}", param, ctx)
        size, odd = divmod(len(digits), 2)
        if odd or size not in self._sizes:
            self.fail(f"expected {self._expected()}, got {len(digits)}", param, ctx)
        return bytes.fromhex(digits)

    def _expected(self) -> str:
        if isinstance(self._sizes, range):
            return f"{2 * self._sizes[0]} to {2 * self._sizes[-1]} hexadecimal digits"
        return f"{' or '.join(str(2 * size) for size in self._sizes)} hexadecimal digits"


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def policy_option(command: F) -> F:
    """``--policy``, for every command that judges."""
    return click.option(
        "--policy", type=click.Path(path_type=Path, dir_okay=False), default="policy.toml", show_default=True,
        envvar="STRONGROOM_POLICY", show_envvar=True, help="The appraisal policy: which enclave may read a prompt.",
    )(command)  # fmt: skip


def url_option(command: F) -> F:
    """``--url``, for every command that asks an enclave."""
    return click.option(
        "--url", default=DEFAULT_URL, show_default=True, envvar="STRONGROOM_URL", show_envvar=True,
        help="The parent's proxy.",
    )(command)  # fmt: skip


def session_options(command: F) -> F:
    """``--url`` and ``--policy``, for every command that has a session."""
    return url_option(policy_option(command))


def key_option(command: F) -> F:
    """``--key``, for every command that seals to the policy's KMS key."""
    return click.option(
        "--key", metavar="ARN", help="The KMS key that is meant; another one in the policy is an error.",
    )(command)  # fmt: skip


def require_key(policy: AppraisalPolicy, purpose: EnvelopePurpose, key: str | None) -> KeyRule:
    """The policy's rule for the KMS key of ``purpose``, which is ``key`` where that is given.

    Raises PolicyError ``missing_field``, ``wrong_key``.
    """
    rule, field = policy.kms.get(purpose), f"kms.{purpose.table}"
    if rule is None:
        raise PolicyError("missing_field", f"the policy names no KMS key for this: add [{field}]", field=field)
    if key is not None and key != rule.key.text:
        raise PolicyError(
            "wrong_key", "the policy names another key", field=f"{field}.key", expected=key, got=rule.key.text
        )
    return rule


def load_policy(path: Path) -> AppraisalPolicy:
    """The policy, with this user's memory of the release histories that it may name. Raises as
    :meth:`AppraisalPolicy.load`.
    """
    with user_heads() as heads:
        return AppraisalPolicy.load(path, heads=heads)


@contextlib.contextmanager
def user_heads() -> Iterator[HeadMemory]:
    """This user's memory of release histories: ``heads`` in ``$STRONGROOM_HOME``, else in
    ``$XDG_STATE_HOME/strongroom``, else in ``~/.local/state/strongroom``. Where it cannot be kept, the error that is
    raised within says how to have it elsewhere.
    """
    try:
        yield FileHeads(_state_directory() / "heads")
    except HeadError as error:
        if error.code != "heads_unavailable":
            raise
        raise HeadError(error.code, f"{error.message}; name a folder of your own with STRONGROOM_HOME") from error


def _state_directory() -> Path:
    if home := os.environ.get("STRONGROOM_HOME"):
        return Path(home)
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state) / "strongroom"
    return Path.home() / ".local" / "state" / "strongroom"


def _take_profile(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    """Its sizes take the place of defaults: whatever is given explicitly goes first."""
    if name is not None:
        sizes = {key: value for key, value in asdict(PROFILES[name]).items() if key != "about"}
        ctx.default_map = {**(ctx.default_map or {}), **sizes}


def _budget(name: str, text: str) -> Callable[[F], F]:
    bounds = click.IntRange(0, MAX_CONTEXT - 1)
    return click.option(name, type=bounds, default=0, show_default=True, help=text)


def engine_options(command: F) -> F:
    """``--profile``, and what it stands for: ``--context``, ``--parallel``, ``--prompt-tokens``, ``--answer-tokens``,
    ``--reasoning-tokens`` and ``--threads``, for every command that writes an ``enclave.toml``.
    """
    profile = click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        is_eager=True,
        expose_value=False,
        callback=_take_profile,
        help="Sizes that belong together; the options below go first. "
        + " ".join(f"{name}: {each.about}." for name, each in PROFILES.items()),
    )
    prompt = _budget("--prompt-tokens", "The longest prompt; 0: what the context has room for.")
    answer = _budget("--answer-tokens", "The longest answer; 0: what the context has room for.")
    reasoning = _budget("--reasoning-tokens", "The most that an answer may think; 0: as its request says.")
    threads = click.option(
        "--threads",
        type=click.IntRange(0, 256),
        default=0,
        show_default=True,
        help="Threads that decode; 0: one for each CPU.",
    )
    context = click.option(
        "--context",
        type=click.IntRange(MIN_CONTEXT, MAX_CONTEXT),
        default=DEFAULT_WORK.context,
        show_default=True,
        help="Tokens, prompt and answer together.",
    )
    parallel = click.option(
        "--parallel",
        type=click.IntRange(1, MAX_PARALLEL),
        default=DEFAULT_WORK.parallel,
        show_default=True,
        help="Answers at once, each with a context of its own.",
    )
    return profile(context(parallel(prompt(answer(reasoning(threads(command)))))))
