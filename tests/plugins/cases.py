"""Calls of the plugin ops with what the op contracts say; CPU and GPU tests share them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ringexport.ops.attention import attention
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.linear_attention import linear_attention
from ringexport.ops.moe import Routing, experts, router
from ringexport.ops.plugin_ops import PLUGIN_CONTRACTS, quantized_experts, quantized_projection
from ringexport.ops.quantization import NumberFormat

__all__ = ["CASES", "DTYPES", "PluginCase"]

Array = npt.NDArray[np.generic]
Rng = np.random.Generator

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
NAMES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.int32): "int32",
    np.dtype(np.int8): "int8",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8_e4m3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginCase:
    """One call.

    Attributes:
        op: name of the plugin.
        attributes: in the order of the contract.
        inputs, outputs: arrays in the order of the contract; outputs are what is expected.
        used: for each output, which elements are defined; all if it is not named.
        exact: outputs that have to be equal.
        rounding: for each output, the largest error of this call with products rounded to the
            activation dtype before they are quantized again, as torch does it; 0 if not named.
    """

    op: str
    attributes: dict[str, int | float]
    inputs: list[Array]
    outputs: list[Array]
    used: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    rounding: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path, library: Path, *lines: str) -> Path:
        """Write the files that plugin_driver reads, and return the case file."""
        spec = next(spec for spec in PLUGIN_CONTRACTS if spec.name == self.op)
        text = [f"library {library}", f"op {self.op}"]
        for name, value in self.attributes.items():
            kind = "real" if name in spec.reals else "int"
            text.append(f"attribute {name} {kind} {value!r}")
        for arg, array in zip(spec.inputs, self.inputs, strict=True):
            path = folder / f"in-{arg.name}.bin"
            path.write_bytes(np.ascontiguousarray(array).tobytes())
            text.append(f"input {arg.name} {_kind(array)} {path}")
        for arg, array in zip(spec.outputs, self.outputs, strict=True):
            text.append(f"output {arg.name} {_kind(array)} {folder / f'out-{arg.name}.bin'}")
        text += lines
        case = folder / "case.txt"
        case.write_text("\n".join(text) + "\n")
        return case

    def profile(self, factor: int) -> list[str]:
        """Return lines for a profile whose rows and tokens go up to `factor` times the case's."""
        spec = next(spec for spec in PLUGIN_CONTRACTS if spec.name == self.op)
        arrays = zip((*spec.inputs, *spec.outputs), (*self.inputs, *self.outputs), strict=True)
        lines = []
        for arg, array in arrays:
            letters = arg.shape.replace("...", "1 N").split()
            extents = [
                extent * factor if letter in {"B", "T", "N"} else extent
                for letter, extent in zip(letters, array.shape, strict=True)
            ]
            lines.append(f"profile {arg.name} {','.join(map(str, extents))}")
        return lines

    def results(self, folder: Path) -> dict[str, tuple[Array, Array]]:
        """Return found and expected arrays by the name of the output."""
        spec = next(spec for spec in PLUGIN_CONTRACTS if spec.name == self.op)
        found = {}
        for arg, expected in zip(spec.outputs, self.outputs, strict=True):
            data = (folder / f"out-{arg.name}.bin").read_bytes()
            array = np.frombuffer(data, dtype=expected.dtype).reshape(expected.shape)
            found[arg.name] = (array, expected)
        return found


def _kind(array: Array) -> str:
    return f"{NAMES[array.dtype]} {','.join(map(str, array.shape))}"


def _f32(array: Array) -> npt.NDArray[np.float32]:
    return array.astype(np.float32)


def _normal(rng: Rng, dtype: np.dtype[np.generic], *shape: int, scale: float = 1.0) -> Array:
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


