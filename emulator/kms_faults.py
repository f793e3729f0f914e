"""What can be made to go wrong between the emulated KMS and its callers, on purpose.

A fault is injected for an operation or for all, for so many requests or until it is taken back. It changes what reaches
the caller, never what the service decides: an altered answer stands for a service, or somebody in its place, that lies.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from emulator.https import Cut
from emulator.kms_request import KmsFault


@dataclass(frozen=True, slots=True)
class Delay:
    """The answer waits so many seconds, and holds nobody else up."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """An error in place of the answer; the operation does not run."""

    code: str
    message: str = ""
    status: int = 400

    def fault(self) -> KmsFault:
        return KmsFault(self.code, self.message, status=self.status)


@dataclass(frozen=True, slots=True)
class Alter:
    """Another answer, made of the true one (as JSON has it). Refusals are left alone."""

    change: Callable[[Mapping[str, Any]], Mapping[str, Any]]


Fault: TypeAlias = Delay | Refuse | Cut | Alter

THROTTLED: Final = Refuse("ThrottlingException", "Rate exceeded")
INTERNAL: Final = Refuse("KMSInternalException", "An internal error has occurred.", 500)
UNAVAILABLE: Final = Refuse("ServiceUnavailableException", "Service is unavailable.", 503)
NO_DEPENDENCY: Final = Refuse("DependencyTimeoutException", "A dependency has timed out.", 503)
WITH_PLAINTEXT: Final = Alter(lambda answer: {**answer, "Plaintext": base64.b64encode(bytes(32)).decode("ascii")})
"""``Plaintext`` beside ``CiphertextForRecipient``."""
GARBAGE: Final = Alter(
    lambda answer: {**answer, "CiphertextForRecipient": base64.b64encode(b"\x30\x80garbage").decode("ascii")}
)


def another_key(arn: str) -> Alter:
    """The answer says that ``arn`` did it."""
    return Alter(lambda answer: {**answer, "KeyId": arn})


@dataclass(slots=True)
class _Injected:
    fault: Fault
    operation: str | None
    left: int | None


class Faults:
    """What is injected at present. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._injected: list[_Injected] = []

    def inject(self, fault: Fault, *, operation: str | None = None, times: int | None = None) -> None:
        """For ``operation`` or, if None, for each; for so many requests or, if None, until :meth:`clear`."""
        with self._lock:
            self._injected.append(_Injected(fault, operation, times))

    def clear(self) -> None:
        with self._lock:
            self._injected.clear()

    def due(self, operation: str) -> list[Fault]:
        """The faults of one request, in the order in which they were injected; each has happened once more then."""
        with self._lock:
            due = [each for each in self._injected if each.operation in (None, operation) and each.left != 0]
            for each in due:
                if each.left is not None:
                    each.left -= 1
            return [each.fault for each in due]
