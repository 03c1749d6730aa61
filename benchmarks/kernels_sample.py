"""Time the choice of tokens from logits beside torch, and beside one reading of the logits.

    python benchmarks/kernels_sample.py

Tokens are compared with the definition in tests/kernels/test_sample.py; here they are looked at:
the largest logit is chosen, and nothing outside of what torch leaves is drawn.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import median_us, print_rows, rotating
from tests.kernels.support import library, workspace

READ_RATE = 4.59e12
"""Bytes per second of a pure read of the H200, measured."""
VOCAB, SPREAD, TEMPERATURE = 157184, 2.0, 0.8
TOP_K, TOP_P, PENALTY = 50, 0.95, 1.1
ROWS = (1, 8, 128)


def _chances(logits: Tensor) -> Tensor:
    return torch.softmax(logits / TEMPERATURE, dim=-1)


def _draw(chances: Tensor) -> Tensor:
    """Draw as torch does without a copy to the host: a race of exponential times."""
    return (chances / torch.empty_like(chances).exponential_()).argmax(-1)


def _top_k(logits: Tensor) -> Tensor:
    values, ids = logits.topk(TOP_K)
    return ids.gather(1, _draw(_chances(values))[:, None])[:, 0]


def _top_p(logits: Tensor) -> Tensor:
    chances, ids = _chances(logits).sort(dim=-1, descending=True)
    chances.masked_fill_(chances.cumsum(-1) - chances >= TOP_P, 0)
    return ids.gather(1, _draw(chances)[:, None])[:, 0]


CHOICES: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor] | None]] = {
    "greedy": ({}, lambda logits: logits.argmax(-1)),
    "temperature": ({"temperature": TEMPERATURE}, lambda logits: _draw(_chances(logits))),
    "top-k 50": ({"temperature": TEMPERATURE, "top_k": TOP_K}, _top_k),
    "top-p 0.95": ({"temperature": TEMPERATURE, "top_p": TOP_P}, _top_p),
    "penalty": ({"temperature": TEMPERATURE, "penalty": PENALTY}, None),
}
"""Name to fields of all rows, and to what does the same with torch."""


def fields_of(logits: Tensor, choice: dict[str, float]) -> dict[str, Any]:
    """Return the fields of one launch on logits [N, V]."""
    rows = len(logits)
    fields: dict[str, Any] = {
        "logits": logits,
        "tokens": torch.empty(rows, dtype=torch.int64, device="cuda"),
        "row_stride": VOCAB,
        "rows": rows,
        "vocab_size": VOCAB,
        "programmatic_launch": 1,
    }
    for name, value in choice.items():
        dtype = torch.int32 if name == "top_k" else torch.float32
        fields[name] = torch.full((rows,), value, dtype=dtype, device="cuda")
    if choice:
        fields["seed"] = torch.arange(rows, device="cuda")
        fields["position"] = torch.full((rows,), 600, dtype=torch.int32, device="cuda")
    if "penalty" in choice:
        fields["seen"] = torch.zeros((rows, VOCAB // 32), dtype=torch.int32, device="cuda")
        fields["seen"][:, ::8] = 4
        fields["seen_slot"] = torch.arange(rows, device="cuda")
    return fields | workspace("sample", **fields)


def check(fields: dict[str, Any]) -> None:
    """Launch once and look at the tokens."""
    library().call("sample", **fields).launch(torch.cuda.current_stream().cuda_stream)
    logits, tokens = fields["logits"], fields["tokens"]
    chosen = logits.gather(1, tokens[:, None])
    if "temperature" not in fields:
        assert torch.equal(tokens, logits.argmax(-1))
    elif "top_k" in fields:
        assert bool(((logits > chosen).sum(-1) < TOP_K).all())
    elif "top_p" in fields:
        chances = _chances(logits.double())
        above = torch.where(logits > chosen, chances, 0).sum(-1)
        assert bool((above < TOP_P + 1e-4).all())
    assert bool(((tokens >= 0) & (tokens < VOCAB)).all())


def measure(name: str, rows: int) -> dict[str, Any]:
    """Return one row of the table."""
    choice, theirs = CHOICES[name]
    nbytes = rows * VOCAB * 4
    tables = [SPREAD * torch.randn((rows, VOCAB), device="cuda") for _ in range(rotating(nbytes))]
    launches = [fields_of(logits, choice) for logits in tables]
    check(launches[0])
    calls = [library().call("sample", **fields) for fields in launches]
    us = median_us(
        [lambda call=call: call.launch(torch.cuda.current_stream().cuda_stream) for call in calls],
        replays=2,
    )
    row = {
        "op": f"sample, {name}",
        "shape": f"{rows} rows",
        "us": us,
        "TB/s": nbytes / us / 1e6,
        "fraction": nbytes / us * 1e6 / READ_RATE,
    }
    if theirs is not None:
        steps = [lambda logits=logits: theirs(logits) for logits in tables[:2]]
        row["reference us"] = median_us(steps, replays=1)
    return row


def rows(counts: Iterable[int] = ROWS) -> Iterator[dict[str, Any]]:
    """Measure all choices at numbers of rows."""
    yield from (measure(name, count) for name in CHOICES for count in counts)


if __name__ == "__main__":
    print_rows(rows())
