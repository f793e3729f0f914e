"""Keeps one enclave running on this host, whichever machine it runs on: serves its model and its way to KMS, gives an
emulated one its NSM, writes its events down, and boots it again when it dies.

A boot starts with a fresh NSM: registers do not survive. What is booted again must still be what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attestation.errors import StrongroomError
from attestation.manifest import ModelManifest
from attestation.reference import PcrSet, digest_text
from parent.config import LaunchConfiguration
from parent.events import Event, EventError, EventReader
from parent.launch.child import child, jailed, last_words
from parent.launch.machine import LaunchError, Machine
from parent.modelstore import ModelStore
from parent.registry import Instance, State
from vsockrpc.address import VsockAddress
from vsockrpc.transport import ConnectionLost, Fault, connect, serve

if TYPE_CHECKING:
    from parent.egress_service import EgressSettings

FIRST_PAUSE_SECONDS = 0.1
FIRST_KMS_PAUSE_SECONDS = 1.0
"""Before a boot is tried again that halted because KMS was away; each further pause is twice as long."""
PASSING_HALTS = frozenset(("kms_unreachable", "kms_timeout", "kms_throttled", "kms_failed"))
"""Why a boot may halt that another one may not."""
MAX_FRUITLESS_BOOTS = 5
"""Boots in a row that end before they serve."""
PKI_ENVIRONMENT = ("HOME", "STRONGROOM_HOME", "XDG_DATA_HOME")
"""By which the software NSM finds this user's development root. An enclave gets none of the environment."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run, and on what. ``egress`` is for a configuration with KMS: None lets the enclave reach its KMS
    endpoint and nothing else, with the credentials of botocore's chain.
    """

    instance: Instance
    machine: Machine
    model: ModelStore | None
    """What the enclave's weights come from. None: they are in its image."""
    egress: EgressSettings | None = None


