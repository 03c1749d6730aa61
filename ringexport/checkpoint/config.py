"""The model's configuration: config.json, read strictly, and every size derived from it.

No value has a default that could change the model: the published configuration class has
defaults that differ from the published models (`routed_scaling_factor` 1.0, `layer_group_size` 1),
so a file that lacks such a key is refused.

Source: inclusionAI Ring-mini-linear-2.0 and Ring-flash-linear-2.0, `config.json` and
`configuration_bailing_moe_linear_v2.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.config_keys import KNOWN_KEYS, REQUIRED_KEYS, read_fields
from ringexport.checkpoint.fields import Fields
from ringexport.checkpoint.quantization import StoredQuantization
from ringexport.checkpoint.refusals import refuse_other_models
from ringexport.checkpoint.rope import YarnConfig, inverse_frequencies
from ringexport.errors import ConfigError
from ringexport.strict_json import read_object

__all__ = ["LayerKind", "RingConfig"]

LayerKind = Literal["linear", "softmax"]
StoredDtype = Literal["bfloat16", "float16", "float32"]

_CONFIG_LIMIT_BYTES = 1 << 20
_MAX_EXPERTS_IN_ALL_LAYERS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """Sizes and constants of one model, checked against each other.

    Attributes are named as in config.json except `num_norm_groups` (there `group_norm_size`),
    `expert_bias` (`moe_router_enable_expert_bias`) and `eos_token_ids`. Sizes are in elements,
    context in tokens.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    expert_bias: bool
    layer_group_size: int
    num_norm_groups: int
    linear_silu: bool
    rms_norm_eps: float
    rotary_dim: int
    rope_theta: float
    rope_scaling: YarnConfig | None
    max_position_embeddings: int
    vocab_size: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    torch_dtype: StoredDtype
    quantization: StoredQuantization | None = None

    @classmethod
    def from_file(cls, path: Path, *, rope_scaling: Mapping[str, Any] | None = None) -> Self:
        """Read a config.json.

        Args:
            path: the file.
            rope_scaling: used instead of the file's value when given, such as
                ``{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072}``.

        Raises:
            ConfigError: unreadable or not JSON, or whatever `from_dict` refuses.
        """
        values = read_object(path, limit_bytes=_CONFIG_LIMIT_BYTES, error=ConfigError)
        if rope_scaling is not None:
            values["rope_scaling"] = dict(rope_scaling)
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """Read the keys of a config.json.

        Args:
            values: parsed JSON; not modified.
            source: what to call it in messages.

        Raises:
            ConfigError: another architecture, a missing or unknown key, a value of the wrong type
                or out of range, or values that contradict each other.
        """
        fields = Fields(values, source)
        refuse_other_models(fields, source)
        fields.refuse_unknown(KNOWN_KEYS)
        fields.require(REQUIRED_KEYS)
        config = cls(**read_fields(fields, source))
        for problem in config._contradictions():
            raise ConfigError(
                f"{source}: {problem}", hint="use the config.json published with the weights"
            )
        return config

    def with_yarn(self, factor: float) -> Self:
        """Return this config with its trained context stretched `factor` times by YaRN.

        Raises:
            ConfigError: a factor below 1 or beyond all sense.
        """
        values = {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.trained_context_length,
        }
        yarn = YarnConfig.from_dict(values, source="rope_scaling")
        return replace(self, rope_scaling=yarn, max_position_embeddings=self.trained_context_length)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Attention kind of each layer."""
        return tuple(
            "linear" if self.is_linear_layer(layer) else "softmax"
            for layer in range(self.num_hidden_layers)
        )

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Indices of the linear-attention layers, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "linear")

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """Indices of the softmax-attention layers, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "softmax")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts, ascending."""
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers))

    def is_linear_layer(self, layer: int) -> bool:
        """Say whether `layer` has linear attention.

        Every `layer_group_size`-th layer is softmax, and so are the layers after the last whole
        group.
        """
        group = self.layer_group_size
        tail = self.num_hidden_layers // group * group
        return (layer + 1) % group != 0 and layer < tail

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether `layer` has experts instead of a dense MLP."""
        return layer >= self.first_k_dense_replace

    @property
    def linear_dim(self) -> int:
        """Width of all query heads; in linear layers also of the keys and of the values."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values, in softmax layers."""
        return self.num_key_value_heads * self.head_dim

    def qkv_rows(self, layer: int) -> int:
        """Return the rows of the fused query_key_value weight, which depend on the layer's kind."""
        kv_dim = self.linear_dim if self.is_linear_layer(layer) else self.kv_dim
        return self.linear_dim + 2 * kv_dim

    @property
    def norm_group_size(self) -> int:
        """Elements per group of the group RMS norm."""
        return self.linear_dim // self.num_norm_groups

    @property
    def shared_intermediate_size(self) -> int:
        """Width of all shared experts together."""
        return self.num_shared_experts * self.moe_shared_expert_intermediate_size

    @property
    def experts_per_group(self) -> int:
        """Experts in each of the router's `n_group` groups."""
        return self.num_experts // self.n_group

    @property
    def softmax_scale(self) -> float:
        """Factor on the query of both kinds of layers, head_dim ** -0.5."""
        return float(self.head_dim**-0.5)

    @property
    def partial_rotary_factor(self) -> float:
        """Rotated share of each head."""
        return self.rotary_dim / self.head_dim

    @property
    def trained_context_length(self) -> int:
        """Context in tokens before YaRN."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.original_max_position_embeddings

    @property
    def context_length(self) -> int:
        """Context in tokens, YaRN included."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.context_length

    @property
    def attention_factor(self) -> float:
        """YaRN's factor on cos and sin, 1.0 without YaRN."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Return the rotary frequencies [rotary_dim / 2], fp64, radians per token, with YaRN."""
        return inverse_frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling)

    @property
    def eos_token_id(self) -> int:
        """The first of `eos_token_ids`; generation_config.json may name more."""
        return self.eos_token_ids[0]

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors of the checkpoint, expert biases included."""
        hidden = self.hidden_size
        linear, softmax = len(self.linear_layers), len(self.softmax_layers)
        moe = len(self.moe_layers)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        norms = hidden + self.num_hidden_layers * (2 * hidden + 2 * self.head_dim)
        linear_layer = hidden * 5 * self.linear_dim + self.linear_dim
        softmax_layer = hidden * 2 * (self.linear_dim + self.kv_dim)
        router = self.num_experts * (hidden + self.expert_bias)
        experts = self.num_experts * self.moe_intermediate_size + self.shared_intermediate_size
        dense = 3 * hidden * self.intermediate_size
        return (
            embeddings
            + norms
            + linear * linear_layer
            + softmax * softmax_layer
            + moe * (router + 3 * hidden * experts)
            + (self.num_hidden_layers - moe) * dense
        )

    def _contradictions(self) -> Iterator[str]:
        """Yield what is wrong between values that are fine alone."""
        yield from self._attention_contradictions()
        yield from self._router_contradictions()
        layers = self.num_hidden_layers
        if self.first_k_dense_replace > layers:
            yield (
                f"first_k_dense_replace {self.first_k_dense_replace} is more than "
                f"num_hidden_layers {layers}"
            )
        if not self.linear_layers:
            yield (
                f"layer_group_size {self.layer_group_size} leaves none of the {layers} layers "
                "linear, expected at least one"
            )

    def _attention_contradictions(self) -> Iterator[str]:
        yarn = self.rope_scaling
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.linear_dim % self.num_norm_groups:
            yield (
                f"num_attention_heads x head_dim = {self.linear_dim} is no multiple of "
                f"group_norm_size {self.num_norm_groups}"
            )
        if yarn and self.max_position_embeddings not in {
            yarn.original_max_position_embeddings,
            yarn.context_length,
        }:
            yield (
                f"max_position_embeddings {self.max_position_embeddings} is neither the trained "
                f"context {yarn.original_max_position_embeddings} nor the stretched one "
                f"{yarn.context_length} of rope_scaling"
            )

    def _router_contradictions(self) -> Iterator[str]:
        selectable = self.topk_group * self.experts_per_group
        in_all_layers = self.num_hidden_layers * self.num_experts
        if in_all_layers > _MAX_EXPERTS_IN_ALL_LAYERS:
            yield (
                f"num_hidden_layers x num_experts = {in_all_layers}, expected at most "
                f"{_MAX_EXPERTS_IN_ALL_LAYERS}"
            )
        if self.num_experts % self.n_group:
            yield f"num_experts {self.num_experts} is no multiple of n_group {self.n_group}"
        if self.experts_per_group < 2:
            yield (
                f"num_experts / n_group is {self.experts_per_group}, expected at least 2, because "
                "the score of a group is the sum of its two best experts"
            )
        if self.topk_group > self.n_group:
            yield f"topk_group {self.topk_group} is more than n_group {self.n_group}"
        if self.num_experts_per_tok > selectable:
            yield (
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {selectable} "
                f"experts of {self.topk_group} groups (topk_group)"
            )
