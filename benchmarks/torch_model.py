"""Ring-linear as one writes it for speed in torch: the engine's weights, torch and FLA kernels.

What a user of torch gets without kernels of his own: fused projections, flash-linear-attention for
the linear layers, torch's attention and grouped products, everything else in plain torch ops. The
decode position is a number of Python, so that a captured step reads just the cache it needs.
"""

import functools
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.ops.rotary import rotary_tables
from ringexport.runtime.backends.cuda.weights import DeviceMatrix, DeviceWeights

__all__ = [
    "ATTENTION_WAYS",
    "EXPERT_WAYS",
    "MOST_GATHERED",
    "TorchModel",
    "TorchState",
    "forget_tuning",
]

ATTENTION_WAYS = ("flash", "products", "sdpa")
"""Decode attention: FlashAttention 2, two batched products, or what torch chooses by itself."""
EXPERT_WAYS = ("gathered", "grouped")
"""Experts: the matrices of each pair copied together, or torch's grouped product."""
MOST_GATHERED = 64
"""Pairs of token and expert whose matrices may be copied together."""


def _norm_rotate(heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm [B, T, H, K] per head and rotate the first 2 * cos.shape[-1] dimensions."""
    normed = F.rms_norm(heads.float(), weight.shape, weight, eps)
    half = cos.shape[-1]
    first, second, rest = normed.split((half, half, normed.shape[-1] - 2 * half), dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1).to(heads.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return FP8 codes and the scale of each row [N, 1]."""
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).clamp_min(torch.finfo(torch.float32).eps)
    return (wide / scale).to(torch.float8_e4m3fn), scale


