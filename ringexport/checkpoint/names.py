"""The table of all tensors that a checkpoint holds: names, shapes, and what each is for."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ringexport.checkpoint.config import RingConfig

__all__ = ["TensorKind", "TensorSpec", "expected_tensors"]


class TensorKind(StrEnum):
    """What a tensor is for; `summary` adds bytes up by kind."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    NORM = "norm"
    LINEAR_ATTENTION = "linear_attention"
    SOFTMAX_ATTENTION = "softmax_attention"
    DENSE_MLP = "dense_mlp"
    ROUTER = "router"
    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the config says about one tensor.

    Attributes:
        shape: sizes, [out, in] for matrices.
        kind: what the tensor is for.
    """

    shape: tuple[int, ...]
    kind: TensorKind


def expected_tensors(config: RingConfig) -> dict[str, TensorSpec]:
    """Return name -> spec of every tensor, in the order in which the model uses them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    specs = {"model.word_embeddings.weight": TensorSpec(vocabulary, TensorKind.EMBEDDING)}
    for layer in range(config.num_hidden_layers):
        specs.update(_layer(config, layer))
    specs["model.norm.weight"] = TensorSpec((config.hidden_size,), TensorKind.NORM)
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = TensorSpec(vocabulary, TensorKind.LM_HEAD)
    return specs


def _layer(config: RingConfig, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    prefix = f"model.layers.{layer}."
    norm = TensorSpec((config.hidden_size,), TensorKind.NORM)
    yield prefix + "input_layernorm.weight", norm
    yield from _attention(config, layer, prefix + "attention.")
    yield prefix + "post_attention_layernorm.weight", norm
    if config.is_moe_layer(layer):
        yield from _moe(config, prefix + "mlp.")
    else:
        yield from _swiglu(config, prefix + "mlp.", config.intermediate_size, TensorKind.DENSE_MLP)


def _attention(config: RingConfig, layer: int, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    linear = config.is_linear_layer(layer)
    kind = TensorKind.LINEAR_ATTENTION if linear else TensorKind.SOFTMAX_ATTENTION
    hidden, width = config.hidden_size, config.linear_dim
    head_norm = TensorSpec((config.head_dim,), TensorKind.NORM)
    yield prefix + "query_key_value.weight", TensorSpec((config.qkv_rows(layer), hidden), kind)
    yield prefix + "query_layernorm.weight", head_norm
    yield prefix + "key_layernorm.weight", head_norm
    if linear:
        yield prefix + "g_proj.weight", TensorSpec((width, hidden), kind)
        yield prefix + "g_norm.weight", TensorSpec((width,), TensorKind.NORM)
    yield prefix + "dense.weight", TensorSpec((hidden, width), kind)


def _moe(config: RingConfig, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    router = (config.num_experts, config.hidden_size)
    yield prefix + "gate.weight", TensorSpec(router, TensorKind.ROUTER)
    if config.expert_bias:
        yield prefix + "gate.expert_bias", TensorSpec((config.num_experts,), TensorKind.ROUTER)
    experts = tuple(_swiglu(config, "", config.moe_intermediate_size, TensorKind.ROUTED_EXPERTS))
    for expert in range(config.num_experts):
        for name, spec in experts:
            yield f"{prefix}experts.{expert}.{name}", spec
    yield from _swiglu(
        config,
        prefix + "shared_experts.",
        config.shared_intermediate_size,
        TensorKind.SHARED_EXPERTS,
    )


def _swiglu(
    config: RingConfig, prefix: str, width: int, kind: TensorKind
) -> Iterator[tuple[str, TensorSpec]]:
    up = TensorSpec((width, config.hidden_size), kind)
    yield prefix + "gate_proj.weight", up
    yield prefix + "up_proj.weight", up
    yield prefix + "down_proj.weight", TensorSpec((config.hidden_size, width), kind)
