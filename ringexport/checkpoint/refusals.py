"""Models that look like Ring-linear 2.0 and are not: each is refused by its name."""

from collections.abc import Mapping
from typing import Any

from ringexport.checkpoint.fields import Fields, show
from ringexport.errors import ConfigError

__all__ = ["ARCHITECTURE", "FIXED_VALUES", "MODEL_TYPE", "refuse_other_models"]

ARCHITECTURE = "BailingMoeLinearV2ForCausalLM"
MODEL_TYPE = "bailing_moe_linear"

# Switches of the published code with the one value that is implemented. Absent means that value.
FIXED_VALUES: Mapping[str, Any] = {
    "hidden_act": "silu",
    "linear_rope": True,
    "norm_head": False,
    "norm_softmax": False,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": None,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
_ONLY = "ringexport reads Ring-mini-linear-2.0, Ring-flash-linear-2.0 and models of their layout"
_OTHER_ARCHITECTURES: Mapping[str, str] = {
    "BailingMoeV2_5ForCausalLM": "Ling/Ring 2.5 or 2.6 with multi-head latent attention (MLA)",
    "BailingMoeV3ForCausalLM": "Ling 3.0 with Kimi delta attention (KDA)",
    "BailingMoeV2ForCausalLM": "Ling/Ring 2.0 with softmax attention in every layer",
    "BailingMoeForCausalLM": "Ling 1 with softmax attention in every layer",
}
_MARKER_KEYS: Mapping[str, str] = {
    "short_conv_kernel_size": "a Ling 3.0 model with Kimi delta attention (KDA)",
    "kv_lora_rank": "a Ling/Ring 2.5 model with multi-head latent attention (MLA)",
    "q_lora_rank": "a Ling/Ring 2.5 model with multi-head latent attention (MLA)",
}


def refuse_other_models(fields: Fields, source: str) -> None:
    """Raise ConfigError if the config is of a model that is not implemented; name the model."""
    for key, model in _MARKER_KEYS.items():
        if fields.raw(key) is not None:
            raise ConfigError(
                f"{source} is of {model}: it holds {key} {show(fields.raw(key))}", hint=_ONLY
            )
    architectures = fields.raw("architectures")
    if architectures != [ARCHITECTURE]:
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        other = _OTHER_ARCHITECTURES.get(first) if isinstance(first, str) else None
        raise fields.bad(
            "architectures",
            f"['{ARCHITECTURE}']",
            hint=f"this is {other}; {_ONLY}" if other else _ONLY,
        )
    if fields.raw("model_type") != MODEL_TYPE:
        raise fields.bad("model_type", repr(MODEL_TYPE), hint=_ONLY)
    _refuse_quantized(fields, source)
    extra_layers = fields.raw("num_nextn_predict_layers")
    if extra_layers is not None and (type(extra_layers) is not int or extra_layers != 0):
        raise fields.bad(
            "num_nextn_predict_layers",
            "0",
            hint="multi-token-prediction (MTP) layers are not implemented; the published "
            "Ring-linear 2.0 checkpoints have none",
        )
    for key, value in FIXED_VALUES.items():
        if key in fields and (fields.raw(key) != value or type(fields.raw(key)) is not type(value)):
            raise fields.bad(key, f"{show(value)}, the only value implemented", hint=_ONLY)


def _refuse_quantized(fields: Fields, source: str) -> None:
    """Refuse the key of mlx; `quantization_config` is read, see `checkpoint.quantization`."""
    if fields.raw("quantization") is not None and fields.raw("quantization_config") is None:
        raise ConfigError(
            f"{source} is of an mlx checkpoint with quantized weights (key quantization), which "
            "cannot be read",
            hint="use the bf16 checkpoint; ringexport quantizes it itself (--recipe fp8)",
        )
