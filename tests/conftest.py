"""Settings for all tests."""

from hypothesis import HealthCheck, settings

# How fast a machine draws examples says nothing about the code; a busy one must not fail for it.
settings.register_profile(
    "omnipretrain", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("omnipretrain")
