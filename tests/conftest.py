"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No property is judged by how long it takes: a busy machine is not a bug.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")
