"""The front door: ``strongroom COMMAND``. Commands are named here as strings and loaded when they are asked for."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from attestation.errors import StrongroomError
from strongroom.extras import MissingExtra, require

if TYPE_CHECKING:
    from attestation.release_signing import Signer

COMMANDS = {
    "run": "strongroom.run:run",
    "init": "strongroom.initialise:init",
    "start": "parent.start_command:start",
    "ps": "parent.commands:ps",
    "logs": "parent.commands:logs",
    "stop": "parent.commands:stop",
    "proxy": "parent.commands:proxy",
    "egress": "parent.egress_commands:egress",
    "model-store": "parent.modelstore_commands:model_store",
    "image": "strongroom.cli:image",
    "nitro": "parent.nitro.commands:nitro",
    "doctor": "parent.doctor.command:doctor",
    "verify": "strongroom.verification:verify_command",
    "inspect": "strongroom.verification:inspect_command",
    "evidence": "strongroom.verification:evidence_command",
    "release": "strongroom.release_commands:release",
    "policy": "strongroom.policy_commands:policy",
    "kms": "strongroom.kms.commands:kms",
    "prompt": "strongroom.prompt_commands:prompt",
    "model": "strongroom.cli:model",
    "ask": "strongroom.conversation:ask",
    "chat": "strongroom.conversation:chat",
    "serve": "strongroom.serving:serve",
    "emulate": "emulator.commands:emulate",
}
IMAGE_COMMANDS = {
    "build": "parent.image.commands:build",
    "reproduce": "parent.image.commands:reproduce",
    "size": "parent.image.size_command:size",
    "measure": "strongroom.image.commands:measure",
    "describe": "strongroom.image.commands:describe",
    "verify": "strongroom.image.commands:verify",
    "extract": "strongroom.image.extract:extract",
    "diff": "strongroom.image.commands:diff",
    "policy": "strongroom.image.policy:policy",
}
"""Who writes images, and who judges them, do not share a room."""
MODEL_COMMANDS = {
    "inspect": "strongroom.model_inspect:inspect",
    "encrypt": "strongroom.model_commands:encrypt",
}
NEEDS = {
    "run": ("parent", "enclave"),
    "init": ("enclave",),
    "start": ("parent",),
    "ps": ("parent",),
    "logs": ("parent",),
    "stop": ("parent",),
    "proxy": ("parent",),
    "egress": ("parent",),
    "model-store": ("parent",),
    "nitro": ("parent",),
    "doctor": ("parent",),
    "kms": ("kms",),
    "prompt": ("kms",),
    "serve": ("serve",),
    "emulate": ("emulator",),
}
"""The extras of a command beyond ``cli``. An emulated enclave is measured and run from this installation."""
IMAGE_NEEDS = {"build": ("parent",), "reproduce": ("parent",), "size": ("parent",)}
MODEL_NEEDS = {"encrypt": ("kms",)}
USAGE, UNAVAILABLE, DEFECT, INTERRUPTED, TERMINATED = 2, 4, 70, 130, 143
WRONG_FILE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What a person named that is not there, not theirs or not of its kind. Other trouble is not their doing."""


