"""The layers on packed tokens [N, D]; norms, router and recurrent state in the wide dtype (fp32).

`weights` maps the checkpoint's names below "model.layers.{i}." to tensors: matrices in the model's
dtype, norms and router wide, and the MLPs' matrices stacked (network.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.model.linear_attention import LinearInputs, LinearKernel
from ringexport.model.state import ReferenceState, TokenLayout

__all__ = ["Step", "apply_rotary", "block", "group_rms_norm", "rms_norm", "route", "routed_experts"]

_QUERY_BLOCK = 1024
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What every layer of one call shares; cos and sin [N, R/2] are those of the tokens."""

    config: RingConfig
    layout: TokenLayout
    cos: Tensor
    sin: Tensor
    state: ReferenceState
    kernel: LinearKernel
    experts: Callable[[Tensor, Weights, Tensor, Tensor], Tensor]  # as `routed_experts`


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * hidden / rms over the last dimension, in the dtype of `weight`."""
    return group_rms_norm(hidden, weight, 1, eps)


def group_rms_norm(hidden: Tensor, weight: Tensor, num_norm_groups: int, eps: float) -> Tensor:
    """Normalise [..., C] in `num_norm_groups` groups of channels; the weight [C] is per channel."""
    shape = (*hidden.shape[:-1], num_norm_groups, hidden.shape[-1] // num_norm_groups)
    wide = hidden.to(weight.dtype).view(shape)
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of K dimensions of [N, H, K], j with j + R/2; cos, sin: [N, R/2]."""
    half = cos.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def block(layer: int, weights: Weights, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
    """Run one layer on the residual stream [N, D]; also return expert_ids [N, k] of MoE layers."""
    eps, dtype = step.config.rms_norm_eps, hidden.dtype
    attention = _linear_layer if step.config.is_linear_layer(layer) else _softmax_layer
    normed = rms_norm(hidden, weights["input_layernorm.weight"], eps).to(dtype)
    hidden = hidden + attention(layer, weights, normed, step)
    normed = rms_norm(hidden, weights["post_attention_layernorm.weight"], eps).to(dtype)
    if not step.config.is_moe_layer(layer):
        return hidden + _swiglu(normed, weights["mlp.gate_up"][0], weights["mlp.down"][0]), None
    logits = F.linear(normed.to(weights["mlp.gate.weight"].dtype), weights["mlp.gate.weight"])
    expert_ids, routing_weights = route(logits, weights["mlp.gate.expert_bias"], step.config)
    output = step.experts(normed, weights, expert_ids, routing_weights)
    shared = weights["mlp.shared_experts.gate_up"][0], weights["mlp.shared_experts.down"][0]
    output += _swiglu(normed, *shared)
    return hidden + output.to(dtype), expert_ids


def _placed(heads: Tensor, norm: Tensor, step: Step) -> Tensor:
    """Norm queries or keys [N, H, K] per head and rotate them, in the wide dtype."""
    return apply_rotary(rms_norm(heads, norm, step.config.rms_norm_eps), step.cos, step.sin)


def _linear_layer(layer: int, weights: Weights, hidden: Tensor, step: Step) -> Tensor:
    config, unpack = step.config, step.layout.unpack
    norm = weights["attention.g_norm.weight"]
    qkv = F.linear(hidden, weights["attention.query_key_value.weight"]).to(norm.dtype)
    qkv = F.silu(qkv) if config.linear_silu else qkv
    query, key, value = qkv.view(len(qkv), 3, -1, config.head_dim).unbind(1)
    inputs = LinearInputs(
        query=unpack(_placed(query, weights["attention.query_layernorm.weight"], step)),
        key=unpack(_placed(key, weights["attention.key_layernorm.weight"], step)),
        value=unpack(value),
        log_decay=weights["log_decay"],
        past_state=step.state.recurrent_state[layer],
        query_scale=config.head_dim**-0.5,
        valid=step.layout.valid,
    )
    output, step.state.recurrent_state[layer] = step.kernel(inputs)
    mixed = step.layout.pack(output).flatten(-2)
    mixed = group_rms_norm(mixed, norm, config.num_norm_groups, config.rms_norm_eps)
    output_gate = F.linear(hidden, weights["attention.g_proj.weight"]).to(norm.dtype).sigmoid()
    return F.linear((mixed * output_gate).to(hidden.dtype), weights["attention.dense.weight"])


def _softmax_layer(layer: int, weights: Weights, hidden: Tensor, step: Step) -> Tensor:
    config, layout = step.config, step.layout
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = F.linear(hidden, weights["attention.query_key_value.weight"])
    qkv = qkv.view(len(qkv), -1, config.head_dim)
    query = _placed(qkv[:, :heads], weights["attention.query_layernorm.weight"], step)
    key = qkv[:, heads : heads + kv_heads]
    key = _placed(key, weights["attention.key_layernorm.weight"], step)
    keys, values = step.state.append(layer, layout, key, qkv[:, heads + kv_heads :])
    # Query heads that share a key head become rows of it, [B, Hkv, T * G, K], so that the cache
    # [B, Hkv, S, K] is never repeated; blocks of rows bound the mask's size.
    shape = (layout.batch, layout.width, kv_heads, -1, config.head_dim)
    rows = layout.unpack(query.to(hidden.dtype)).view(shape).transpose(1, 2).flatten(2, 3)
    positions = layout.unpack(layout.position).repeat_interleave(heads // kv_heads, dim=1)
    slots, outputs = torch.arange(keys.shape[2], device=keys.device), []
    for start in range(0, rows.shape[2], _QUERY_BLOCK):
        block_rows = slice(start, start + _QUERY_BLOCK)
        seen = slots <= positions[:, None, block_rows, None]
        queries = rows[:, :, block_rows]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen))
    mixed = torch.cat(outputs, dim=2).view(layout.batch, kv_heads, layout.width, -1)
    mixed = layout.pack(mixed.transpose(1, 2)).flatten(1)
    return F.linear(mixed, weights["attention.dense.weight"])


