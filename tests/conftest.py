"""What holds for every test."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A shell starts what it does not wait for with Ctrl-C ignored, and every process below inherits that; a person's
# terminal does not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No property is judged by how long it takes: a busy machine is not a bug. The gate asks each one the same questions on
# every run, so that a change is judged by what it changed; `make properties` asks new ones, and more of them.
_TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", _TIMELESS, derandomize=True)
settings.register_profile("new", _TIMELESS, max_examples=2000, print_blob=True)
settings.load_profile("same")
