"""``python -m enclave --config enclave.toml``: one enclave, from COLD to its end.

Relative socket addresses are relative to the working directory. Exit codes: 0 after SIGTERM or SIGINT, 2 when the
configuration cannot be used or the RPC cannot listen. A boot that halts does not exit: the enclave stays to say why
in its events, and answers nothing else.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything can be imported that nobody measured
    from enclave.imports import only_measured

    only_measured()

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from attestation.errors import StrongroomError
from enclave.boot import BootError, Enclave
from enclave.config import EnclaveConfiguration
from enclave.confine import forbid_core_dumps
from enclave.cpu import stated_features
from enclave.engine import Engine, LlamaEngine
from enclave.log import EngineLost, EngineStarted, EventLog, InternalError, Phase
from enclave.model import SealedModel
from enclave.nsm import DeviceTransport, open_nsm
from enclave.parent import find_parent
from enclave.pipe import Ready
from enclave.server import Server
from vsockrpc.transport import serve


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m enclave", description="Run one enclave.")
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the measured configuration, enclave.toml"
    )
    parser.add_argument(
        "--last-file", type=Path, metavar="FILE", help="of the image that this runs from: it does not begin without it"
    )
    options = parser.parse_args(arguments)
    forbid_core_dumps()
    forget_environment()
    try:
        require_whole(options.last_file)
        configuration = find_parent(EnclaveConfiguration.parse(options.config.read_bytes()))
        asyncio.run(run(configuration))
    except (StrongroomError, OSError) as error:
        # Nothing of a client can be in this text: the enclave has not listened yet.
        print(f"enclave: {error}", file=sys.stderr)
        return 2
    return 0


def require_whole(last: Path | None) -> None:
    """The kernel unpacks as much of an image as fits into half of the memory, which the parent chooses, and boots with
    that: measured whole, but cut off behind any file. Our init looks for that, AWS's does not. Raises BootError
    ``image_cut_off``.
    """
    if last is not None and not (last.is_file() and last.stat().st_size):
        raise BootError(
            "image_cut_off", "the image did not fit into the memory: start the enclave with more", expected=last
        )


def forget_environment() -> None:
    """Whatever could tell a library of a place, a key or a plugin: what counts is in the measured configuration."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "BOTO", "SSL", "HTTP", "http"))]:
        del os.environ[name]


async def run(configuration: EnclaveConfiguration) -> None:
    """Listens, boots and serves until a signal. Raises StrongroomError or OSError when it cannot listen."""
    log = EventLog()
    nsm = open_nsm(configuration.nsm)
    if isinstance(nsm.transport, DeviceTransport):
        nsm.transport.keep_from_others()
    enclave = Enclave(configuration, nsm, make_engine, log, cpu_features=stated_features())
    server = Server(enclave)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)

    def on_error(error: BaseException) -> None:
        if enclave.phase is Phase.SERVING:  # it may be one request's
            log.totals.defects += 1
        else:
            log.write(InternalError(type(error).__name__))

    async with serve(configuration.listen, server.handlers, on_error=on_error):
        background = [asyncio.ensure_future(enclave.boot()), asyncio.ensure_future(server.write_totals())]
        try:
            await ended.wait()
        finally:
            log.close()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await enclave.close()
            server.close()


def make_engine(configuration: EnclaveConfiguration, model: SealedModel, log: EventLog) -> Engine:
    def started(ready: Ready) -> None:
        read = ready.model
        log.write(EngineStarted(ready.own_user, ready.seccomp, read.family, read.reasons, read.calls))

    def restarted() -> None:
        log.totals.engine_restarts += 1

    return LlamaEngine(
        model.fd,
        model.manifest.chat_template,
        configuration.engine,
        on_start=started,
        on_exit=restarted,
        on_lost=lambda kind: log.write(EngineLost(kind)),
    )


if __name__ == "__main__":
    sys.exit(main())