def _gated_norm(mixed: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm [N, G, C] per group, scale by weight [G, C] and by the sigmoid of gate [N, G * C]."""
    wide = mixed.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return (normed.flatten(1) * gate.float().sigmoid()).to(gate.dtype)


def _route(logits: Tensor, bias: Tensor, config: RingConfig) -> tuple[Tensor, Tensor]:
    """Return expert ids and weights [N, k] of router logits [N, E] with torch's topk."""
    scores = logits.sigmoid()
    grouped = (scores + bias).view(len(scores), config.n_group, -1)
    strength = grouped.topk(2, dim=-1).values.sum(-1)
    kept = strength.topk(config.topk_group, dim=-1).indices
    dropped = torch.ones_like(strength, dtype=torch.bool).scatter_(1, kept, value=False)
    biased = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ids = biased.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


@dataclass
class _Source:
    """Input rows [N, K] of products; quantized once if a product wants that."""

    values: Tensor

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        return _quantize(self.values)


def _product(source: _Source, matrix: DeviceMatrix) -> Tensor:
    """Return source x matrix^T in bf16; FP8 with one scale per row and channel."""
    if matrix.scale is None:
        return F.linear(source.values, matrix.values)
    codes, scale = source.codes
    return torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it
        codes,
        matrix.values.t(),
        scale_a=scale,
        scale_b=matrix.scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _grouped(source: _Source, matrix: DeviceMatrix, ends: Tensor) -> Tensor:
    """Multiply rows sorted by expert with the matrices [E, N, K] of their experts."""
    weight = matrix.values.transpose(1, 2)
    if matrix.scale is None:
        return torch._grouped_mm(source.values, weight, offs=ends)  # noqa: SLF001 - as above
    codes, scale = source.codes
    return torch._scaled_grouped_mm(  # noqa: SLF001 - as above
        codes,
        weight,
        scale.flatten(),
        matrix.scale,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@dataclass
class TorchState:
    """What a batch of sequences of equal length carries.

    Attributes:
        recurrent: linear layer -> [B, H, K, V] fp32.
        keys: softmax layer -> [B, Hkv, capacity, D].
        values: like `keys`.
        position: tokens that every row has seen.
    """

    recurrent: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    position: int = 0


@dataclass
class TorchModel:
    """The network with every tensor of a packed engine.

    Attributes:
        weights: of the engine, whose gate and up rows alternate.
        split: "copies" has a copy of these matrices with all gate rows first; "in place" changes
            the weights, which are no use to the engine afterwards; "done" has found them so;
            "on demand" copies at each use.
        capacity: most tokens of a sequence.
        attention: one of ATTENTION_WAYS, for one token a row.
        experts: one of EXPERT_WAYS.
        expert_ids: of the last call, by layer.
    """

    weights: DeviceWeights
    capacity: int
    split: str = "copies"
    attention: str = "flash"
    experts: str = "grouped"
    expert_ids: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        device = self.weights["embedding"].device
        tables = rotary_tables(config.inv_freq(), config.attention_factor, self.capacity)
        self.cos, self.sin = (torch.from_numpy(t).to(device) for t in tables)
        self._apart: dict[str, DeviceMatrix] = {}
        self._norms: dict[str, Tensor] = {}
        for layer in range(config.num_hidden_layers):
            for name in ("experts", "shared"):
                if name == "experts" or config.is_moe_layer(layer):
                    self._split(f"layers.{layer}.{name}.gate_up")
        for name in self._norm_names():
            self._norms[name] = self.weights[name].to(torch.bfloat16)

    @property
    def config(self) -> RingConfig:
        """Of the model."""
        return self.weights.config

    def apart(self, name: str) -> DeviceMatrix:
        """Return a gate and up matrix with all gate rows first."""
        return self._apart.get(name) or _apart(self.weights.matrix(name))

    def _split(self, name: str) -> None:
        mixed = self.weights.matrix(name)
        if self.split == "copies":
            self._apart[name] = _apart(mixed)
        elif self.split == "in place":
            found = _apart(mixed)
            mixed.values.copy_(found.values)
            if mixed.scale is not None and found.scale is not None:
                mixed.scale.copy_(found.scale)
            self._apart[name] = mixed
        elif self.split == "done":
            self._apart[name] = mixed

    def new_state(self, batch: int) -> TorchState:
        """Return empty caches and zero states."""
        config, device = self.config, self.weights["embedding"].device
        heads, size = config.num_attention_heads, config.head_dim
        cache = (batch, config.num_key_value_heads, self.capacity, size)

        def empty() -> dict[int, Tensor]:
            return {
                layer: torch.zeros(cache, dtype=torch.bfloat16, device=device)
                for layer in config.softmax_layers
            }

        recurrent = {
            layer: torch.zeros((batch, heads, size, size), device=device)
            for layer in config.linear_layers
        }
        return TorchState(recurrent, empty(), empty())

    def forward(self, tokens: Tensor, state: TorchState) -> Tensor:
        """Feed tokens [B, T] int64 and return the fp32 logits [B, vocab] of the last ones."""
        batch, width = tokens.shape
        hidden = F.embedding(tokens.flatten(), self.weights["embedding"])
        for layer in range(self.config.num_hidden_layers):
            hidden = self.layer(layer, hidden, state, (batch, width))
        state.position += width
        last = hidden.view(batch, width, -1)[:, -1]
        normed = self._norm(last, "final_norm")
        return _product(_Source(normed), self.weights.matrix("lm_head")).float()

    def _norm_names(self) -> list[str]:
        layers = range(self.config.num_hidden_layers)
        names = [f"layers.{i}.{part}_norm" for i in layers for part in ("input", "mlp")]
        return [*names, "final_norm"]

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._norms[name], self.config.rms_norm_eps)

    def layer(
        self, layer: int, hidden: Tensor, state: TorchState, sizes: tuple[int, int]
    ) -> Tensor:
        """Return the residual stream [B * T, D] behind a layer; `sizes` are B and T."""
        prefix = f"layers.{layer}."
        normed = _Source(self._norm(hidden, prefix + "input_norm"))
        mixed = _product(normed, self.weights.matrix(prefix + "attention.input"))
        linear = self.config.is_linear_layer(layer)
        attend = self._linear_attention if linear else self._softmax_attention
        output = attend(layer, mixed.view(*sizes, -1), state)
        matrix = self.weights.matrix(prefix + "attention.output")
        hidden = hidden + _product(_Source(output), matrix)
        source = _Source(self._norm(hidden, prefix + "mlp_norm"))
        if not self.config.is_moe_layer(layer):
            return hidden + self._dense(prefix + "experts.", source)
        logits = F.linear(source.values.float(), self.weights[prefix + "router"])
        ids, factors = _route(logits, self.weights[prefix + "router_bias"], self.config)
        self.expert_ids[layer] = ids
        few = self.experts == "gathered" and ids.numel() <= MOST_GATHERED
        routed = (self._gathered if few else self._sorted)(prefix + "experts.", source, ids)
        combined = torch.bmm(factors[:, None].to(routed.dtype), routed)[:, 0]
        return hidden + combined + self._dense(prefix + "shared.", source)

    def _placed(self, layer: int, name: str, heads: Tensor, position: int) -> Tensor:
        rows = slice(position, position + heads.shape[1])
        return _norm_rotate(
            heads,
            self.weights[f"layers.{layer}.attention.{name}_norm"],
            self.cos[rows, None],
            self.sin[rows, None],
            self.config.rms_norm_eps,
        )

    def _linear_attention(self, layer: int, mixed: Tensor, state: TorchState) -> Tensor:
        config = self.config
        batch, width, _ = mixed.shape
        heads = mixed.view(batch, width, 4, config.num_attention_heads, config.head_dim)
        query, key, value, gate = heads.unbind(2)
        if config.linear_silu:
            query, key, value = F.silu(query), F.silu(key), F.silu(value)
        output, state.recurrent[layer] = _simple_gla(
            self._placed(layer, "query", query, state.position),
            self._placed(layer, "key", key, state.position),
            value.contiguous(),
            self.weights[f"layers.{layer}.attention.log_decay"],
            state.recurrent[layer],
        )
        groups = config.num_norm_groups
        weight = self.weights[f"layers.{layer}.attention.output_norm"].view(groups, -1)
        mixed_heads = output.reshape(batch * width, groups, -1)
        flat_gate = gate.reshape(batch * width, -1)
        return _gated_norm(mixed_heads, flat_gate, weight, config.rms_norm_eps)

    def _softmax_attention(self, layer: int, mixed: Tensor, state: TorchState) -> Tensor:
        config, position = self.config, state.position
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch, width, _ = mixed.shape
        split = mixed.view(batch, width, -1, config.head_dim)
        query, key, value = split.split((heads, kv_heads, kv_heads), dim=2)
        query = self._placed(layer, "query", query, position)
        key = self._placed(layer, "key", key, position)
        rows = slice(position, position + width)
        keys, values = state.keys[layer], state.values[layer]
        keys[:, :, rows].copy_(key.transpose(1, 2))
        values[:, :, rows].copy_(value.transpose(1, 2))
        seen = slice(0, position + width)
        output = self._attend(query.transpose(1, 2), keys[:, :, seen], values[:, :, seen])
        return output.transpose(1, 2).reshape(batch * width, -1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [B, H, T, D] of query [B, H, T, D] over the caches [B, Hkv, S, D]."""
        batch, _, width, size = query.shape
        if width > 1:
            if keys.shape[2] != width:
                raise ValueError("several tokens on top of a cache are not written here")
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=True
            )
        if self.attention == "products":
            kv_heads = keys.shape[1]
            grouped = query.reshape(batch * kv_heads, -1, size)
            scores = torch.bmm(grouped, keys.flatten(0, 1).mT) * self.config.softmax_scale
            mixed = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
            return mixed.view(batch, -1, 1, size)
        if self.attention == "flash":
            parts = [t.transpose(1, 2) for t in (query, keys, values)]
            sizes: tuple[Any, ...] = (None, None, 1, keys.shape[2], 0.0, False, False)
            found = torch.ops.aten._flash_attention_forward(*parts, *sizes)  # noqa: SLF001 - as above
            return found[0].transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def _dense(self, prefix: str, source: _Source) -> Tensor:
        up = _product(source, _first(self.apart(prefix + "gate_up")))
        inner = _Source(_swiglu(up))
        return _product(inner, _first(self.weights.matrix(prefix + "down")))

    def _gathered(self, prefix: str, source: _Source, ids: Tensor) -> Tensor:
        """Copy the matrices of every (token, expert) pair together; returns [N, k, D]."""
        count, chosen = ids.shape
        flat = ids.flatten()

        def multiply(values: Tensor, matrix: DeviceMatrix) -> Tensor:
            weight = matrix.values[flat]
            if matrix.scale is not None:
                weight = weight.to(torch.bfloat16) * matrix.scale[flat][..., None].bfloat16()
            return torch.bmm(weight, values[..., None])[..., 0]

        rows = source.values.repeat_interleave(chosen, dim=0)
        up = multiply(rows, self.apart(prefix + "gate_up"))
        inner = _swiglu(up)
        return multiply(inner, self.weights.matrix(prefix + "down")).view(count, chosen, -1)

    def _sorted(self, prefix: str, source: _Source, ids: Tensor) -> Tensor:
        """Sort the pairs by expert and multiply group by group; returns [N, k, D]."""
        count, chosen = ids.shape
        gate_up = self.apart(prefix + "gate_up")
        flat, order = ids.flatten().sort()
        experts = torch.arange(1, len(gate_up.values) + 1, device=ids.device)
        ends = torch.searchsorted(flat, experts).to(torch.int32)
        token = order // chosen
        rows = _Source(source.values[token])
        if gate_up.scale is not None:
            codes, scale = source.codes
            rows.codes = codes.view(torch.uint8)[token].view(codes.dtype), scale[token]
        inner = _Source(_swiglu(_grouped(rows, gate_up, ends)))
        found = _grouped(inner, self.weights.matrix(prefix + "down"), ends)
        back = torch.empty_like(found)
        back[order] = found
        return back.view(count, chosen, -1)


def _simple_gla(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run FLA's recurrent kernel for one token, its chunked one for more; [B, T, H, K] each."""
    kernels = _fla()
    one = query.shape[1] == 1
    kernel = kernels.fused_recurrent_simple_gla if one else kernels.chunk_simple_gla
    found: tuple[Tensor, Tensor] = kernel(
        query.contiguous(),
        key.contiguous(),
        value,
        g_gamma=log_decay,
        initial_state=state,
        output_final_state=True,
    )
    return found


@functools.cache
def _fla() -> Any:
    """Import FLA's simple GLA without its layers and models, which would take 18 s."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("flash-linear-attention is not installed: pip install flash-linear-attention")
    folder = spec.submodule_search_locations[0]
    for name, path in (("fla", folder), ("fla.ops", f"{folder}/ops")):
        package = sys.modules.setdefault(name, types.ModuleType(name))
        package.__dict__.update(__path__=[path], __version__="")
    return importlib.import_module("fla.ops.simple_gla")


def forget_tuning() -> None:
    """Let FLA choose the tiles of its kernels for prompts anew, for the sizes of the next call.

    It would keep those of the first call, whatever its size. Of the 48 ways of one kernel, which
    take half a minute to compile, it chooses among the eight that suit heads of 128.
    """
    _fla()
    state = importlib.import_module("fla.ops.common.chunk_h").chunk_fwd_kernel_h.fn
    output = importlib.import_module("fla.ops.common.chunk_o").chunk_fwd_kernel_o.fn
    for tuner in (state, output):
        tuner.cache.clear()
        tuner.cache_results = False
    some = [one for one in state.configs if one.num_stages == 3 and one.num_warps in {2, 4}]
    state.configs = some or state.configs


def _first(matrix: DeviceMatrix) -> DeviceMatrix:
    """Return the only expert of a stack, or a matrix that is none."""
    if matrix.values.dim() == 2:
        return matrix
    scale = None if matrix.scale is None else matrix.scale[0]
    return DeviceMatrix(matrix.values[0], scale, matrix.format)


def _apart(matrix: DeviceMatrix) -> DeviceMatrix:
    """Return a copy of [(E,) 2 * I, D] with all gate rows first, which the engine interleaves."""

    def split(tensor: Tensor, dim: int) -> Tensor:
        raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        pairs = raw.unflatten(dim, (-1, 2))
        return pairs.transpose(dim, dim + 1).flatten(dim, dim + 1).view(tensor.dtype)

    rows = matrix.values.dim() - 2
    scale = None if matrix.scale is None else split(matrix.scale, rows)
    return DeviceMatrix(split(matrix.values, rows), scale, matrix.format)
