"""Random experts of any weight format and what they must give: for tests and benchmarks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.kernels.library import DType, ScaleKind
from tests.kernels.support import product

EPS = 1e-6
BLOCK = 128
FORMATS = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
WEIGHT_DTYPES = {
    "fp8": DType.FP8_E4M3,
    "int8": DType.INT8,
    "bf16": DType.BFLOAT16,
    "fp16": DType.FLOAT16,
}
RANGES = {"fp8": 448.0, "int8": 127.5}
SCALE_KINDS = {
    "none": ScaleKind.NONE,
    "tensor": ScaleKind.TENSOR,
    "channel": ScaleKind.CHANNEL,
    "block": ScaleKind.BLOCK128,
}


def encode(scaled: Tensor, weight_format: str) -> Tensor:
    """Round values that were divided by their scale to codes."""
    if weight_format == "int8":
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)


def dynamic_scale(tiles: Tensor, weight_format: str) -> Tensor:
    """Return the scale [..., 1] of values that share one along the last dimension."""
    largest = tiles.abs().amax(-1, keepdim=True)
    # By a tensor: torch on a GPU multiplies by the reciprocal of a number.
    scale = largest / torch.full_like(largest, RANGES[weight_format])
    return scale.masked_fill(scale == 0, torch.finfo(torch.float32).eps)


def quantize_rows(
    values: Tensor, weight_format: str, *, block: bool, static: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes [N, C] and scales [N, 1 or blocks] of activations."""
    wide = values.float()
    if static is not None:
        count = -(-wide.shape[-1] // BLOCK) if block else 1
        scale = torch.full((len(wide), count), static, device=wide.device)
        return encode(wide / scale[:, :1], weight_format), scale
    if not block:
        scale = dynamic_scale(wide, weight_format)
        return encode(wide / scale, weight_format), scale
    columns = wide.shape[-1]
    tiles = F.pad(wide, (0, -columns % BLOCK)).view(len(wide), -1, BLOCK)
    scale = dynamic_scale(tiles, weight_format)
    codes = encode(tiles / scale, weight_format).flatten(1)[:, :columns]
    return codes.contiguous(), scale[..., 0].contiguous()


def real_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Return what the codes of activations stand for, in fp64."""
    wide = scale.double().repeat_interleave(BLOCK if scale.shape[1] > 1 else codes.shape[1], dim=1)
    return codes.double() * wide[:, : codes.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Codes [E, R, C] of one product, their scales, and the real values in fp64 if wanted."""

    codes: Tensor
    scale: Tensor | None

    def real(self, expert: int, *, interleaved: bool) -> Tensor:
        """Return one expert's weights in fp64; `interleaved`: rows alternate gate and up."""
        codes = self.codes[expert].double()
        if self.scale is None:
            return codes
        scale = self.scale[expert].double()
        if scale.ndim == 0:
            return codes * scale
        if scale.ndim == 1:
            return codes * scale[:, None]
        columns = scale.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[1]]
        if not interleaved:
            return codes * columns.repeat_interleave(BLOCK, dim=0)[: len(codes)]
        rows = columns.repeat_interleave(BLOCK, dim=1)[:, : len(codes) // 2]
        return codes * rows.transpose(0, 1).flatten(0, 1)


def make_matrices(
    shape: tuple[int, int, int], weight_format: str, kind: str, *, interleaved: bool, seed: int
) -> Matrices:
    """Return random weights of about unit gain."""
    experts, rows, columns = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    spread = columns**-0.5
    if kind == "none":
        codes = torch.empty(shape, dtype=FORMATS[weight_format], device="cuda")
        for expert in range(experts):
            codes[expert] = torch.randn(rows, columns, device="cuda", generator=generator) * spread
        return Matrices(codes=codes, scale=None)
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    halves = (2, -(-(rows // 2) // BLOCK), blocks[1])
    tail = {"tensor": (), "channel": (rows,), "block": halves if interleaved else blocks}[kind]
    scale = torch.rand(experts, *tail, device="cuda", generator=generator) + 0.5
    codes = torch.empty(shape, dtype=FORMATS[weight_format], device="cuda")
    width = RANGES[weight_format] / 4
    for expert in range(experts):
        codes[expert] = encode(
            torch.randn(rows, columns, device="cuda", generator=generator) * width, weight_format
        )
    return Matrices(codes=codes, scale=scale * (spread / width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The weights of one MoE layer."""

    weight_format: str
    kind: str
    gate_up: Matrices
    down: Matrices
    shared_gate_up: Matrices | None
    shared_down: Matrices | None

    @classmethod
    def make(
        cls,
        *,
        experts: int,
        hidden: int,
        width: int,
        shared: int,
        weight_format: str,
        kind: str,
        seed: int = 0,
    ) -> "Experts":
        """Return a random layer."""

        def product(count: int, rows: int, columns: int, number: int) -> Matrices:
            return make_matrices(
                (count, rows, columns),
                weight_format,
                kind,
                interleaved=number % 2 == 0,
                seed=4 * seed + number,
            )

        return cls(
            weight_format=weight_format,
            kind=kind,
            gate_up=product(experts, 2 * width, hidden, 0),
            down=product(experts, hidden, width, 1),
            shared_gate_up=product(1, 2 * shared, hidden, 2) if shared else None,
            shared_down=product(1, hidden, shared, 3) if shared else None,
        )

    def fields(self) -> dict[str, object]:
        """Return the weight fields of ExpertsParams."""
        found: dict[str, object] = {
            "gate_up_proj": self.gate_up.codes,
            "down_proj": self.down.codes,
            "weight_dtype": WEIGHT_DTYPES[self.weight_format],
            "scale_kind": SCALE_KINDS[self.kind],
            "num_experts": len(self.gate_up.codes),
            "hidden_size": self.gate_up.codes.shape[2],
            "intermediate_size": self.down.codes.shape[2],
        }
        if self.gate_up.scale is not None:
            found |= {"gate_up_scale": self.gate_up.scale, "down_scale": self.down.scale}
        if self.shared_gate_up is not None and self.shared_down is not None:
            found |= {
                "shared_gate_up": self.shared_gate_up.codes,
                "shared_down": self.shared_down.codes,
                "shared_intermediate_size": self.shared_down.codes.shape[2],
            }
            if self.shared_gate_up.scale is not None:
                found |= {
                    "shared_gate_up_scale": self.shared_gate_up.scale,
                    "shared_down_scale": self.shared_down.scale,
                }
        return found

    def _rounded(self, values: Tensor, static: float | None) -> Tensor:
        if self.kind == "none":
            return values.double()
        return real_rows(
            *quantize_rows(
                values.float(), self.weight_format, block=self.kind == "block", static=static
            )
        )

    def expected(
        self,
        hidden: Tensor,
        expert_ids: Tensor,
        routing_weights: Tensor,
        *,
        static: tuple[float | None, float | None] = (None, None),
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Return the output [N, D] in `dtype` arithmetic, inputs rounded as the kernels do."""
        inputs = self._rounded(hidden, static[0]).to(dtype)
        output = torch.zeros(hidden.shape, dtype=dtype, device="cuda")
        for expert in range(len(self.gate_up.codes)):
            token, choice = torch.where(expert_ids == expert)
            if len(token):
                result = self._one(self.gate_up, self.down, expert, inputs[token], static[1])
                output.index_add_(0, token, result * routing_weights[token, choice, None].to(dtype))
        if self.shared_gate_up is not None and self.shared_down is not None:
            output += self._one(self.shared_gate_up, self.shared_down, 0, inputs, static[1])
        return output

    def _one(
        self, gate_up: Matrices, down: Matrices, expert: int, inputs: Tensor, static: float | None
    ) -> Tensor:
        both = product(inputs, gate_up.real(expert, interleaved=True).to(inputs.dtype).T)
        activated = F.silu(both[:, 0::2]) * both[:, 1::2]
        rounded = self._rounded(activated, static).to(inputs.dtype)
        return product(rounded, down.real(expert, interleaved=False).to(inputs.dtype).T)


def normed(residual: Tensor, weight: Tensor) -> Tensor:
    """Return the RMS norm of fp32 rows."""
    return residual * (residual.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def symmetric_difference(got: Tensor, truth: Tensor) -> float:
    """Return 1 - 2 <x, y> / (|x|^2 + |y|^2), the metric of level L3."""
    x, y = got.double().flatten(), truth.double().flatten()
    return float(1 - 2 * (x @ y) / (x @ x + y @ y))
