"""A pool whose preserver stands still: what is acknowledged meanwhile lies in the intent log, and nowhere else."""

from __future__ import annotations

import threading

from nbdsnap.engine.pool import Pool

START_TIMEOUT_S = 30.0


def hold_preserver(pool: Pool) -> threading.Event:
    """Returns when the preserver stands; it goes on when the event is set."""
    standing, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        standing.set()
        go_on.wait()

    threading.Thread(target=pool._preserver.run, args=(stand,), daemon=True).start()
    assert standing.wait(START_TIMEOUT_S)
    return go_on
