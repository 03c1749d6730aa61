"""The runner of TensorRT targets over an engine that ONNX Runtime computes."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ringexport.errors import RingExportError
from ringexport.runtime.backends.trt import TrtRunner
from tests.fake_trt import FakeContext, FakeCuda
from tests.runners import export_tiny_graph, open_test_runner

TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture
def runner(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrtRunner]:
    graph = export_tiny_graph(tiny_checkpoint, tmp_path_factory.mktemp("trt") / "graph")
    with open_test_runner("tensorrt-rtx:fake", tiny_checkpoint, graph) as opened:
        assert isinstance(opened, TrtRunner)
        yield opened


def cuda_of(runner: TrtRunner) -> FakeCuda:
    assert isinstance(runner.cuda, FakeCuda)
    return runner.cuda


def test_a_step_is_a_graph_from_the_second_on(runner: TrtRunner) -> None:
    state = runner.new_state(2)
    runner.prefill(TOKENS, None, state)
    for number in range(4):
        runner.decode([1, 2], state)
        assert cuda_of(runner).launches == number
        assert len(cuda_of(runner).graphs) == min(number, 1)


def test_graphs_are_given_back_with_their_state(runner: TrtRunner) -> None:
    for _ in range(3):
        state = runner.new_state(1)
        for token in (1, 2, 3):
            runner.decode([token], state)
        assert len(cuda_of(runner).graphs) == 1
        del state
        gc.collect()
        assert not cuda_of(runner).graphs


def test_steps_of_two_states_in_turn(runner: TrtRunner) -> None:
    """A graph is void once its context is bound to another state."""
    steps = (3, 1, 2, 1, 3)  # of one state and the other by turns
    apart = [
        [runner.decode([place], state) for place in range(8)]
        for state in (runner.new_state(1), runner.new_state(1))
    ]
    mixed, found = [runner.new_state(1), runner.new_state(1)], ([], [])
    for turn, count in enumerate(steps):
        for _ in range(count):
            logits = found[turn % 2]
            logits.append(runner.decode([len(logits)], mixed[turn % 2]))
    assert cuda_of(runner).launches > 0
    for one, expected in zip(found, apart, strict=True):
        np.testing.assert_array_equal(one, expected[: len(one)])


def test_a_shape_that_tensorrt_refuses(runner: TrtRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run with the shapes of the call before."""
    state = runner.new_state(1)
    monkeypatch.setattr(
        FakeContext, "set_input_shape", lambda _self, name, _shape: name != "past_key.2"
    )
    with pytest.raises(RingExportError, match=r"refuses past_key.2 of shape \[1, 2, 256, 16\]"):
        runner.decode([1], state)
    assert state.position.tolist() == [0]
