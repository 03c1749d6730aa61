"""The blocks of a layer, built from contract ops and standard ones."""

from dataclasses import dataclass

import numpy as np
import onnx

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.graph import initializers
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.initializers import ComputeDtype
from ringexport.ops.attention import ATTENTION
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.linear_attention import LINEAR_ATTENTION
from ringexport.ops.moe import EXPERTS, ROUTER, Routing

__all__ = ["BlockBuilder", "Step"]

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Values that all layers share.

    Attributes:
        position_ids: [B, T] int64, absolute positions of the new tokens.
        cos, sin: [context, R/2] fp32.
    """

    position_ids: str
    cos: str
    sin: str


class BlockBuilder:
    """Adds the blocks of one checkpoint to a graph; every method returns the value it made."""

    def __init__(
        self,
        builder: GraphBuilder,
        config: RingConfig,
        weights: CheckpointWeights,
        decay_index: DecayIndex,
        dtype: ComputeDtype,
    ) -> None:
        self.builder = builder
        self.config = config
        self.weights = weights
        self.decay_index = decay_index
        self.dtype = dtype

    def linear_attention(self, layer: int, hidden: str, state: list[str], step: Step) -> str:
        """Linear attention with group norm and output gate.

        Args:
            layer: 0-based.
            hidden: [B, T, D] residual stream.
            state: names of past_state and present_state.
            step: shared values.
        """
        build, config = self.builder, self.config
        heads, dim = config.num_attention_heads, config.linear_dim
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm.weight", "input_norm")
        # One matrix for query, key, value and output gate: they share their input.
        projected = self._project(
            normed, layer, ["attention.query_key_value", "attention.g_proj"], "attention.in_proj"
        )
        if config.linear_silu:
            qkv, output_gate = self._split(projected, [3 * dim, dim], "split_gate")
            qkv = self._silu(qkv, "qkv_silu")
            query_key, value = self._split(qkv, [2 * dim, dim], "split_qkv")
        else:
            query_key, value, output_gate = self._split(projected, [2 * dim, dim, dim], "split_qkv")
        query, key = self._rotated_query_key(layer, query_key, (heads, heads), step)
        decay = log_decay(heads, layer, config.num_hidden_layers, self.decay_index)
        past_state, present_state = state
        attended, _ = build.contract(
            LINEAR_ATTENTION,
            [query, key, value, past_state, build.constant(decay, "log_decay"), "lengths"],
            {"num_heads": heads, "query_scale": config.head_dim**-0.5},
            "linear_attention",
            values={"present_state": present_state},
        )
        gated = self._group_norm_gate(layer, attended, output_gate)
        return self._project(gated, layer, ["attention.dense"], "attention.out_proj")

    def softmax_attention(self, layer: int, hidden: str, state: list[str], step: Step) -> str:
        """Grouped-query softmax attention.

        Args:
            layer: 0-based.
            hidden: [B, T, D] residual stream.
            state: names of past_key, past_value, present_key and present_value.
            step: shared values.
        """
        build, config = self.builder, self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm.weight", "input_norm")
        projected = self._project(normed, layer, ["attention.query_key_value"], "attention.in_proj")
        sizes = [(heads + kv_heads) * config.head_dim, kv_heads * config.head_dim]
        query_key, value = self._split(projected, sizes, "split_qkv")
        query, key = self._rotated_query_key(layer, query_key, (heads, kv_heads), step)
        past_key, past_value, present_key, present_value = state
        attended, _, _ = build.contract(
            ATTENTION,
            [query, key, value, past_key, past_value, "position", "lengths"],
            {
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "softmax_scale": config.head_dim**-0.5,
            },
            "attention",
            values={"present_key": present_key, "present_value": present_value},
        )
        return self._project(attended, layer, ["attention.dense"], "attention.out_proj")

    def mlp(self, layer: int, hidden: str) -> str:
        """Dense MLP, or routed and shared experts, of the normed residual stream [B, T, D]."""
        source = f"model.layers.{layer}.post_attention_layernorm.weight"
        normed = self._norm(hidden, source, "mlp_norm")
        if not self.config.is_moe_layer(layer):
            return self._swiglu(normed, layer, "mlp")
        routed = self._routed_experts(layer, normed)
        shared = self._swiglu(normed, layer, "mlp.shared_experts")
        return self.builder.node("Add", [routed, shared], "mlp.sum")

    def head(self, hidden: str) -> str:
        """Logits [B, L, vocab] fp32 at the positions of `logits_index`."""
        build, config = self.builder, self.config
        with build.scope("head"):
            index = build.node("Unsqueeze", ["logits_index", build.ints(2)], "index")
            chosen = build.node("GatherND", [hidden, index], "gather", batch_dims=1)
            normed = self._norm(chosen, "model.norm.weight", "norm", value_name="hidden.final")
        tied = config.tie_word_embeddings
        source = "model.word_embeddings.weight" if tied else "lm_head.weight"
        matrix = initializers.transposed_projection("lm_head", self.weights, [source], self.dtype)
        name = build.weight(matrix)
        if self.dtype is ComputeDtype.FP32:
            return build.node("MatMul", [normed, name], "lm_head.matmul", value="logits")
        logits = build.node("MatMul", [normed, name], "lm_head.matmul")
        return build.node("Cast", [logits], "lm_head.cast", value="logits", to=FLOAT)

    def _routed_experts(self, layer: int, normed: str) -> str:
        build, config = self.builder, self.config
        prefix = f"model.layers.{layer}.mlp"
        flat = build.node("Reshape", [normed, build.ints(-1, config.hidden_size)], "mlp.tokens")
        expert_ids, routing_weights = build.contract(
            ROUTER,
            [flat, *self._router_weights(layer)],
            self._routing().attributes(),
            "mlp.router",
            values={"expert_ids": f"expert_ids.{layer}"},
        )
        experts = [f"{prefix}.experts.{expert}" for expert in range(config.num_experts)]
        gate_up = initializers.stacked_gate_up_projections(
            f"layers.{layer}.mlp.experts.gate_up_proj", self.weights, experts, self.dtype
        )
        down = initializers.stacked_down_projections(
            f"layers.{layer}.mlp.experts.down_proj", self.weights, experts, self.dtype
        )
        (mixed,) = build.contract(
            EXPERTS,
            [flat, expert_ids, routing_weights, build.weight(gate_up), build.weight(down)],
            {"num_experts": config.num_experts, "top_k": config.num_experts_per_tok},
            "mlp.experts",
        )
        shape = build.node("Shape", [normed], "mlp.shape")
        return build.node("Reshape", [mixed, shape], "mlp.routed")

    def _routing(self) -> Routing:
        config = self.config
        return Routing(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalize=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def _router_weights(self, layer: int) -> list[str]:
        """Router matrix [D, E] and expert bias [E], fp32 in every graph."""
        build, prefix = self.builder, f"model.layers.{layer}.mlp.gate"
        matrix = initializers.transposed_projection(
            f"layers.{layer}.mlp.router.weight",
            self.weights,
            [f"{prefix}.weight"],
            ComputeDtype.FP32,
        )
        if not self.config.expert_bias:
            zeros = np.zeros(self.config.num_experts, dtype=np.float32)
            return [build.weight(matrix), build.constant(zeros, "no_bias")]
        bias = initializers.vector(
            f"layers.{layer}.mlp.router.expert_bias",
            self.weights,
            f"{prefix}.expert_bias",
            ComputeDtype.FP32,
        )
        return [build.weight(matrix), build.weight(bias)]

    def _rotated_query_key(
        self, layer: int, query_key: str, heads: tuple[int, int], step: Step
    ) -> list[str]:
        """Norm and rotate query and key, [B, T, (H + KV) * K], together; return them apart.

        Args:
            layer: 0-based.
            query_key: query heads, then key heads.
            heads: number of query heads and of key heads.
            step: shared values.
        """
        build, config = self.builder, self.config
        total, dim = sum(heads), config.head_dim
        # Always in fp32: bf16 tables lose the phase of far positions.
        value = self._cast(query_key, ComputeDtype.FP32, "query_key_float")
        split = build.node("Reshape", [value, build.ints(0, 0, total, dim)], "query_key_heads")
        normed = self._rms_norm(split, np.ones(dim, dtype=np.float32), "query_key_norm")
        weight = self._query_key_norm_weight(layer, heads)
        scaled = build.node("Mul", [normed, weight], "query_key_scaled")
        flat = build.node("Reshape", [scaled, build.ints(0, 0, total * dim)], "query_key_flat")
        rotated = build.node(
            "RotaryEmbedding",
            [flat, step.cos, step.sin, step.position_ids],
            "rotary",
            num_heads=total,
            rotary_embedding_dim=config.rotary_dim,
            interleaved=0,
        )
        rotated = self._cast(rotated, self.dtype, "rotary_cast")
        return self._split(rotated, [count * dim for count in heads], "split_query_key")

    def _query_key_norm_weight(self, layer: int, heads: tuple[int, int]) -> str:
        """Norm weights of every query and key head, [H + KV, K] fp32."""
        prefix = f"model.layers.{layer}.attention"
        names = ("query_layernorm", "key_layernorm")
        rows = [
            np.tile(self.weights.read_f32(f"{prefix}.{name}.weight"), (count, 1))
            for name, count in zip(names, heads, strict=True)
        ]
        return self.builder.constant(np.concatenate(rows), "query_key_norm")

    def _group_norm_gate(self, layer: int, attended: str, output_gate: str) -> str:
        """RMS norm over groups of heads, times the weight, times the sigmoid of the gate."""
        build, config = self.builder, self.config
        groups, dim = config.num_norm_groups, config.linear_dim
        width = dim // groups
        split = build.node("Reshape", [attended, build.ints(0, 0, groups, width)], "groups")
        ones = np.ones(width, dtype=self.dtype.numpy)
        normed = self._rms_norm(split, ones, "group_norm")
        flat = build.node("Reshape", [normed, build.ints(0, 0, dim)], "group_norm_flat")
        weight = initializers.vector(
            f"layers.{layer}.attention.group_norm.weight",
            self.weights,
            f"model.layers.{layer}.attention.g_norm.weight",
            self.dtype,
        )
        scaled = build.node("Mul", [flat, build.weight(weight)], "group_norm_scaled")
        gate = build.node("Sigmoid", [output_gate], "output_gate")
        return build.node("Mul", [scaled, gate], "gated")

    def _swiglu(self, normed: str, layer: int, prefix: str) -> str:
        """down(silu(gate) * up) of the modules below `prefix`."""
        sources = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        rows = self.weights.info(f"model.layers.{layer}.{sources[0]}.weight").shape[0]
        both = self._project(normed, layer, sources, f"{prefix}.gate_up_proj")
        gate, up = self._split(both, [rows, rows], f"{prefix}.split")
        product = self.builder.node(
            "Mul", [self._silu(gate, f"{prefix}.silu"), up], f"{prefix}.mul"
        )
        return self._project(product, layer, [f"{prefix}.down_proj"], f"{prefix}.down_proj")

    def _project(self, value: str, layer: int, modules: list[str], label: str) -> str:
        """Multiply by the joined matrices of checkpoint modules of a layer."""
        sources = [f"model.layers.{layer}.{module}.weight" for module in modules]
        matrix = initializers.transposed_projection(
            f"layers.{layer}.{label}", self.weights, sources, self.dtype
        )
        return self.builder.node("MatMul", [value, self.builder.weight(matrix)], f"{label}.matmul")

    def _norm(self, value: str, source: str, label: str, *, value_name: str | None = None) -> str:
        scale = initializers.vector(
            self.builder.name(f"{label}.weight"), self.weights, source, self.dtype
        )
        return self._normalize(value, self.builder.weight(scale), label, value_name)

    def _rms_norm(self, value: str, scale: np.ndarray, label: str) -> str:
        return self._normalize(value, self.builder.constant(scale, "ones"), label, None)

    def _normalize(self, value: str, scale: str, label: str, value_name: str | None) -> str:
        """RMS norm over the last axis, statistics in fp32 whatever the dtype."""
        return self.builder.node(
            "RMSNormalization",
            [value, scale],
            label,
            value=value_name,
            axis=-1,
            epsilon=self.config.rms_norm_eps,
            stash_type=FLOAT,
        )

    def _silu(self, value: str, label: str) -> str:
        gate = self.builder.node("Sigmoid", [value], f"{label}.sigmoid")
        return self.builder.node("Mul", [value, gate], label)

    def _split(self, value: str, sizes: list[int], label: str) -> list[str]:
        inputs = [value, self.builder.ints(*sizes)]
        return self.builder.multi_node("Split", inputs, label, [""] * len(sizes), axis=-1)

    def _cast(self, value: str, dtype: ComputeDtype, label: str) -> str:
        if self.dtype is ComputeDtype.FP32:
            return value
        return self.builder.node("Cast", [value], label, to=dtype.onnx)
