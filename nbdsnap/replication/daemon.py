"""The sending end: one thread for each target of each volume.

A *cycle* brings a target up to date.  Nothing is remembered between two of them, so that a kill at any moment does no
harm: the target is asked what it has.

1. What was cut is sent to its end, if its snapshots are still here.
2. The newest snapshot that both have is the *common* one, told by its identifier.  If the volume was written since, a
   new snapshot is taken, ``repl-TIME``.  (A volume that is a replica itself gets its snapshots from elsewhere; they are
   passed on.)
3. What is newer than the common snapshot is sent, each as its difference from the one before: users' own snapshots, and
   the newest of ours.  Where the target has nothing yet, the first of them is sent whole; where it has, but nothing in
   common, the newest, if the configuration allows it.
4. The newest is the common one now.  It is held; those of ours that no target needs are deleted.

What fails is tried again, after a second at first, then after ever longer.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nbdsnap.config import Config, ReplicateConfig
from nbdsnap.delta.choice import Compression
from nbdsnap.engine.pool import Pool
from nbdsnap.errors import ConflictError, NbdsnapError, NotFoundError, WrongBaseError, from_exception
from nbdsnap.models import ReplicationStatus, SnapshotInfo
from nbdsnap.replication.listener import OWN_PREFIX, Listener, StoppingError
from nbdsnap.replication.peer import Peer
from nbdsnap.replication.tls import client_context
from nbdsnap.replication.wire import ReplicaState
from nbdsnap.transfer.pace import Progress, RateLimit
from nbdsnap.transfer.send import Selection, Sender, select

log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 300.0


@dataclass
class Seen:
    """What is known of one target; changed by its thread, read by anyone."""

    common: str | None = None
    point: datetime | None = None
    error: str | None = None
    failures: int = 0
    sending: str | None = None
    done: int = 0
    total: int = 0
    rate: float = 0.0
    sent_bytes: int = 0
    sent_snapshots: int = 0
    cycles: int = 0
    contacted: bool = False
    next_s: float = 0.0


class Replicator:
    """All that the configuration says of replication: who follows us, and whom we let."""

    def __init__(self, pool: Pool, config: Config) -> None:
        self.pool = pool
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        if config.replicate:
            client_context(config)  # that it can be used is found out now
        self.targets = [Target(self, entry, config) for entry in config.replicate]
        address: Any = config.replication.listen
        self.listener = Listener(pool, config, address) if address is not None else None

    def start(self) -> None:
        if self.listener is not None:
            self.listener.start()
        for target in self.targets:
            target.start()

    def stop(self) -> None:
        """Afterwards nothing of this uses the pool."""
        self.stopping.set()
        for target in self.targets:
            target.wake()
        if self.listener is not None:
            self.listener.close()
        for target in self.targets:
            target.join()

    def status(self) -> list[ReplicationStatus]:
        return [target.status() for target in self.targets]

    def run(self, volume: str | None, tick: Callable[[], None] | None) -> list[ReplicationStatus]:
        """Begin a cycle of each target (of ``volume``) now; with ``tick``, wait for its end."""
        chosen = [target for target in self.targets if volume in (None, target.entry.volume)]
        if not chosen:
            raise NotFoundError(
                f"nothing is said about replicating {'anything' if volume is None else volume}",
                hint="the configuration needs a [[replicate]] table for that",
            )
        wanted = [target.wake() for target in chosen]
        if tick is not None:
            for target, cycle in zip(chosen, wanted, strict=True):
                target.wait_for(cycle, tick)
        return [target.status() for target in chosen]

    # Snapshots of ours

    def in_use(self, volume: str) -> set[str] | None:
        """Names of ``volume``'s snapshots that a target needs; None where that isn't known of each yet."""
        targets = [target for target in self.targets if target.entry.volume == volume]
        if not all(target.seen.contacted for target in targets):
            return None
        return {name for target in targets for name in (target.seen.common, target.seen.sending) if name is not None}

    def tidy(self, volume: str) -> None:
        """Hold what some target needs next time, and delete of ours what none does."""
        with self.lock:
            used = self.in_use(volume)
            if used is None:
                return
            own = [one for one in self.pool.snapshots_of(volume) if one.name.startswith(OWN_PREFIX)]
            for one in own:
                name = f"{volume}@{one.name}"
                with contextlib.suppress(ConflictError, NotFoundError):
                    if one.name in used:
                        if not one.held:
                            self.pool.snapshot_hold([name])
                        continue
                    if one.held:
                        self.pool.snapshot_hold([name], held=False)
                    if not self.is_replica(volume):
                        self.pool.snapshot_delete([name])

    def is_replica(self, volume: str) -> bool:
        return any(info.name == volume and info.replica for info in self.pool.volume_list())


@dataclass
class _Plan:
    """``base``: what both have; None: send the first of ``snapshots`` whole."""

    base: str | None
    snapshots: list[str] = field(default_factory=list)


class Target:
    """One volume, one target, one thread."""

    def __init__(self, owner: Replicator, entry: ReplicateConfig, config: Config) -> None:
        self.entry = entry
        self.seen = Seen()
        self._owner = owner
        self._pool = owner.pool
        self._peer = Peer(entry.target, entry.volume, lambda: client_context(config), self._tick)
        self._wake = threading.Condition()
        self._wanted = 0
        self._began = 0
        self._ended = 0
        self._thread = threading.Thread(target=self._run, name=f"replicate-{entry.volume}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def wake(self) -> int:
        """Begin a cycle soon; the number of the first one that begins after this call."""
        with self._wake:
            self._wanted = self._began + 1
            self._wake.notify_all()
            return self._wanted

    def wait_for(self, cycle: int, tick: Callable[[], None]) -> None:
        while True:
            with self._wake:
                if self._ended >= cycle or not self._thread.is_alive():
                    return
                self._wake.wait(0.1)
            tick()

    def _tick(self) -> None:
        if self._owner.stopping.is_set():
            raise StoppingError

    def _run(self) -> None:
        delay = 0.0 if self.entry.at is None else self._until_next(0.0)
        while not self._owner.stopping.is_set():
            with self._wake:
                deadline = time.monotonic() + delay
                self.seen.next_s = deadline
                while (
                    self._began >= self._wanted
                    and not self._owner.stopping.is_set()
                    and (left := deadline - time.monotonic()) > 0
                ):
                    self._wake.wait(left)
                self._began += 1
                number = self._began
            if self._owner.stopping.is_set():
                return
            delay = self._try()
            with self._wake:
                self._ended = number
                self._wake.notify_all()

    def _try(self) -> float:
        """One cycle; seconds until the next."""
        began = time.monotonic()
        try:
            self._cycle()
        except StoppingError:
            return 0.0
        except Exception as error:
            known = from_exception(error)
            if known is None:
                log.exception("volume %s: replication to %s failed unexpectedly", self.entry.volume, self.entry.target)
                known = NbdsnapError(f"unexpected {type(error).__name__}: {error}")
            text = str(known) + (f" ({known.advice})" if known.advice else "")
            if self.seen.error != text:
                log.warning("volume %s: replication to %s: %s", self.entry.volume, self.entry.target, text)
            self.seen.error = text
            self.seen.failures += 1
            longest = min(LONGEST_RETRY_S, FIRST_RETRY_S * (1 << min(self.seen.failures - 1, 16)))
            return longest * random.uniform(0.75, 1.0)
        self.seen.sending = None
        if self.seen.error is not None:
            log.info("volume %s: replication to %s goes on", self.entry.volume, self.entry.target)
        self.seen.error, self.seen.failures = None, 0
        self.seen.cycles += 1
        return self._until_next(time.monotonic() - began)

    def _until_next(self, taken_s: float) -> float:
        """Seconds, after a cycle that took so long."""
        if self.entry.at is None:
            return max(0.0, self.entry.every - taken_s)
        now = datetime.now(UTC)
        return max(0.0, (self.entry.at.next_due(now) - now).total_seconds())

    # A cycle

    def _cycle(self) -> None:
        state = self._peer.state()
        if state.token is not None and self._finish_cut(state.token):
            state = self._peer.state()
        plan = self._plan(state)
        base = plan.base
        for name in plan.snapshots:
            self._send(Selection(f"{self.entry.volume}@{name}", base and f"{self.entry.volume}@{base}"))
            self._has(name)
            base = name
        if not plan.snapshots and plan.base is not None:
            self._has(plan.base)
        self._owner.tidy(self.entry.volume)

    def _finish_cut(self, token: str) -> bool:
        try:
            selection = select(self._pool, None, None, token)
        except NotFoundError:
            return False  # what is sent next takes its place
        if selection.start == 0:
            return False
        self._send(selection)
        return True

    def _plan(self, state: ReplicaState) -> _Plan:
        volume = self.entry.volume
        if state.exists and not state.replica and state.snapshots:
            raise ConflictError(
                f"the volume at {self.entry.target} is no replica (any more): it may have been written",
                hint=f"if what it has may be lost: nbdsnap volume demote {state.volume}, on its server",
            )
        known = {one.id for one in state.snapshots}
        ours = self._pool.snapshots_of(volume)
        common = next((one for one in reversed(ours) if one.id in known), None)
        if common is None and known and not self.entry.full:
            raise WrongBaseError(
                f"{self.entry.target} and volume {volume} have no snapshot in common any more",
                hint="allow to send all again: full = true in its [[replicate]] table",
            )
        with self._owner.lock:  # so that nobody deletes it before it is known to be in use
            newest = self._newest(ours, common)
            self.seen.sending = newest
            self.seen.common = None if common is None else common.name
            self.seen.contacted = True
        self._owner.tidy(volume)  # else failures would leave ever more behind
        if newest is None:
            return _Plan(self.seen.common)
        later = [one.name for one in self._pool.snapshots_of(volume) if _after(one, common, ours)]
        if common is None and known:
            return _Plan(None, [newest])  # older ones may be there under the same names
        users = [name for name in later if not name.startswith(OWN_PREFIX) or self._owner.is_replica(volume)]
        return _Plan(self.seen.common, [*(name for name in users if name != newest), newest])

    def _newest(self, ours: Sequence[SnapshotInfo], common: SnapshotInfo | None) -> str | None:
        """The newest snapshot, taken now where that would be another one than ``common``; None where it wouldn't."""
        volume = self.entry.volume
        newest = ours[-1] if ours else None
        if self._owner.is_replica(volume):
            return None if newest is None or newest == common else newest.name
        if newest is not None and not any(self._pool.diff(f"{volume}@{newest.name}")):
            return None if newest == common else newest.name
        name = OWN_PREFIX + datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self._pool.snapshot_create([f"{volume}@{name}"])
        return name

    def _send(self, selection: Selection) -> None:
        entry, seen = self.entry, self.seen
        began, before = time.monotonic(), seen.sent_bytes

        def report(done: int, total: int) -> None:
            self._tick()
            seen.done, seen.total = done, total

        with Sender(self._pool, selection, Compression(entry.compress)) as sender:
            sink = Progress(report)
            received = self._peer.send(sender, RateLimit(entry.rate_limit, self._tick), sink, entry.keep)
        seen.sent_bytes += received.stream_bytes
        seen.sent_snapshots += 1
        seen.rate = (seen.sent_bytes - before) / max(time.monotonic() - began, 1e-6)
        seen.done = seen.total = 0

    def _has(self, name: str) -> None:
        """The target has the snapshot."""
        info = self._pool.snapshot_info(f"{self.entry.volume}@{name}")
        with self._owner.lock:
            self.seen.common = name
        self.seen.point = info.created
        if name.startswith(OWN_PREFIX) and not info.held:
            self._pool.snapshot_hold([f"{self.entry.volume}@{name}"])

    # Seen

    def status(self) -> ReplicationStatus:
        seen = self.seen
        lag_bytes = None
        if seen.common is not None:
            with contextlib.suppress(NbdsnapError, OSError):
                changes = self._pool.diff(f"{self.entry.volume}@{seen.common}")
                lag_bytes = sum(extent.length for extent in changes)
        now = datetime.now(UTC)
        behind = None if seen.point is None else (now - seen.point).total_seconds()
        return ReplicationStatus(
            volume=self.entry.volume,
            target=self.entry.target,
            state="failing" if seen.error else "sending" if seen.sending else "idle" if seen.contacted else "starting",
            snapshot=seen.common,
            point=seen.point,
            lag_seconds=0.0 if behind is not None and lag_bytes == 0 else behind,
            lag_bytes=lag_bytes,
            sending=seen.sending,
            done=seen.done,
            total=seen.total,
            rate=round(seen.rate),
            sent_bytes=seen.sent_bytes,
            sent_snapshots=seen.sent_snapshots,
            failures=seen.failures,
            error=seen.error,
            next_in_s=max(0.0, round(seen.next_s - time.monotonic(), 1)),
        )


def _after(one: SnapshotInfo, common: SnapshotInfo | None, ours: Sequence[SnapshotInfo]) -> bool:
    """Whether it is newer than ``common``; one that is not among ``ours`` was taken since."""
    if common is None:
        return True
    order = [snapshot.id for snapshot in ours]
    return one.id not in order or order.index(one.id) > order.index(common.id)
