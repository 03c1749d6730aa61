"""Rows of a state that come, go and step on their own: what a batching loop needs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringexport.errors import ContextLengthError, ShapeError
from ringexport.runtime.runner import Runner
from ringexport.runtime.state import DecodeState, StateSnapshot
from tests.conformance.conftest import Bounds, TinyModel
from tests.conformance.test_runner import assert_snapshots_same, fed, ids
from tests.numerics import assert_close, assert_same

ROWS = [[0], [2], [0, 1], [1, 2], [0, 2], [2, 0], [3, 1, 0], [0, 1, 2, 3]]


def ragged(runner: Runner) -> DecodeState:
    return fed(runner, ids(runner, 4, 12), [12, 3, 7, 1])


@pytest.mark.parametrize("rows", ROWS)
def test_decode_of_rows_equals_the_rows_alone(
    runner: Runner, bounds: Bounds, rows: list[int]
) -> None:
    state = ragged(runner)
    before = state.snapshot()
    others = [row for row in range(4) if row not in rows]
    for step in range(3):
        alone = state.fork(rows)
        expected = runner.decode(np.arange(len(rows)) + step, alone)
        found = runner.decode(np.arange(len(rows)) + step, state, rows=rows)
        assert found.shape == (len(rows), runner.spec.vocab_size)
        assert_close(found, expected, rtol=bounds.logits)
        mine, theirs = state.snapshot_rows(rows), alone.snapshot()
        assert_same(mine.position, theirs.position)
        for name, tensor in mine.tensors.items():
            assert_close(tensor, theirs.tensors[name], rtol=bounds.state)
    if others:
        assert_snapshots_same(state.snapshot_rows(others), before.rows(others))


@pytest.mark.parametrize(
    ("tokens", "rows", "message"),
    [
        ([1], [4], "row 4"),
        ([1], [-1], "row -1"),
        ([1, 2], [1], r"2 tokens were given for the rows \[1\]"),
        ([1, 2], [1, 1], r"rows \[1, 1\]"),
        ([], [], "rows"),
        ([384], [3], "token id 384"),
    ],
)
def test_bad_rows_are_refused(
    runner: Runner, tokens: list[int], rows: list[int], message: str
) -> None:
    state = ragged(runner)
    before = state.snapshot()
    with pytest.raises(ShapeError, match=message):
        runner.decode(np.array(tokens, dtype=np.int64), state, rows=rows)
    assert_snapshots_same(state.snapshot(), before)


def test_a_full_row_does_not_stop_the_others(runner: Runner) -> None:
    limit = runner.spec.context_length
    state = runner.new_state(2)
    tokens = np.zeros((2, limit), dtype=np.int64)
    runner.prefill(tokens, [limit, 2], state)
    runner.decode([1], state, rows=[1])
    assert state.position.tolist() == [limit, 3]
    with pytest.raises(ContextLengthError, match="row 0"):
        runner.decode([1], state, rows=[0])


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 1, 2, 3]])
def test_rows_can_be_kept_and_put_elsewhere(
    runner: Runner, bounds: Bounds, rows: list[int]
) -> None:
    state, other = ragged(runner), runner.new_state(4)
    runner.prefill(ids(runner, 4, 300, seed=3), [300, 5, 9, 2], other)
    before = other.snapshot()
    places = rows[::-1]
    other.restore_rows(places, state.snapshot_rows(rows))
    assert_snapshots_same(other.snapshot_rows(places), state.snapshot_rows(rows))
    untouched = [row for row in range(4) if row not in places]
    if untouched:
        assert_snapshots_same(other.snapshot_rows(untouched), before.rows(untouched))
    found = runner.decode(np.full(len(rows), 7), other, rows=places)
    expected = runner.decode(np.full(len(rows), 7), state, rows=rows)
    assert_close(found, expected, rtol=bounds.logits)


def test_rows_can_be_copied_between_states(runner: Runner) -> None:
    state, other = ragged(runner), fed(runner, ids(runner, 2, 700))
    before, long = state.snapshot(), other.snapshot()
    state.copy_rows([3, 1], other, [0, 1])
    assert state.position.tolist() == [12, 700, 7, 700]
    assert_snapshots_same(state.snapshot_rows([3, 1]), long)
    assert_snapshots_same(state.snapshot_rows([0, 2]), before.rows([0, 2]))
    state.copy_rows([3, 1], state, [0, 2])
    assert_snapshots_same(state.snapshot(), before.rows([0, 2, 2, 0]))
    assert_snapshots_same(other.snapshot(), long)
    runner.decode([1], state, rows=[3])
    assert_snapshots_same(state.snapshot_rows([0]), before.rows([0]))


def test_rows_can_be_moved(runner: Runner) -> None:
    state, other = ragged(runner), fed(runner, ids(runner, 2, 700))
    before, long = state.snapshot(), other.snapshot()
    state.move_rows([3, 1], other, [0, 1])
    assert state.position.tolist() == [12, 700, 7, 700]
    assert_snapshots_same(state.snapshot_rows([3, 1]), long)
    state.move_rows([3], state, [2])
    state.reset([2])
    assert_snapshots_same(state.snapshot_rows([0, 3]), before.rows([0, 2]))
    assert state.position.tolist() == [12, 700, 0, 7]
    assert_snapshots_same(state.snapshot_rows([2]), runner.new_state(1).snapshot())
    runner.decode([1, 2], state, rows=[1, 2])
    assert state.position.tolist() == [12, 701, 1, 7]
    assert_snapshots_same(state.snapshot_rows([0, 3]), before.rows([0, 2]))


def test_rows_of_another_runner_are_not_copied(
    runner: Runner, backend: str, model: TinyModel
) -> None:
    with model.open(backend) as other:
        mine, theirs = runner.new_state(1), other.new_state(1)
        with pytest.raises(ShapeError, match="another runner"):
            mine.copy_rows([0], theirs, [0])


def test_a_restored_row_makes_room_for_itself(runner: Runner) -> None:
    long, state = fed(runner, ids(runner, 1, 700)), ragged(runner)
    before = state.snapshot()
    state.restore_rows([2], long.snapshot())
    assert state.position.tolist() == [12, 3, 700, 1]
    assert_snapshots_same(state.snapshot_rows([2]), long.snapshot())
    assert_snapshots_same(state.snapshot_rows([0, 1, 3]), before.rows([0, 1, 3]))


def test_a_reset_row_is_a_new_one(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 1, 9)
    state, fresh = ragged(runner), runner.new_state(1)
    before = state.snapshot()
    state.reset([1, 2])
    assert state.position.tolist() == [12, 0, 0, 1]
    assert_snapshots_same(state.snapshot_rows([1]), fresh.snapshot())
    assert_snapshots_same(state.snapshot_rows([0, 3]), before.rows([0, 3]))
    padded = np.zeros((4, 9), dtype=np.int64)
    padded[1] = tokens
    found = runner.prefill(padded, [0, 9, 0, 0], state)[1]
    assert_close(found, runner.prefill(tokens, None, fresh)[0], rtol=bounds.logits)


def test_parts_of_a_snapshot_make_a_whole(runner: Runner) -> None:
    tokens, state, parts = ids(runner, 1, 90), runner.new_state(1), []
    for start, stop in ((0, 40), (40, 41), (41, 90)):
        runner.prefill(tokens[:, start:stop], None, state)
        parts.append(state.snapshot_rows([0], start=start))
    assert_snapshots_same(StateSnapshot.joined(parts), state.snapshot())
    assert parts[1].nbytes < parts[0].nbytes
    with pytest.raises(ShapeError, match="do not follow"):
        StateSnapshot.joined(parts[1:])
    with pytest.raises(ShapeError, match="only a part"):
        runner.new_state(1).restore(parts[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda state: state.copy_rows([0], state, [4]), "row 4"),
        (lambda state: state.copy_rows([4], state, [0]), "row 4"),
        (lambda state: state.copy_rows([0, 1], state, [2]), "1 rows"),
        (lambda state: state.copy_rows([0, 1], state, [1, 2]), "overlap"),
        (lambda state: state.snapshot_rows([4]), "row 4"),
        (lambda state: state.snapshot_rows([]), "at least one"),
        (lambda state: state.snapshot_rows([0], start=13), "token 13"),
        (lambda state: state.reset([-1]), "row -1"),
        (lambda state: state.restore_rows([0], state.snapshot()), "4 rows were"),
        (lambda state: state.restore_rows([1, 1], state.snapshot_rows([0, 1])), "rows"),
    ],
)
def test_bad_operations_on_rows_are_refused(
    runner: Runner, call: Callable[[Any], object], message: str
) -> None:
    state = ragged(runner)
    before = state.snapshot()
    with pytest.raises(ShapeError, match=message):
        call(state)
    assert_snapshots_same(state.snapshot(), before)
