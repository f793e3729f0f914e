"""The operator's commands for what was started: ps, logs, stop, proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click
from rich.console import Console

from parent.events import EventReader
from parent.launch.machine import LaunchError
from parent.proxy import Proxy
from parent.registry import Registry, RegistryError
from vsockrpc.address import Address, parse_address
from vsockrpc.errors import AddressError, ConnectionLost, Fault
from vsockrpc.http_server import listen_on, parse_listen, serve_http
from vsockrpc.transport import connect

err = Console(stderr=True, highlight=False)

POLL_SECONDS = 0.05
STOP_SECONDS = 30
QUIET_SECONDS = 1.0
"""Without a new event, before an enclave is taken to have told its recent ones."""
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


# --- ps, logs, stop -----------------------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def ps(as_json: bool) -> None:
    """List the enclaves that were started here.

    \b
    Example:
      strongroom ps
      strongroom ps --json
    """
    states = [state for instance in Registry.of_user().all() if (state := instance.read_state()) is not None]
    if as_json:
        click.echo(json.dumps([asdict(state) for state in states]))
        return
    if not states:
        click.echo("no enclaves")
        return
    rows = [("name", "phase", "since", "boots", "network", "address")]
    for state in states:
        since = str(timedelta(seconds=int(time.time() - state.started_at)))
        rows.append((state.name, state.phase, since, str(state.restarts + 1), state.network, state.address))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reasons = [None, *(state.error for state in states)]
    for row, reason in zip(rows, reasons, strict=True):
        click.echo("  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip())
        if reason is not None:
            click.echo(f"  {LaunchError.of(reason)}")


@click.command()
@click.argument("name", required=False)
@click.option(
    "--enclave",
    metavar="ADDRESS",
    help="Instead of a name of `strongroom ps`: where an enclave is that was started otherwise, vsock:CID:PORT, "
    "unix:PATH or tcp:HOST:PORT.",
)
@click.option("-f", "--follow", is_flag=True, help="Wait for more until Ctrl-C or the enclave's end.")
def logs(name: str | None, enclave: str | None, follow: bool) -> None:
    """Print an enclave's events, one JSON object a line.

    The events come from a closed catalogue and hold nothing of any prompt or answer. With --enclave the enclave itself
    is asked, and says its recent ones: what nobody wrote down is gone with it.

    \b
    Example:
      strongroom logs demo
      strongroom logs demo --follow
      strongroom logs --enclave vsock:16:5005 --follow
    """
    if enclave is not None:
        if name is not None:
            raise click.UsageError("name an enclave, or an --enclave ADDRESS")
        asyncio.run(print_events(enclave_address(enclave), follow=follow))
        return
    name = name or "enclave"
    instance = Registry.of_user().find(name)
    if not instance.events.exists() and not follow:
        return
    instance.events.touch()
    with instance.events.open() as file:
        while True:
            for line in file:
                click.echo(line, nl=False)
            if not follow or not instance.supervised():
                return
            time.sleep(POLL_SECONDS)


async def print_events(address: Address, *, follow: bool) -> None:
    """Those that an enclave has; without ``follow`` until none has come for :data:`QUIET_SECONDS`, since nothing in
    the protocol ends the recent ones. Raises ConnectionLost, Fault, EventError, AddressError.
    """
    reader = EventReader()
    try:
        async with connect(address) as client, client.call("events", {}) as call:
            await call.send(b"", end=True)
            pieces = aiter(call)
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                while True:
                    async with asyncio.timeout(None if follow else QUIET_SECONDS):
                        piece = await anext(pieces)
                    for line, _ in reader.feed(piece):
                        click.echo(line.decode("ascii"))
    except Fault as fault:
        raise Fault(fault.code, f"{address} tells no events: {fault.message}") from fault
    except ConnectionLost as lost:
        ended = "" if lost.code == "unreachable" else ", and the enclave with it, or the way to it"
        raise ConnectionLost(f"{lost.message}{ended}", code=lost.code) from lost


@click.command()
@click.argument("name", default="enclave")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stop(name: str, as_json: bool) -> None:
    """Stop an enclave and remove its folder. Its keys die with it.

    \b
    Example:
      strongroom stop demo
    """
    instance = Registry.of_user().find(name)
    state = instance.read_state()
    if state is not None and instance.supervised():
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while instance.supervised():
            if time.monotonic() > deadline:
                raise RegistryError(
                    "does_not_stop", f"{name} does not stop; its supervisor is process {state.pid}", got=name
                )
            time.sleep(POLL_SECONDS)
    instance.remove()
    click.echo(json.dumps({"stopped": name}) if as_json else f"stopped {name}")


# --- proxy --------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--enclave",
    default="enclave",
    show_default=True,
    metavar="ADDRESS",
    help="vsock:CID:PORT, unix:PATH, tcp:HOST:PORT or a name of `strongroom ps`.",
)
@click.option(
    "--listen",
    default="127.0.0.1:8080",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients connect; port 0 takes a free one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def proxy(enclave: str, listen: str, as_json: bool) -> None:
    """Carry HTTP to an enclave: ciphertext, and nothing that it could read.

    It may start before its enclave does: until then /healthz and every request say that it is unavailable.

    \b
    Example:
      strongroom proxy --enclave demo --listen 127.0.0.1:8080
      curl http://127.0.0.1:8080/healthz
    """
    address = parse_listen(listen)
    application = Proxy(enclave_address(enclave)).application()
    listener = listen_on(address)
    host, port = listener.getsockname()[:2]

    def ready() -> None:
        click.echo(json.dumps({"listening": f"{host}:{port}"}) if as_json else f"proxy: http://{host}:{port}")
        sys.stdout.flush()

    asyncio.run(serve_http(application, listener, ready=ready))


def enclave_address(text: str) -> Address:
    """An address, or the name of an enclave that was started here."""
    if ":" in text:
        try:
            return parse_address(text)
        except AddressError as error:
            raise click.BadParameter(str(error), param_hint="--enclave") from error
    instance = Registry.of_user().find(text)
    state = instance.read_state()
    if state is None:
        raise RegistryError("not_started", f"{text} has not begun to start", got=text)
    return parse_address(state.address)
