"""The memory that an engine will take, known before it takes any."""

from typing import Any, Protocol

import torch

from ringexport.kernels.library import DType, ScaleKind
from ringexport.ops.quantization import NumberFormat
from ringexport.runtime.backends.cuda.graphs import BATCH_BUCKETS, bucket_of
from ringexport.runtime.backends.cuda.state import MemoryPlan, StatePool
from ringexport.runtime.backends.cuda.weights import DeviceMatrix, DeviceWeights

__all__ = ["LOGIT_ROWS", "Sizes", "WorkspaceSource", "plan_memory"]

_LIBRARIES = 900_000_000
"""Code of the kernels that get loaded, workspaces of cuBLAS and cuDNN, and what torch's allocator
holds between tensors: 0.65 to 0.9 GB, measured on one H200."""
LOGIT_ROWS = 64
"""Rows of a prompt whose logits are computed at once."""
_POINTER = 256
"""Any address: says that a tensor will be there."""


class Sizes(Protocol):
    """What of the options decides how much memory is needed."""

    @property
    def max_batch(self) -> int:
        """Sequences whose state fits at a time."""

    @property
    def prefill_chunk(self) -> int:
        """Tokens per row that are computed at once."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens of all rows that are computed at once."""


class WorkspaceSource(Protocol):
    """Knows the workspaces of kernels, as `KernelLibrary` does."""

    def workspace_bytes(self, op: str, **fields: Any) -> int:
        """Return the bytes of the workspace of an op."""


def plan_memory(
    weights: DeviceWeights,
    library: WorkspaceSource,
    options: Sizes,
    *,
    capacity: int,
    cache_dtype: torch.dtype,
) -> MemoryPlan:
    """Add up what an engine takes at its largest step.

    Args:
        weights: loaded.
        library: asked for the workspaces of the kernels.
        options: numbers of rows and tokens.
        capacity: tokens of a sequence.
        cache_dtype: of the KV cache.
    """
    config, rows = weights.config, options.max_batch
    recurrent, cache = StatePool.bytes_per_slot(config, capacity, cache_dtype)
    tokens = min(options.prefill_tokens, rows * min(options.prefill_chunk, capacity))
    workspace = _kernel_workspaces(weights, library, tokens, rows) + _LIBRARIES
    workspace += tokens * _activation_bytes(weights)
    workspace += capacity * config.rotary_dim * 4  # cos and sin of half of them in fp32
    if cache_dtype == torch.float8_e4m3fn:  # a prompt attends to a copy in bf16
        workspace += 2 * capacity * config.kv_dim * torch.bfloat16.itemsize
    # A step of each bucket keeps its logits; those of prompts are computed a few rows at a time.
    logit_rows = 2 * bucket_of(min(rows, BATCH_BUCKETS[-1]), BATCH_BUCKETS) + LOGIT_ROWS
    return MemoryPlan(
        weights=weights.nbytes,
        recurrent_state=recurrent * rows,
        kv_cache=cache * rows,
        workspace=workspace + logit_rows * config.vocab_size * 4,
        slots=rows,
        capacity=capacity,
    )


def _activation_bytes(weights: DeviceWeights) -> int:
    """Return the bytes a token of a prompt takes where a layer holds most, before its experts."""
    config = weights.config
    source = weights.matrix(f"layers.{config.linear_layers[0]}.attention.input")
    width, hidden, mixed = config.linear_dim, config.hidden_size, len(source.values)
    code = source.values.element_size()
    held = 4 * hidden + 2 * mixed + (2 + code) * width + 2 * hidden
    held += (2 + 2 * code) * hidden  # normed for the experts, and before for the attention
    if source.format.number_format is NumberFormat.INT8:
        return max(held, 4 * hidden + code * hidden + (2 + 4 + 4) * mixed)
    return held


def _kernel_workspaces(
    weights: DeviceWeights, library: WorkspaceSource, tokens: int, rows: int
) -> int:
    """Return the bytes of the workspaces, each as large as its largest call."""
    config = weights.config
    sizes = {
        tokens,
        *(bucket for bucket in BATCH_BUCKETS if bucket <= bucket_of(rows, BATCH_BUCKETS)),
    }
    layers = {config.is_moe_layer(layer): layer for layer in range(config.num_hidden_layers)}
    experts = [
        library.workspace_bytes("experts", **_experts(weights, layer, size))
        for layer in layers.values()
        for size in sizes
    ]
    router = [
        library.workspace_bytes(
            "router",
            tokens=size,
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
        )
        for size in sizes
    ]
    prefill = library.workspace_bytes(
        "linear_attention_prefill",
        batch=rows,
        max_length=tokens,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        dtype=DType.BFLOAT16,
    )
    return max(experts) + max(router) + prefill


def _experts(weights: DeviceWeights, layer: int, tokens: int) -> dict[str, Any]:
    """Return the fields that decide the workspace of the experts of a layer."""
    config, prefix = weights.config, f"layers.{layer}."
    gate_up: DeviceMatrix = weights.matrix(prefix + "experts.gate_up")
    down = weights.matrix(prefix + "experts.down")
    moe = config.is_moe_layer(layer)
    fields: dict[str, Any] = {
        "tokens": tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": down.values.shape[-1],
        "num_experts": len(gate_up.values),
        "top_k": config.num_experts_per_tok if moe else 1,
        "dtype": DType.BFLOAT16,
        "weight_dtype": gate_up.dtype,
        "output_dtype": DType.FLOAT32,
        "scale_kind": gate_up.scale_kind,
        "accumulate": 1,
    }
    if moe:
        fields |= {"shared_gate_up": _POINTER, "shared_down": _POINTER}
        fields["shared_intermediate_size"] = config.shared_intermediate_size
    if gate_up.scale_kind != ScaleKind.NONE:
        fields |= {"quantized_hidden": _POINTER, "hidden_scale": _POINTER}
    return fields
