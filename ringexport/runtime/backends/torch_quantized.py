"""The torch reference as an engine runs a quantized checkpoint: inputs and states rounded too.

`ReferenceModel` knows only weights, which the checkpoint's reader has dequantized already. Here
every matrix product whose module is quantized gets an input that was rounded to 8 bits first. The
product of two dequantized operands in fp32 is what an engine computes from the codes: scales are
factors that commute with the sum, so that only the order of rounding in fp32 differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import ConfigError
from ringexport.model.linear_attention import LinearInputs, LinearKernel
from ringexport.model.network import ReferenceModel
from ringexport.model.state import ReferenceState, TokenLayout
from ringexport.ops.decay import DecayIndex
from ringexport.ops.quantization import Granularity, GranularityKind, NumberFormat
from ringexport.ops.schemes import StateFormat

__all__ = ["InputRounding", "QuantizedModel", "QuantizedState", "fake_quantize", "round_state"]

_PER_TENSOR = Granularity(GranularityKind.TENSOR)
_NO_SCALE = float(torch.finfo(torch.float32).eps)
"""Scale of a tile of zeros, as that of weights: any positive number gives zeros again."""


def fake_quantize(
    values: Tensor,
    number_format: NumberFormat,
    granularity: Granularity = _PER_TENSOR,
    scale: float | None = None,
) -> Tensor:
    """Return values rounded to 8 bits and multiplied by their scale again, in the input's dtype.

    Args:
        values: [N, C] for granularities other than "tensor".
        number_format: of the codes; rounding is to nearest, ties to even, and saturates.
        granularity: "tensor", "token" or "group(n)"; the last group may be ragged.
        scale: a static one; None finds each tile's from its largest magnitude.
    """
    wide = values.float()
    if granularity.kind is GranularityKind.GROUP:
        columns = wide.shape[-1]
        tiles = F.pad(wide, (0, -columns % granularity.columns))
        count = tiles.shape[-1] // granularity.columns
        tiles = tiles.view(*tiles.shape[:-1], count, granularity.columns)
        return _rounded(tiles, number_format, scale).flatten(-2)[..., :columns].to(values.dtype)
    if granularity.kind is GranularityKind.TENSOR:
        flat = wide.reshape(1, -1)
        return _rounded(flat, number_format, scale).view(values.shape).to(values.dtype)
    return _rounded(wide, number_format, scale).to(values.dtype)


def round_state(state: Tensor, state_format: StateFormat) -> Tensor:
    """Return a recurrent state [B, H, K, V] as it comes back from memory, in its own dtype.

    8-bit formats have one scale per row and head, found anew each time the state is written. INT8
    maps the largest magnitude to 127, not to 127.5 as elsewhere: -127.5 would become -128, and a
    state that grows by 0.4 % each time it is written explodes.
    """
    if state_format is StateFormat.FP32:
        return state
    if state_format is StateFormat.BF16:
        return state.to(torch.bfloat16).to(state.dtype)
    if state_format is StateFormat.FP16:
        largest = torch.finfo(torch.float16).max
        return state.clamp(-largest, largest).to(torch.float16).to(state.dtype)
    heads = state.float().flatten(-2)
    number_format = NumberFormat(state_format.value)
    largest = 127.0 if number_format is NumberFormat.INT8 else number_format.half_range
    rounded = _rounded(heads, number_format, None, half_range=largest)
    return rounded.view(state.shape).to(state.dtype)


def _rounded(
    tiles: Tensor,
    number_format: NumberFormat,
    scale: float | None,
    *,
    half_range: float | None = None,
) -> Tensor:
    """Round fp32 [..., C], where the last dimension shares a scale: absmax / `half_range`."""
    if scale is None:
        largest = tiles.abs().amax(-1, keepdim=True) if tiles.numel() else tiles[..., :1]
        factor = largest / (half_range or number_format.half_range)
        factor = factor.masked_fill(factor == 0, _NO_SCALE)
    else:
        factor = tiles.new_tensor(scale)
    scaled = tiles / factor
    if number_format is NumberFormat.INT8:
        return scaled.round().clamp(-128.0, 127.0) * factor
    codes = scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.float() * factor


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRounding:
    """How the input of one module is rounded; `scale` is None where it is dynamic."""

    number_format: NumberFormat
    granularity: Granularity
    scale: float | None

    def __call__(self, values: Tensor) -> Tensor:
        """Return the rounded input [N, C]."""
        return fake_quantize(values, self.number_format, self.granularity, self.scale)

    @classmethod
    def of(cls, weights: CheckpointWeights, module: str) -> "InputRounding | None":
        """Return how the checkpoint rounds the input of `module`, None if it does not."""
        scheme = weights.schemes.get(module)
        if scheme is None or scheme.activations is None:
            return None
        inputs = scheme.activations
        return cls(
            number_format=inputs.format,
            granularity=inputs.granularity,
            scale=weights.input_scale(module),
        )


@dataclass(slots=True, kw_only=True)
class QuantizedState(ReferenceState):
    """A decode state whose cached keys and values were rounded on their way in.

    Attributes:
        cache_format: of the KV cache, None if it is not quantized.
        cache_scales: layer -> static scales of keys and values.
    """

    cache_format: NumberFormat | None = None
    cache_scales: Mapping[int, tuple[float, float]]

    @classmethod
    def of(
        cls,
        empty: ReferenceState,
        cache_format: NumberFormat | None,
        cache_scales: Mapping[int, tuple[float, float]],
    ) -> Self:
        """Return `empty`, whose cache is rounded from now on."""
        return cls(
            position=empty.position,
            recurrent_state=empty.recurrent_state,
            kv_cache=empty.kv_cache,
            context_length=empty.context_length,
            cache_format=cache_format,
            cache_scales=cache_scales,
        )

    def append(
        self, layer: int, layout: TokenLayout, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `ReferenceState.append`; attention then reads what was rounded."""
        if self.cache_format is not None:
            scales = self.cache_scales[layer]
            key, value = (
                fake_quantize(tensor, self.cache_format, scale=scale)
                for tensor, scale in zip((key, value), scales, strict=True)
            )
        return ReferenceState.append(self, layer, layout, key, value)


