"""The keys of config.json: which must be there, which may be, and the range of each value."""

from collections.abc import Mapping
from typing import Any

from ringexport.checkpoint.fields import Fields
from ringexport.checkpoint.quantization import read_quantization
from ringexport.checkpoint.refusals import FIXED_VALUES
from ringexport.checkpoint.rope import MAX_CONTEXT_TOKENS, YarnConfig

__all__ = ["KNOWN_KEYS", "REQUIRED_KEYS", "read_fields"]

_MAX_WIDTH = 1 << 20
# Key in config.json -> (field, smallest, largest). The limits are far beyond any published model;
# they keep a damaged file from asking for terabytes.
_INTEGERS: Mapping[str, tuple[str, int, int]] = {
    "first_k_dense_replace": ("first_k_dense_replace", 0, 1024),
    "group_norm_size": ("num_norm_groups", 1, _MAX_WIDTH),
    "head_dim": ("head_dim", 2, 4096),
    "hidden_size": ("hidden_size", 1, _MAX_WIDTH),
    "intermediate_size": ("intermediate_size", 1, _MAX_WIDTH),
    "layer_group_size": ("layer_group_size", 1, 1024),
    "max_position_embeddings": ("max_position_embeddings", 1, MAX_CONTEXT_TOKENS),
    "moe_intermediate_size": ("moe_intermediate_size", 1, _MAX_WIDTH),
    "n_group": ("n_group", 1, 8192),
    "num_attention_heads": ("num_attention_heads", 1, 4096),
    "num_experts": ("num_experts", 1, 8192),
    "num_experts_per_tok": ("num_experts_per_tok", 1, 8192),
    "num_hidden_layers": ("num_hidden_layers", 1, 1024),
    "num_key_value_heads": ("num_key_value_heads", 1, 4096),
    "num_shared_experts": ("num_shared_experts", 1, 64),
    "topk_group": ("topk_group", 1, 8192),
    "vocab_size": ("vocab_size", 1, 1 << 24),
}
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (10.0, 1e12),
    "routed_scaling_factor": (1e-3, 1e3),
}
REQUIRED_KEYS: tuple[str | tuple[str, ...], ...] = (
    *_INTEGERS,
    *_NUMBERS,
    "eos_token_id",
    "moe_router_enable_expert_bias",
    "norm_topk_prob",
    "tie_word_embeddings",
    ("linear_silu", "use_linear_silu"),
    ("partial_rotary_factor", "rotary_dim"),
    ("torch_dtype", "dtype"),
)
# Keys that cannot change what the model computes at inference.
_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "embedding_dropout",
        "initializer_range",
        "linear_backend",
        "max_window_layers",
        "mtp_loss_scaling_factor",
        "output_dropout",
        "output_router_logits",
        "pretraining_tp",
        "router_aux_loss_coef",
        "transformers_version",
        "use_cache",
    }
)
KNOWN_KEYS = (
    {name for names in REQUIRED_KEYS for name in ((names,) if isinstance(names, str) else names)}
    | FIXED_VALUES.keys()
    | _HARMLESS
    | {
        "architectures",
        "model_type",
        "moe_shared_expert_intermediate_size",
        "num_nextn_predict_layers",
        "pad_token_id",
        "quantization",
        "quantization_config",
        "kv_lora_rank",
        "q_lora_rank",
        "rope_scaling",
        "short_conv_kernel_size",
    }
)


def read_fields(fields: Fields, source: str) -> dict[str, Any]:
    """Return the arguments of RingConfig, each checked by itself."""
    values: dict[str, Any] = {
        field: fields.integer(key, low, high) for key, (field, low, high) in _INTEGERS.items()
    }
    values |= {key: fields.number(key, low, high) for key, (low, high) in _NUMBERS.items()}
    values |= {key: fields.flag(key) for key in ("norm_topk_prob", "tie_word_embeddings")}
    values["expert_bias"] = fields.flag("moe_router_enable_expert_bias")
    # The engines of the model's authors let the more specific key win.
    silu_key = "use_linear_silu" if "use_linear_silu" in fields else "linear_silu"
    values["linear_silu"] = fields.flag(silu_key)
    values["rotary_dim"] = _read_rotary_dim(fields, values["head_dim"])
    shared_key = "moe_shared_expert_intermediate_size"
    values[shared_key] = (
        fields.integer(shared_key, 1, _MAX_WIDTH)
        if fields.raw(shared_key) is not None
        else values["moe_intermediate_size"]
    )
    values["rope_scaling"] = _read_rope_scaling(fields, source)
    values["eos_token_ids"] = _read_eos(fields, values["vocab_size"])
    values["pad_token_id"] = (
        fields.integer("pad_token_id", 0, values["vocab_size"] - 1)
        if fields.raw("pad_token_id") is not None
        else values["eos_token_ids"][0]
    )
    stored = fields.raw("quantization_config")
    if stored is not None:
        values["quantization"] = read_quantization(stored, f"{source}: quantization_config")
    dtype_key = "dtype" if "dtype" in fields else "torch_dtype"
    values["torch_dtype"] = fields.choice(dtype_key, ("bfloat16", "float16", "float32"))
    return values


def _read_rotary_dim(fields: Fields, head_dim: int) -> int:
    expected = f"an even number of rotated dimensions from 2 to head_dim {head_dim}"
    if fields.raw("rotary_dim") is not None:
        rotary_dim = fields.integer("rotary_dim", 2, head_dim)
        if rotary_dim % 2:
            raise fields.bad("rotary_dim", expected)
        return rotary_dim
    rotated = head_dim * fields.number("partial_rotary_factor", 1e-6, 1.0)
    if rotated % 2 or rotated == 0:
        raise fields.bad("partial_rotary_factor", expected)
    return int(rotated)


def _read_rope_scaling(fields: Fields, source: str) -> YarnConfig | None:
    scaling = fields.raw("rope_scaling")
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise fields.bad("rope_scaling", "null or an object")
    return YarnConfig.from_dict(scaling, source=f"{source}: rope_scaling")


def _read_eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw("eos_token_id")
    if not isinstance(value, list):
        return (fields.integer("eos_token_id", 0, vocab_size - 1),)
    good = all(type(item) is int and 0 <= item < vocab_size for item in value)
    if not value or not good:
        raise fields.bad("eos_token_id", f"token ids from 0 to {vocab_size - 1}")
    return tuple(value)
