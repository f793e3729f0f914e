"""What holds for every test."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# A shell starts what it does not wait for with Ctrl-C ignored, and every process below inherits that; a person's
# terminal does not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# readline, which a test runner has loaded, exports the size of a terminal to the workers that the runner starts.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# No property is judged by how long it takes: a busy machine is not a bug. The gate asks each one the same questions on
# every run, so that a change is judged by what it changed; `make properties` asks new ones, and more of them.
_TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", _TIMELESS, derandomize=True)
settings.register_profile("new", _TIMELESS, max_examples=2000, print_blob=True)
settings.load_profile("same")

ONE_BY_ONE = ("model", "processes", "wheel", "boot")
"""The marks of tests that take the machine: models that decode with every CPU, houses of processes, installations."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run on several workers (``make test``), each file's stay together, and share what it has made; those
    that take the machine stay on one worker, so that no two of them run side by side.
    """
    if config.getoption("dist", "no") != "loadgroup":
        return
    for item in items:
        alone = any(item.get_closest_marker(name) for name in ONE_BY_ONE)
        item.add_marker(pytest.mark.xdist_group("one by one" if alone else str(item.path.relative_to(config.rootpath))))
