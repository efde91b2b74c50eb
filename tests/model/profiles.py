"""How long the model tests look: ``NBDSNAP_TEST_PROFILE`` is quick, default or long.

quick and default try the same examples in every run, and report a failure as they met it; long tries new ones in each,
makes a failing one small (which takes a while), and prints how to repeat it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_NO_CHECKS = tuple(HealthCheck)
_NO_SHRINKING = (Phase.explicit, Phase.generate)

PROFILES = {
    "quick": settings(
        max_examples=5,
        stateful_step_count=30,
        derandomize=True,
        phases=_NO_SHRINKING,
        database=None,
        deadline=None,
        suppress_health_check=_NO_CHECKS,
    ),
    "default": settings(
        max_examples=20,
        stateful_step_count=40,
        derandomize=True,
        phases=_NO_SHRINKING,
        database=None,
        deadline=None,
        suppress_health_check=_NO_CHECKS,
    ),
    "long": settings(
        max_examples=2000,
        stateful_step_count=100,
        print_blob=True,
        database=None,
        deadline=None,
        suppress_health_check=_NO_CHECKS,
    ),
}


def name() -> str:
    return os.environ.get("NBDSNAP_TEST_PROFILE", "default")


def profile() -> settings:
    return PROFILES[name()]


def scale() -> int:
    """How many times the load of the quick profile other tests put on."""
    return {"quick": 1, "default": 3, "long": 50}[os.environ.get("NBDSNAP_TEST_PROFILE", "default")]


def seed() -> int:
    """Of the tests that draw their own random numbers: ``NBDSNAP_TEST_SEED``."""
    return int(os.environ.get("NBDSNAP_TEST_SEED", "1"))
