"""Tiny random checkpoints in the exact layout of the published ones.

Written without `ringexport.checkpoint`, so that its tests compare two independent readings of
the layout. The config keys are the published ones (`group_norm_size`, not `num_norm_groups`).
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

__all__ = ["SPECIAL_TOKENS", "make_checkpoint", "tensor_shapes", "tiny_config"]

# In the order of the published ids: 156891 <|startoftext|>, 156892 <|endoftext|>, ...
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|role_end|>",
    "<role>",
    "</role>",
    "<think>",
    "</think>",
)
# fmt: off
MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "Ġt he", "r e", "o n", "Ġ s",
    "e r", "a t", "Ġ w", "Ġ o", "n d", "o u", "e n", "i s",
    "Ġ c", "i t", "e s", "o r", "a n", "Ġ f", "in g", "Ġ b",
    "e d", "Ġ Ġ", "ĠĠ ĠĠ", "a r", "Ġa nd", "Ġo f", "Ġt o", "l l",
)
# fmt: on
FIRST_SPECIAL_ID = 256 + len(MERGES)
STORED_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
Shapes = dict[str, tuple[int, ...]]


def make_checkpoint(
    directory: Path, *, seed: int = 0, shards: int = 2, **config_overrides: Any
) -> Path:
    """Write a random checkpoint and return `directory`; the same arguments give the same bytes.

    Args:
        directory: created if it does not exist.
        seed: of the weights.
        shards: number of weight files; 1 writes model.safetensors without an index.
        config_overrides: published config keys; `torch_dtype` is also the stored dtype and the
            value `...` leaves a key out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**config_overrides)
    if config["vocab_size"] < FIRST_SPECIAL_ID + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size {config['vocab_size']} cannot hold the tiny tokenizer")
    _write_json(directory / "config.json", config)
    _write_weights(directory, _random_tensors(config, seed), shards)
    _write_tokenizer(directory)
    return directory


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """Return a config.json with the published key set and small sizes."""
    end_of_text = FIRST_SPECIAL_ID + 1
    module = "modeling_bailing_moe_linear_v2"
    config: dict[str, Any] = {
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config",
            "AutoModel": f"{module}.BailingMoeLinearV2Model",
            "AutoModelForCausalLM": f"{module}.BailingMoeLinearV2ForCausalLM",
        },
        "embedding_dropout": 0.0,
        "eos_token_id": end_of_text,
        "first_k_dense_replace": 1,
        "group_norm_size": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_group_size": 3,
        "linear_silu": False,
        "max_position_embeddings": 4096,
        "max_window_layers": 20,
        "model_type": "bailing_moe_linear",
        "moe_intermediate_size": 16,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 4,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "pad_token_id": end_of_text,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.56.1",
        "use_bias": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "vocab_size": 384,
    }
    if "moe_intermediate_size" in overrides:
        config["moe_shared_expert_intermediate_size"] = overrides["moe_intermediate_size"]
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Return name -> shape of every tensor that a checkpoint with `config` holds."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.word_embeddings.weight": (vocab, hidden)}
    group = config["layer_group_size"]
    first_tail = config["num_hidden_layers"] // group * group
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        softmax = (layer + 1) % group == 0 or layer >= first_tail
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= _attention_shapes(prefix + "attention.", config, softmax)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if layer < config["first_k_dense_replace"]:
            shapes |= _swiglu_shapes(prefix + "mlp.", hidden, config["intermediate_size"])
        else:
            shapes |= _moe_shapes(prefix + "mlp.", config)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(prefix: str, config: dict[str, Any], softmax: bool) -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = (heads + 2 * kv_heads) * size if softmax else 3 * heads * size
    shapes: Shapes = {
        prefix + "query_key_value.weight": (rows, hidden),
        prefix + "query_layernorm.weight": (size,),
        prefix + "key_layernorm.weight": (size,),
        prefix + "dense.weight": (hidden, heads * size),
    }
    if not softmax:
        shapes[prefix + "g_proj.weight"] = (heads * size, hidden)
        shapes[prefix + "g_norm.weight"] = (heads * size,)
    return shapes


def _moe_shapes(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, experts = config["hidden_size"], config["num_experts"]
    shapes: Shapes = {prefix + "gate.weight": (experts, hidden)}
    if config["moe_router_enable_expert_bias"]:
        shapes[prefix + "gate.expert_bias"] = (experts,)
    for expert in range(experts):
        shapes |= _swiglu_shapes(
            f"{prefix}experts.{expert}.", hidden, config["moe_intermediate_size"]
        )
    if config["num_shared_experts"]:
        rows = config["num_shared_experts"] * config["moe_shared_expert_intermediate_size"]
        shapes |= _swiglu_shapes(prefix + "shared_experts.", hidden, rows)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, rows: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (rows, hidden),
        prefix + "up_proj.weight": (rows, hidden),
        prefix + "down_proj.weight": (hidden, rows),
    }


def _random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Draw weights for which logits and routing differ from token to token."""
    shapes = tensor_shapes(config)
    stored = STORED_DTYPES[config["torch_dtype"]]
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("expert_bias"):
            tensors[name] = values * np.float32(0.05)
        elif len(shape) == 1:
            tensors[name] = (1 + 0.1 * values).astype(stored)
        elif name == "model.word_embeddings.weight":
            tensors[name] = values.astype(stored)
        else:
            tensors[name] = (values * np.float32(shape[1] ** -0.5)).astype(stored)
    return tensors


def _write_weights(directory: Path, tensors: dict[str, np.ndarray[Any, Any]], shards: int) -> None:
    """Write `tensors` into `shards` files with about the same number of tensors each."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard, part in enumerate(np.array_split(np.arange(len(names)), shards)):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {names[i]: tensors[names[i]] for i in part}
        save_file(chosen, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_tokenizer(directory: Path) -> None:
    """Write tokenizer, chat template and generation config: byte-level BPE and special tokens."""
    vocab = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    for merge in MERGES:
        vocab["".join(merge.split())] = len(vocab)
    assert len(vocab) == FIRST_SPECIAL_ID
    added = [
        {
            "id": FIRST_SPECIAL_ID + offset,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in {"<think>", "</think>"},
        }
        for offset, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    _write_json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level | {"use_regex": True},
            "post_processor": None,
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [merge.split() for merge in MERGES],
            },
        },
    )
    special = {
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": "<|role_end|>",
        "gmask_token": "[gMASK]",
        "pad_token": "<|endoftext|>",
    }
    _write_json(directory / "special_tokens_map.json", special)
    template = Path(__file__).parent / "data" / "chat_template.jinja"
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "chat_template": template.read_text(encoding="utf-8"),
            "clean_up_tokenization_spaces": False,
            "fast_tokenizer": True,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        | special,
    )
    end_of_text = FIRST_SPECIAL_ID + SPECIAL_TOKENS.index("<|endoftext|>")
    role_end = FIRST_SPECIAL_ID + SPECIAL_TOKENS.index("<|role_end|>")
    _write_json(
        directory / "generation_config.json",
        {
            "_from_model_config": True,
            "eos_token_id": [end_of_text, role_end],
            "pad_token_id": end_of_text,
            "transformers_version": "4.56.1",
        },
    )


def _byte_symbols() -> list[str]:
    """Return the printable symbol of each byte 0..255, as GPT-2 and every ByteLevel use them."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (chr(256 + offset) for offset in range(256 - len(kept)))
    return [chr(byte) if byte in kept else next(moved) for byte in range(256)]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
