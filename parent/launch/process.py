"""The process launcher: an emulated enclave as its own processes on this host, supervised.

It measures the files that it is about to run, as the hypervisor measures an image, gives the measurements to a
software NSM, and starts the enclave beside it without network and under limits. What it starts is what it measured:
bytecode comes from a cache of its own, never from beside the sources. An enclave whose NSM or server dies is booted
again with a fresh NSM: registers do not survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attestation.errors import StrongroomError
from attestation.manifest import ModelManifest
from attestation.process_image import measure_process_image
from attestation.reference import PcrSet, digest_text
from parent.config import LaunchConfiguration
from parent.events import Event, EventError, EventReader
from parent.modelstore import ModelStore
from parent.registry import Instance, State, state_home
from vsockrpc.address import UnixAddress
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
STOP_SECONDS = 10
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
PKI_ENVIRONMENT = ("HOME", "STRONGROOM_HOME", "XDG_DATA_HOME")
"""By which the software NSM finds this user's development root. The enclave gets none of the environment."""
UNUSABLE = 2
"""The exit code of an enclave that could not begin, for its configuration or because it cannot listen: starting it
again would not help.
"""
LISTEN_SECONDS = 60
MEMORY_SLACK = 6 << 30
"""Address space besides twice the model: Python, llama.cpp's buffers and the reserve of its threads' stacks."""


class LaunchError(StrongroomError):
    """The enclave cannot be started here."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start, and under which limits. ``memory`` is bytes of address space a process, ``cpus`` a count; 0 takes
    the defaults. ``egress`` is for a configuration with KMS: None lets the enclave reach its KMS endpoint and nothing
    else, with the credentials of botocore's chain.
    """

    instance: Instance
    manifest: ModelManifest
    model: Path
    memory: int = 0
    cpus: int = 0
    egress: EgressSettings | None = None