def _linear_attention(tokens: int) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        rows, heads, dim = 3, 4, 64
        query, key, value = (_normal(rng, dtype, rows, tokens, heads * dim) for _ in range(3))
        past = _normal(rng, np.dtype(np.float32), rows, heads, dim, dim)
        decay = log_decay(heads, 1, 6, DecayIndex.SERVING)
        lengths = np.array([tokens, max(1, tokens // 2), 1], np.int32)
        split = (rows, tokens, heads, dim)
        scale = dim**-0.5
        output, present = linear_attention(
            *(_f32(part).reshape(split) for part in (query, key, value)),
            past,
            decay,
            lengths,
            query_scale=scale,
        )
        used = np.broadcast_to(
            np.arange(tokens)[None, :, None] < lengths[:, None, None], (rows, tokens, heads * dim)
        )
        return PluginCase(
            op="RingLinearAttention",
            attributes={"num_heads": heads, "query_scale": scale},
            inputs=[query, key, value, past, decay, lengths],
            outputs=[output.reshape(query.shape).astype(dtype), present],
            used={"output": used},
        )

    return make


def _attention(
    tokens: int, *, rows: int = 3, kv_heads: int = 2
) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        heads, dim, capacity = 4, 64, 160
        query = _normal(rng, dtype, rows, tokens, heads * dim)
        key, value = (_normal(rng, dtype, rows, tokens, kv_heads * dim) for _ in range(2))
        cache = [_normal(rng, dtype, rows, kv_heads, capacity, dim) for _ in range(2)]
        position = np.resize(np.array([0, 31, 90], np.int32), rows)
        lengths = np.resize(np.array([tokens, max(1, tokens // 2), 1], np.int32), rows)
        scale = dim**-0.5
        output, present_key, present_value = attention(
            _f32(query).reshape(rows, tokens, heads, dim),
            *(_f32(part).reshape(rows, tokens, kv_heads, dim) for part in (key, value)),
            (_f32(cache[0]), _f32(cache[1])),
            position,
            lengths,
            softmax_scale=scale,
        )
        used = np.broadcast_to(
            np.arange(tokens)[None, :, None] < lengths[:, None, None], query.shape
        )
        return PluginCase(
            op="RingAttention",
            attributes={"num_heads": heads, "num_kv_heads": kv_heads, "softmax_scale": scale},
            inputs=[query, key, value, *cache, position, lengths],
            outputs=[
                output.reshape(query.shape).astype(dtype),
                present_key.astype(dtype),
                present_value.astype(dtype),
            ],
            used={"output": used},
            exact=frozenset({"present_key", "present_value"}),
        )

    return make


ROUTING = Routing(
    num_experts=32, top_k=4, n_group=4, topk_group=2, normalize=True, routed_scaling_factor=2.5
)


def _router(tokens: int) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        hidden = _normal(rng, dtype, tokens, 256)
        matrix = _normal(rng, np.dtype(np.float32), ROUTING.num_experts, 256, scale=0.05)
        bias = _normal(rng, np.dtype(np.float32), ROUTING.num_experts, scale=0.1)
        ids, weights = router(_f32(hidden), _f32(matrix).T, _f32(bias), ROUTING)
        return PluginCase(
            op="RingRouter",
            attributes=ROUTING.attributes(),
            inputs=[hidden, matrix, bias],
            outputs=[ids.astype(np.int32), weights],
            exact=frozenset({"expert_ids"}),
        )

    return make


def _routed(rng: Rng, tokens: int) -> list[Array]:
    count, top_k = ROUTING.num_experts, ROUTING.top_k
    ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return [ids, rng.random((tokens, top_k), np.float32)]


def _experts(tokens: int) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        count, width, inner = ROUTING.num_experts, 256, 32
        hidden = _normal(rng, dtype, tokens, width)
        ids, weights = _routed(rng, tokens)
        gate_up = _normal(rng, dtype, count, 2 * inner, width, scale=0.05)
        down = _normal(rng, dtype, count, width, inner, scale=0.1)
        output = experts(
            _f32(hidden), ids.astype(np.int64), _f32(weights), _f32(gate_up), _f32(down)
        )
        return PluginCase(
            op="RingExperts",
            attributes={"num_experts": count, "top_k": ROUTING.top_k},
            inputs=[hidden, ids, weights, gate_up, down],
            outputs=[output.astype(dtype)],
        )

    return make


def _codes(
    rng: Rng, number_format: NumberFormat, *shape: int
) -> tuple[Array, npt.NDArray[np.float32]]:
    """Return codes of a random weight with scales per row."""
    real = rng.standard_normal(shape).astype(np.float32) * 0.05
    scale = np.abs(real).max(axis=-1, keepdims=True) / number_format.half_range
    codes = real / scale
    if number_format is NumberFormat.INT8:
        codes = np.clip(np.rint(codes), -128, 127)
    return codes.astype(number_format.dtype), scale[..., 0].astype(np.float32)


def _rounding(
    hidden: Array,
    routing: tuple[Array, npt.NDArray[np.float32]],
    matrices: tuple[tuple[Array, npt.NDArray[np.float32]], ...],
    output: npt.NDArray[np.float32],
) -> float:
    """Return the error of quantized experts whose products are rounded to the type of `hidden`."""
    rounded = np.zeros_like(output)
    (gate_up, gate_up_scale), (down, down_scale) = matrices
    for expert in range(len(down)):
        tokens, slots = np.nonzero(routing[0] == expert)
        both = quantized_projection(_f32(hidden)[tokens], gate_up[expert], gate_up_scale[expert])
        gate, up = both[:, 0::2], both[:, 1::2]
        inner = _f32((gate / (1 + np.exp(-gate)) * up).astype(hidden.dtype))
        made = quantized_projection(inner, down[expert], down_scale[expert]).astype(hidden.dtype)
        np.add.at(rounded, tokens, routing[1][tokens, slots][:, None] * _f32(made))
    return float(np.abs(rounded - output).max())


def _quantized_experts(
    tokens: int, number_format: NumberFormat, *, fp8_bytes: bool = False, rounded: bool = False
) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        count, width, inner = ROUTING.num_experts, 256, 64
        hidden = _normal(rng, dtype, tokens, width)
        ids, weights = _routed(rng, tokens)
        gate_up = _codes(rng, number_format, count, 2 * inner, width)
        down = _codes(rng, number_format, count, width, inner)
        routing = (ids, _f32(weights))
        output = quantized_experts(_f32(hidden), routing, gate_up, down)
        rounding = _rounding(hidden, routing, (gate_up, down), output) if rounded else 0.0
        if fp8_bytes:
            gate_up, down = ((codes.view(np.int8), scale) for codes, scale in (gate_up, down))
        return PluginCase(
            op="RingQuantizedExperts",
            attributes={
                "num_experts": count,
                "top_k": ROUTING.top_k,
                "fp8_bytes": int(fp8_bytes),
            },
            inputs=[hidden, ids, weights, *gate_up, *down],
            outputs=[output.astype(dtype)],
            rounding={"output": rounding},
        )

    return make


def _projection(
    tokens: int, number_format: NumberFormat, *, fp8_bytes: bool = False
) -> Callable[[Rng, np.dtype[np.generic]], PluginCase]:
    def make(rng: Rng, dtype: np.dtype[np.generic]) -> PluginCase:
        hidden = _normal(rng, dtype, 1, tokens, 256)
        codes, scale = _codes(rng, number_format, 384, 256)
        output = quantized_projection(_f32(hidden)[0], codes, scale)
        return PluginCase(
            op="RingQuantizedProjection",
            attributes={"fp8_bytes": int(fp8_bytes)},
            inputs=[hidden, codes.view(np.int8) if fp8_bytes else codes, scale],
            outputs=[output[None].astype(dtype)],
        )

    return make


INT8, FP8 = NumberFormat.INT8, NumberFormat.FP8_E4M3

CASES: dict[str, Callable[[Rng, np.dtype[np.generic]], PluginCase]] = {
    "linear-decode": _linear_attention(1),
    "linear-prefill": _linear_attention(63),
    "linear-prefill-long": _linear_attention(1500),
    "attention-decode": _attention(1),
    "attention-few": _attention(5),
    "attention-few-of-many-rows": _attention(15, rows=80, kv_heads=1),
    "attention-prefill": _attention(37),
    "router-1": _router(1),
    "router-500": _router(500),
    "experts-1": _experts(1),
    "experts-70": _experts(70),
    "experts-600": _experts(600),
    "experts-int8-1": _quantized_experts(1, INT8),
    "experts-int8-70": _quantized_experts(70, INT8),
    "experts-int8-600": _quantized_experts(600, INT8, rounded=True),
    "experts-fp8-1": _quantized_experts(1, FP8),
    "experts-fp8-70": _quantized_experts(70, FP8),
    "experts-fp8-600": _quantized_experts(600, FP8, rounded=True),
    "experts-fp8-bytes-1": _quantized_experts(1, FP8, fp8_bytes=True),
    "experts-fp8-bytes-70": _quantized_experts(70, FP8, fp8_bytes=True),
    "experts-fp8-bytes-600": _quantized_experts(600, FP8, fp8_bytes=True, rounded=True),
    "projection-int8-1": _projection(1, INT8),
    "projection-int8-70": _projection(70, INT8),
    "projection-fp8-1": _projection(1, FP8),
    "projection-fp8-70": _projection(70, FP8),
    "projection-fp8-500": _projection(500, FP8),
    "projection-fp8-bytes-1": _projection(1, FP8, fp8_bytes=True),
    "projection-fp8-bytes-70": _projection(70, FP8, fp8_bytes=True),
    "projection-fp8-bytes-500": _projection(500, FP8, fp8_bytes=True),
}
"""Name to a function of a generator and an activation dtype."""