_Part = tuple[int, int, InputRounding | None]


class _RoundInputs(TorchFunctionMode):
    """While entered, `F.linear` of a known weight rounds its input; the key is its address."""

    def __init__(self, known: Mapping[int, tuple[_Part, ...]]) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        parts = self._known.get(args[1].data_ptr()) if func is F.linear else None
        if parts is None:
            return func(*args, **(kwargs or {}))
        products = [
            F.linear(args[0] if rounding is None else rounding(args[0]), args[1][start:stop])
            for start, stop, rounding in parts
        ]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class QuantizedModel(ReferenceModel):
    """The reference model with the inputs, KV cache and states of a quantized checkpoint rounded.

    Args:
        weights: an open checkpoint, quantized or not.
        state_format: of the recurrent state between two calls.
        decay_index, dtype, device: as `ReferenceModel`.

    Raises:
        ConfigError: a KV cache that is quantized without scales.
    """

    def __init__(
        self,
        weights: CheckpointWeights,
        *,
        state_format: StateFormat = StateFormat.FP32,
        decay_index: DecayIndex = DecayIndex.SERVING,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            weights.config, weights, decay_index=decay_index, dtype=dtype, device=device
        )
        self._kernel = _rounding_kernel(self._kernel, state_format)
        self._known = self._find_parts(weights)
        stored = weights.config.quantization
        self._cache_format = stored.kv_cache.format if stored and stored.kv_cache else None
        self._cache_scales = self._find_scales(weights) if self._cache_format else {}

    @property
    def rounded_products(self) -> int:
        """How many weights have an input that is rounded; fused ones count once."""
        return len(self._known)

    def new_state(self, batch: int) -> ReferenceState:
        """See `ReferenceModel.new_state`."""
        return QuantizedState.of(super().new_state(batch), self._cache_format, self._cache_scales)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        state: ReferenceState,
        *,
        every_position: bool = False,
        taps: dict[str, Tensor] | None = None,
        padding: str = "right",
    ) -> Tensor:
        """See `ReferenceModel.forward`."""
        with _RoundInputs(self._known):
            return super().forward(
                tokens, lengths, state, every_position=every_position, taps=taps, padding=padding
            )

    def _find_scales(self, weights: CheckpointWeights) -> dict[int, tuple[float, float]]:
        scales = {layer: weights.kv_scales(layer) for layer in self.config.softmax_layers}
        found = {layer: pair for layer, pair in scales.items() if pair is not None}
        if len(found) != len(scales):
            raise ConfigError(
                f"{weights.path} quantizes its KV cache and has scales for {len(found)} of "
                f"{len(scales)} layers",
                hint="write it again with calibration stats",
            )
        return found

    def _find_parts(self, weights: CheckpointWeights) -> dict[int, tuple[_Part, ...]]:
        """Return address of a weight -> its rows with the rounding of their input."""
        known: dict[int, tuple[_Part, ...]] = {}

        def add(matrix: Tensor, modules: list[str]) -> None:
            rows = len(matrix) // len(modules)
            parts = [
                (index * rows, (index + 1) * rows, InputRounding.of(weights, module))
                for index, module in enumerate(modules)
            ]
            if len({rounding for _, _, rounding in parts}) == 1:
                parts = [(0, len(matrix), parts[0][2])]
            if any(rounding is not None for _, _, rounding in parts):
                known[matrix.data_ptr()] = tuple(parts)

        add(self._head, ["lm_head"])
        for layer, tensors in enumerate(self._layers):
            prefix = f"model.layers.{layer}."
            for key, tensor in tensors.items():
                if key.endswith((".gate_up", ".down")):
                    unit, _, fused = key.rpartition(".")
                    names = ("gate_proj", "up_proj") if fused == "gate_up" else ("down_proj",)
                    units = [f"{prefix}{unit}"]
                    if unit == "mlp.experts":
                        units = [f"{prefix}{unit}.{expert}" for expert in range(len(tensor))]
                    for matrix, one in zip(tensor, units, strict=True):
                        add(matrix, [f"{one}.{name}" for name in names])
                elif key.endswith(".weight") and tensor.ndim == 2:
                    add(tensor, [prefix + key.removesuffix(".weight")])
        return known


def _rounding_kernel(kernel: LinearKernel, state_format: StateFormat) -> LinearKernel:
    """Return the kernel with its new state rounded as it is written, once per call."""
    if state_format is StateFormat.FP32:
        return kernel

    def rounding(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
        output, state = kernel(inputs)
        return output, round_state(state, state_format)

    return rounding
