"""Sampling on the GPU against the definition in ringexport/runtime/sampling.py."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.support import Guarded, library, workspace

pytestmark = pytest.mark.gpu
DRAWS = 4096


def greedy(logits: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = Guarded((rows,), torch.int64)
    fields = {
        "logits": logits,
        "tokens": out.tensor,
        "row_stride": logits.stride(0),
        "rows": rows,
        "vocab_size": vocab,
    }
    space = workspace("sample", **fields)
    for _ in range(2):  # the workspace is left as it was found
        library().call("sample", **fields, **space).launch(torch.cuda.current_stream().cuda_stream)
    return out.check()


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 7,
    positions: Tensor,
) -> Tensor:
    """Draw one token for each position from the same logits [vocab]."""
    rows = len(positions)
    table = logits.expand(rows, -1).contiguous()
    full = {"device": "cuda"}
    out = Guarded((rows,), torch.int64)
    call = library().call(
        "sample",
        logits=table,
        temperature=torch.full((rows,), temperature, **full),
        top_k=torch.full((rows,), top_k, dtype=torch.int32, **full),
        top_p=torch.full((rows,), top_p, **full),
        min_p=torch.full((rows,), min_p, **full),
        seed=torch.full((rows,), seed, dtype=torch.int64, **full),
        position=positions.to("cuda", torch.int32),
        tokens=out.tensor,
        row_stride=table.stride(0),
        rows=rows,
        vocab_size=len(logits),
    )
    call.launch(torch.cuda.current_stream().cuda_stream)
    return out.check()


def many(logits: Tensor, **options: float) -> Tensor:
    parts = torch.arange(DRAWS).split(512)
    return torch.cat([draw(logits, positions=part, **options) for part in parts])


@pytest.mark.parametrize("shape", [(1, 157184), (3, 1001), (256, 3072), (2, 4)])
def test_greedy_takes_the_lowest_id_of_the_largest(shape: tuple[int, int]) -> None:
    rows, vocab = shape
    stride = -(-vocab // 4) * 4
    logits = torch.randn((rows, stride), device="cuda")[:, :vocab]
    if vocab > 1000:
        logits[0, [900, 17, 600]] = 50.0
    expected = np.array([int(np.argmax(row)) for row in logits.cpu().numpy()])
    assert np.array_equal(greedy(logits).cpu().numpy(), expected)
    logits.fill_(-float("inf"))
    logits[:, vocab - 1] = -1e30
    assert (greedy(logits) == vocab - 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options: dict[str, float]) -> None:
    logits = torch.randn(64, device="cuda") * 1.5
    logits[[3, 40, 41]] = 2.0  # ties
    found = many(logits, **options).cpu().numpy()
    expected = filtered(logits.double().cpu().numpy(), **options)
    assert set(found) <= set(np.flatnonzero(expected))
    counts = np.bincount(found, minlength=64)
    mean = DRAWS * expected
    likely = mean > 5
    statistic = float(((counts - mean)[likely] ** 2 / mean[likely]).sum())
    degrees = max(int(likely.sum()) - 1, 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5, (statistic, degrees)


def filtered(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Return the distribution that the definition draws from."""
    order = np.argsort(-logits, kind="stable")
    order = order[: int(top_k) or None]
    chances = np.exp((logits[order] - logits.max()) / temperature)
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    chances[before >= top_p] = 0
    chances[chances < min_p * chances.max()] = 0
    result = np.zeros_like(logits)
    result[order] = chances / chances.sum()
    return result


def test_ties_at_the_edge_go_to_the_lower_ids() -> None:
    logits = torch.zeros(300, device="cuda")
    assert set(many(logits, top_k=7).tolist()) == set(range(7))
    assert set(many(logits, top_p=0.049).tolist()) == set(range(15))


def test_a_row_depends_on_nothing_but_itself() -> None:
    logits = torch.randn(157184, device="cuda") * 3
    positions = torch.arange(40)
    together = draw(logits, temperature=0.9, top_p=0.95, positions=positions)
    alone = [
        draw(logits, temperature=0.9, top_p=0.95, positions=positions[i : i + 1]).item()
        for i in range(8)
    ]
    assert together[:8].tolist() == alone
    other = draw(logits, temperature=0.9, top_p=0.95, positions=positions, seed=8)
    assert not torch.equal(together, other)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(1000, device="cuda")
    logits[[5, 900]] = 9.0
    assert (draw(logits, temperature=0.0, positions=torch.arange(4)) == 5).all()
