"""The reference model over the weights of a packed engine: what its results are compared with.

No kernel of plugins/ takes part: matrices are dequantized one at a time by torch, so that a model
that fills the GPU in 8 bits can be checked on it, and inputs are rounded to 8 bits where the
engine rounds them. In fp32 only the order of sums and the rounding of activations to bf16 differ.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from ringexport.model.layers import Step, Weights, route
from ringexport.model.linear_attention import plain
from ringexport.model.network import ReferenceModel
from ringexport.model.state import ReferenceState
from ringexport.ops.decay import DecayIndex
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.rotary import rotary_tables
from ringexport.runtime.backends.cuda.weights import DeviceMatrix, DeviceWeights
from ringexport.runtime.backends.torch_quantized import InputRounding, QuantizedState

__all__ = ["PackedReference", "dequantized"]

_BLOCK = 128
_AT_ONCE = 16
"""Experts that are dequantized together: 134 MB of Ring-mini's in fp32."""
_FORCE = 64.0
"""Scores are below 1 and biases small: nothing else reaches an expert with so much more."""
_VECTORS = {
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "attention.query_layernorm.weight": "attention.query_norm",
    "attention.key_layernorm.weight": "attention.key_norm",
    "attention.g_norm.weight": "attention.output_norm",
    "log_decay": "attention.log_decay",
}


