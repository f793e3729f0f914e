"""HTTP between client and parent: the names of PROTOCOL.md section 8.

The enclave has no HTTP, and a client has no server: what serves is in :mod:`vsockrpc.http_server`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

EVIDENCE_PATH = "/v1/evidence"
SEALED_PATH = "/v1/sealed"
ENVELOPE_PATH = "/v1/envelope"
EVIDENCE_TYPE = "application/vnd.strongroom.evidence+cbor"
SEALED_TYPE = "application/vnd.strongroom.sealed"
ENVELOPE_TYPE = "application/vnd.strongroom.envelope"
ANSWER_TYPE = "application/vnd.strongroom.answer"
"""The answer to what an envelope asked."""
KEY_ID_HEADER = "strongroom-key-id"
MAX_EVIDENCE_BYTES = 32768

STATUS_OF_FAULT: Mapping[str, int] = {
    "malformed": 400,
    "not_released": 403,
    "unknown_key": 409,
    "overloaded": 429,
    "unavailable": 503,
}
"""The closed list of clear faults (section 6.3) and the status that carries each."""


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or ``localhost``, is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
