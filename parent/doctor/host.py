"""The machine as a check sees it: files below a root, programs, the clock, and places in the network.

Whatever is asked, there is an answer within :data:`SECONDS`, and nothing is changed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import ssl
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from parent.egress import Allowed, first_connected
from parent.names import Names, UnresolvedName

SECONDS: Final = 8.0
"""For a program, or for a connection with its TLS handshake and first answer."""
MAX_TEXT: Final = 1 << 20
"""Bytes of a file that are read, and of what a program prints."""
MAX_HEAD: Final = 16_384
"""Bytes of a server's answer in which its date is looked for."""

_TIMEX: Final = struct.Struct("=I4xqqqqi")
"""The beginning of ``struct timex`` (adjtimex(2)) where long has 64 bits: modes, offset, frequency, maximum error,
estimated error, status."""
_TIMEX_SIZE: Final = 256
_STA_UNSYNC: Final = 0x40


class Unreached(Exception):
    """A place does not answer. ``stage`` is where it ended: ``name``, ``connection``, ``tls``, ``answer`` or
    ``deadline``."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Ran:
    """A program's end. ``status`` is None for one that is not there or did not end in time."""

    status: int | None
    output: str
    """The beginning of what it printed on both outputs."""


@dataclass(frozen=True, slots=True)
class Clock:
    """What the kernel says of its clock (adjtimex(2))."""

    synchronised: bool
    maximum_error: float
    """Seconds, as the kernel bounds it. It means nothing where the clock is not synchronised."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A place that answered over TLS, with a certificate for its name."""

    ahead: float | None
    """Seconds by which this machine's clock is ahead of the place's; None where its answer had no date."""


class Host:
    """The machine that this runs on. Tests give another ``root`` and their own answers."""

    def __init__(self, root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.environment: Mapping[str, str] = os.environ if environment is None else environment

    # --- Files -------------------------------------------------------------------------------------------------------

    def path(self, path: str | Path) -> Path:
        """Where an absolute path of the machine is."""
        return self.root / str(path).lstrip("/")

    def exists(self, path: str | Path) -> bool:
        return os.path.exists(self.path(path))

    def text(self, path: str | Path) -> str | None:
        """At most the first :data:`MAX_TEXT` bytes; None for what is not there or cannot be read."""
        try:
            with self.path(path).open("rb") as file:
                return file.read(MAX_TEXT).decode("utf-8", "replace")
        except OSError:
            return None

    def may_use(self, path: str | Path) -> bool:
        """This user may read and write it."""
        return os.access(self.path(path), os.R_OK | os.W_OK)

    def free(self, path: str | Path) -> int:
        """Bytes that this user may still write where ``path`` is or would be. Raises OSError."""
        place = self.path(path)
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free

    # --- Programs ----------------------------------------------------------------------------------------------------

    def program(self, name: str) -> str | None:
        """Its path."""
        return shutil.which(name, path=self.environment.get("PATH"))

    def run(self, *command: str) -> Ran:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                env=dict(self.environment),
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return Ran(None, type(error).__name__)
        return Ran(done.returncode, done.stdout[:MAX_TEXT].decode("utf-8", "replace"))

    # --- Who, and when -----------------------------------------------------------------------------------------------

    def user(self) -> str:
        """For a text: the name, or the number where there is none."""
        return self.environment.get("USER") or str(os.getuid())

    def is_superuser(self) -> bool:
        """Root, for whom no permission says anything."""
        return os.geteuid() == 0

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def clock(self) -> Clock | None:
        """None where the kernel does not say."""
        timex = ctypes.create_string_buffer(_TIMEX_SIZE)  # modes 0: asks, and sets nothing
        if ctypes.CDLL(None).adjtimex(timex) < 0:
            return None
        _, _, _, maximum_error, _, status = _TIMEX.unpack_from(timex.raw)
        return Clock(not status & _STA_UNSYNC, maximum_error / 1_000_000)

    # --- The network -------------------------------------------------------------------------------------------------

    def reach(self, place: Allowed, authority: bytes | None = None) -> Reached:
        """Connects, speaks TLS for the name that was asked for, asks for ``/`` and reads the date of the answer.

        ``authority`` (DER) is the one certificate that is trusted; None stands for those of the system. Raises
        Unreached.
        """
        return asyncio.run(self._reach(place, authority))

    async def _reach(self, place: Allowed, authority: bytes | None) -> Reached:
        try:
            async with asyncio.timeout(SECONDS):
                return await self._answer_of(place, authority)
        except TimeoutError as error:
            raise Unreached("deadline", f"no answer within {SECONDS:g} s") from error

    async def _answer_of(self, place: Allowed, authority: bytes | None) -> Reached:
        names = Names(hosts=self.path("/etc/hosts"), resolv_conf=self.path("/etc/resolv.conf"))
        try:
            addresses = await names.addresses(place.target.host)
        except UnresolvedName as error:
            raise Unreached("name", str(error)) from error
        finally:
            await names.close()
        try:
            sock = await first_connected(addresses, place.target.port)
        except OSError as error:
            raise Unreached("connection", error.strerror or type(error).__name__) from error
        try:
            trusted = None if authority is None else ssl.DER_cert_to_PEM_cert(authority)
            context = ssl.create_default_context(cadata=trusted)
            reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=place.asked.host)
        except (OSError, ValueError) as error:  # ValueError: no certificate, or a host that no certificate can name
            sock.close()
            raise Unreached("tls", str(error)) from error
        try:
            writer.write(f"HEAD / HTTP/1.1\r\nHost: {place.asked.host}\r\nConnection: close\r\n\r\n".encode("ascii"))
            head = await reader.read(MAX_HEAD)
        except OSError as error:
            raise Unreached("answer", error.strerror or type(error).__name__) from error
        finally:
            writer.transport.abort()
        return Reached(self._ahead_of(head))

    def _ahead_of(self, head: bytes) -> float | None:
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"date":
                try:
                    return self.now() - parsedate_to_datetime(value.decode("ascii").strip()).timestamp()
                except (ValueError, OverflowError):
                    return None
        return None