class LazyGroup(click.Group):
    """Loads a command's module when that command is named, so that ``ask`` does not wait for what ``start`` imports.

    ``where`` says where each command is, ``MODULE:NAME``; ``needs`` the extras of those that want more than ``cli``.
    """

    def __init__(
        self, *args: Any, where: Mapping[str, str], needs: Mapping[str, tuple[str, ...]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._where = where
        self._needs = needs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._where)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._where:
            return None
        try:
            require(f"{ctx.command_path} {cmd_name}", self._needs.get(cmd_name, ()))
        except MissingExtra as error:
            return _NotInstalled(cmd_name, error)
        module, _, name = self._where[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click looks for names like it among loaded commands, and none is
            raise click.NoSuchCommand(error.command_name, possibilities=self._where, ctx=ctx) from None


class _NotInstalled(click.Command):
    """Stands for a command whose extra is missing: it is listed, and whatever its arguments it says what to install."""

    def __init__(self, name: str, error: MissingExtra) -> None:
        super().__init__(name, short_help=f"(not installed: {error.install})")
        self._error = error

    def parse_args(self, ctx: click.Context, args: list[str]) -> NoReturn:
        raise self._error


@click.command(
    cls=LazyGroup,
    where=COMMANDS,
    needs=NEEDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="strongroom", prog_name="strongroom")
def strongroom() -> None:
    """Confidential LLM inference: a prompt that only the measured enclave can read.

    \b
    strongroom run MODEL.gguf --prompt "Why is the sky blue?"      all in one, on this machine
    \b
    strongroom init --model MODEL.gguf --directory DIR             reference values: enclave.toml and policy.toml
    strongroom start --config DIR/enclave.toml --model MODEL.gguf  an enclave (emulated here)
    strongroom proxy --enclave NAME --listen 127.0.0.1:8080        HTTP in front of it
    strongroom ask "Why is the sky blue?" --policy DIR/policy.toml

    Exit codes: 0 ok, 1 verdict negative, 2 usage, 3 malformed or untrusted Evidence or answer, 4 unavailable.

    What is remembered, of enclaves and of release histories, is in the folder that STRONGROOM_HOME names, else below
    ~/.local.
    """


@click.command(cls=LazyGroup, where=IMAGE_COMMANDS, needs=IMAGE_NEEDS)
def image() -> None:
    """Build, measure and compare enclave images (EIF).

    \b
    Example:
      strongroom image build --oci layout --config enclave.toml --out enclave.eif   for a Nitro host
      strongroom image measure enclave.eif                                          PCR0, PCR1, PCR2, as nitro-cli says
      strongroom image policy enclave.eif --output policy.toml                      what a client must see
      strongroom image diff enclave.eif other.eif                                   why two of them differ
    """


@click.command(cls=LazyGroup, where=MODEL_COMMANDS, needs=MODEL_NEEDS)
def model() -> None:
    """Look at a model, and encrypt it, so that only the measured image can have it.

    \b
    Example:
      strongroom model inspect MODEL.gguf --context 4096 --parallel 4   what it is, and the memory that it takes
      strongroom model encrypt MODEL.gguf --policy policy.toml --out MODEL.sealed
      strongroom start --config enclave.toml --model MODEL.sealed
    """


def kms_signer(arn: str) -> Signer:
    """A key of KMS that signs. Commands of other rooms get it as their context's object."""
    from strongroom.kms.signer import KmsSigner  # an SDK, which hardly any command needs

    return KmsSigner(arn)


def main() -> NoReturn:
    """Runs a command and turns every error that was raised on purpose into one clear text and an exit code.

    An output that cannot be written is one of them, whatever the verdict was: 1 is for one that somebody could read.
    """
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    try:
        code = _run(as_json="--json" in sys.argv[1:])
        _flush()
    except OSError as error:
        code = _without_output(error)
    sys.exit(code)


def _run(*, as_json: bool) -> int:
    """The exit code. Raises OSError when what there is to say cannot be written."""
    try:
        code = strongroom.main(prog_name="strongroom", standalone_mode=False, obj=kms_signer)
    except Terminated:
        return TERMINATED
    except SystemExit:  # by click or rich, when whoever read our output has gone: their 1 would be a verdict here
        return INTERRUPTED
    except click.ClickException as error:
        if as_json:
            report(_as_json("usage", error.format_message()), "", as_json)
        else:
            error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except StrongroomError as error:
        report(error.as_json(), str(error), as_json)
        return error.exit_code
    except OSError as error:
        _flush()  # when it is our output that failed, it fails again
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        report(_as_json("system_error", text), text, as_json)
        return USAGE if isinstance(error, WRONG_FILE) else UNAVAILABLE
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"a defect of this program: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        report(_as_json("defect", text), text, as_json)
        return DEFECT
    return code if isinstance(code, int) else 0


def _flush() -> None:
    if sys.stdout is not None:  # a closed one: Python has none then, and prints nothing
        sys.stdout.flush()


def _without_output(error: OSError) -> int:
    """The exit code where standard output, or both outputs, cannot be written; a line says so where one can."""
    with contextlib.suppress(OSError):  # then there is nobody to tell
        if error.errno != errno.EPIPE:
            click.echo(f"strongroom: the output cannot be written: {error.strerror or error}", err=True)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # at exit Python flushes once more, and would put its own exit code in place of ours
            os.dup2(null, stream.fileno())
    return INTERRUPTED if error.errno == errno.EPIPE else UNAVAILABLE


class Terminated(SystemExit):
    """SIGTERM came. It ends a command as Ctrl-C does: through its ``finally`` blocks, so that nothing stays behind.

    It is a SystemExit because that is what an event loop lets through from wherever it was raised.
    """


def _terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


def report(body: dict[str, str | None], text: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": body}))
    else:
        from strongroom.render import printable  # when there is something to show, as with commands

        click.echo(f"strongroom: {printable(text)}", err=True)


def _as_json(code: str, message: str) -> dict[str, str | None]:
    return {"code": code, "message": message, "expected": None, "got": None}


if __name__ == "__main__":
    main()