class Supervisor:
    """Keeps one enclave running until it is told to stop or its boot halts."""

    def __init__(
        self, launch: Launch, *, on_change: Callable[[State], None], on_event: Callable[[Event], None]
    ) -> None:
        self._launch = launch
        self._machine = launch.machine
        self._places = launch.machine.places
        self._on_change = on_change
        self._on_event = on_event
        self._disk_failed = False
        self._unheard = False
        self._instance = launch.instance
        self._configuration = LaunchConfiguration.load(launch.instance.configuration)
        self._state = State(
            name=self._instance.name,
            launcher=self._machine.launcher,
            pid=os.getpid(),
            phase="MEASURING",
            address=str(self._places.rpc),
            started_at=time.time(),
            model=self._configuration.manifest if launch.model is None else _described(launch.model.manifest),
        )

    async def run(self) -> State:
        """Runs until SIGTERM or SIGINT, or until a boot halts, and returns the state at the end: ``error`` says why it
        halted.
        """
        lock = self._instance.lock()
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        try:
            self._enter("MEASURING")
            measured = await self._machine.measure()
            self._state.pcrs = {str(index): value.hex() for index, value in measured.as_registers().items()}
            async with self._model(), self._egress():
                supervising = asyncio.ensure_future(self._keep_running(measured))
                waiting = asyncio.ensure_future(stopping.wait())
                await asyncio.wait({supervising, waiting}, return_when=asyncio.FIRST_COMPLETED)
                for task in (supervising, waiting):
                    task.cancel()
                await asyncio.gather(supervising, waiting, return_exceptions=True)
            if supervising.cancelled():
                self._enter("STOPPED")
            else:
                self._fail(await supervising)
        except StrongroomError as error:
            self._fail(error.as_json())
        finally:
            os.close(lock)
        return self._state

    @contextlib.asynccontextmanager
    async def _model(self) -> AsyncIterator[None]:
        """The model store, for as long as the enclave is supervised."""
        store, address = self._launch.model, self._places.store
        if store is None or address is None:
            yield
            return
        async with serve(address, store.handlers, on_error=self._note):
            yield

    @contextlib.asynccontextmanager
    async def _egress(self) -> AsyncIterator[None]:
        """The enclave's way to KMS, beside its other sockets, for as long as it is supervised."""
        kms, address = self._configuration.kms, self._places.egress
        if kms is None or address is None:
            yield
            return
        from parent.egress import Allowed  # its resolver takes 0.1 s to load, which `ps` and `logs` need not wait for
        from parent.egress_service import EgressSettings, serve_egress

        settings = self._launch.egress or EgressSettings([Allowed.parse(kms.endpoint)])
        if isinstance(self._places.rpc, VsockAddress):  # a port of vsock is open to every enclave of the host
            settings = replace(settings, enclave_cid=self._places.rpc.cid)
        async with serve_egress(address, settings, on_error=self._note, warn=self._say):
            yield

    async def _keep_running(self, measured: PcrSet) -> dict[str, str | None]:
        """Boots again whenever something dies, and when KMS was away. Returns why a boot halted: doing the same again
        would not help then, or has not helped.
        """
        fruitless = 0
        while True:
            halted = await self._one_boot(measured)
            if halted is not None and halted["code"] not in PASSING_HALTS:
                return halted
            fruitless = 0 if self._state.phase == "SERVING" else fruitless + 1
            if fruitless == MAX_FRUITLESS_BOOTS:
                if halted is not None:
                    return halted
                raise LaunchError(
                    "does_not_come_up",
                    f"the enclave died {fruitless} times before it served; {self._instance.log} may say why",
                    got=last_words(self._instance) or "nothing was said",
                )
            self._state.restarts += 1
            self._enter("RESTARTING")
            first = FIRST_PAUSE_SECONDS if halted is None else FIRST_KMS_PAUSE_SECONDS
            await asyncio.sleep(first * 2**fruitless)
            await self._require_same(measured)

    async def _require_same(self, measured: PcrSet) -> None:
        """A boot runs the files as they are now, so they must still be those that were measured. Raises LaunchError."""
        now = await self._machine.measure()
        if now != measured:
            raise LaunchError(
                "image_changed",
                "the enclave's files changed while it ran: start it again to run the new ones",
                expected=f"PCR0 {measured.pcr0.hex()}",
                got=f"PCR0 {now.pcr0.hex()}",
            )

    async def _one_boot(self, measured: PcrSet) -> dict[str, str | None] | None:
        """From a fresh NSM to the end of either process. Returns the reason when the boot halted, None when something
        died.
        """
        self._enter("STARTING")
        async with self._nsm(measured) as module, self._machine.boot(measured) as enclave:
            self._state.network = await enclave.network()
            following = asyncio.ensure_future(self._follow_events())
            ended = asyncio.ensure_future(enclave.wait())
            ends: set[asyncio.Future[Any]] = {following, ended}
            if module is not None:
                ends.add(asyncio.ensure_future(module.wait()))
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if ended.done() and (reason := ended.result()) is not None:
                    return reason.as_json()
                return self._end_of(following) if following.done() else None
            finally:
                for end in ends:
                    end.cancel()
                await asyncio.gather(*ends, return_exceptions=True)

    def _end_of(self, following: asyncio.Future[dict[str, str | None]]) -> dict[str, str | None] | None:
        """What the end of the events means: the reason of a halt, or None for a death, whose reason is logged. Anything
        else is a defect here, and booting a healthy enclave again would hide it: it is noted and raised.
        """
        try:
            return following.result()
        except (ConnectionLost, Fault, TimeoutError, EventError) as death:
            self._log(f"strongroom: following the enclave's events ended: {death or type(death).__name__}\n")
            return None
        except Exception as defect:
            self._note(defect)
            raise

    @contextlib.asynccontextmanager
    async def _nsm(self, measured: PcrSet) -> AsyncIterator[asyncio.subprocess.Process | None]:
        """A software NSM with what was measured in its registers, for a machine that has none."""
        if self._places.nsm is None:
            yield None
            return
        registers = [
            argument for index, value in measured.as_registers().items() for argument in (f"--pcr{index}", value.hex())
        ]
        command = jailed([sys.executable, "-I", "-m", "emulator.nsm", "--listen", str(self._places.nsm), *registers])
        pki = {name: os.environ[name] for name in PKI_ENVIRONMENT if name in os.environ}
        async with child(self._instance, command, stdout=subprocess.PIPE, environment=pki) as process:
            assert process.stdout is not None
            ready = await process.stdout.readline()
            if not ready:
                raise LaunchError("nsm_failed", "the software NSM did not start", got=last_words(self._instance))
            yield process

    async def _follow_events(self) -> dict[str, str | None]:
        """Writes the enclave's events down as they come. Returns when the boot has halted; ends with ConnectionLost
        when the enclave dies, and with EventError when it says what is no event.
        """
        deadline = time.monotonic() + self._machine.listen_seconds
        while True:
            try:
                async with connect(self._places.rpc) as client, client.call("events", {}) as call:
                    await call.send(b"", end=True)
                    return await self._write_events(aiter(call))
            except (ConnectionLost, Fault):
                if self._state.phase != "STARTING" or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def _write_events(self, chunks: AsyncIterator[bytes | memoryview]) -> dict[str, str | None]:
        reader = EventReader()
        async for chunk in chunks:
            for line, event in reader.feed(chunk):
                self._append(self._instance.events, line + b"\n")
                self._tell(partial(self._on_event, event))
                if event["event"] == "phase":
                    self._enter(event["phase"])
                elif event["event"] == "halted":
                    return {key: event[key] for key in ("code", "message", "expected", "got")}
        raise ConnectionLost("the enclave ended its events")

    def _note(self, error: BaseException) -> None:
        """A defect on this side goes to the supervisor's log, not to the enclave."""
        self._log("".join(traceback.format_exception(error)))

    def _log(self, text: str) -> None:
        self._append(self._instance.log, text.encode("utf-8", "backslashreplace"))

    def _append(self, path: Path, data: bytes) -> None:
        def write() -> None:
            with path.open("ab", buffering=0) as file:
                file.write(data)

        self._write(write)

    def _enter(self, phase: str) -> None:
        self._state.phase = phase
        self._write(partial(self._instance.write_state, self._state))
        self._tell(partial(self._on_change, self._state))

    def _tell(self, tell: Callable[[], None]) -> None:
        """Tells whoever watches. A pipe that they left must not end an enclave that serves: it is noted once, and the
        enclave goes on.
        """
        try:
            tell()
        except OSError as error:
            if not self._unheard:
                self._unheard = True
                self._note(error)

    def _write(self, write: Callable[[], object]) -> None:
        """Writes into the operator's notebook. A full disk must not end an enclave that serves: it is said once, and
        the enclave goes on.
        """
        try:
            write()
        except OSError as error:
            if not self._disk_failed:
                self._disk_failed = True
                self._say(f"{self._instance.directory}: {error.strerror}; events are being lost")

    def _say(self, text: str) -> None:
        self._tell(partial(print, f"strongroom: {text}", file=sys.stderr))

    def _fail(self, error: dict[str, str | None]) -> None:
        self._state.error = error
        self._enter("FAILED")


def _described(manifest: ModelManifest) -> str:
    return f"{manifest.name} {digest_text(manifest.digest())}"
