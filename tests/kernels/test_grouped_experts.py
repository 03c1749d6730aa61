"""Experts of many tokens against fp64 products of the same codes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ringexport.kernels.library import ScaleKind
from tests.kernels.support import DTYPES, Guarded, assert_within_torch, library, workspace

pytestmark = pytest.mark.gpu
FP8, INT8 = torch.float8_e4m3fn, torch.int8
KINDS = {
    "none": ScaleKind.NONE,
    "tensor": ScaleKind.TENSOR,
    "channel": ScaleKind.CHANNEL,
    "block": ScaleKind.BLOCK128,
}
BLOCK = 128


def half_range(code: torch.dtype) -> float:
    """What the largest magnitude is mapped to."""
    return 127.5 if code == INT8 else 448.0


def to_codes(scaled: Tensor, code: torch.dtype) -> Tensor:
    """Round scaled numbers to codes, saturating."""
    if code == INT8:
        return scaled.round().clamp(-128, 127).to(INT8)
    return scaled.float().clamp(-448, 448).to(FP8)


def blocks(values: Tensor) -> Tensor:
    """Pad the last dimension to blocks: [..., count, 128]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK))


def rounded(values: Tensor, code: torch.dtype, kind: str, static: float | None) -> Tensor:
    """Quantize rows [N, C] and return their real values in the input's dtype."""
    tiles = blocks(values) if kind == "block" else values
    if static is None:
        scale = tiles.float().abs().amax(-1, keepdim=True) / half_range(code)
        scale = torch.where(scale > 0, scale, torch.finfo(torch.float32).eps)
    else:
        scale = torch.tensor(static, device=values.device)
    real = to_codes(tiles / scale.to(tiles.dtype), code).to(values.dtype) * scale.to(values.dtype)
    return real.flatten(-2)[:, : values.shape[1]] if kind == "block" else real


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch."""

    tokens: int = 600
    hidden: int = 256
    width: int = 128
    shared: int = 96
    experts: int = 16
    top_k: int = 4
    dtype: torch.dtype = torch.bfloat16
    weight: torch.dtype = FP8
    kind: str = "channel"
    output: torch.dtype = torch.bfloat16
    accumulate: bool = False
    static: float | None = None
    given: bool = False
    routing: str = "random"


class Weights:
    """Codes [groups, rows, columns] with scales, and their real values in fp64."""

    def __init__(
        self, case: Case, shape: tuple[int, int, int], generator: torch.Generator, *, gated: bool
    ) -> None:
        groups, rows, columns = shape
        real = torch.randn(shape, generator=generator, device="cuda") * columns**-0.5
        if case.kind == "none":
            self.codes, self.scale = real.to(case.weight), None
            self.real = self.codes.double()
            return
        if case.kind == "tensor":
            scale = real.abs().amax((1, 2), keepdim=True) / half_range(case.weight)
            self.scale = scale.flatten()
        elif case.kind == "channel":
            scale = real.abs().amax(2, keepdim=True) / half_range(case.weight)
            self.scale = scale.flatten(1)
        else:
            parts = 2 if gated else 1
            shape = (groups, parts, -(-rows // parts // BLOCK), -(-columns // BLOCK))
            self.scale = torch.rand(shape, generator=generator, device="cuda") * 0.001 + 0.0005
            scale = self.scale.repeat_interleave(BLOCK, 2)[:, :, : rows // parts]
            scale = scale.repeat_interleave(BLOCK, 3)[..., :columns]
            scale = scale.transpose(1, 2).reshape(groups, rows, columns)  # rows alternate gate, up
        self.codes = to_codes(real / scale, case.weight)
        self.real = self.codes.double() * scale.double()


class Inputs:
    """Random inputs of a case and two references."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator("cuda").manual_seed(seed)
        self.hidden = torch.randn(case.tokens, case.hidden, generator=generator, device="cuda").to(
            case.dtype
        )
        self.hidden[case.tokens // 2] = 0
        scores = torch.rand(case.tokens, case.experts, generator=generator, device="cuda")
        self.ids = scores.topk(case.top_k).indices.int()
        if case.routing == "one":
            self.ids[:] = case.experts - 1
            self.ids[:, 1:] = -1
        elif case.routing == "empty":  # neither the first nor the last expert
            self.ids = self.ids.clamp(1, case.experts - 2)
        elif case.routing == "invalid":
            self.ids[::3, 1] = -1
            self.ids[1::3, 0] = case.experts
            self.ids[5] = -1
        self.routing = torch.rand(case.tokens, case.top_k, generator=generator, device="cuda")
        sizes = (case.experts, 2 * case.width, case.hidden), (case.experts, case.hidden, case.width)
        self.weights = [
            Weights(case, sizes[0], generator, gated=True),
            Weights(case, sizes[1], generator, gated=False),
        ]
        self.shared: list[Weights] = []
        if case.shared:
            sizes = (1, 2 * case.shared, case.hidden), (1, case.hidden, case.shared)
            self.shared = [
                Weights(case, sizes[0], generator, gated=True),
                Weights(case, sizes[1], generator, gated=False),
            ]
        self.before = torch.randn(case.tokens, case.hidden, generator=generator, device="cuda").to(
            case.output
        )
        self.output = Guarded((case.tokens, case.hidden), case.output)

    def fields(self) -> dict[str, object]:
        """Return all fields with a fresh workspace; refill the output."""
        case = self.case
        if case.accumulate:
            self.output.tensor.copy_(self.before)
        fields: dict[str, object] = {
            "hidden": self.hidden, "expert_ids": self.ids, "routing_weights": self.routing,
            "gate_up_proj": self.weights[0].codes, "down_proj": self.weights[1].codes,
            "output": self.output.tensor, "tokens": case.tokens, "hidden_size": case.hidden,
            "intermediate_size": case.width, "shared_intermediate_size": case.shared,
            "num_experts": case.experts, "top_k": case.top_k, "norm_eps": 1e-6,
            "dtype": DTYPES[case.dtype], "weight_dtype": DTYPES[case.weight],
            "output_dtype": DTYPES[case.output], "scale_kind": KINDS[case.kind],
            "accumulate": int(case.accumulate),
        }  # fmt: skip
        if case.shared:
            fields |= {"shared_gate_up": self.shared[0].codes, "shared_down": self.shared[1].codes}
        if case.kind != "none":
            fields |= {"gate_up_scale": self.weights[0].scale, "down_scale": self.weights[1].scale}
            if case.shared:
                fields |= {
                    "shared_gate_up_scale": self.shared[0].scale,
                    "shared_down_scale": self.shared[1].scale,
                }
        if case.static is not None:
            fields["gate_up_input_scale"] = torch.tensor([case.static], device="cuda")
            fields["down_input_scale"] = torch.tensor([case.static / 4], device="cuda")
        if case.given:
            tiles = blocks(self.hidden.float()) if case.kind == "block" else self.hidden.float()
            scale = tiles.abs().amax(-1, keepdim=True) / half_range(case.weight)
            scale = torch.where(scale > 0, scale, torch.finfo(torch.float32).eps)
            fields["quantized_hidden"] = to_codes(tiles / scale, case.weight).flatten(1)
            fields["hidden_scale"] = scale.squeeze(-1)
        return fields | workspace("experts", **fields)

    def run(self) -> Tensor:
        """Launch once."""
        library().call("experts", **self.fields()).launch()
        return self.output.check()

    def mlp(self, rows: Tensor, pair: list[Weights], group: int, wide: torch.dtype) -> Tensor:
        """SwiGLU; `wide` = fp64: exact but for 8-bit codes, fp32: rounded as torch would."""
        case = self.case
        narrow = (lambda x: x) if wide == torch.float64 else (lambda x: x.to(case.dtype).to(wide))
        both = rows @ pair[0].real[group].to(wide).T
        gate, up = both[:, 0::2], both[:, 1::2]
        inner = narrow(torch.nn.functional.silu(gate) * up)
        if case.kind != "none":
            inner = rounded(inner, case.weight, case.kind, case.static and case.static / 4)
        return narrow(inner @ pair[1].real[group].to(wide).T)

    def expected(self, wide: torch.dtype) -> Tensor:
        """Return the output; `wide` as in `mlp`."""
        case = self.case
        rows = self.hidden.to(wide)
        if case.kind != "none":
            rows = rounded(rows, case.weight, case.kind, case.static)
        output = torch.zeros(case.tokens, case.hidden, dtype=wide, device="cuda")
        for expert in range(case.experts):
            token, choice = (self.ids == expert).nonzero(as_tuple=True)
            result = self.mlp(rows[token], self.weights, expert, wide)
            output.index_add_(0, token, result * self.routing[token, choice, None].to(wide))
        if case.shared:
            output += self.mlp(rows, self.shared, 0, wide)
        if case.accumulate:
            output += self.before.to(wide)
        return output if wide == torch.float64 else output.to(case.output)


def check(case: Case) -> None:
    """Run a case and compare."""
    inputs = Inputs(case)
    got = inputs.run()
    same_dtype, truth = inputs.expected(torch.float32), inputs.expected(torch.float64)
    if (
        case.output == torch.float32
    ):  # the products were rounded to 16 bits before they were added up
        got, same_dtype = got.to(case.dtype), same_dtype.to(case.dtype)
    assert_within_torch(got, same_dtype, truth)


FORMATS = [
    (FP8, "channel"), (FP8, "tensor"), (FP8, "block"), (INT8, "channel"), (INT8, "tensor"),
    (torch.bfloat16, "none"), (torch.float16, "none"),
]  # fmt: skip
format_cases = pytest.mark.parametrize(
    ("weight", "kind"), FORMATS, ids=lambda x: str(x).removeprefix("torch.")
)


def case_of(weight: torch.dtype, kind: str, **fields: object) -> Case:
    """Return a case of a format, activations of the same type if it is not quantized."""
    if kind == "none":
        fields |= {"dtype": weight, "output": weight}
    return Case(weight=weight, kind=kind, **fields)  # type: ignore[arg-type]


@format_cases
def test_every_format(weight: torch.dtype, kind: str) -> None:
    check(case_of(weight, kind))


@format_cases
def test_a_tile_of_each(weight: torch.dtype, kind: str) -> None:
    """The fewest tokens that come here, for tools that slow a kernel down."""
    sizes = {"tokens": 513, "hidden": 128, "width": 32, "shared": 64, "experts": 3, "top_k": 2}
    check(case_of(weight, kind, **sizes))


@format_cases
def test_odd_widths_and_no_shared_expert(weight: torch.dtype, kind: str) -> None:
    check(case_of(weight, kind, tokens=777, hidden=384, width=160, shared=0, experts=5, top_k=3))


@format_cases
def test_many_tokens_for_each_expert(weight: torch.dtype, kind: str) -> None:
    check(case_of(weight, kind, tokens=4097, experts=4, top_k=2, hidden=512, width=256, shared=256))


@format_cases
def test_more_tiles_than_one_round(weight: torch.dtype, kind: str) -> None:
    """Seven and four rounds of 132 blocks: what goes from tile to tile comes round twice."""
    sizes = {"tokens": 4097, "hidden": 1024, "width": 1024, "shared": 512, "experts": 8, "top_k": 2}
    check(case_of(weight, kind, **sizes))


@pytest.mark.parametrize("routing", ["one", "empty", "invalid"])
@pytest.mark.parametrize("kind", ["channel", "block"])
def test_uneven_routing(routing: str, kind: str) -> None:
    check(Case(routing=routing, kind=kind, tokens=1500))


@pytest.mark.parametrize("weight", [FP8, INT8], ids=str)
def test_fp16_activations(weight: torch.dtype) -> None:
    check(Case(weight=weight, dtype=torch.float16, output=torch.float16))


@pytest.mark.parametrize("weight", [FP8, INT8], ids=str)
def test_static_scales(weight: torch.dtype) -> None:
    check(Case(weight=weight, kind="tensor", static=4 / half_range(weight)))


@pytest.mark.parametrize("kind", ["channel", "block"])
def test_input_quantized_before(kind: str) -> None:
    check(Case(kind=kind, given=True))


def test_adds_to_the_residual() -> None:
    check(Case(output=torch.float32, accumulate=True))


def test_dense_layer_as_one_expert() -> None:
    check(Case(tokens=1030, experts=1, top_k=1, width=1280, shared=0, hidden=512, kind="block"))


def test_narrow_experts() -> None:
    fields = {"tokens": 1500, "experts": 32, "width": 32, "shared": 32}
    check(case_of(torch.bfloat16, "none", **fields))


def test_many_experts() -> None:
    check(Case(tokens=2500, experts=256, top_k=8, width=64, shared=64))


def test_repeats_are_bitwise_equal() -> None:
    inputs = Inputs(Case(tokens=3000))
    call = library().call("experts", **inputs.fields())
    outputs = []
    for _ in range(5):
        inputs.output.tensor.fill_(float("nan"))
        call.launch()
        outputs.append(inputs.output.check().clone())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
