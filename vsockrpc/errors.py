"""What goes wrong on the wire, told apart by whose doing it is.

A call ends in one of three ways, and a program must not confuse them: cleanly (its data ends), with a ``Fault`` (the
other side, or a deadline, says no), or with ``ConnectionLost`` (nobody knows what became of it).
"""

from __future__ import annotations

from attestation.errors import StrongroomError


class AddressError(StrongroomError):
    """A text that is no address, or an address that this system cannot use. Code ``bad_address``."""

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("bad_address", message, expected=expected, got=got)


class LocalProtocolError(StrongroomError):
    """This side asked its own connection for something that the protocol forbids: a bug here. Nothing was sent."""


class RemoteProtocolError(StrongroomError):
    """The other side broke PROTOCOL.md section 5. The connection is over; ``code`` names the rule.

    Codes: ``bad_header``, ``oversized_frame``, ``malformed_payload``, ``no_hello``, ``unexpected_frame``,
    ``unknown_call``, ``call_number``, ``too_many_calls``, ``window_exceeded``, ``window_overflow``, ``bad_ping``,
    ``truncated``.
    """


class Fault(StrongroomError):
    """A call was refused or given up. ``code`` and ``message`` are those of the FAULT frame: from the other side
    they are a claim, no proof.
    """

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message or code.replace("_", " "))


class ConnectionLost(StrongroomError):
    """The connection could not be made (code ``unreachable``) or is gone (``connection_lost``); what became of a call
    on it is unknown.
    """

    def __init__(self, message: str, *, code: str = "connection_lost") -> None:
        super().__init__(code, message)
