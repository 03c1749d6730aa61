"""One engine serves steps of all sizes in any order: what a kernel leaves behind disturbs none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.gpu
MINI = Path(__file__).parents[1] / "checkpoint" / "data" / "ring-mini-linear-2.0.json"
SIZES = ((1, 700), (3, 150), (4, 512), (1, 16), (9, 40), (40, 30), (2, 1500), (1, 513))
"""Rows and tokens of prompts: all ways to compute experts, attention split into parts."""


@pytest.fixture(scope="module")
def parts() -> tuple[object, object]:
    import torch

    from ringexport.checkpoint import RingConfig
    from ringexport.ops.quantization import NumberFormat
    from ringexport.packing.layout import MatrixFormat, matrices
    from ringexport.runtime.backends.cuda.random_weights import random_weights
    from tests.kernels.support import library

    config = RingConfig.from_file(MINI)
    config = dataclasses.replace(config, num_hidden_layers=6, vocab_size=4096)
    fp8 = MatrixFormat(NumberFormat.FP8_E4M3)
    formats = {matrix.name: fp8 for matrix in matrices(config) if matrix.name != "lm_head"}
    return random_weights(config, formats, torch.device("cuda")), library()


def run(runner: object, rows: int, size: int) -> list[np.ndarray]:
    """Return the logits of prompts and of some steps behind them."""
    rng = np.random.default_rng([rows, size])
    state = runner.new_state(rows)  # type: ignore[attr-defined]
    found = [runner.prefill(rng.integers(0, 4096, (rows, size)), None, state)]  # type: ignore[attr-defined]
    found += [runner.decode(rng.integers(0, 4096, rows), state) for _ in range(3)]  # type: ignore[attr-defined]
    return found


def test_sizes_do_not_disturb_each_other(parts: tuple[object, object]) -> None:
    from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner

    def opened(*, capture_ahead: bool = False) -> CudaRunner:
        options = CudaOptions(max_batch=40, max_context=2048, capture_ahead=capture_ahead)
        return CudaRunner(*parts, model_digest=str, options=options)  # type: ignore[arg-type]

    expected = []
    for size in SIZES:
        with opened() as fresh:
            expected.append(run(fresh, *size))
    with opened(capture_ahead=True) as runner:
        for turn in range(2):
            for size, wanted in zip(SIZES, expected, strict=True):
                for got, logits in zip(run(runner, *size), wanted, strict=True):
                    assert np.isfinite(logits).all()
                    assert np.array_equal(got, logits), (turn, size)