class Supervisor:
    """Keeps one emulated enclave running until it is told to stop or its boot halts."""

    def __init__(
        self, launch: Launch, *, on_change: Callable[[State], None], on_event: Callable[[Event], None]
    ) -> None:
        self._launch = launch
        self._on_change = on_change
        self._on_event = on_event
        self._bytecode = Path()
        self._disk_failed = False
        self._unheard = False
        self._instance = launch.instance
        self._configuration = LaunchConfiguration.load(launch.instance.configuration)
        self._state = State(
            name=self._instance.name,
            launcher="process",
            pid=os.getpid(),
            phase="MEASURING",
            address=f"unix:{self._instance.directory / self._configuration.listen.path}",
            started_at=time.time(),
            model=f"{launch.manifest.name} {digest_text(launch.manifest.digest())}",
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
            measured = await self._measure()
            self._bytecode = bytecode_cache(measured)
            self._state.pcrs = {str(index): value.hex() for index, value in measured.as_registers().items()}
            kms = self._configuration.kms
            store = ModelStore(
                self._launch.manifest, self._launch.model, encrypted=kms is not None and kms.encrypted_model
            )
            address = UnixAddress(str(self._instance.directory / self._configuration.store.path))
            async with serve(address, store.handlers, on_error=self._note), self._egress():
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
    async def _egress(self) -> AsyncIterator[None]:
        """The enclave's way to KMS, beside its other sockets, for as long as it is supervised."""
        kms = self._configuration.kms
        if kms is None:
            yield
            return
        from parent.egress import Allowed  # its resolver takes 0.1 s to load, which `ps` and `logs` need not wait for
        from parent.egress_service import EgressSettings, serve_egress

        settings = self._launch.egress or EgressSettings([Allowed.parse(kms.endpoint)])
        address = UnixAddress(str(self._instance.directory / kms.egress.path))
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
                    got=self._last_words() or "nothing was said",
                )
            self._state.restarts += 1
            self._enter("RESTARTING")
            first = FIRST_PAUSE_SECONDS if halted is None else FIRST_KMS_PAUSE_SECONDS
            await asyncio.sleep(first * 2**fruitless)
            await self._require_same(measured)

    async def _measure(self) -> PcrSet:
        return await asyncio.to_thread(measure_process_image, Path(sys.executable), self._instance.configuration)

    async def _require_same(self, measured: PcrSet) -> None:
        """A boot runs the files as they are now, so they must still be those that were measured. Raises LaunchError."""
        now = await self._measure()
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
        async with self._nsm(measured) as nsm, self._enclave() as enclave:
            self._state.network = await _network_of(enclave.pid)
            following = asyncio.ensure_future(self._follow_events())
            ends = {asyncio.ensure_future(nsm.wait()), asyncio.ensure_future(enclave.wait()), following}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if enclave.returncode == UNUSABLE:
                    return {"code": "enclave_unusable", "message": self._last_words(), "expected": None, "got": None}
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
    async def _nsm(self, measured: PcrSet) -> AsyncIterator[asyncio.subprocess.Process]:
        registers = [
            argument for index, value in measured.as_registers().items() for argument in (f"--pcr{index}", value.hex())
        ]
        socket = self._configuration.nsm
        command = ["-m", "emulator.nsm", "--listen", f"unix:{socket.path}", *registers]
        async with self._child(command, PKI_ENVIRONMENT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            ready = await process.stdout.readline()
            if not ready:
                raise LaunchError("nsm_failed", "the software NSM did not start", got=self._last_words())
            yield process

    @contextlib.asynccontextmanager
    async def _enclave(self) -> AsyncIterator[asyncio.subprocess.Process]:
        memory = self._launch.memory or 2 * sum(file.size for file in self._launch.manifest.files) + MEMORY_SLACK
        jail = ["-m", "parent.launch.jail", "--parent", str(os.getpid()), "--no-network"]
        jail += ["--address-space", str(memory)]
        if self._launch.cpus:
            jail += ["--cpus", str(self._launch.cpus)]
        command = [*jail, "--", *self._python(), "-m", "enclave", "--config", self._instance.configuration.name]
        async with self._child(command, (), stdout=subprocess.DEVNULL) as process:
            yield process

    def _python(self) -> list[str]:
        """The measured interpreter, isolated from the environment, with a bytecode cache that nothing else writes."""
        return [sys.executable, "-I", "-X", f"pycache_prefix={self._bytecode}"]

    @contextlib.asynccontextmanager
    async def _child(
        self, arguments: Sequence[str], keep: Sequence[str], *, stdout: int
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        with self._instance.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._python(),
                *arguments,
                cwd=self._instance.directory,
                env={**ENVIRONMENT, **{name: os.environ[name] for name in keep if name in os.environ}},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    async with asyncio.timeout(STOP_SECONDS):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()

    async def _follow_events(self) -> dict[str, str | None]:
        """Writes the enclave's events down as they come. Returns when the boot has halted; ends with ConnectionLost
        when the enclave dies, and with EventError when it says what is no event.
        """
        address = UnixAddress(str(self._instance.directory / self._configuration.listen.path))
        deadline = time.monotonic() + LISTEN_SECONDS
        while True:
            try:
                async with connect(address) as client, client.call("events", {}) as call:
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

    def _last_words(self) -> str:
        """The end of what the children wrote before they served anybody."""
        return self._instance.log.read_text(errors="replace").strip()[-500:]

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


def bytecode_cache(measured: PcrSet) -> Path:
    """A folder for compiled bytecode that only these very files fill: Python compares a cache with its source by time
    and size alone. Those of other measurements are removed.
    """
    caches = state_home() / "bytecode"
    ours = caches / measured.pcr0.hex()[:32]
    for other in caches.glob("*"):
        if other != ours:
            shutil.rmtree(other, ignore_errors=True)
    return ours


async def _network_of(pid: int) -> str:
    """``none`` for a process in a network namespace of its own, else ``host``. The jail needs a moment to enter it."""
    ours = os.readlink("/proc/self/ns/net")
    for _ in range(20):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/net") != ours:
                return "none"
        await asyncio.sleep(0.05)
    return "host"
