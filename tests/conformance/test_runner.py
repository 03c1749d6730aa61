"""What every runner must do, whatever it runs on. A new backend joins in tests/runners.py."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ringexport.compare.tolerances import drift_bound
from ringexport.errors import ContextLengthError, RingExportError, ShapeError
from ringexport.runtime.runner import Logits, Runner
from ringexport.runtime.state import DecodeState, StateSnapshot
from tests.conformance.conftest import CUDA, Bounds, TinyModel
from tests.numerics import assert_close, assert_same
from tests.runners import skip_if_missing

Ids = npt.NDArray[np.int64]


def ids(runner: Runner, *shape: int, seed: int = 1) -> Ids:
    return np.random.default_rng(seed).integers(0, runner.spec.vocab_size, shape)


def fed(runner: Runner, tokens: Ids, lengths: list[int] | None = None) -> DecodeState:
    state = runner.new_state(len(tokens))
    runner.prefill(tokens, lengths, state)
    return state


def assert_states_close(found: DecodeState, expected: DecodeState, bounds: Bounds) -> None:
    assert_snapshots_close(found.snapshot(), expected.snapshot(), bounds)


def assert_snapshots_close(found: StateSnapshot, expected: StateSnapshot, bounds: Bounds) -> None:
    np.testing.assert_array_equal(found.position, expected.position)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert_close(tensor, expected.tensors[name], rtol=bounds.state)


def assert_snapshots_same(found: StateSnapshot, expected: StateSnapshot) -> None:
    assert_same(found.position, expected.position)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert_same(tensor, expected.tensors[name])


def assert_repeated(found: Logits, expected: Logits, bounds: Bounds) -> None:
    """Check the logits of one call, made twice on the same state."""
    if bounds.repeatable:
        assert_same(found, expected)
    else:
        assert_close(found, expected, rtol=bounds.logits)


def assert_states_repeated(found: DecodeState, expected: StateSnapshot, bounds: Bounds) -> None:
    """Check the state behind one call, made twice on the same state."""
    if bounds.repeatable:
        assert_snapshots_same(found.snapshot(), expected)
    else:
        assert_snapshots_close(found.snapshot(), expected, bounds)


def relative_error(found: StateSnapshot, expected: StateSnapshot) -> float:
    """Return the largest |difference| / |expected| of the recurrent states."""
    return max(
        float(np.linalg.norm(tensor - expected.tensors[name]))
        / float(np.linalg.norm(expected.tensors[name]))
        for name, tensor in found.tensors.items()
        if name.startswith("recurrent_state.")
    )


@pytest.mark.parametrize("split", [1, 17, 62])
def test_prefill_in_two_calls_equals_one(runner: Runner, bounds: Bounds, split: int) -> None:
    tokens = ids(runner, 1, 63)
    whole, parts = runner.new_state(1), runner.new_state(1)
    expected = runner.prefill(tokens, None, whole)
    runner.prefill(tokens[:, :split], None, parts)
    found = runner.prefill(tokens[:, split:], None, parts)
    assert_close(found, expected, rtol=bounds.logits)
    assert_states_close(parts, whole, bounds)


def test_decode_equals_prefill(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 2, 33)
    whole, steps = runner.new_state(2), runner.new_state(2)
    expected = runner.prefill(tokens, None, whole, every_position=True)
    for place in range(33):
        found = runner.decode(tokens[:, place], steps)
        assert_close(found, expected[:, place], rtol=bounds.logits)
    assert_states_close(steps, whole, bounds)


def test_last_of_every_position_is_the_default(runner: Runner, bounds: Bounds) -> None:
    tokens, lengths = ids(runner, 3, 20), [20, 0, 7]
    every = runner.prefill(tokens, lengths, runner.new_state(3), every_position=True)
    last = runner.prefill(tokens, lengths, runner.new_state(3))
    assert every.shape == (3, 20, runner.spec.vocab_size)
    assert every.dtype == last.dtype == np.float32
    assert_close(every[0, 19], last[0], rtol=bounds.logits)
    assert_close(every[2, 6], last[2], rtol=bounds.logits)
    assert not every[1].any()
    assert not every[2, 7:].any()
    assert not last[1].any()


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 1], [1, 9, 0]])
def test_padding_does_not_matter(runner: Runner, bounds: Bounds, lengths: list[int]) -> None:
    tokens = ids(runner, 3, 9)
    noisy = np.where(np.arange(9) < np.array(lengths)[:, None], tokens, -5)
    clean, other = runner.new_state(3), runner.new_state(3)
    expected = runner.prefill(tokens, lengths, clean)
    assert_repeated(runner.prefill(noisy, lengths, other), expected, bounds)
    assert_states_repeated(other, clean.snapshot(), bounds)


@pytest.mark.parametrize("lengths", [[20, 20, 20, 20], [20, 3, 0, 11], [1, 20, 2, 1]])
def test_prompts_in_a_batch_equal_the_same_prompts_alone(
    runner: Runner, bounds: Bounds, lengths: list[int]
) -> None:
    tokens = ids(runner, 4, 20)
    together = runner.new_state(4)
    first = runner.prefill(tokens, lengths, together)
    second = runner.prefill(tokens[:, :5], [5, 0, 2, 5], together)
    third = runner.decode(tokens[:, 0], together)
    for row, length in enumerate(lengths):
        alone = runner.new_state(1)
        found = runner.prefill(tokens[row : row + 1, :length], None, alone)
        assert_close(first[row], found[0], rtol=bounds.logits)
        size = [5, 0, 2, 5][row]
        found = runner.prefill(tokens[row : row + 1, :size], None, alone)
        assert_close(second[row], found[0], rtol=bounds.logits)
        found = runner.decode(tokens[row : row + 1, 0], alone)
        assert_close(third[row], found[0], rtol=bounds.logits)
        assert_states_close(together.fork([row]), alone, bounds)


def test_batch_permutation_commutes(runner: Runner, bounds: Bounds) -> None:
    tokens, lengths, order = ids(runner, 3, 12), np.array([12, 5, 9]), [2, 0, 1]
    plain, mixed = runner.new_state(3), runner.new_state(3)
    expected = runner.prefill(tokens, lengths, plain)[order]
    found = runner.prefill(tokens[order], lengths[order], mixed)
    assert_close(found, expected, rtol=bounds.logits)
    assert_states_close(mixed, plain.fork(order), bounds)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunk_size_does_not_matter(
    runner: Runner, bounds: Bounds, backend: str, model: TinyModel, chunk: int
) -> None:
    tokens, lengths = ids(runner, 2, 70), [70, 23]
    whole = runner.new_state(2)
    expected = runner.prefill(tokens, lengths, whole, every_position=True)
    with model.open(backend, prefill_chunk=chunk) as other:
        state = other.new_state(2)
        found = other.prefill(tokens, lengths, state)
        assert_close(found, expected[[0, 1], [69, 22]], rtol=bounds.logits)
        assert_states_close(state, whole, bounds)


def test_every_position_in_chunks(
    runner: Runner, bounds: Bounds, backend: str, model: TinyModel
) -> None:
    tokens, lengths = ids(runner, 2, 20), [20, 9]
    expected = runner.prefill(tokens, lengths, runner.new_state(2), every_position=True)
    with model.open(backend, prefill_chunk=7) as other:
        found = other.prefill(tokens, lengths, other.new_state(2), every_position=True)
        assert_close(found, expected, rtol=bounds.logits)


def test_zero_length_is_a_no_op(runner: Runner) -> None:
    state = fed(runner, ids(runner, 2, 6), [6, 3])
    before = state.snapshot()
    assert not runner.prefill(ids(runner, 2, 4), [0, 0], state).any()
    assert runner.prefill(np.zeros((2, 0), np.int64), None, state).shape[0] == 2
    assert_snapshots_same(state.snapshot(), before)
    runner.prefill(ids(runner, 2, 4), [4, 0], state)
    assert_snapshots_same(state.snapshot().rows([1]), before.rows([1]))


def test_restore_is_bitwise_and_repeatable(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 2, 10)
    state = fed(runner, tokens, [10, 4])
    before = state.snapshot()
    first = runner.decode(tokens[:, 0], state)
    after = state.snapshot()
    runner.prefill(ids(runner, 2, 300, seed=2), None, state)
    for _ in range(2):
        state.restore(before)
        assert_snapshots_same(state.snapshot(), before)
        assert_repeated(runner.decode(tokens[:, 0], state), first, bounds)
        assert_states_repeated(state, after, bounds)


def test_snapshot_is_a_copy(runner: Runner) -> None:
    state = fed(runner, ids(runner, 1, 5))
    kept, again = state.snapshot(), state.snapshot()
    runner.decode([3], state)
    assert_snapshots_same(kept, again)
    assert kept.nbytes > 0


def test_fork_is_independent(runner: Runner) -> None:
    tokens = ids(runner, 3, 8)
    state = fed(runner, tokens, [8, 2, 5])
    before = state.snapshot()
    fork = state.fork([2, 0, 2])
    assert_snapshots_same(fork.snapshot(), before.rows([2, 0, 2]))
    runner.decode([1, 2, 3], fork)
    assert_snapshots_same(state.snapshot(), before)
    copied = fork.snapshot()
    runner.decode([4, 5, 6], state)
    assert_snapshots_same(fork.snapshot(), copied)


def test_fork_of_rows_that_do_not_exist(runner: Runner) -> None:
    state = runner.new_state(2)
    with pytest.raises(ShapeError, match="row 2"):
        state.fork([2])
    with pytest.raises(ShapeError, match="at least one"):
        state.fork([])


def test_interleaved_states_are_independent(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 2, 30)
    apart = [fed(runner, tokens[row : row + 1]) for row in range(2)]
    mixed = [runner.new_state(1) for _ in range(2)]
    for place in range(0, 30, 10):
        for row, state in enumerate(mixed):
            runner.prefill(tokens[row : row + 1, place : place + 10], None, state)
    for found, expected in zip(mixed, apart, strict=True):
        assert_states_close(found, expected, bounds)


def test_save_and_load_are_bitwise(runner: Runner, bounds: Bounds, tmp_path: Path) -> None:
    state = fed(runner, ids(runner, 2, 9), [9, 4])
    state.save(tmp_path / "state.safetensors")
    loaded = runner.load_state(tmp_path / "state.safetensors")
    assert_snapshots_same(loaded.snapshot(), state.snapshot())
    other = runner.new_state(2)
    other.load(tmp_path / "state.safetensors")
    assert_repeated(runner.decode([1, 2], other), runner.decode([1, 2], state), bounds)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_cache_grows_past_its_first_capacity(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 2, 520)
    state = runner.new_state(2)
    small = state.nbytes
    runner.prefill(tokens[:, :250], None, state)
    for place in range(250, 260):
        runner.decode(tokens[:, place], state)
    runner.prefill(tokens[:, 260:], None, state)
    if runner.spec.name == "cuda":  # its memory is planned up front
        assert state.nbytes == small
    else:
        assert state.nbytes > small
    assert state.position.tolist() == [520, 520]
    assert_states_close(state, fed(runner, tokens), bounds)


def test_context_can_be_filled_but_not_passed(runner: Runner) -> None:
    limit = runner.spec.context_length
    state = fed(runner, ids(runner, 1, limit - 1))
    runner.decode([1], state)
    before = state.snapshot()
    with pytest.raises(ContextLengthError, match=rf"row 0 holds {limit} .* {limit + 1} in all"):
        runner.decode([1], state)
    with pytest.raises(ContextLengthError, match="hint:"):
        runner.prefill([[1, 2]], None, state)
    assert_snapshots_same(state.snapshot(), before)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[1, 2], [3, 384]], None, "token id 384 in row 1, position 1 .* 384 ids"),
        ([[1, 2], [-1, 3]], None, "token id -1 in row 1, position 0"),
        ([[1, 2]], None, "tokens have 1 rows, the state has 2"),
        ([[1, 2], [3, 4]], [1, 3], "length of row 1 is 3, expected 0 to 2"),
        ([[1, 2], [3, 4]], [1, -1], "length of row 1 is -1"),
        ([[1, 2], [3, 4]], [1], "lengths has 1 rows, tokens have 2"),
        ([1, 2], None, "expected 2 dimensions"),
        ([[1, 2], [3]], None, "different lengths"),
        ([[1.5, 2], [3, 4]], None, "float64, expected integers"),
    ],
)
def test_bad_prefill_is_refused(
    runner: Runner, tokens: list[object], lengths: list[int] | None, message: str
) -> None:
    state = runner.new_state(2)
    with pytest.raises(ShapeError, match=message):
        runner.prefill(tokens, lengths, state)  # type: ignore[arg-type]
    assert not state.position.any()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 384], "token id 384 in row 1"),
        ([-1, 0], "token id -1 in row 0"),
        ([1], "tokens have 1 rows"),
        ([[1], [2]], "expected 1 dimensions"),
    ],
)
def test_bad_decode_is_refused(runner: Runner, tokens: list[object], message: str) -> None:
    state = runner.new_state(2)
    with pytest.raises(ShapeError, match=message):
        runner.decode(tokens, state)  # type: ignore[arg-type]
    assert not state.position.any()


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_needs_rows(runner: Runner, batch: int) -> None:
    with pytest.raises(ShapeError, match=r"at least 1|expected 1 to"):
        runner.new_state(batch)


def test_foreign_state_and_closed_runner_are_refused(
    runner: Runner, backend: str, model: TinyModel
) -> None:
    other = model.open(backend)
    state = other.new_state(1)
    with pytest.raises(ShapeError, match="not made by this"):
        runner.decode([1], state)
    other.close()
    other.close()
    for call in (
        lambda: other.decode([1], state),
        lambda: other.prefill([[1]], None, state),
        lambda: other.new_state(1),
    ):
        with pytest.raises(RingExportError, match="closed"):
            call()


@pytest.mark.parametrize("name", ["torch", "onnxruntime:cpu"])
def test_states_move_between_backends(
    runner: Runner, bounds: Bounds, model: TinyModel, name: str
) -> None:
    skip_if_missing(name)
    tokens = ids(runner, 2, 30)
    state = fed(runner, tokens, [30, 8])
    with model.open(name) as other:
        moved = other.new_state(2)
        moved.restore(state.snapshot())
        assert_snapshots_same(moved.snapshot(), state.snapshot())
        found = other.decode([1, 2], moved)
        assert_close(found, runner.decode([1, 2], state.fork()), rtol=bounds.backends)


def test_many_rows_equal_the_same_rows_alone(runner: Runner, bounds: Bounds) -> None:
    rows = min(300, runner.spec.max_batch or 300)
    tokens, lengths = ids(runner, rows, 4), np.arange(rows) % 4 + 1
    state = runner.new_state(rows)
    runner.prefill(tokens, lengths, state)
    chosen = [row for row in (0, 2, 63, 255, 256, 257, 299) if row < rows]
    alone = state.fork(chosen)
    found = runner.decode(np.arange(rows), state)
    expected = runner.decode(chosen, alone)
    assert_close(found[chosen], expected, rtol=bounds.logits)
    assert_states_close(state.fork(chosen), alone, bounds)
    odd, others = list(range(1, rows - 1, 2)), [0, rows - 2]
    before = state.snapshot_rows(others)
    found = runner.decode(np.zeros(len(odd), dtype=np.int64), state, rows=odd)
    assert found.shape == (len(odd), runner.spec.vocab_size)
    assert_snapshots_same(state.snapshot_rows(others), before)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("torch", marks=pytest.mark.slow), "onnxruntime:cpu", CUDA],
    indirect=True,
)
def test_decode_does_not_drift_from_prefill(runner: Runner, bounds: Bounds) -> None:
    tokens = ids(runner, 1, 2048)
    steps = runner.new_state(1)
    errors = {}
    for place in range(2048):
        runner.decode(tokens[:, place], steps)
        if place + 1 in {64, 2048}:
            whole = fed(runner, tokens[:, : place + 1])
            errors[place + 1] = relative_error(steps.snapshot(), whole.snapshot())
    assert errors[2048] <= drift_bound(2048, max(errors[64], bounds.error)), errors
