"""Requests that are longer than their connection's share of the memory go one after the other."""

from __future__ import annotations

from collections.abc import Callable

from nbdsnap.server.buffers import BufferPool, new_buffer
from nbdsnap.server.context import Limits
from nbdsnap.server.turns import TURN_STALLED_S, Turns
from nbdsnap.server.watch import Watch


class Loop:
    """Calls what was asked for when it is told to."""

    def __init__(self) -> None:
        self._asked: list[Callable[[], None]] = []

    def soon(self, call: Callable[[], None]) -> None:
        self._asked.append(call)

    def run(self) -> None:
        asked, self._asked = self._asked, []
        for call in asked:
            call()


class Client:
    """Asks for ``size`` bytes; ``ready``: whether it could use its turn."""

    def __init__(self, turns: Turns, pool: BufferPool, size: int, ready: bool = True) -> None:
        self._turns, self._pool, self._size = turns, pool, size
        self.ready = ready
        self.buffer: memoryview | None = None
        self.on_turn()

    def on_turn(self) -> None:
        if not self.ready:
            self._turns.leave(self)
        elif self.buffer is None and self._turns.ask(self, self._size):
            self.buffer = self._pool.take(self._size)
            self._turns.hold(self.buffer, self._size)

    def end(self) -> None:
        assert self.buffer is not None
        self._pool.give(self.buffer)


def make(total: int) -> tuple[Loop, Turns, BufferPool]:
    loop = Loop()
    turns = Turns(total, loop.soon)
    return loop, turns, BufferPool(on_give=turns.given)


def test_turns_are_given_in_the_order_of_asking() -> None:
    loop, turns, pool = make(100_000)
    first, second, third, fourth = (Client(turns, pool, size) for size in (60_000, 50_000, 40_000, 10_000))
    assert first.buffer is not None and second.buffer is None
    assert third.buffer is None, "it would fit, but another one waits already"
    first.end()
    loop.run()
    loop.run()
    loop.run()
    assert second.buffer is not None and third.buffer is not None and fourth.buffer is not None
    assert turns.used == 100_000 and not turns.waiting


def test_one_may_always_go_on() -> None:
    loop, turns, pool = make(1000)
    longest = Client(turns, pool, 64 << 20)
    other = Client(turns, pool, 2000)
    assert longest.buffer is not None and other.buffer is None
    longest.end()
    loop.run()
    assert other.buffer is not None


def test_who_can_not_use_its_turn_holds_nobody_up() -> None:
    loop, turns, pool = make(1000)
    holder, unready, next_one = (Client(turns, pool, 1000) for _ in range(3))
    unready.ready = False
    holder.end()
    loop.run()
    loop.run()
    assert next_one.buffer is not None and unready.buffer is None and not turns.waiting


def test_a_buffer_of_somebody_else_ends_no_turn() -> None:
    _, turns, pool = make(1000)
    holder = Client(turns, pool, 1000)
    pool.give(new_buffer(4096))
    assert turns.used == 1000
    holder.end()
    assert turns.used == 0


class Path:
    """What a :class:`Watch` looks at: a client that has begun a long request, and sends nothing more."""

    has_turn = True
    waits_for_turn = False
    pending = 0

    def __init__(self, turns: Turns) -> None:
        self.context = self
        self.turns = turns

    def owed(self) -> object:
        return "the rest of a payload"


def test_who_holds_others_up_is_ended_soon() -> None:
    _, turns, pool = make(1000)
    Client(turns, pool, 1000)
    watch, path = Watch(Limits(stalled_s=0)), Path(turns)
    assert not watch.look(0.0, path)  # type: ignore[arg-type]
    assert not watch.look(1000.0, path), "nobody waits"  # type: ignore[arg-type]
    Client(turns, pool, 1000)
    assert "others wait" in watch.look(1001.0, path)  # type: ignore[arg-type]
    fresh = Watch(Limits(stalled_s=0))
    assert not fresh.look(0.0, path)  # type: ignore[arg-type]
    assert not fresh.look(TURN_STALLED_S - 1, path)  # type: ignore[arg-type]
    assert fresh.look(TURN_STALLED_S, path)  # type: ignore[arg-type]