def dequantized(matrix: DeviceMatrix, *, interleaved: bool) -> Tensor:
    """Return matrices [..., N, K] in fp32, rows of gate before rows of up.

    Args:
        matrix: packed, [N, K] or [E, N, K].
        interleaved: rows of gate and up alternate.
    """
    values, scale, block = matrix.values, matrix.scale, matrix.format.block
    if interleaved:
        values = _halves_first(values)
        if scale is not None and not block:
            scale = _halves_first(scale[..., None])[..., 0]
    wide = values.float()
    if scale is None:
        return wide
    if not block:
        return wide.mul_(scale[..., None])
    rows, columns = wide.shape[-2:]
    parts = scale if interleaved else scale[..., None, :, :]  # [..., 1 or 2, rows, columns]
    spread = parts.repeat_interleave(_BLOCK, -2)[..., : rows // parts.shape[-3], :]
    spread = spread.flatten(-3, -2).repeat_interleave(_BLOCK, -1)[..., :columns]
    return wide.mul_(spread)


def _halves_first(values: Tensor) -> Tensor:
    """Return [..., 2 N, K] with the even rows before the odd ones."""
    pairs = values.view(*values.shape[:-2], -1, 2, values.shape[-1])
    return pairs.transpose(-3, -2).flatten(-3, -2)


class _Weight(Tensor):
    """A weight whose product rounds the other operand to 8 bits first, or is told to somebody.

    Attributes:
        rounding: of the input.
        note: called with the product.
    """

    rounding: InputRounding | None = None
    note: Callable[[Tensor], None] | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        with DisableTorchFunctionSubclass():
            if func is not F.linear:
                return func(*args, **(kwargs or {}))
            values, weight = args
            found = F.linear(weight.rounding(values) if weight.rounding else values, weight)
            if weight.note is not None:
                weight.note(found)
            return found


class _Layer(Mapping[str, Any]):
    """One layer under the names that the reference model reads."""

    def __init__(self, owner: "PackedReference", layer: int) -> None:
        self._owner = owner
        self._layer = layer

    def experts(self, part: str, ids: Sequence[int]) -> tuple[Tensor, InputRounding | None]:
        """Return some experts [E, N, K] of "gate_up" or "down", and how their input is rounded."""
        owner = self._owner
        packed = owner.weights.matrix(f"layers.{self._layer}.experts.{part}")
        values, scale = packed.values, packed.scale
        index = torch.tensor(ids, device=values.device)
        # As bytes, since torch does not index all dtypes of 8 bits.
        some = values.view(torch.uint8)[index].view(values.dtype)
        chosen = replace(packed, values=some, scale=None if scale is None else scale[index])
        wide = dequantized(chosen, interleaved=part == "gate_up").to(owner.dtype)
        return wide, owner.rounding(packed)

    def __getitem__(self, key: str) -> Any:
        owner, prefix = self._owner, f"layers.{self._layer}."
        if key == "mlp.gate.expert_bias":
            return owner.expert_bias(self._layer)
        if key == "mlp.gate.weight":
            return owner.router(self._layer)
        if key in _VECTORS:
            return owner.weights[prefix + _VECTORS[key]]
        unit, _, part = key.rpartition(".")
        if part in {"gate_up", "down"}:
            packed = "shared" if unit == "mlp.shared_experts" else "experts"
            return [owner.matrix(f"{prefix}{packed}.{part}", interleaved=part == "gate_up")]
        rows = owner.config.qkv_rows(self._layer)
        name, part_of = {
            "attention.dense.weight": ("attention.output", None),
            "attention.query_key_value.weight": ("attention.input", slice(0, rows)),
            "attention.g_proj.weight": ("attention.input", slice(rows, None)),
        }[key]
        return owner.matrix(prefix + name, rows=part_of)

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("layers are read by name only")

    def __len__(self) -> int:
        raise NotImplementedError("layers are read by name only")


class PackedReference(ReferenceModel):
    """The reference model in fp32 with the values of packed weights, which stay as they are.

    Args:
        weights: of an engine, on any device; computing happens there.
        round_inputs: round inputs and KV cache to 8 bits as the engine does; without it the
            difference to the engine contains the loss of quantizing activations.

    Attributes:
        weights: as given.
        own_choices: MoE layer -> [N, top_k] experts that the model itself chose in the last call.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        *,
        round_inputs: bool = True,
    ) -> None:
        self.config, self.weights, self.dtype = weights.config, weights, torch.float32
        self.decay_index = DecayIndex.SERVING  # not used: packed weights hold the table
        self.device, self._wide = weights["embedding"].device, torch.float32
        self._kernel = plain
        config = self.config
        tables = rotary_tables(config.inv_freq(), config.attention_factor, config.context_length)
        self._rotary = [torch.from_numpy(table).to(self.device) for table in tables]
        self._round_inputs = round_inputs
        self.own_choices: dict[int, Tensor] = {}
        self._forced: Mapping[int, Tensor] | None = None
        self._embedding = weights["embedding"]
        self._norm = weights["final_norm"]
        self._head = self.matrix("lm_head", dtype=torch.float32)
        self._name_layers()

    def _name_layers(self) -> None:
        layers: Any = [_Layer(self, layer) for layer in range(self.config.num_hidden_layers)]
        self._layers = layers
        self._step = partial(Step, config=self.config, experts=_routed_experts)

    def in_dtype(self, dtype: torch.dtype) -> "PackedReference":
        """Return the same model in another dtype; nothing is copied."""
        other = copy.copy(self)
        other.own_choices = {}
        other.dtype = dtype
        other._name_layers()  # noqa: SLF001 - its own class
        return other

    def matrix(
        self,
        name: str,
        *,
        rows: slice | None = None,
        interleaved: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a matrix [N, K], or rows of it, in `dtype` (None: the model's), scales applied.

        A product with it rounds the other operand as the engine does.
        """
        packed = self.weights.matrix(name)
        found = dequantized(packed, interleaved=interleaved).to(dtype or self.dtype)
        found = found[0] if found.ndim > 2 else found  # a dense MLP is a layer of one expert
        rounding = self.rounding(packed)
        found = found if rows is None else found[rows]
        if rounding is None:
            return found
        weight = found.as_subclass(_Weight)
        weight.rounding = rounding
        return weight

    def rounding(self, packed: DeviceMatrix) -> InputRounding | None:
        """Return how the input of a matrix is rounded, None if it is not."""
        number_format = packed.format.number_format
        if not self._round_inputs or number_format is None:
            return None
        granularity = Granularity.parse(f"group({_BLOCK})" if packed.format.block else "token")
        return InputRounding(number_format=number_format, granularity=granularity, scale=None)

    def new_state(self, batch: int) -> ReferenceState:
        """See `ReferenceModel.new_state`."""
        empty = super().new_state(batch)
        if not (self._round_inputs and self.weights.fp8_cache):
            return empty
        scales = {}
        for layer in self.config.softmax_layers:
            key, value = self.weights[f"layers.{layer}.attention.kv_scale"].tolist()
            scales[layer] = (key, value)
        return QuantizedState.of(empty, NumberFormat.FP8_E4M3, scales)

    def expert_bias(self, layer: int) -> Tensor:
        """Return the router's bias [E], or [N, E] that makes it choose the experts forced on it."""
        bias = self.weights[f"layers.{layer}.router_bias"]
        if self._forced is None:
            return bias
        ids = self._forced[layer].to(bias.device, torch.int64)
        rows = bias.expand(len(ids), -1)
        return rows.scatter(1, ids, rows.gather(1, ids) + _FORCE)

    def router(self, layer: int) -> Tensor:
        """Return the router's weight [E, D]; what the model would choose with it is noted."""

        def note(logits: Tensor) -> None:
            bias = self.weights[f"layers.{layer}.router_bias"]
            self.own_choices[layer] = route(logits, bias, self.config)[0]

        weight = self.weights[f"layers.{layer}.router"].as_subclass(_Weight)
        weight.note = note
        return weight

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        state: ReferenceState,
        *,
        every_position: bool = False,
        taps: dict[str, Tensor] | None = None,
        padding: str = "right",
        experts: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """See `ReferenceModel.forward`.

        Args:
            tokens, lengths, state, every_position, taps, padding: as there.
            experts: MoE layer -> [N, top_k] experts to use instead of the router's choice, for
                the tokens in their order; the routing weights are still the router's.
        """
        self._forced = experts
        return super().forward(
            tokens, lengths, state, every_position=every_position, taps=taps, padding=padding
        )


def _routed_experts(
    hidden: Tensor, weights: Weights, expert_ids: Tensor, routing_weights: Tensor
) -> Tensor:
    """See `routed_experts`; some experts at once, each with as many rows as one of them has."""
    assert isinstance(weights, _Layer)
    order = expert_ids.flatten().argsort(stable=True)
    token, factor = order // expert_ids.shape[1], routing_weights.flatten()[order, None]
    output = torch.zeros_like(hidden, dtype=factor.dtype)
    counts = expert_ids.flatten().bincount().tolist()
    hit = [(expert, count) for expert, count in enumerate(counts) if count]
    stop = 0
    for first in range(0, len(hit), _AT_ONCE):
        ids, sizes = zip(*hit[first : first + _AT_ONCE], strict=True)
        start, stop = stop, stop + sum(sizes)
        chosen = token[start:stop]
        place = _places(sizes, hidden.device)
        rows = hidden.new_zeros((len(ids), max(sizes), hidden.shape[1]))
        rows[place] = hidden[chosen]
        for part in ("gate_up", "down"):
            matrices, rounding = weights.experts(part, ids)
            rows = rows if rounding is None else rounding(rows)
            rows = rows @ matrices.mT
            if part == "gate_up":
                gate, up = rows.chunk(2, dim=-1)
                rows = F.silu(gate) * up
        output.index_add_(0, chosen, rows[place] * factor[start:stop])
    return output


def _places(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return indices (i, j) with j < sizes[i], in their order."""
    counts = torch.tensor(sizes)
    group = torch.arange(len(sizes)).repeat_interleave(counts)
    place = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]
    return group.to(device), place.to(device)
