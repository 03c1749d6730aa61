"""config.json: what is read from it, what is derived, and what is refused with which words."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ringexport.checkpoint import RingConfig
from ringexport.checkpoint.fields import show
from ringexport.errors import ConfigError
from tests.checkpoints import tiny_config

# Written from the published values. The rope_theta of flash (600000) is the one of Ring-flash-2.0:
# that of the linear model was not found, and nothing here depends on it.
DATA = Path(__file__).parent / "data"


def read(**overrides: Any) -> RingConfig:
    return RingConfig.from_dict(tiny_config(**overrides), source="config.json")


def refusal(**overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**overrides)
    assert caught.value.hint is None or caught.value.hint
    assert "\n" not in caught.value.message
    return str(caught.value)


def test_every_field_comes_from_its_published_key() -> None:
    config = read()
    published = tiny_config()
    renamed = {"num_norm_groups": "group_norm_size", "expert_bias": "moe_router_enable_expert_bias"}
    derived = {"eos_token_ids": (289,), "rotary_dim": 8}
    for name in RingConfig.__slots__:
        expected = derived.get(name, published.get(renamed.get(name, name)))
        assert getattr(config, name) == expected, name


@pytest.mark.parametrize(
    ("model", "parameters", "linear", "softmax"),
    [
        ("mini", 16_423_448_320, 16, (4, 9, 14, 19)),
        ("flash", 104_181_665_536, 28, (7, 15, 23, 31)),
    ],
)
def test_published_configs(
    model: str, parameters: int, linear: int, softmax: tuple[int, ...]
) -> None:
    config = RingConfig.from_file(DATA / f"ring-{model}-linear-2.0.json")
    assert config.num_parameters == parameters
    assert len(config.linear_layers) == linear
    assert config.softmax_layers == softmax
    assert config.context_length == config.trained_context_length == 131072
    assert config.attention_factor == 1.0
    assert config.rotary_dim == 64
    assert config.norm_group_size == config.hidden_size // 4
    assert config.experts_per_group == 32


def test_derived_sizes_of_flash() -> None:
    config = RingConfig.from_file(DATA / "ring-flash-linear-2.0.json")
    assert (config.linear_dim, config.kv_dim) == (4096, 512)
    assert (config.qkv_rows(0), config.qkv_rows(7)) == (12288, 5120)
    assert config.shared_intermediate_size == 1024
    assert config.softmax_scale == 128**-0.5
    assert config.partial_rotary_factor == 0.5
    assert config.moe_layers == tuple(range(1, 32))
    assert (config.is_moe_layer(0), config.is_moe_layer(1)) == (False, True)
    assert (config.is_linear_layer(6), config.is_linear_layer(7)) == (True, False)


@pytest.mark.parametrize(
    ("layers", "group", "pattern"),
    [
        (6, 3, "LLSLLS"),
        (7, 3, "LLSLLSS"),
        (8, 3, "LLSLLSSS"),
        (5, 5, "LLLLS"),
        (9, 5, "LLLLSSSSS"),
        (2, 2, "LS"),
    ],
)
def test_layers_after_the_last_whole_group_are_softmax(
    layers: int, group: int, pattern: str
) -> None:
    config = read(num_hidden_layers=layers, layer_group_size=group)
    assert "".join(kind[0].upper() for kind in config.layer_kinds) == pattern
    assert sorted(config.linear_layers + config.softmax_layers) == list(range(layers))


# What an absent key would silently become in the published configuration class, and the rest
# without which the model is not defined.
@pytest.mark.parametrize(
    "key",
    [
        "eos_token_id",
        "first_k_dense_replace",
        "group_norm_size",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "layer_group_size",
        "linear_silu",
        "max_position_embeddings",
        "moe_intermediate_size",
        "moe_router_enable_expert_bias",
        "n_group",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_shared_experts",
        "partial_rotary_factor",
        "rms_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "tie_word_embeddings",
        "topk_group",
        "torch_dtype",
        "vocab_size",
    ],
)
def test_a_missing_key_is_never_defaulted(key: str) -> None:
    assert f"config.json lacks {key}" in refusal(**{key: ...})


@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "attention_dropout",
        "auto_map",
        "hidden_act",
        "initializer_range",
        "max_window_layers",
        "num_nextn_predict_layers",
        "router_dtype",
        "score_function",
        "use_bias",
        "use_cache",
        "use_qk_norm",
        "use_rmsnorm",
    ],
)
def test_keys_with_one_possible_meaning_may_be_absent(key: str) -> None:
    if key == "architectures":
        assert "architectures is None" in refusal(architectures=...)
    else:
        assert read(**{key: ...}) == read()


def test_optional_keys_fall_back_on_what_they_repeat() -> None:
    config = read(pad_token_id=None, moe_shared_expert_intermediate_size=...)
    assert config.pad_token_id == config.eos_token_id
    assert config.shared_intermediate_size == config.moe_intermediate_size
    assert read(torch_dtype=..., dtype="float16").torch_dtype == "float16"
    assert read(eos_token_id=[289, 292]).eos_token_ids == (289, 292)
    assert read(eos_token_id=[289, 292]).eos_token_id == 289


def test_specific_keys_win_over_general_ones() -> None:
    assert read(rotary_dim=6, partial_rotary_factor=0.5).rotary_dim == 6
    assert read(rotary_dim=6, partial_rotary_factor=...).rotary_dim == 6
    assert read(use_linear_silu=True, linear_silu=False).linear_silu is True
    assert read(use_linear_silu=False, linear_silu=...).linear_silu is False
    assert read(linear_rope=True, linear_backend="seg_la", max_window_layers=1) == read()


def test_values_are_not_taken_for_true_by_their_truth() -> None:
    assert "num_nextn_predict_layers is False, expected 0" in refusal(
        num_nextn_predict_layers=False
    )
    assert "use_bias is 0, expected False" in refusal(use_bias=0)
    assert "norm_topk_prob is 1, expected true or false" in refusal(norm_topk_prob=1)


BAD_VALUES: list[tuple[str, Any]] = [
    *(
        (key, bad)
        for key in ("hidden_size", "vocab_size")
        for bad in (0, -1, 2.0, True, "64", None)
    ),
    ("hidden_size", 1 << 40),
    ("hidden_size", [64]),
    ("num_hidden_layers", 100_000),
    ("num_shared_experts", 0),
    ("num_experts", 10**5000),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", True),
    ("rms_norm_eps", "1e-6"),
    ("routed_scaling_factor", math.nan),
    ("routed_scaling_factor", math.inf),
    ("rope_theta", 1.0),
    ("rope_theta", 1e300),
    ("partial_rotary_factor", 0),
    ("partial_rotary_factor", 1.5),
    ("partial_rotary_factor", 0.55),
    ("rotary_dim", 7),
    ("rotary_dim", 18),
    ("rotary_dim", 0),
    ("eos_token_id", 384),
    ("eos_token_id", -1),
    ("eos_token_id", None),
    ("eos_token_id", []),
    ("eos_token_id", [289, 384]),
    ("eos_token_id", [289, True]),
    ("pad_token_id", 384),
    ("torch_dtype", "float8_e4m3fn"),
    ("torch_dtype", ["bfloat16"]),
    ("rope_scaling", "yarn"),
    ("tie_word_embeddings", "false"),
    ("hidden_act", "gelu"),
    ("score_function", "softmax"),
    ("router_dtype", "bf16"),
    ("use_bias", True),
    ("use_qkv_bias", True),
    ("use_rmsnorm", False),
    ("use_qk_norm", False),
    ("linear_rope", False),
    ("sliding_window", 4096),
    ("num_nextn_predict_layers", 1),
    ("model_type", "bailing_hybrid"),
    ("architectures", []),
    ("architectures", ["LlamaForCausalLM"]),
    ("architectures", "BailingMoeLinearV2ForCausalLM"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda v: show(v)[:30])
def test_absurd_values_are_refused_by_key_value_and_expectation(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"config.json: {key} is ")
    assert ", expected " in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads"),
        ({"group_norm_size": 3}, "= 64 is no multiple of group_norm_size 3"),
        ({"n_group": 5}, "num_experts 16 is no multiple of n_group 5"),
        ({"n_group": 16, "topk_group": 16}, "num_experts / n_group is 1, expected at least 2"),
        ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts of 2"),
        ({"first_k_dense_replace": 7}, "first_k_dense_replace 7 is more than num_hidden_layers 6"),
        ({"layer_group_size": 1}, "layer_group_size 1 leaves none of the 6 layers linear"),
        ({"layer_group_size": 7}, "layer_group_size 7 leaves none of the 6 layers linear"),
        (
            {"num_experts": 8192, "num_hidden_layers": 1000},
            "num_hidden_layers x num_experts = 8192000, expected at most",
        ),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, Any], words: str) -> None:
    assert words in refusal(**overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["BailingMoeV2_5ForCausalLM"]}, "multi-head latent attention (MLA)"),
        ({"kv_lora_rank": 512}, "Ling/Ring 2.5 model with multi-head latent attention (MLA)"),
        ({"q_lora_rank": 1536}, "it holds q_lora_rank 1536"),
        ({"architectures": ["BailingMoeV3ForCausalLM"]}, "Kimi delta attention (KDA)"),
        ({"short_conv_kernel_size": 4}, "Ling 3.0 model with Kimi delta attention (KDA)"),
        ({"architectures": ["BailingMoeV2ForCausalLM"]}, "softmax attention in every layer"),
        ({"num_nextn_predict_layers": 1}, "multi-token-prediction (MTP) layers"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: quant_method is 'gptq', expected 'compressed-tensors' or 'fp8'",
        ),
        ({"quantization": {"bits": 4}}, "an mlx checkpoint with quantized weights"),
    ],
)
def test_relatives_are_refused_by_name(overrides: dict[str, Any], words: str) -> None:
    assert words in refusal(**overrides)


def test_null_markers_of_relatives_are_harmless() -> None:
    assert read(q_lora_rank=None, kv_lora_rank=None, quantization_config=None) == read()


def test_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    assert refusal(hiden_size=64).splitlines() == [
        "config.json holds the unknown key 'hiden_size'",
        "hint: did you mean 'hidden_size'?",
    ]
    message = refusal(zzzz=1, qqqq=2)
    assert "unknown key 'zzzz' and 1 more" in message
    assert "unknown keys are refused" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"<html>", "is not valid JSON: Expecting value at line 1, column 1"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "holds the key 'a' more than once"),
        (b'{"a": "\xff"}', "is not UTF-8 text: bad byte at offset 7"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "expected at most 1,048,576"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_files_that_are_no_json_object(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        RingConfig.from_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        RingConfig.from_file(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        RingConfig.from_file(tmp_path)


def test_from_file_reads_and_overrides_rope_scaling(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    assert RingConfig.from_file(path) == read()
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    assert RingConfig.from_file(path, rope_scaling=scaling) == read(rope_scaling=scaling)
    with pytest.raises(ConfigError, match="factor is 0"):
        RingConfig.from_file(path, rope_scaling=scaling | {"factor": 0})
