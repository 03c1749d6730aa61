"""One workspace serves launches of all sizes, as in an engine: none leaves traces for the next."""

import pytest
import torch
from torch import Tensor

from tests.kernels import test_attention, test_grouped_experts
from tests.kernels.support import library

pytestmark = pytest.mark.gpu


def alone_and_together(
    op: str, inputs: list[test_attention.Inputs | test_grouped_experts.Inputs]
) -> None:
    """Launch with fresh workspaces, then twice in turn with one for all, and compare bit by bit."""

    def run(one: test_attention.Inputs | test_grouped_experts.Inputs, **fields: object) -> Tensor:
        one.output.tensor.fill_(float("nan"))
        library().call(op, **(one.fields() | fields)).launch()
        return one.output.check().clone()

    wanted = [run(one) for one in inputs]
    size = max(library().workspace_bytes(op, **one.fields()) for one in inputs)
    shared = {
        "workspace": torch.zeros(size, dtype=torch.uint8, device="cuda"),
        "workspace_bytes": size,
    }
    for number, (one, expected) in enumerate(zip(inputs * 2, wanted * 2, strict=True)):
        got = run(one, **shared)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), number


@pytest.mark.parametrize(
    ("weight", "kind"), test_grouped_experts.FORMATS[:1] + test_grouped_experts.FORMATS[3:4]
)
def test_experts_of_one_to_many_tokens(weight: torch.dtype, kind: str) -> None:
    sizes = (600, 1, 2000, 8, 64, 500, 1500, 16)
    cases = [test_grouped_experts.case_of(weight, kind, tokens=size) for size in sizes]
    alone_and_together("experts", [test_grouped_experts.Inputs(case) for case in cases])


def test_attention_of_one_to_many_rows() -> None:
    rows = (1, 64, 3, 128, 1, 17, 256)
    cases = [test_attention.Case(contexts=(3000, *[900] * (count - 1))) for count in rows]
    alone_and_together("attention_decode", [test_attention.Inputs(case) for case in cases])
