"""Checks of the clock, and of the places that an enclave reaches through this host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from parent.doctor.findings import Aim, Finding, Wanted, note, ok, problem
from parent.doctor.host import Host, Unreached

MAX_SKEW: Final = 300.0
"""Seconds: AWS refuses a request that was signed so long before or after (Signature Version 4)."""
WORTH_KNOWING: Final = 5.0
"""Seconds. A date in an answer is cut to the second, and the answer takes its time."""
DO: Final = {
    "name": "ask why this host's name server (/etc/resolv.conf) does not know the name",
    "connection": "open the way: route, security group, network ACL or VPC endpoint, for TCP to this port",
    "tls": "find out who answers there in place of the endpoint; a proxy that breaks TLS is refused",
    "answer": "try again; a load balancer between may have cut it off",
    "deadline": "open the way: packets are dropped (security group or network ACL), or use a VPC endpoint",
}
SET_CLOCK: Final = "sudo systemctl enable --now chronyd (on Debian: systemd-timesyncd or chrony)"


def clock(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """That something keeps it. Nothing that protects a client rests on it; signatures to AWS do."""
    said = host.clock()
    if said is None:
        yield note("clock", "the kernel does not say whether its clock is synchronised")
    elif said.synchronised:
        yield ok("clock", f"synchronised, within {said.maximum_error * 1000:.0f} ms")
    else:
        yield note("clock", "nothing says that this clock is synchronised", todo=SET_CLOCK)


def places(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Each answers over TLS, and KMS's clock agrees with ours."""
    for place, authority in wanted.places:
        name = f"{place}"
        try:
            reached = host.reach(place, authority)
        except Unreached as error:
            expected, got = "TLS with a certificate for it", f"{error.stage}: {error.reason}"[:300]
            yield problem("reach", f"{name} cannot be reached", expected=expected, got=got, todo=DO[error.stage])
            continue
        yield ok("reach", f"{name} answers, with a certificate for its name")
        if place == wanted.kms:
            yield from _agreement(reached.ahead, name)
    if not wanted.places and wanted.aim is Aim.NITRO:
        yield note("reach", "no place was tried", todo="--config names KMS's endpoint; --reach names others")


def _agreement(ahead: float | None, name: str) -> Iterator[Finding]:
    if ahead is None:
        yield note("clock-kms", f"{name} did not say what time it is")
    elif abs(ahead) < WORTH_KNOWING:
        yield ok("clock-kms", f"the clock agrees with {name}")
    else:
        got = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {name}"
        make = problem if abs(ahead) >= MAX_SKEW else note
        expected = f"less than {MAX_SKEW:.0f} s"
        yield make("clock-kms", "the clock is wrong", expected=expected, got=got, todo=SET_CLOCK)
