"""Settings for all tests."""

import signal

from hypothesis import HealthCheck, settings

# How fast a machine draws examples says nothing about the code; a busy one must not fail for it.
settings.register_profile(
    "omnipretrain", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("omnipretrain")


def pytest_configure() -> None:
    """Let Ctrl-C mean what it means: shells start background jobs (`make test &`), and so all
    processes that these start, with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
