"""The layers of the model as kernel launches; the order of launches is the order on the GPU.

Few rows (decode at small batch): six kernels a layer, norms and quantization inside the products.
Many rows: norms and quantization are kernels of their own, products are those of cuBLASLt.
The residual stream is fp32 [N, D] and updated in place; activations are bf16.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringexport.checkpoint import RingConfig
from ringexport.errors import ShapeError
from ringexport.kernels.library import DType, Prologue
from ringexport.runtime.backends.cuda.kernels import Activations, Kernels, Rotary
from ringexport.runtime.backends.cuda.prefill_attention import attend
from ringexport.runtime.backends.cuda.products import product
from ringexport.runtime.backends.cuda.state import StatePool
from ringexport.runtime.backends.cuda.weights import DeviceMatrix, DeviceWeights

__all__ = ["Crossovers", "Network", "PackedRows"]

_MAX_TOKENS = 1 << 17
"""Tokens of one call; a dense MLP is a layer of one expert that all of them choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossovers:
    """Up to how many rows a way to compute is used; measured on one H200.

    Attributes:
        fused: norms inside products, computed redundantly in every block.
        skinny_8bit: the memory-bound product of plugins/ for 8-bit weights instead of cuBLASLt.
        skinny_bf16: the same for bf16 weights.
    """

    fused: int = 1
    skinny_8bit: int = 8
    skinny_bf16: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Where the tokens of one call belong.

    Attributes:
        slots: [B] int32 slot of each row, < 0 for padding.
        position: [B] int32 tokens each row has seen.
        token_slots: [N] int32 slot of each token, prefill only.
        token_position: [N] int32 position of each token, prefill only.
        starts: [B] int32 first token of each row, prefill only.
        lengths: [B] int32 tokens of each row, prefill only.
        host_rows: (slot, position, start, length) of each row on the host, prefill only.
        last_only: only the last token of each row has to leave the last layer, prefill only.
        max_context: upper bound of position + 1.
    """

    slots: Tensor
    position: Tensor
    max_context: int
    token_slots: Tensor | None = None
    token_position: Tensor | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    host_rows: tuple[tuple[int, int, int, int], ...] = ()
    last_only: bool = False

    @property
    def last_tokens(self) -> Tensor:
        """Index [B] int64 of the last token of each row, prefill only."""
        assert self.starts is not None
        assert self.lengths is not None
        return (self.starts + self.lengths - 1).long()


class Network:
    """Launches one step of the model on the current stream; knows no batch of its own."""

    def __init__(
        self,
        weights: DeviceWeights,
        kernels: Kernels,
        pool: StatePool,
        rotary: Rotary,
        crossovers: Crossovers | None = None,
    ) -> None:
        self.config: RingConfig = weights.config
        self._weights = weights
        self._kernels = kernels
        self._pool = pool
        self._rotary = rotary
        self._crossovers = crossovers or Crossovers()
        device = weights["embedding"].device
        self._only_expert = torch.zeros((_MAX_TOKENS, 1), dtype=torch.int32, device=device)
        self._full_weight = torch.ones((_MAX_TOKENS, 1), device=device)
        self.expert_ids: dict[int, Tensor] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [N, D] fp32 of tokens [N] int64.

        Raises:
            ShapeError: more tokens than one call takes.
        """
        if len(tokens) > _MAX_TOKENS:
            raise ShapeError(
                f"{len(tokens):,} tokens were given to one call, expected at most {_MAX_TOKENS:,}",
                hint="lower prefill_chunk or prefill_tokens of CudaOptions",
            )
        table = self._weights["embedding"]
        residual = torch.empty((len(tokens), table.shape[1]), device=table.device)
        self._kernels.launch(
            "embed",
            tokens=tokens,
            table=table,
            residual=residual,
            rows=len(tokens),
            columns=table.shape[1],
            vocab_size=len(table),
            dtype=DType.BFLOAT16,
        )
        return residual

    def logits(self, residual: Tensor, out: Tensor) -> None:
        """Write logits [N, vocab] fp32 of the residual stream."""
        head, norm = self._weights.matrix("lm_head"), self._weights["final_norm"]
        if len(residual) <= self._crossovers.fused:
            fused: dict[str, Any] = {"prologue": Prologue.RMS_NORM, "norm_weight": norm}
            self._kernels.project(Activations(residual), head, out, **fused)
            return
        source = self._kernels.rms_norm(residual, norm, matrix=head)
        if self._is_skinny(head, len(residual)):
            self._kernels.project(source, head, out)
        else:
            product(source, head, out)

    def choose(self, logits: Tensor, tokens: Tensor, **parameters: Tensor) -> None:
        """Write a token for each row of logits [N, vocab] to `tokens` [N] int64.

        Args:
            logits: fp32.
            tokens: written.
            parameters: of the sample kernel, [N] each; without any the choice is greedy.
        """
        self._kernels.launch(
            "sample",
            logits=logits,
            tokens=tokens,
            row_stride=logits.stride(0),
            rows=len(logits),
            vocab_size=logits.shape[1],
            **parameters,
        )

    def run(self, residual: Tensor, rows: PackedRows) -> None:
        """Run all layers on the residual stream in place."""
        for layer in range(self.config.num_hidden_layers):
            if len(residual) <= self._crossovers.fused and rows.starts is None:
                self._fused_layer(layer, residual, rows)
            elif rows.last_only and layer == self.config.num_hidden_layers - 1:
                self._last_layer(layer, residual, rows)
            else:
                self._layer(layer, residual, rows)

    def _matrix(self, layer: int, name: str) -> DeviceMatrix:
        return self._weights.matrix(f"layers.{layer}.{name}")

    def _vector(self, layer: int, name: str) -> Tensor:
        return self._weights[f"layers.{layer}.{name}"]

    def _fused_layer(self, layer: int, residual: Tensor, rows: PackedRows) -> None:
        config, kernels = self.config, self._kernels
        source, target = (self._matrix(layer, f"attention.{io}") for io in ("input", "output"))
        mixed = torch.empty(
            (len(residual), len(source.values)), dtype=torch.bfloat16, device=residual.device
        )
        norm: dict[str, Any] = {
            "prologue": Prologue.RMS_NORM,
            "norm_weight": self._vector(layer, "input_norm"),
        }
        kernels.project(Activations(residual), source, mixed, **norm)
        output = self._decode_attention(layer, mixed, rows)
        gated: dict[str, Any] = {}
        if config.is_linear_layer(layer):
            gate = mixed[:, -config.linear_dim :]
            gated = {
                "prologue": Prologue.GROUP_NORM_GATE,
                "norm_weight": self._vector(layer, "attention.output_norm"),
                "gate": gate,
                "gate_row_stride": gate.stride(0),
                "num_norm_groups": config.num_norm_groups,
            }
        kernels.project(Activations(output), target, residual, accumulate=True, **gated)
        self._experts(layer, residual, Activations(residual), fused=True)

    def _layer(self, layer: int, residual: Tensor, rows: PackedRows) -> None:
        mixed = self._mixed(layer, residual)
        decode = rows.starts is None
        attend = self._decode_attention if decode else self._prefill_attention
        self._after_attention(layer, residual, mixed, attend(layer, mixed, rows))

    def _last_layer(self, layer: int, residual: Tensor, rows: PackedRows) -> None:
        """Run a layer that has to update its state with all tokens but to output only a few."""
        wanted = rows.last_tokens
        mixed = self._mixed(layer, residual)
        output = self._prefill_attention(layer, mixed, rows, last_only=True)
        some = residual[wanted]
        self._after_attention(layer, some, mixed[wanted], output)
        residual[wanted] = some

    def _mixed(self, layer: int, residual: Tensor) -> Tensor:
        """Return queries, keys, values (and gates) [N, ...] of a layer."""
        source = self._matrix(layer, "attention.input")
        norm = self._vector(layer, "input_norm")
        return self._product(self._kernels.rms_norm(residual, norm, matrix=source), source)

    def _after_attention(self, layer: int, residual: Tensor, mixed: Tensor, output: Tensor) -> None:
        """Add the rest of a layer to the residual."""
        config, kernels = self.config, self._kernels
        target = self._matrix(layer, "attention.output")
        if config.is_linear_layer(layer):
            gate, weight = (
                mixed[:, -config.linear_dim :],
                self._vector(layer, "attention.output_norm"),
            )
            gated = kernels.group_norm_gate(output, gate, weight, config.num_norm_groups, target)
        else:
            gated = kernels.quantize(output, target)
        delta = None
        if self._is_skinny(target, len(residual)):
            kernels.project(gated, target, residual, accumulate=True)
        else:
            delta = self._product(gated, target)
        normed = kernels.rms_norm(
            residual,
            self._vector(layer, "mlp_norm"),
            matrix=self._matrix(layer, "experts.gate_up"),
            delta=delta,
            keep_values=True,
        )
        self._experts(layer, residual, normed, fused=False)

    def _is_skinny(self, matrix: DeviceMatrix, rows: int) -> bool:
        plain = matrix.format.number_format is None
        limit = self._crossovers.skinny_bf16 if plain else self._crossovers.skinny_8bit
        return rows <= limit

    def _product(self, source: Activations, matrix: DeviceMatrix) -> Tensor:
        """Return source x matrix^T in bf16."""
        values = source.codes if source.codes is not None else source.values
        assert values is not None
        shape = (len(values), len(matrix.values))
        out = torch.empty(shape, dtype=torch.bfloat16, device=values.device)
        if self._is_skinny(matrix, len(values)):
            self._kernels.project(source, matrix, out)
        else:
            product(source, matrix, out)
        return out

    def _decode_attention(self, layer: int, mixed: Tensor, rows: PackedRows) -> Tensor:
        """Attend with one new token a row; `mixed` [B, q + k + v (+ gate)] is not normed yet."""
        config = self.config
        output = mixed.new_empty((len(mixed), config.linear_dim))
        size, pool = mixed.element_size(), self._pool
        query = mixed.data_ptr()
        linear = config.is_linear_layer(layer)
        width = config.linear_dim if linear else config.kv_dim
        key = query + config.linear_dim * size
        shared: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": key + width * size,
            "query_norm": self._vector(layer, "attention.query_norm"),
            "key_norm": self._vector(layer, "attention.key_norm"),
            "rotary_cos": self._rotary.cos,
            "rotary_sin": self._rotary.sin,
            "rotary_dim": self._rotary.dim,
            "position": rows.position,
            "slots": rows.slots,
            "output": output,
            "row_stride": mixed.stride(0),
            "output_row_stride": output.stride(0),
            "batch": len(mixed),
            "num_heads": config.num_attention_heads,
            "head_dim": config.head_dim,
            "norm_eps": config.rms_norm_eps,
            "dtype": DType.BFLOAT16,
        }
        if linear:
            self._kernels.launch(
                "linear_attention_decode",
                **shared,
                log_decay=self._vector(layer, "attention.log_decay"),
                state=pool.recurrent_state[layer],
                silu=int(config.linear_silu),
                query_scale=config.softmax_scale,
                state_settled=1,  # written by the step before
            )
            return output
        self._kernels.launch(
            "attention_decode",
            **shared,
            **pool.cache_fields(layer, self._vector(layer, "attention.kv_scale")),
            max_context=min(rows.max_context, pool.capacity),
            num_kv_heads=config.num_key_value_heads,
            softmax_scale=config.softmax_scale,
            cache_settled=1,  # written by the steps before
        )
        return output

    def _prefill_attention(
        self, layer: int, mixed: Tensor, rows: PackedRows, *, last_only: bool = False
    ) -> Tensor:
        """Attend with all new tokens; returns [N, H * K], or [B, H * K] of the last of each row."""
        config, pool = self.config, self._pool
        linear = config.is_linear_layer(layer)
        heads = config.num_attention_heads
        kv_heads = heads if linear else config.num_key_value_heads
        size, query = mixed.element_size(), mixed.data_ptr()
        key = query + config.linear_dim * size
        value = key + kv_heads * config.head_dim * size
        cache = {}
        if not linear:
            cache = pool.cache_fields(layer, self._vector(layer, "attention.kv_scale"))
            cache |= {"value": value, "slots": rows.token_slots}
        self._kernels.launch(
            "qk_norm_rotary",
            query=query,
            key=key,
            query_norm=self._vector(layer, "attention.query_norm"),
            key_norm=self._vector(layer, "attention.key_norm"),
            rotary_cos=self._rotary.cos,
            rotary_sin=self._rotary.sin,
            position=rows.token_position,
            row_stride=mixed.stride(0),
            tokens=len(mixed),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim,
            rotary_dim=self._rotary.dim,
            silu=int(linear and config.linear_silu),
            norm_eps=config.rms_norm_eps,
            dtype=DType.BFLOAT16,
            **cache,
        )
        if not linear:
            return self._cached_attention(layer, mixed, rows, last_only=last_only)
        if config.linear_silu:
            part = mixed[:, 2 * config.linear_dim : 3 * config.linear_dim]
            part.copy_(torch.nn.functional.silu(part))
        output = mixed.new_empty((len(mixed), config.linear_dim))
        self._kernels.launch(
            "linear_attention_prefill",
            query=query,
            key=key,
            value=value,
            log_decay=self._vector(layer, "attention.log_decay"),
            state=pool.recurrent_state[layer],
            slots=rows.slots,
            starts=rows.starts,
            lengths=rows.lengths,
            output=output,
            row_stride=mixed.stride(0),
            output_row_stride=output.stride(0),
            batch=len(rows.slots),
            max_length=max(length for *_, length in rows.host_rows),
            num_heads=heads,
            head_dim=config.head_dim,
            query_scale=config.softmax_scale,
            dtype=DType.BFLOAT16,
        )
        return output[rows.last_tokens] if last_only else output

    def _cached_attention(
        self, layer: int, mixed: Tensor, rows: PackedRows, *, last_only: bool
    ) -> Tensor:
        """Attend to cached and new tokens of each row; returns [N, H * K] or [B, H * K]."""
        config, parts = self.config, []
        shape = (len(mixed), config.num_attention_heads, config.head_dim)
        queries = mixed[:, : config.linear_dim].view(shape)
        scale = self._vector(layer, "attention.kv_scale")
        for slot, position, start, length in rows.host_rows:
            keys, values = self._pool.cached(layer, slot, position + length, scale)
            skipped = length - 1 if last_only else 0
            some = queries[start + skipped : start + length]
            parts.append(attend(some, keys, values, position + skipped, config.softmax_scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _experts(self, layer: int, residual: Tensor, source: Activations, *, fused: bool) -> None:
        """Add the MLP of a layer to the residual; `source` is the normed input, or the residual."""
        config, count = self.config, len(residual)
        moe = config.is_moe_layer(layer)
        assert source.values is not None
        norm: dict[str, Tensor] = {"norm_weight": self._vector(layer, "mlp_norm")} if fused else {}
        if moe:
            expert_ids, routing_weights = self._route(layer, source.values, norm)
        else:
            expert_ids, routing_weights = self._only_expert[:count], self._full_weight[:count]
        gate_up, down = (self._matrix(layer, f"experts.{name}") for name in ("gate_up", "down"))
        fields: dict[str, Any] = norm | _matrix_fields("gate_up_proj", "gate_up_scale", gate_up)
        fields |= _matrix_fields("down_proj", "down_scale", down)
        if moe:
            shared = [self._matrix(layer, f"shared.{name}") for name in ("gate_up", "down")]
            fields |= _matrix_fields("shared_gate_up", "shared_gate_up_scale", shared[0])
            fields |= _matrix_fields("shared_down", "shared_down_scale", shared[1])
            fields["shared_intermediate_size"] = shared[1].values.shape[1]
        if source.codes is not None:
            fields |= {"quantized_hidden": source.codes, "hidden_scale": source.scale}
        self._kernels.launch(
            "experts",
            **fields,
            hidden=source.values,
            expert_ids=expert_ids,
            routing_weights=routing_weights,
            output=residual,
            tokens=count,
            hidden_size=config.hidden_size,
            intermediate_size=down.values.shape[2],
            num_experts=len(gate_up.values),
            top_k=expert_ids.shape[1],
            norm_eps=config.rms_norm_eps,
            dtype=DType.BFLOAT16,
            weight_dtype=gate_up.dtype,
            output_dtype=DType.FLOAT32,
            scale_kind=gate_up.scale_kind,
            accumulate=1,
        )

    def _route(self, layer: int, hidden: Tensor, norm: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        config = self.config
        shape = (len(hidden), config.num_experts_per_tok)
        expert_ids = torch.empty(shape, dtype=torch.int32, device=hidden.device)
        routing_weights = torch.empty(shape, device=hidden.device)
        self.expert_ids[layer] = expert_ids
        self._kernels.launch(
            "router",
            hidden=hidden,
            **norm,
            router_weight=self._vector(layer, "router"),
            expert_bias=self._vector(layer, "router_bias"),
            expert_ids=expert_ids,
            routing_weights=routing_weights,
            tokens=len(hidden),
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalize=int(config.norm_topk_prob),
            routed_scaling_factor=config.routed_scaling_factor,
            norm_eps=config.rms_norm_eps,
            hidden_dtype=DType.FLOAT32 if norm else DType.BFLOAT16,
        )
        return expert_ids, routing_weights


def _matrix_fields(values: str, scale: str, matrix: DeviceMatrix) -> dict[str, Tensor]:
    fields = {values: matrix.values}
    return fields if matrix.scale is None else fields | {scale: matrix.scale}
