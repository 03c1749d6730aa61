"""The runner of onnxruntime:cuda on the CPU's provider, over memory of the host."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.compare.tolerances import TOLERANCES
from ringexport.graph.export import export_graph
from ringexport.runtime.backends import ort_cuda
from ringexport.runtime.backends.ort_cuda import OrtCudaRunner
from ringexport.runtime.backends.ort_session import OrtOptions
from ringexport.runtime.backends.torch_ref import TorchRunner
from tests.fake_trt import FakeCuda
from tests.runners import DIGEST, export_tiny_graph

TOKENS = np.arange(12).reshape(2, 6)
RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_graph(tiny_checkpoint, tmp_path_factory.mktemp("cuda") / "graph", "cuda")


def opened(graph: Path, *, cuda_graph: bool) -> OrtCudaRunner:
    options = OrtOptions(provider="cpu", threads=1, spin=False, cuda_graph=cuda_graph)
    return OrtCudaRunner(
        graph, context_length=4096, model_digest=lambda: DIGEST, options=options, cuda=FakeCuda()
    )


def continued(runner: OrtCudaRunner) -> tuple[list[Any], dict[str, Any]]:
    state = runner.new_state(2)
    runner.prefill(TOKENS, [6, 3], state)
    logits = [runner.decode(tokens, state) for tokens in ([1, 2], [3, 4])]
    return logits, dict(state.snapshot().tensors)


def test_recording_a_graph_leaves_no_trace(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like onnxruntime, run a step several times for each new graph."""
    ids: list[int | None] = []
    run = ort_cuda.run_bound

    def repeated(session: Any, binding: Any, graph_id: int | None = None) -> None:
        first = graph_id is not None and graph_id > 0 and graph_id not in ids
        ids.append(graph_id)
        for _ in range(3 if first else 1):
            run(session, binding, graph_id)

    with opened(graph, cuda_graph=False) as runner:
        expected_logits, expected_state = continued(runner)
    monkeypatch.setattr(ort_cuda, "run_bound", repeated)
    with opened(graph, cuda_graph=True) as runner:
        logits, state = continued(runner)
    assert ids == [-1, 1, 1, 1]  # a prompt, which is never recorded; recording; two steps
    np.testing.assert_array_equal(logits, expected_logits)
    for name, values in state.items():
        np.testing.assert_array_equal(values, expected_state[name])


@pytest.fixture
def graph_ids(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The graph of every run, as it comes."""
    ids: list[int | None] = []
    run = ort_cuda.run_bound

    def noted(session: Any, binding: Any, graph_id: int | None = None) -> None:
        ids.append(graph_id)
        run(session, binding, graph_id)

    monkeypatch.setattr(ort_cuda, "run_bound", noted)
    return ids


def test_graphs_are_not_recorded_without_end(
    graph: Path, graph_ids: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cuda, "MAX_GRAPHS", 1)
    with opened(graph, cuda_graph=True) as runner:
        for _ in range(2):
            runner.decode([5], runner.new_state(1))
    assert graph_ids == [1, 1, -1]


def test_steps_of_other_rows_keep_their_graphs(graph: Path, graph_ids: list[int | None]) -> None:
    with opened(graph, cuda_graph=True) as runner:
        state = runner.new_state(2)
        for row in (0, 1, 0, 1):
            runner.decode([5], state, rows=[row])
    assert graph_ids == [1, 1, 2, 2, 1, 2]


def test_what_a_cache_has_held_does_not_split_attention(
    graph: Path, graph_ids: list[int | None]
) -> None:
    """A step's total length is that of the smallest cache for its tokens, also in a larger one."""
    lengths = []
    with opened(graph, cuda_graph=True) as runner:
        state = runner.new_state(1)
        before = state.snapshot()
        for tokens in (0, 300, 0):
            state.restore(before)
            runner.prefill(np.zeros((1, tokens), dtype=np.int64), None, state)
            runner.decode([5], state)
            call = runner._decode_call(state, slice(0, 1))
            lengths.append((state.capacity, int(call.total_length[0])))
    assert lengths == [(256, 256), (512, 512), (512, 256)]
    assert graph_ids == [1, 1, -1, 2, 2, 3, 3]


def test_a_grown_cache_is_bound_again(graph: Path) -> None:
    with opened(graph, cuda_graph=False) as runner:
        whole, stepped = runner.new_state(1), runner.new_state(1)
        tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, 258)
        runner.prefill(tokens[None, :254], None, stepped)
        for token in tokens[254:]:  # the first cache holds 256
            found = runner.decode([token], stepped)
        expected = runner.prefill(tokens[None], None, whole)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_graph_in_16_bits_against_the_reference(tmp_path: Path) -> None:
    """In fp16, for which the CPU's provider has kernels; bf16 differs in nothing but the dtype."""
    with CheckpointWeights.open(RING_NANO) as weights:
        export_graph(weights, tmp_path, dtype="fp16", provider="cuda")
    rng = np.random.default_rng(0)
    vocab, cosines = 3000, []
    with (
        opened(tmp_path, cuda_graph=False) as runner,
        TorchRunner(RING_NANO, model_digest=str, threads=1) as reference,
    ):
        mine, true = runner.new_state(3), reference.new_state(3)
        for width, lengths in ((40, [40, 13, 1]), (1, None), (20, None), (1, None)):
            tokens = rng.integers(0, vocab, (3, width))
            found = runner.prefill(tokens, lengths, mine)
            expected = reference.prefill(tokens, lengths, true)
            norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
            cosines.append(((found * expected).sum(-1) / norms).min())
    assert min(cosines) >= TOLERANCES["logits_cosine"].bound
