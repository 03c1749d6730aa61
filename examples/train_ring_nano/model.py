"""The architecture of Ring-mini-linear-2.0 in plain torch, arranged for training.

Same functions as the published model; only the arrangement differs: linear attention runs in
chunks, and the routed experts run as one wide MLP whose hidden units are scaled by the routing
weights (zero for experts that were not chosen).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 64


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_group_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    group_norm_size: int
    rms_norm_eps: float
    partial_rotary_factor: float
    rope_theta: float
    initializer_range: float

    @classmethod
    def load(cls, path: Path) -> Config:
        values = json.loads(path.read_text())
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def is_softmax(self, layer: int) -> bool:
        group = self.layer_group_size
        return (layer + 1) % group == 0 or layer >= self.num_hidden_layers // group * group


def log_decay(config: Config, layer: int) -> Tensor:
    """Log of the per-step decay of each head: -slope_h * f_l ("serving" layer factor)."""
    heads = config.num_attention_heads
    slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
    return -slopes * (1.0 - layer / (config.num_hidden_layers - 1) + 1e-5)


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    wide = x.float().view(*x.shape[:-1], groups, -1)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.flatten(-2) * weight.float()


def rotary(length: int, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    width = int(config.head_dim * config.partial_rotary_factor)
    powers = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angles = torch.outer(torch.arange(length, device=device).float(), config.rope_theta**-powers)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first dims of [B, T, heads, head_dim], paired as two halves (NeoX)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """o_t = sum_{s<=t} exp(g (t-s)) (q_t . k_s) v_s for [B, T, H, d]; T divides by CHUNK.

    Inside a chunk through the masked score matrix; across chunks through the states, which are
    accumulated in fp32 with one decay matrix over the chunks.
    """
    batch, length, heads, dim = q.shape
    count = length // CHUNK
    q, k, v = (t.view(batch, count, CHUNK, heads, dim).permute(0, 3, 1, 2, 4) for t in (q, k, v))
    step = torch.arange(CHUNK, device=q.device, dtype=torch.float32)
    gap = step[:, None] - step[None, :]
    g = decay.view(heads, 1, 1)
    mask = torch.where(gap >= 0, torch.exp(g * gap.clamp(min=0)), 0.0)
    scores = (q @ k.transpose(-1, -2)) * mask[:, None]
    inside = scores.to(v.dtype) @ v
    with torch.autocast(q.device.type, enabled=False):
        to_end = torch.exp(decay[:, None] * (CHUNK - 1 - step)).view(heads, 1, CHUNK, 1)
        states = (k.float() * to_end).transpose(-1, -2) @ v.float()
        chunk = torch.arange(count, device=q.device, dtype=torch.float32)
        lag = chunk[:, None] - chunk[None, :] - 1
        carry = torch.where(lag >= 0, torch.exp(g * CHUNK * lag.clamp(min=0)), 0.0)
        before = (carry @ states.flatten(-2)).view(batch, heads, count, dim, dim)
        from_start = torch.exp(decay[:, None] * (step + 1)).view(heads, 1, CHUNK, 1)
        across = (q.float() * from_start) @ before
    out = inside.float() + across
    return out.permute(0, 2, 3, 1, 4).reshape(batch, length, heads, dim)


def rank(values: Tensor) -> Tensor:
    """Position of each value in descending order; ties go to the lower index."""
    size = values.shape[-1]
    index = torch.arange(size, device=values.device)
    higher = values.unsqueeze(-2) > values.unsqueeze(-1)
    tied = (values.unsqueeze(-2) == values.unsqueeze(-1)) & (index[None, :] < index[:, None])
    return (higher | tied).sum(-1)


def choose_experts(scores: Tensor, bias: Tensor, config: Config) -> Tensor:
    """The boolean mask [N, experts] of the experts chosen for each token."""
    biased = (scores + bias).view(*scores.shape[:-1], config.n_group, -1)
    group_score = torch.where(rank(biased) < 2, biased, 0.0).sum(-1)
    allowed = rank(group_score) < config.topk_group
    masked = torch.where(allowed.unsqueeze(-1), biased, -torch.inf).flatten(-2)
    return rank(masked) < config.num_experts_per_tok


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


class Attention(nn.Module):
    decay: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.softmax = config, config.is_softmax(layer)
        hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
        self.kv_heads = config.num_key_value_heads if self.softmax else heads
        self.query_key_value = _matrix((heads + 2 * self.kv_heads) * dim, hidden)
        self.query_layernorm = nn.Parameter(torch.ones(dim))
        self.key_layernorm = nn.Parameter(torch.ones(dim))
        self.dense = _matrix(hidden, heads * dim)
        if not self.softmax:
            self.g_proj = _matrix(heads * dim, hidden)
            self.g_norm = nn.Parameter(torch.ones(heads * dim))
            self.register_buffer("decay", log_decay(config, layer), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config, heads = self.config, self.config.num_attention_heads
        qkv = F.linear(x, self.query_key_value).view(*x.shape[:-1], -1, config.head_dim)
        q, k, v = torch.split(qkv, [heads, self.kv_heads, self.kv_heads], dim=-2)
        q = rotate(rms_norm(q, self.query_layernorm, config.rms_norm_eps), cos, sin)
        k = rotate(rms_norm(k, self.key_layernorm, config.rms_norm_eps), cos, sin)
        scale = config.head_dim**-0.5
        if self.softmax:
            repeat = heads // self.kv_heads
            k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)
            q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return F.linear(out.transpose(1, 2).flatten(-2), self.dense)
        out = linear_attention(q * scale, k, v, self.decay).flatten(-2)
        out = rms_norm(out, self.g_norm, config.rms_norm_eps, config.group_norm_size)
        return F.linear(out * torch.sigmoid(F.linear(x, self.g_proj).float()), self.dense)


class DenseMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = _matrix(config.intermediate_size, config.hidden_size)
        self.up_proj = _matrix(config.intermediate_size, config.hidden_size)
        self.down_proj = _matrix(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj)
        return F.linear(hidden, self.down_proj), x.new_zeros(0)


class MoE(nn.Module):
    """Routed experts 0..E-1 and the shared expert (index E) in one stack of weights."""

    expert_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        stack = config.num_experts + config.num_shared_experts
        self.gate = _matrix(config.num_experts, config.hidden_size)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.gate_proj = _matrix(stack, config.moe_intermediate_size, config.hidden_size)
        self.up_proj = _matrix(stack, config.moe_intermediate_size, config.hidden_size)
        self.down_proj = _matrix(stack, config.moe_intermediate_size, config.hidden_size)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.float()))
            with torch.no_grad():
                chosen = choose_experts(scores, self.expert_bias, self.config)
            weights = scores * chosen
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return weights * self.config.routed_scaling_factor, chosen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.route(x)
        width = self.config.moe_intermediate_size
        shared = weights.new_ones(*weights.shape[:-1], self.config.num_shared_experts)
        weights = torch.cat((weights, shared), -1)
        hidden = F.silu(F.linear(x, self.gate_proj.flatten(0, 1)))
        hidden = hidden * F.linear(x, self.up_proj.flatten(0, 1))
        hidden = hidden.view(*weights.shape, width) * weights.unsqueeze(-1).to(hidden.dtype)
        return hidden.flatten(-2) @ self.down_proj.flatten(0, 1), chosen.float().flatten(
            0, -2
        ).mean(0)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = DenseMLP(config) if layer < config.first_k_dense_replace else MoE(config)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.attention(rms_norm(h, self.input_layernorm, self.eps), cos, sin)
        out, load = self.mlp(rms_norm(h, self.post_attention_layernorm, self.eps))
        return h + out, load


class RingNano(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = _matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = _matrix(config.vocab_size, config.hidden_size)
        generator = torch.Generator().manual_seed(1234)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
                if name.endswith(("dense", "down_proj")):
                    parameter.data /= (2 * config.num_hidden_layers) ** 0.5

    def features(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states before the head, and each MoE layer's share of tokens per expert."""
        h = F.embedding(tokens, self.word_embeddings)
        cos, sin = rotary(tokens.shape[1], self.config, tokens.device)
        loads = []
        for layer in self.layers:
            h, load = layer(h, cos, sin)
            if load.numel():
                loads.append(load)
        return rms_norm(h, self.norm, self.config.rms_norm_eps), loads

    def logits(self, tokens: Tensor) -> Tensor:
        return F.linear(self.features(tokens)[0], self.lm_head).float()


def head_loss(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, head).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