def route(logits: Tensor, expert_bias: Tensor, config: RingConfig) -> tuple[Tensor, Tensor]:
    """Return expert_ids int64 [N, k], best first, and routing_weights [N, k] of logits [N, E].

    The bias [E] takes part in the selection only. Ties, between groups as between experts, go to
    the lower id: a stable sort, since the order that torch.topk gives to equals is unspecified.
    """
    scores = logits.sigmoid()
    grouped = (scores + expert_bias).view(len(scores), config.n_group, -1)
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = strength.sort(descending=True, stable=True).indices[:, : config.topk_group]
    dropped = torch.ones_like(strength, dtype=torch.bool).scatter_(1, kept, value=0)
    biased = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ranked = biased.sort(descending=True, stable=True).indices
    expert_ids = ranked[:, : config.num_experts_per_tok]
    routing_weights = scores.gather(1, expert_ids)
    if config.norm_topk_prob:
        routing_weights = routing_weights / (routing_weights.sum(-1, keepdim=True) + 1e-20)
    return expert_ids, routing_weights * config.routed_scaling_factor


def routed_experts(
    hidden: Tensor, weights: Weights, expert_ids: Tensor, routing_weights: Tensor
) -> Tensor:
    """Return the weighted sum of the chosen experts [N, D] in the dtype of `routing_weights`."""
    # Tokens are sorted by expert; one pass over the experts that have any.
    order = expert_ids.flatten().argsort(stable=True)
    token, factor = order // expert_ids.shape[1], routing_weights.flatten()[order, None]
    gate_up, down = weights["mlp.experts.gate_up"], weights["mlp.experts.down"]
    output, stop = torch.zeros_like(hidden, dtype=factor.dtype), 0
    for expert, count in enumerate(expert_ids.flatten().bincount().tolist()):
        start, stop = stop, stop + count
        if count:
            chosen = token[start:stop]
            result = _swiglu(hidden[chosen], gate_up[expert], down[expert])
            output.index_add_(0, chosen, result * factor[start:stop])
    return output


def _swiglu(hidden: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(hidden, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
