import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ringexport.compare.tolerances import TOLERANCES
from ringexport.errors import BackendUnavailableError, BundleError, RingExportError
from ringexport.runtime.backends.ort import OrtOptions, OrtRunner
from ringexport.runtime.backends.ort_base import row_groups
from ringexport.runtime.backends.ort_session import failed_node
from ringexport.runtime.session import Engine
from tests.numerics import assert_close


def test_rows_share_a_call_only_where_the_graph_allows_it() -> None:
    def groups(lengths: list[int], position: list[int]) -> list[tuple[int, int]]:
        found = row_groups(np.array(lengths), np.array(position))
        return [(rows.start, rows.stop) for rows in found]

    assert groups([5, 4, 5], [0, 0, 0]) == [(0, 3)]
    assert groups([1, 1], [7, 3]) == [(0, 2)]
    assert groups([5, 4], [0, 1]) == [(0, 1), (1, 2)]
    assert groups([5, 0, 5], [0, 0, 0]) == [(0, 1), (2, 3)]
    assert groups([100, 1, 1], [0, 0, 0]) == [(0, 1), (1, 2), (2, 3)]
    assert groups([5000, 5000], [0, 0]) == [(0, 1), (1, 2)]


def test_unknown_or_unsupported_provider(tmp_path: Path) -> None:
    for provider in ("cuda", "magic"):
        with pytest.raises(BackendUnavailableError, match=provider):
            OrtRunner(
                tmp_path,
                context_length=1,
                model_digest=str,
                options=OrtOptions(provider=provider),
            )


@pytest.mark.parametrize("content", [None, b"", b"no graph at all"])
def test_graph_that_cannot_be_loaded(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        OrtRunner(tmp_path, context_length=1, model_digest=str)


def test_failed_node_is_named() -> None:
    message = (
        "Non-zero status code returned while running GroupQueryAttention node. "
        "Name:'layers.2.attention' Status Message: bad"
    )
    assert failed_node(message) == "GroupQueryAttention 'layers.2.attention'"


def test_errors_of_a_run_are_wrapped(engine: Engine) -> None:
    assert isinstance(engine.runner, OrtRunner)
    state = engine.runner.new_state(1)
    engine.runner.decode([1], state)
    assert state.decode_call is not None
    state.decode_call.binding.clear_binding_inputs()
    with pytest.raises(RingExportError, match="onnxruntime failed"):
        engine.runner.decode([1], state)


def test_state_is_updated_in_place(engine: Engine) -> None:
    assert isinstance(engine.runner, OrtRunner)
    state = engine.runner.new_state(2)
    places = {name: array.ctypes.data for name, array in state.arrays()}
    engine.runner.prefill([[1, 2], [3, 4]], None, state)
    engine.runner.decode([5, 6], state)
    assert {name: array.ctypes.data for name, array in state.arrays()} == places
    call = state.decode_call
    engine.runner.decode([5, 6], state)
    assert state.decode_call is call


def test_a_step_binds_and_copies_nothing_but_its_logits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine.runner, OrtRunner)
    state = engine.runner.new_state(1)
    engine.runner.decode([1], state)
    bound: list[object] = []
    monkeypatch.setattr(engine.runner, "_bind", lambda *_: bound.append(None))
    tracemalloc.start()
    try:
        logits = engine.runner.decode([1], state)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(50):
            logits = engine.runner.decode([1], state)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert not bound
    assert peak < 2 * logits.nbytes + 16384 < state.nbytes


def test_onnxruntime_is_imported_without_telemetry(tmp_path: Path) -> None:
    code = (
        "import ringexport.runtime.backends.ort, onnxruntime;"
        "onnxruntime.InferenceSession(onnxruntime.__file__.replace('__init__.py', 'datasets/')"
        " + 'sigmoid.onnx', providers=['CPUExecutionProvider'])"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    environment.pop("XDG_CACHE_HOME", None)
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_probe_shows_the_layers(engine: Engine) -> None:
    assert isinstance(engine.runner, OrtRunner)
    tokens, lengths = [[1, 2, 3], [4, 0, 0]], [3, 1]
    state = engine.runner.new_state(2)
    found = engine.runner.probe(tokens, lengths, state)
    plain = engine.runner.new_state(2)
    logits = engine.runner.prefill(tokens, lengths, plain, every_position=True)
    assert_close(found["logits"], logits, rtol=TOLERANCES["hidden_fp32"].bound)
    assert state.position.tolist() == [3, 1]
    assert found["hidden.0"].shape == (2, 3, 64)
    assert found["expert_ids.1"].shape == (2, 3, 4)
    assert not found["hidden.final"][1, 1:].any()
    assert (found["expert_ids.1"][1, 1:] == -1).all()
