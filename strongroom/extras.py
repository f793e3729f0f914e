"""Which extra brings what, so that a command that lacks one says which to install, and not which import failed.

It imports the standard library alone: an installation for verification has nothing else that the commands need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from attestation.errors import StrongroomError

_CLI = ("click", "httpx2", "rich")
_SERVE = (*_CLI, "httptools", "starlette", "uvicorn")

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "cli": _CLI,
    "serve": _SERVE,
    "parent": (*_SERVE, "botocore", "dns", "prometheus_client"),
    "enclave": ("botocore", "jinja2", "llama_cpp", "pyasn1"),
    "kms": (*_CLI, "boto3"),
    "emulator": (*_CLI, "boto3", "moto"),
}
"""The extras of ``pyproject.toml`` that commands need, each with the modules that must be there."""


class MissingExtra(StrongroomError):
    """This installation cannot run the command: ``missing_extra``. ``install`` is the command line that helps."""

    exit_code = 2

    def __init__(self, what: str, extras: Sequence[str], missing: Sequence[str]) -> None:
        self.install = f"pip install 'strongroom[{','.join(extras)}]'"
        super().__init__("missing_extra", f"{what} lacks {', '.join(missing)}: {self.install}")


def require(what: str, extras: Sequence[str]) -> None:
    """Raises MissingExtra when ``what``, which needs ``extras``, would lack a module."""
    missing = {extra: [name for name in EXTRAS[extra] if find_spec(name) is None] for extra in extras}
    wanted = [extra for extra, names in missing.items() if names]
    if wanted:
        raise MissingExtra(what, wanted, sorted({name for names in missing.values() for name in names}))
