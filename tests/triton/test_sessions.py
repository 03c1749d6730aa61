"""The table of sessions, with a clock that the test turns."""

from dataclasses import dataclass

import pytest

from ringexport.errors import ConfigError
from ringexport.triton.serving.sessions import (
    SessionBusyError,
    SessionLimitError,
    SessionTable,
    UnknownSessionError,
)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> SessionTable:
    return SessionTable(limit=2, idle_seconds=10, clock=clock)


def test_a_session_remembers_its_turns(table: SessionTable) -> None:
    turn = table.begin(1, start=True, last=False)
    assert turn.history == ()
    turn.finish([1, 2, 3])
    turn = table.begin(1, start=False, last=True)
    assert turn.history == (1, 2, 3)
    turn.finish([1, 2, 3, 4])
    assert len(table) == 0
    with pytest.raises(UnknownSessionError):
        table.begin(1, start=False, last=False)


def test_sessions_are_apart(table: SessionTable) -> None:
    table.begin(1, start=True, last=False).finish([1])
    table.begin("1", start=True, last=False).finish([2])
    assert table.begin(1, start=False, last=False).history == (1,)
    assert table.begin("1", start=False, last=False).history == (2,)


def test_an_aborted_turn_leaves_no_trace(table: SessionTable) -> None:
    table.begin(1, start=True, last=False).abort()
    assert len(table) == 0
    table.begin(1, start=True, last=False).finish([1])
    table.begin(1, start=False, last=False).abort()
    assert table.begin(1, start=False, last=False).history == (1,)


def test_a_running_turn_is_waited_for_or_replaced(table: SessionTable) -> None:
    cancelled = []
    first = table.begin(1, start=True, last=False)
    first.cancel = lambda: cancelled.append(1)
    with pytest.raises(SessionBusyError):
        table.begin(1, start=False, last=False)
    second = table.begin(1, start=True, last=False)
    assert cancelled == [1]
    first.finish([9])
    second.finish([2])
    assert table.begin(1, start=False, last=False).history == (2,)


def test_the_number_of_sessions_is_bounded(table: SessionTable) -> None:
    table.begin(1, start=True, last=False).finish([1])
    table.begin(2, start=True, last=False)
    with pytest.raises(SessionLimitError, match="there are 2 sessions"):
        table.begin(3, start=True, last=False)
    table.begin(1, start=True, last=True).finish([1])
    table.begin(3, start=True, last=False)


def test_idle_sessions_go_and_running_ones_stay(table: SessionTable, clock: Clock) -> None:
    table.begin(1, start=True, last=False).finish([1])
    running = table.begin(2, start=True, last=False)
    clock.now += 9
    assert table.expire() == 0
    clock.now += 2
    assert table.expire() == 1
    with pytest.raises(UnknownSessionError, match="idle for more than 10 seconds"):
        table.begin(1, start=False, last=False)
    running.finish([2])
    clock.now += 5
    assert table.begin(2, start=False, last=False).history == (2,)


def test_a_new_session_takes_the_place_of_an_idle_one(table: SessionTable, clock: Clock) -> None:
    for number in (1, 2):
        table.begin(number, start=True, last=False).finish([number])
    clock.now += 11
    table.begin(3, start=True, last=False)
    assert len(table) == 1


def test_sessions_can_be_turned_off() -> None:
    with pytest.raises(ConfigError, match="keeps no sessions"):
        SessionTable(limit=0, idle_seconds=1).begin(1, start=True, last=True)
