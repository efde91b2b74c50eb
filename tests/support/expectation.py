"""What a pool must hold, from the journal of the load on it (:mod:`tests.support.load`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests.support.history import Change, History, HistoryError, Instant, content

Events = Iterable[tuple[int, dict[str, Any]]]
"""``(time, fields)``, ascending."""


class SnapshotEvents:
    """When snapshots were taken and deleted, each by name; a time that is not there has not come."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        """What was taken at one instant."""
        self.create: dict[str, int] = {}
        self.created: dict[str, int] = {}
        self.delete: dict[str, int] = {}
        self.deleted: dict[str, int] = {}

    def enter(self, time: int, event: str, names: list[str]) -> None:
        if event == "create":
            self.groups.append(names)
        for name in names:
            if event == "kept":  # a deletion that was refused
                del self.delete[name]
            elif event == "delete":  # by several, perhaps: the first counts
                self.delete.setdefault(name, time)
            else:
                getattr(self, event)[name] = time

    def check(self, found: set[str], time: int) -> None:
        """Whether the snapshots ``found`` may be the ones that exist after an end at ``time``."""
        for name in found - self.create.keys():
            raise HistoryError(f"snapshot {name} exists, and nobody took it")
        for name, begun in self.create.items():
            may_be_gone = self.delete.get(name, time) < time
            surely_gone = self.deleted.get(name, time) < time
            if name in found and (begun >= time or surely_gone):
                raise HistoryError(f"snapshot {name} exists, and should not")
            if name not in found and self.created.get(name, time) < time and not may_be_gone:
                raise HistoryError(f"snapshot {name} is lost")
        for group in self.groups:
            undisturbed = {name for name in group if self.delete.get(name, time) >= time}
            if len({name in found for name in undisturbed}) > 1:
                raise HistoryError(f"of {group}, taken at one instant, only some exist")


class Expectation:
    """``initial``: the volumes' content before the first event.  ``images``: of snapshots, as they were read."""

    def __init__(self, initial: Mapping[str, bytes], events: Events, images: Mapping[str, bytes], seed: int) -> None:
        self.volumes = {name: History(image) for name, image in initial.items()}
        self.snapshots = SnapshotEvents()
        self.images = images
        self._seed = seed
        self._changes: dict[int, Change] = {}
        self._flushes: dict[int, tuple[str, int]] = {}
        for time, fields in events:
            self._enter(time, fields)

    def _enter(self, time: int, fields: dict[str, Any]) -> None:
        event, number = fields["event"], fields.get("number", 0)
        if event == "change":
            length = fields["length"]
            data = content(self._seed, number, length) if fields["kind"] == "WRITE" else bytes(length)
            change = Change(number, fields["offset"], data, time, fua=fields["fua"])
            self._changes[number] = change
            self.volumes[fields["volume"]].changes.append(change)
        elif event == "flush":
            self._flushes[number] = fields["volume"], time
        elif event == "done" and number in self._changes:
            self._changes[number].end = time
        elif event == "done":
            volume, begin = self._flushes[number]
            self.volumes[volume].flushes.append((begin, time))
        elif event == "close":  # all is made durable by a clean stop
            self._flushes.update({-1: ("", time)})
        elif event == "closed":
            for history in self.volumes.values():
                history.flushes.append((self._flushes[-1][1], time))
        elif event in ("create", "created", "delete", "deleted", "kept"):
            self.snapshots.enter(time, event, fields["names"])

    def check_instants(self) -> None:
        """Each group of snapshots that were taken together, as they were read, is one instant of all its volumes."""
        for group in self.snapshots.groups:
            together = Instant()
            try:
                for name in group:
                    if name in self.images and name in self.snapshots.created:
                        together.include(self._check_instant(name))
                together.check()
            except HistoryError as error:
                raise HistoryError(f"snapshots {group}: {error}") from None

    def _check_instant(self, name: str) -> Instant:
        history = self.volumes[name.partition("@")[0]]
        return history.check_snapshot(self.images[name], self.snapshots.create[name], self.snapshots.created[name])

    def order(self, name: str) -> int:
        """A key that sorts snapshots by age."""
        return self.snapshots.create[name]
