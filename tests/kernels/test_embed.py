"""Rows of the embedding table as the first residual stream."""

import pytest
import torch

from tests.kernels.support import Guarded, library

pytestmark = pytest.mark.gpu
VOCABULARY = 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 2048), (1, 8), (7, 2056), (500, 256), (5000, 64)]
)
def test_rows_are_widened(rows: int, columns: int, dtype: torch.dtype) -> None:
    table = torch.randn((VOCABULARY, columns), device="cuda").to(dtype)
    tokens = torch.randint(0, VOCABULARY, (rows,), device="cuda")
    residual = embedded(table, tokens)
    assert torch.equal(residual, table.float()[tokens])


def test_an_unknown_token_gives_nan_and_reads_nothing() -> None:
    table = torch.randn((VOCABULARY, 64), device="cuda").bfloat16()
    tokens = torch.tensor([3, -1, VOCABULARY, 1 << 40], device="cuda")
    residual = embedded(table, tokens)
    assert torch.equal(residual[0], table[3].float())
    assert residual[1:].isnan().all()


def embedded(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    out = Guarded((len(tokens), table.shape[1]), torch.float32)
    library().call(
        "embed",
        tokens=tokens,
        table=table,
        residual=out.tensor,
        rows=len(tokens),
        columns=table.shape[1],
        vocab_size=len(table),
        dtype=2 if table.dtype == torch.bfloat16 else 1,
    ).launch(torch.cuda.current_stream().cuda_stream)
    return out.check()
