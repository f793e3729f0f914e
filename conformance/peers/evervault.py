"""``evervault-attestation-bindings`` (PyPI, 0.5.0), the Python face of Evervault's Rust verifier.

    python -m conformance --no-vectors --real DIR --command "python -m conformance.peers.evervault"

It has AWS's root built in and takes the time from the system, so each question runs in a process of its own whose clock
Debian's ``faketime`` sets. The package's entry point ends with a check of its product's: that ``user_data`` is the
public key of the TLS certificate. A document that fails nothing before that has passed all that AWS's process asks, and
counts as accepted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC

import cbor2
from evervault_attestation_bindings import attest_enclave

from conformance.protocol import MAX_ANSWER, Answer, Question, Verdict, serve

_NO_USER_DATA = "User data was not set in the attestation doc"
_OTHER_KEY = "The public key length in the attestation doc was invalid"
"""What the last check says. An earlier one says the same of a ``public_key`` that is empty or too long."""


def at_its_time(question: Question) -> Answer:
    """The answer of a process whose clock shows the verification time."""
    started = question.time.astimezone(UTC).strftime("@%Y-%m-%d %H:%M:%S")
    command = ["faketime", "-f", started, sys.executable, "-m", "conformance.peers.evervault", "--now"]
    environment = {**os.environ, "TZ": "UTC"}
    run = subprocess.run(command, input=question.encode(), env=environment, capture_output=True, check=True, timeout=60)
    return Answer.decode(run.stdout[:MAX_ANSWER], question.id)


def now(question: Question) -> Answer:
    """The package's answer, at the time of the system."""
    try:
        # Any certificate serves as that of the connection, since the check of it is not what is asked.
        attest_enclave(question.anchor, [], question.payload)
    except ValueError as error:
        said = str(error)
        passed = _NO_USER_DATA in said or (_OTHER_KEY in said and _has_fit_public_key(question.payload))
        return Answer(Verdict.ACCEPTED if passed else Verdict.REFUSED)
    return Answer(Verdict.ACCEPTED)


def _has_fit_public_key(document: bytes) -> bool:
    """Absent, or as long as AWS's text allows: decoded after the package has decoded it, and found it good so far."""
    outer = cbor2.loads(document)
    payload = cbor2.loads((outer.value if isinstance(outer, cbor2.CBORTag) else outer)[2])
    return payload["public_key"] is None or 1 <= len(payload["public_key"]) <= 1024


if __name__ == "__main__":
    serve(now if sys.argv[1:] == ["--now"] else at_its_time)
