"""The MoE kernels against fp64 experts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.kernels.library import DType
from tests.kernels.moe_cases import EPS, Experts, normed, quantize_rows, symmetric_difference
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library, workspace

pytestmark = pytest.mark.gpu
L3_BOUND = 1e-6

CASES = [
    ("fp8", "channel"),
    ("fp8", "block"),
    ("fp8", "tensor"),
    ("int8", "channel"),
    ("int8", "block"),
    ("int8", "tensor"),
    ("bf16", "none"),
    ("fp16", "none"),
]
TOKENS = [1, 2, 5, 8, 9, 33, 64, 130, 257]


class Run:
    """One call of the experts op on random data."""

    def __init__(
        self, layer: Experts, tokens: int, *, top_k: int, norm: bool = False, seed: int = 1
    ) -> None:
        self.layer, self.top_k = layer, top_k
        generator = torch.Generator("cuda").manual_seed(seed)
        self.dtype = torch.float16 if layer.weight_format == "fp16" else torch.bfloat16
        experts, _, hidden = layer.gate_up.codes.shape
        self.residual = torch.randn(tokens, hidden, device="cuda", generator=generator)
        self.hidden = self.residual.to(self.dtype)
        self.norm_weight = (
            torch.rand(hidden, device="cuda", generator=generator) + 0.5 if norm else None
        )
        scores = torch.rand(tokens, experts, device="cuda", generator=generator)
        self.ids = scores.argsort(-1)[:, :top_k].int().contiguous()
        self.weights = torch.rand(tokens, top_k, device="cuda", generator=generator)

    def inputs(self) -> Tensor:
        """What the experts see."""
        if self.norm_weight is None:
            return self.hidden
        found = normed(self.residual, self.norm_weight)
        return found if self.layer.kind != "none" else found.to(self.dtype)

    def launch(
        self, output_dtype: torch.dtype = torch.float32, start: Tensor | None = None, **more: object
    ) -> Tensor:
        """Return the output; `start`: what it is added to."""
        output = Guarded(tuple(self.hidden.shape), output_dtype)
        if start is not None:
            output.tensor.copy_(start)
        fields: dict[str, object] = self.layer.fields() | {
            "hidden": self.hidden if self.norm_weight is None else self.residual,
            "norm_eps": EPS,
            "expert_ids": self.ids,
            "routing_weights": self.weights,
            "output": output.tensor,
            "tokens": len(self.hidden),
            "top_k": self.top_k,
            "dtype": DTYPES[self.dtype],
            "output_dtype": DTYPES[output_dtype],
            "accumulate": int(start is not None),
            **more,
        }
        if self.norm_weight is not None:
            fields["norm_weight"] = self.norm_weight
        space = workspace("experts", **fields)
        library().call("experts", **fields, **space).launch()
        return output.check()

    def check(self, got: Tensor, truth: Tensor) -> None:
        """Level L3 for 8-bit weights in fp32, L2 otherwise."""
        if self.layer.kind == "none" or got.dtype != torch.float32:
            work = torch.float32 if got.dtype == torch.float32 else got.dtype
            same_dtype = self.layer.expected(
                self.inputs(), self.ids, self.weights, dtype=self.dtype
            ).to(work)
            assert_within_torch(got, same_dtype, truth)
        else:
            assert bool(torch.isfinite(got).all())
            assert symmetric_difference(got, truth) <= L3_BOUND


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("weight_format", "kind"), CASES)
def test_experts(weight_format: str, kind: str, tokens: int) -> None:
    """Random routing, a shared expert of another width, fp32 output."""
    layer = Experts.make(
        experts=48, hidden=512, width=160, shared=288, weight_format=weight_format, kind=kind
    )
    run = Run(layer, tokens, top_k=6)
    run.check(
        run.launch(programmatic_launch=tokens % 2),
        layer.expected(run.inputs(), run.ids, run.weights),
    )


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize(("weight_format", "kind"), CASES)
def test_experts_ring_mini(weight_format: str, kind: str, tokens: int) -> None:
    """The real widths; norm inside, added to the residual."""
    layer = Experts.make(
        experts=16, hidden=2048, width=512, shared=512, weight_format=weight_format, kind=kind
    )
    run = Run(layer, tokens, top_k=8, norm=True)
    start = run.residual
    got = run.launch(start=start)
    run.check(got, layer.expected(run.inputs(), run.ids, run.weights) + start.double())


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 256, "width": 32, "shared": 32, "experts": 32},
        {"hidden": 4096, "width": 1024, "shared": 0, "experts": 8},
        {"hidden": 2048, "width": 5120, "shared": 0, "experts": 1},
        {"hidden": 128, "width": 96, "shared": 512, "experts": 3},
    ],
    ids=["nano", "flash", "dense", "ragged"],
)
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(
    ("weight_format", "kind"),
    [("fp8", "channel"), ("fp8", "block"), ("int8", "block"), ("bf16", "none")],
)
def test_experts_shapes(weight_format: str, kind: str, tokens: int, sizes: dict[str, int]) -> None:
    """Ring-nano, Ring-flash, a dense layer as one expert, ragged blocks."""
    layer = Experts.make(**sizes, weight_format=weight_format, kind=kind)
    run = Run(layer, tokens, top_k=min(4, sizes["experts"]))
    run.check(run.launch(), layer.expected(run.inputs(), run.ids, run.weights))


@pytest.mark.parametrize("tokens", [40, 200])
@pytest.mark.parametrize(("weight_format", "kind"), [("fp8", "channel"), ("bf16", "none")])
def test_experts_many(weight_format: str, kind: str, tokens: int) -> None:
    """More experts for a multiprocessor than have room for their tokens there at once."""
    layer = Experts.make(
        experts=420, hidden=2048, width=96, shared=96, weight_format=weight_format, kind=kind
    )
    run = Run(layer, tokens, top_k=16)
    run.check(run.launch(), layer.expected(run.inputs(), run.ids, run.weights))


@pytest.mark.parametrize("tokens", [3, 8, 50])
@pytest.mark.parametrize("how", ["one_expert", "nobody", "some_elsewhere", "repeated"])
def test_experts_routing(tokens: int, how: str) -> None:
    """All on one expert, ids that are not here, an expert twice for a token."""
    layer = Experts.make(
        experts=24, hidden=256, width=64, shared=32, weight_format="fp8", kind="channel"
    )
    run = Run(layer, tokens, top_k=4)
    if how == "one_expert":
        run.ids[:] = 23
    elif how == "nobody":
        run.ids[:] = torch.tensor([-1, 24, -5, 10**6], dtype=torch.int32)
    elif how == "some_elsewhere":
        run.ids[::2, 1] = -1
        run.ids[1:, 2] = 24
    else:
        run.ids[:, 1] = run.ids[:, 0]
    run.check(run.launch(), layer.expected(run.inputs(), run.ids, run.weights))


@pytest.mark.parametrize("tokens", [4, 50])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_experts_output(tokens: int, output_dtype: torch.dtype, accumulate: bool) -> None:
    """Every output dtype, written or added to."""
    weight_format = "fp16" if output_dtype == torch.float16 else "bf16"
    layer = Experts.make(
        experts=16, hidden=256, width=128, shared=0, weight_format=weight_format, kind="none"
    )
    run = Run(layer, tokens, top_k=4)
    start = torch.randn(tokens, 256, device="cuda").to(output_dtype) if accumulate else None
    truth = layer.expected(run.inputs(), run.ids, run.weights)
    got = run.launch(output_dtype, start)
    if start is None:
        run.check(got, truth)
    else:
        same_dtype = (
            layer.expected(run.inputs(), run.ids, run.weights, dtype=run.dtype).to(output_dtype)
            + start
        )
        assert_within_torch(got, same_dtype, truth + start.double())


@pytest.mark.parametrize("tokens", [5, 50])
@pytest.mark.parametrize(("weight_format", "kind"), CASES[:6])
@pytest.mark.parametrize("static", [False, True])
def test_experts_given_codes(weight_format: str, kind: str, tokens: int, static: bool) -> None:
    """Quantized by the caller, dynamically or with static scales for both products."""
    layer = Experts.make(
        experts=16, hidden=384, width=160, shared=64, weight_format=weight_format, kind=kind
    )
    run = Run(layer, tokens, top_k=4)
    scales = (4.0 / 448, 2.0 / 448) if static else (None, None)
    codes, scale = quantize_rows(run.hidden, weight_format, block=kind == "block", static=scales[0])
    more: dict[str, Any] = {"quantized_hidden": codes, "hidden_scale": scale}
    if static:
        tensors = [torch.tensor([value], device="cuda") for value in scales]
        more |= {"gate_up_input_scale": tensors[0], "down_input_scale": tensors[1]}
    truth = layer.expected(run.inputs(), run.ids, run.weights, static=scales)
    run.check(run.launch(**more), truth)
    if static:
        del more["quantized_hidden"], more["hidden_scale"]
        run.check(run.launch(**more), truth)


def test_experts_repeat_bitwise() -> None:
    """No result depends on the order in which blocks run."""
    layer = Experts.make(
        experts=64, hidden=512, width=128, shared=128, weight_format="fp8", kind="channel"
    )
    for tokens in (4, 100):
        run = Run(layer, tokens, top_k=8)
        first = run.launch()
        for _ in range(5):
            assert torch.equal(run.launch(), first)


def test_experts_fields() -> None:
    """The messages name the field."""
    layer = Experts.make(
        experts=4, hidden=128, width=32, shared=0, weight_format="fp8", kind="channel"
    )
    run = Run(layer, 2, top_k=2)
    for field, value in (
        ("hidden_size", 100),
        ("intermediate_size", 40),
        ("weight_dtype", DType.FLOAT32),
        ("top_k", 0),
        ("expert_ids", 0),
        ("gate_up_scale", 0),
    ):
        overrides: dict[str, Any] = {field: value}
        with pytest.raises(ShapeError, match=field):
            run.launch(**overrides)
