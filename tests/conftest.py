"""Settings for all tests."""

import os
import signal

from hypothesis import HealthCheck, settings

# How fast a machine draws examples says nothing about the code; a busy one must not fail for it.
settings.register_profile(
    "omnipretrain", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("omnipretrain")


def pytest_configure() -> None:
    """Make the surroundings of tests those of a plain shell."""
    # What tests start trains on the CPU, where equal runs are equal bit for bit, GPUs or not.
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Shells start background jobs (`make test &`), and so what these start, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Servers of tests are here, whatever proxy leads elsewhere.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
