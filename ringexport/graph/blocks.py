"""The blocks of a layer, built from contract ops and standard ones."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.graph import initializers
from ringexport.graph.builder import GraphBuilder
from ringexport.graph.initializers import ComputeDtype
from ringexport.graph.quantized import EmitterFactory, QuantizedEmitter
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
        cos, sin: [B, T, R/2] fp32 at the positions of the new tokens.
    """

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
        emitter: EmitterFactory = QuantizedEmitter,
    ) -> None:
        self.builder = builder
        self.config = config
        self.weights = weights
        self.decay_index = decay_index
        self.dtype = dtype
        self.quantized = emitter(builder=builder, weights=weights, dtype=dtype)

    def embedding(self) -> str:
        """Embedded tokens [B, T, D].

        Beside quantized weights the table keeps the dtype of the checkpoint: only the rows of the
        tokens are converted, so that it costs no time and half of the space.
        """
        source = "model.word_embeddings.weight"
        stored = {"bfloat16": ComputeDtype.BF16, "float16": ComputeDtype.FP16}
        dtype = self.dtype
        if self.weights.schemes:
            dtype = stored.get(self.weights.info(source).dtype.name, dtype)
        table = self.builder.weight(initializers.table("embedding", self.weights, source, dtype))
        rows = self.builder.node("Gather", [table, "tokens"], "embed")
        if dtype is self.dtype:
            return rows
        return self.builder.node("Cast", [rows], "embed_cast", to=self.dtype.onnx)

    def linear_attention(self, layer: int, hidden: str, state: list[str], step: Step) -> str:
        """Linear attention with group norm and output gate, before its output projection.

        Args:
            layer: 0-based.
            hidden: [B, T, D] residual stream.
            state: names of past_state and present_state.
            step: shared values.
        """
        build, config = self.builder, self.config
        heads = config.num_attention_heads
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm.weight", "input_norm")
        output_gate = self._project(normed, layer, "attention.g_proj", "attention.output_gate_proj")
        query, key, value = self._query_key_value(layer, normed, (heads, heads), step)
        decay = log_decay(heads, layer, config.num_hidden_layers, self.decay_index)
        past_state, present_state = state
        attended, _ = build.contract(
            LINEAR_ATTENTION,
            [query, key, value, past_state, build.constant(decay, "log_decay"), "lengths"],
            {"num_heads": heads, "query_scale": config.head_dim**-0.5},
            "linear_attention",
            values={"present_state": present_state},
        )
        return self._group_norm_gate(layer, attended, output_gate)

    def softmax_attention(self, layer: int, hidden: str, state: list[str], step: Step) -> str:
        """Grouped-query softmax attention, before its output projection.

        Args:
            layer: 0-based.
            hidden: [B, T, D] residual stream.
            state: names of past_key, past_value, present_key and present_value.
            step: shared values.
        """
        build, config = self.builder, self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm.weight", "input_norm")
        query, key, value = self._query_key_value(layer, normed, (heads, kv_heads), step)
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
        return attended

    def output_projection(self, layer: int, attended: str) -> str:
        """Project attention outputs [B, T, H * K] back to the residual stream."""
        return self._project(attended, layer, "attention.dense", "attention.out_proj")

    def mlp(self, layer: int, hidden: str) -> str:
        """Dense MLP, or routed and shared experts, of the normed residual stream [B, T, D]."""
        source = f"model.layers.{layer}.post_attention_layernorm.weight"
        normed = self._norm(hidden, source, "mlp_norm")
        if not self.config.is_moe_layer(layer):
            return self._swiglu(normed, layer, "mlp")
        routed = self._routed_experts(layer, normed)
        shared = self._swiglu(normed, layer, "mlp.shared_experts")
        return self.builder.node("Add", [routed, shared], "mlp.sum")

    def wanted(self, value: str, label: str) -> str:
        """Gather [B, T, D] at the positions of `logits_index`: [B, L, D]."""
        build = self.builder
        index = build.node("Unsqueeze", ["logits_index", build.ints(2)], f"{label}_index")
        return build.node("GatherND", [value, index], label, batch_dims=1)

    def head(self, hidden: str) -> str:
        """Logits [B, L, vocab] fp32 of the residual stream [B, L, D]."""
        build, config = self.builder, self.config
        with build.scope("head"):
            normed = self._norm(hidden, "model.norm.weight", "norm", value_name="hidden.final")
        tied = config.tie_word_embeddings
        module = "model.word_embeddings" if tied else "lm_head"
        span = (0, config.vocab_size)
        logits = self.quantized.projection(normed, module, "lm_head", span, output="logits")
        if logits is not None:
            return logits
        matrix = initializers.transposed_projection(
            "lm_head", self.weights, f"{module}.weight", self.dtype
        )
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
        sharing = [f"{expert}.{name}" for expert in experts for name in ("gate_proj", "up_proj")]
        flat = self.quantized.rounded(flat, sharing, "mlp.experts")
        mixed = self._mixed_experts(layer, [flat, expert_ids, routing_weights], experts)
        shape = build.node("Shape", [normed], "mlp.shape")
        return build.node("Reshape", [mixed, shape], "mlp.routed")

    def _mixed_experts(self, layer: int, inputs: list[str], experts: list[str]) -> str:
        """Weighted sum of the routed experts [N, D]; inputs as of RingExperts."""
        build, label = self.builder, f"layers.{layer}.mlp.experts"
        top_k = self.config.num_experts_per_tok
        mixed = self.quantized.experts(inputs, experts, "mlp.experts", top_k)
        if mixed is not None:
            return mixed
        matrices = self.quantized.expert_weights(experts, "mlp.experts")
        if matrices is None:
            gate_up = initializers.stacked_gate_up_projections(
                f"{label}.gate_up_proj", self.weights, experts, self.dtype
            )
            down = initializers.stacked_down_projections(
                f"{label}.down_proj", self.weights, experts, self.dtype
            )
            matrices = [build.weight(gate_up), build.weight(down)]
        attributes = {"num_experts": self.config.num_experts, "top_k": top_k}
        return build.contract(EXPERTS, [*inputs, *matrices], attributes, "mlp.experts")[0]

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
            f"{prefix}.weight",
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

    def _query_key_value(
        self, layer: int, normed: str, heads: tuple[int, int], step: Step
    ) -> tuple[str, str, str]:
        """Project to query and key, both normed per head and rotated, and value.

        Each has a matrix of its own: one joined product would have to be split again, which costs
        a copy of every activation.

        Args:
            layer: 0-based.
            normed: [B, T, D].
            heads: number of query heads, and of key and value heads.
            step: shared values.
        """
        dim = self.config.head_dim
        ends = np.cumsum([0, heads[0] * dim, heads[1] * dim, heads[1] * dim]).tolist()
        parts = []
        for name, rows in zip(("query", "key", "value"), pairwise(ends), strict=True):
            label = f"attention.{name}_proj"
            part = self._project(normed, layer, "attention.query_key_value", label, rows=rows)
            if self.config.linear_silu and self.config.is_linear_layer(layer):
                part = self._silu(part, f"attention.{name}_silu")
            parts.append(part)
        query = self._normed_and_rotated(layer, parts[0], "query", heads[0], step)
        key = self._normed_and_rotated(layer, parts[1], "key", heads[1], step)
        return query, key, parts[2]

    def _normed_and_rotated(self, layer: int, value: str, kind: str, heads: int, step: Step) -> str:
        """RMS norm of every head of a query or key [B, T, heads * K], then partial rotary."""
        build, dim = self.builder, self.config.head_dim
        # Always in fp32: bf16 tables lose the phase of far positions.
        value = self._cast(value, ComputeDtype.FP32, f"{kind}_float")
        split = build.node("Reshape", [value, build.ints(0, 0, heads, dim)], f"{kind}_heads")
        weight = initializers.vector(
            f"layers.{layer}.attention.{kind}_norm.weight",
            self.weights,
            f"model.layers.{layer}.attention.{kind}_layernorm.weight",
            ComputeDtype.FP32,
        )
        normed = self._normalize(split, build.weight(weight), f"{kind}_norm", None)
        flat = build.node("Reshape", [normed, build.ints(0, 0, heads * dim)], f"{kind}_flat")
        rotated = build.node(
            "RotaryEmbedding",
            [flat, step.cos, step.sin],
            f"{kind}_rotary",
            num_heads=heads,
            rotary_embedding_dim=self.config.rotary_dim,
            interleaved=0,
        )
        return self._cast(rotated, self.dtype, f"{kind}_cast")

    def _group_norm_gate(self, layer: int, attended: str, output_gate: str) -> str:
        """RMS norm over groups of heads, times the weight, times the sigmoid of the gate."""
        build, config = self.builder, self.config
        groups, dim = config.num_norm_groups, config.linear_dim
        width = dim // groups
        split = build.node("Reshape", [attended, build.ints(0, 0, groups, width)], "groups")
        # The weight differs from group to group, which the op cannot express: it follows below.
        ones = build.constant(np.ones(width, dtype=self.dtype.numpy), "ones")
        normed = self._normalize(split, ones, "group_norm", None)
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
        gate, up = (
            self._project(normed, layer, f"{prefix}.{name}", f"{prefix}.{name}")
            for name in ("gate_proj", "up_proj")
        )
        product = self.builder.node(
            "Mul", [self._silu(gate, f"{prefix}.silu"), up], f"{prefix}.mul"
        )
        return self._project(product, layer, f"{prefix}.down_proj", f"{prefix}.down_proj")

    def _project(
        self,
        value: str,
        layer: int,
        module: str,
        label: str,
        *,
        rows: tuple[int, int] | None = None,
    ) -> str:
        """Multiply by the matrix of a checkpoint module of a layer, or by some rows of it."""
        name = f"model.layers.{layer}.{module}"
        span = rows or (0, self.weights.info(f"{name}.weight").shape[0])
        quantized = self.quantized.projection(value, name, label, span)
        if quantized is not None:
            return quantized
        value = self.quantized.rounded(value, [name], label)
        matrix = initializers.transposed_projection(
            self.builder.scoped(label), self.weights, f"{name}.weight", self.dtype, rows=span
        )
        return self.builder.node("MatMul", [value, self.builder.weight(matrix)], f"{label}.matmul")

    def _norm(self, value: str, source: str, label: str, *, value_name: str | None = None) -> str:
        scale = initializers.vector(
            self.builder.name(f"{label}.weight"), self.weights, source, self.dtype
        )
        return self._normalize(value, self.builder.weight(scale), label, value_name)

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

    def _cast(self, value: str, dtype: ComputeDtype, label: str) -> str:
        if self.dtype is ComputeDtype.FP32:
            return value
        return self.builder.node("Cast", [value], label, to=dtype.onnx)
