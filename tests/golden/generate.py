"""Golden vectors: a slow fp64 implementation of the network in plain numpy.

Written from the model's specification alone; it imports nothing of ringexport, so that the two
can disagree. Every formula is spelled out per token and per head; speed does not matter here.
Weights and inputs come from an integer hash, not from a library's generator, so that they are the
same on every machine and version. They are exact in bf16.

    python -m tests.golden.generate          # write tests/golden/*.safetensors
"""

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

VERSION = "1"
DIRECTORY = Path(__file__).parent
Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


# ---------------------------------------------------------------------------------- random numbers


def hashed(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    """Return numbers k/128 * scale for k in -128..127 from splitmix64 of `name` and the index.

    With `scale` a power of two every one is exact in bf16. Their standard deviation is 0.58 scale.
    """
    seed = np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
    x = np.arange(math.prod(shape), dtype=np.uint64) + seed
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    steps = ((x ^ (x >> np.uint64(31))) >> np.uint64(56)).astype(np.float64) - 128.0
    return (steps / 128.0 * scale).reshape(shape)


# ------------------------------------------------------------------------------------ single steps


def slope(head: int, heads: int) -> float:
    """ALiBi slope of one head; heads that are no power of two take even places of the next."""
    below = 2 ** math.floor(math.log2(heads))
    if head < below:
        start = 2.0 ** (-(2.0 ** -(math.log2(below) - 3)))
        return start ** (head + 1)
    twice = 2 * below
    start = 2.0 ** (-(2.0 ** -(math.log2(twice) - 3)))
    return start ** (2 * (head - below) + 1)


def layer_factor(form: str, layer: int, layers: int) -> float:
    if form == "hf":  # form A
        return 1 - (layer - 1) / (layers - 1) + 1e-5
    if form == "serving":  # form B
        return 1 - layer / (layers - 1) + 1e-5
    return 1 - max(0, layer - 1) / max(1, layers - 1) + 1e-5  # form C, clamped


def log_decay(heads: int, layer: int, layers: int, form: str) -> Array:
    return np.array([-slope(h, heads) * layer_factor(form, layer, layers) for h in range(heads)])


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def group_rms_norm(x: Array, weight: Array, groups: int, eps: float = 1e-6) -> Array:
    """x [T, C]; `groups` is how many, not how wide."""
    width = x.shape[-1] // groups
    parts = [x[:, g * width : (g + 1) * width] for g in range(groups)]
    normed = [p / np.sqrt(np.mean(p * p, axis=-1, keepdims=True) + eps) for p in parts]
    return np.concatenate(normed, axis=-1) * weight


def inv_freq(dim: int, theta: float, yarn: dict[str, float] | None) -> tuple[Array, float]:
    """Return [dim/2] frequencies and the attention factor; YaRN as in its paper, by parts."""
    freq = np.array([theta ** (-2.0 * j / dim) for j in range(dim // 2)])
    if yarn is None:
        return freq, 1.0
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(dim_of(yarn.get("beta_slow", 1))), dim - 1)
    span = high - low if high > low else 0.001
    out = []
    for j in range(dim // 2):
        slow = min(max((j - low) / span, 0.0), 1.0)  # 1: interpolate, 0: keep
        out.append(freq[j] / factor * slow + freq[j] * (1 - slow))
    return np.array(out), 0.1 * math.log(factor) + 1.0


def rope(x: Array, positions: Ids, freq: Array, attention_factor: float) -> Array:
    """x [T, H, K]; the first 2 * len(freq) dimensions rotate, j with j + len(freq)."""
    out, half = x.copy(), len(freq)
    for t, position in enumerate(positions):
        for j in range(half):
            cos = math.cos(position * freq[j]) * attention_factor
            sin = math.sin(position * freq[j]) * attention_factor
            a, b = x[t, :, j], x[t, :, j + half]
            out[t, :, j] = a * cos - b * sin
            out[t, :, j + half] = b * cos + a * sin
    return out


def linear_attention(
    q: Array, k: Array, v: Array, decay: Array, state: Array
) -> tuple[Array, Array]:
    """q, k [T, H, K], v [T, H, V], decay [H] (log), state [H, K, V] -> o [T, H, V], state."""
    out, state, keep = np.zeros_like(v), state.copy(), np.exp(decay)[:, None, None]
    for t in range(len(q)):
        state = keep * state + k[t][:, :, None] * v[t][:, None, :]
        out[t] = q.shape[-1] ** -0.5 * (q[t][:, :, None] * state).sum(axis=1)
    return out, state


def linear_attention_parallel(q: Array, k: Array, v: Array, decay: Array) -> Array:
    """The same output from a zero state, as a sum over all earlier tokens."""
    out = np.zeros_like(v)
    for t in range(len(q)):
        for s in range(t + 1):
            weight = np.exp(decay * (t - s)) * (q[t] * k[s]).sum(axis=-1)
            out[t] += q.shape[-1] ** -0.5 * weight[:, None] * v[s]
    return out


def softmax_attention(q: Array, k: Array, v: Array, past: int) -> Array:
    """q [T, H, K] at positions past.., k and v [past + T, Hkv, K]: causal grouped-query softmax."""
    out, share = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t in range(len(q)):
        for h in range(q.shape[1]):
            seen = slice(0, past + t + 1)
            scores = k[seen, h // share] @ q[t, h] * q.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[seen, h // share]
    return out


def route(scores: Array, bias: Array, c: "Config") -> tuple[Ids, Array]:
    """scores [E] after the sigmoid -> ids [k] best first, weights [k]; ties to the lower id."""
    biased, size = scores + bias, c.num_experts // c.n_group
    groups = [biased[g * size : (g + 1) * size] for g in range(c.n_group)]
    strength = [float(np.sort(group)[-2:].sum()) for group in groups]
    kept = sorted(range(c.n_group), key=lambda g: (-strength[g], g))[: c.topk_group]
    candidates = [e for e in range(c.num_experts) if e // size in kept]
    ids = sorted(candidates, key=lambda e: (-biased[e], e))[: c.num_experts_per_tok]
    weights = scores[ids]
    if c.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return np.array(ids), weights * c.routed_scaling_factor


# ------------------------------------------------------------------------------------- the network


@dataclass(frozen=True, kw_only=True)
class Config:
    """Field names of the published config.json."""

    hidden_size: int = 32
    num_hidden_layers: int = 7
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 48
    moe_intermediate_size: int = 16
    moe_shared_expert_intermediate_size: int = 16
    num_experts: int = 12
    num_experts_per_tok: int = 3
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    layer_group_size: int = 3
    group_norm_size: int = 3
    linear_silu: bool = False
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rope_scaling: dict[str, float | str] | None = None
    max_position_embeddings: int = 512
    vocab_size: int = 64
    tie_word_embeddings: bool = False

    def is_softmax(self, layer: int) -> bool:
        size = self.layer_group_size
        return (layer + 1) % size == 0 or layer >= self.num_hidden_layers // size * size


# Layer count no multiple of the group, head count no power of two.
BASE = Config()
# The other side of every switch: 12 heads, one group, SiLU, YaRN, two shared experts, two dense
# layers, tied embeddings, routing weights that are not normalised.
SWITCHED = Config(
    num_hidden_layers=4,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    num_shared_experts=2,
    first_k_dense_replace=2,
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    layer_group_size=4,
    group_norm_size=4,
    linear_silu=True,
    rope_theta=100.0,
    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
CONFIGS = {"base": BASE, "switched": SWITCHED}


def weights_of(c: Config) -> dict[str, Array]:
    """Return the checkpoint's tensors by their published names."""
    out: dict[str, Array] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        scale = 2.0 ** round(math.log2(1.75 * columns**-0.5))
        out[name] = hashed(name, (rows, columns), scale)

    def norm(name: str, size: int) -> None:
        out[name] = 1.0 + np.round(hashed(name, (size,), 32.0)) / 128.0

    def mlp(prefix: str, inner: int) -> None:
        matrix(prefix + "gate_proj.weight", inner, c.hidden_size)
        matrix(prefix + "up_proj.weight", inner, c.hidden_size)
        matrix(prefix + "down_proj.weight", c.hidden_size, inner)

    width = c.num_attention_heads * c.head_dim
    out["model.word_embeddings.weight"] = hashed("embed", (c.vocab_size, c.hidden_size), 2.0)
    norm("model.norm.weight", c.hidden_size)
    if not c.tie_word_embeddings:
        matrix("lm_head.weight", c.vocab_size, c.hidden_size)
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm.weight", c.hidden_size)
        norm(prefix + "post_attention_layernorm.weight", c.hidden_size)
        norm(prefix + "attention.query_layernorm.weight", c.head_dim)
        norm(prefix + "attention.key_layernorm.weight", c.head_dim)
        rows = 3 * width
        if c.is_softmax(layer):
            rows = width + 2 * c.num_key_value_heads * c.head_dim
        else:
            matrix(prefix + "attention.g_proj.weight", width, c.hidden_size)
            norm(prefix + "attention.g_norm.weight", width)
        matrix(prefix + "attention.query_key_value.weight", rows, c.hidden_size)
        matrix(prefix + "attention.dense.weight", c.hidden_size, width)
        if layer < c.first_k_dense_replace:
            mlp(prefix + "mlp.", c.intermediate_size)
            continue
        matrix(prefix + "mlp.gate.weight", c.num_experts, c.hidden_size)
        name = prefix + "mlp.gate.expert_bias"
        out[name] = hashed(name, (c.num_experts,), 0.25)
        for expert in range(c.num_experts):
            mlp(f"{prefix}mlp.experts.{expert}.", c.moe_intermediate_size)
        shared = c.num_shared_experts * c.moe_shared_expert_intermediate_size
        mlp(prefix + "mlp.shared_experts.", shared)
    return out


@dataclass
class State:
    """What one sequence carries: [H, K, V] per linear layer, keys and values per softmax layer."""

    position: int = 0
    recurrent: dict[int, Array] = field(default_factory=dict)
    keys: dict[int, Array] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)


class Network:
    """One sequence at a time; no batch, no padding."""

    def __init__(self, config: Config, form: str) -> None:
        self.c, self.form, self.w = config, form, weights_of(config)
        rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        yarn = config.rope_scaling
        self.freq, self.attention_factor = inv_freq(
            rotary_dim,
            config.rope_theta,
            yarn,  # type: ignore[arg-type]
        )

    def forward(self, tokens: Ids, state: State) -> dict[str, npt.NDArray[np.generic]]:
        """Append tokens [T]; return logits [T, vocab], hidden.* [T, D] and expert_ids.* [T, k]."""
        out: dict[str, npt.NDArray[np.generic]] = {}
        h = self.w["model.word_embeddings.weight"][tokens]
        for layer in range(self.c.num_hidden_layers):
            p = f"model.layers.{layer}."
            x = rms_norm(h, self.w[p + "input_layernorm.weight"])
            mix = self.softmax_layer if self.c.is_softmax(layer) else self.linear_layer
            h = h + mix(layer, x, state)
            x = rms_norm(h, self.w[p + "post_attention_layernorm.weight"])
            if layer < self.c.first_k_dense_replace:
                h = h + self.mlp(p + "mlp.", x)
            else:
                y, out[f"expert_ids.{layer}"] = self.experts(p + "mlp.", x)
                h = h + y
            out[f"hidden.{layer}"] = h
        state.position += len(tokens)
        h = rms_norm(h, self.w["model.norm.weight"])
        head = "model.word_embeddings" if self.c.tie_word_embeddings else "lm_head"
        out["hidden.final"] = h
        out["logits"] = h @ self.w[head + ".weight"].T
        return out

    def rotated(self, x: Array, norm: Array, start: int) -> Array:
        positions = np.arange(start, start + len(x))
        return rope(rms_norm(x, norm), positions, self.freq, self.attention_factor)

    def linear_layer(self, layer: int, x: Array, state: State) -> Array:
        c, p = self.c, f"model.layers.{layer}.attention."
        heads, dim = c.num_attention_heads, c.head_dim
        qkv = x @ self.w[p + "query_key_value.weight"].T
        if c.linear_silu:
            qkv = silu(qkv)
        q, k, v = (part.reshape(-1, heads, dim) for part in np.split(qkv, 3, axis=-1))
        q = self.rotated(q, self.w[p + "query_layernorm.weight"], state.position)
        k = self.rotated(k, self.w[p + "key_layernorm.weight"], state.position)
        decay = log_decay(heads, layer, c.num_hidden_layers, self.form)
        past = state.recurrent.get(layer, np.zeros((heads, dim, dim)))
        o, state.recurrent[layer] = linear_attention(q, k, v, decay, past)
        if state.position == 0:
            difference = np.abs(o - linear_attention_parallel(q, k, v, decay)).max()
            assert difference < 1e-12 * max(1.0, np.abs(o).max())
        o = group_rms_norm(o.reshape(len(x), -1), self.w[p + "g_norm.weight"], c.group_norm_size)
        o = o * sigmoid(x @ self.w[p + "g_proj.weight"].T)
        return o @ self.w[p + "dense.weight"].T

    def softmax_layer(self, layer: int, x: Array, state: State) -> Array:
        c, p = self.c, f"model.layers.{layer}.attention."
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = (x @ self.w[p + "query_key_value.weight"].T).reshape(len(x), -1, dim)
        q = self.rotated(qkv[:, :heads], self.w[p + "query_layernorm.weight"], state.position)
        k = qkv[:, heads : heads + kv_heads]
        k = self.rotated(k, self.w[p + "key_layernorm.weight"], state.position)
        none = np.zeros((0, kv_heads, dim))
        state.keys[layer] = np.concatenate([state.keys.get(layer, none), k])
        v = qkv[:, heads + kv_heads :]
        state.values[layer] = np.concatenate([state.values.get(layer, none), v])
        o = softmax_attention(q, state.keys[layer], state.values[layer], state.position)
        return o.reshape(len(x), -1) @ self.w[p + "dense.weight"].T

    def mlp(self, p: str, x: Array) -> Array:
        gate, up = x @ self.w[p + "gate_proj.weight"].T, x @ self.w[p + "up_proj.weight"].T
        return (silu(gate) * up) @ self.w[p + "down_proj.weight"].T

    def experts(self, p: str, x: Array) -> tuple[Array, Ids]:
        scores = sigmoid(x @ self.w[p + "gate.weight"].T)
        out, chosen = self.mlp(p + "shared_experts.", x), []
        for t in range(len(x)):
            ids, weights = route(scores[t], self.w[p + "gate.expert_bias"], self.c)
            chosen.append(ids)
            for expert, weight in zip(ids, weights, strict=True):
                out[t] += weight * self.mlp(f"{p}experts.{expert}.", x[t : t + 1])[0]
        return out, np.array(chosen)


# ------------------------------------------------------------------------------------------ files

ROW_LENGTHS = (21, 13)
NEW_TOKENS = 3
FORMS = ("serving", "hf", "clamped")


def tokens_of(c: Config, row: int) -> Ids:
    """Return the prompt and the continuation of one row."""
    raw = hashed(f"tokens.{row}", (ROW_LENGTHS[row] + NEW_TOKENS,))
    return ((raw * 128 + 128).astype(np.int64) * 7 + row) % c.vocab_size


def network_golden(c: Config) -> dict[str, npt.NDArray[np.generic]]:
    """Prefill and decode of two rows in form "serving"; logits and states of the other forms."""
    out: dict[str, npt.NDArray[np.generic]] = {}
    for form in FORMS:
        network = Network(c, form)
        for row, length in enumerate(ROW_LENGTHS):
            tokens, state = tokens_of(c, row), State()
            steps = [network.forward(tokens[:length], state)]
            steps += [network.forward(tokens[t : t + 1], state) for t in range(length, len(tokens))]
            traces = {name: np.concatenate([s[name] for s in steps]) for name in steps[0]}
            whole = network.forward(tokens, State())
            for name, value in traces.items():
                assert np.abs(value - whole[name]).max() < 1e-11, name
            if form == "serving":
                kept = traces if row == 0 else {"logits": traces["logits"]}
                out |= {f"{form}.{row}.{name}": value for name, value in kept.items()}
                out[f"{form}.{row}.tokens"] = tokens
            else:
                out[f"{form}.{row}.logits"] = traces["logits"][-4:]
            if row == 0:
                layer = max(state.recurrent)
                out[f"{form}.{row}.recurrent_state.{layer}"] = state.recurrent[layer]
    return out


ROUTER_CASES = {
    "spread": BASE,
    "one_group": Config(num_experts=12, n_group=1, topk_group=1),
    "all_groups": Config(num_experts=12, n_group=4, topk_group=4, num_experts_per_tok=5),
    "plain": Config(num_experts=16, num_experts_per_tok=2, norm_topk_prob=False),
}


def ops_golden() -> dict[str, npt.NDArray[np.generic]]:
    """Single operations, small enough to look at."""
    out: dict[str, npt.NDArray[np.generic]] = {}
    heads, key_dim, value_dim, length = 3, 8, 4, 67
    q = hashed("q", (length, heads, key_dim), 2.0)
    k = hashed("k", (length, heads, key_dim), 2.0)
    v = hashed("v", (length, heads, value_dim), 2.0)
    decay, past = np.array([-0.84, -0.05, -2e-4]), hashed("past", (heads, key_dim, value_dim), 4.0)
    o, state = linear_attention(q, k, v, decay, past)
    out |= {"linear.query": q, "linear.key": k, "linear.value": v, "linear.log_decay": decay}
    out |= {"linear.past_state": past, "linear.output": o, "linear.present_state": state}
    x, weight = hashed("group_norm", (5, 24), 4.0), 1 + hashed("group_norm.weight", (24,), 0.5)
    out |= {"group_norm.input": x, "group_norm.weight": weight}
    out |= {f"group_norm.output.{n}": group_rms_norm(x, weight, n) for n in (1, 3, 8)}
    out |= rope_golden() | router_golden()
    return out


def rope_golden() -> dict[str, npt.NDArray[np.generic]]:
    out: dict[str, npt.NDArray[np.generic]] = {}
    heads, positions = hashed("rope", (6, 2, 32), 1.0), np.array([0, 1, 63, 4096, 131071, 524287])
    out |= {"rope.input": heads, "rope.positions": positions}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 131072.0}
    for name, scaling in (("plain", None), ("yarn", yarn)):
        freq, factor = inv_freq(16, 1e6, scaling)
        out[f"rope.{name}.inv_freq"] = freq
        out[f"rope.{name}.attention_factor"] = np.array([factor])
        out[f"rope.{name}.output"] = rope(heads, positions, freq, factor)
    return out


def router_golden() -> dict[str, npt.NDArray[np.generic]]:
    """Rows 0..5 random, then exact ties: all equal, in pairs, and between groups.

    Biases of -2 make every biased score negative: a mask of 0 instead of -inf would then pick
    experts of dropped groups.
    """
    out: dict[str, npt.NDArray[np.generic]] = {}
    for name, c in ROUTER_CASES.items():
        experts = c.num_experts
        logits = hashed(f"router.{name}", (9, experts), 2.0)
        logits[6] = 0.5
        logits[7] = np.repeat(hashed("pairs", (experts // 2,), 2.0), 2)
        logits[8] = np.tile(hashed("groups", (experts // c.n_group,), 2.0), c.n_group)
        mixed = hashed(f"router.{name}.bias", (experts,), 0.25)
        biases = {"zero": np.zeros(experts), "mixed": mixed, "negative": mixed - 2.0}
        out[f"router.{name}.logits"] = logits
        for kind, bias in biases.items():
            routed = [route(sigmoid(row), bias, c) for row in logits]
            out[f"router.{name}.{kind}.bias"] = bias
            out[f"router.{name}.{kind}.expert_ids"] = np.stack([ids for ids, _ in routed])
            out[f"router.{name}.{kind}.routing_weights"] = np.stack([w for _, w in routed])
    return out


def goldens() -> dict[str, dict[str, npt.NDArray[np.generic]]]:
    """Return the content of every golden file by its stem."""
    networks = {f"network_{name}": network_golden(c) for name, c in CONFIGS.items()}
    return {"ops": ops_golden(), **networks}


def main() -> None:
    metadata = {
        "version": VERSION,
        "source": "tests/golden/generate.py, numpy fp64",
        "seed": "splitmix64 of crc32 of each tensor's name",
    }
    for stem, tensors in goldens().items():
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(contiguous, DIRECTORY / f"{stem}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
