"""Checkpoint files in the published layout: names, shapes and types of the big models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from model import Block, Config, MoE, RingNano
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def slots(model: RingNano) -> Iterator[tuple[str, Tensor]]:
    """(published name, view of the model's own storage) of every tensor of the checkpoint."""
    yield "model.word_embeddings.weight", model.word_embeddings.data
    for index, block in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", getattr(block, norm).data
        assert isinstance(block, Block)
        attention = block.attention
        for name, parameter in attention.named_parameters():
            yield f"{prefix}attention.{name}.weight", parameter.data
        mlp = block.mlp
        if not isinstance(mlp, MoE):
            for name, parameter in mlp.named_parameters():
                yield f"{prefix}mlp.{name}.weight", parameter.data
            continue
        yield f"{prefix}mlp.gate.weight", mlp.gate.data
        yield f"{prefix}mlp.gate.expert_bias", mlp.expert_bias
        for expert in range(mlp.gate_proj.shape[0]):
            routed = expert < mlp.config.num_experts
            where = f"{prefix}mlp." + (f"experts.{expert}." if routed else "shared_experts.")
            yield f"{where}gate_proj.weight", mlp.gate_proj.data[expert]
            yield f"{where}up_proj.weight", mlp.up_proj.data[expert]
            yield f"{where}down_proj.weight", mlp.down_proj.data[expert].T
    yield "model.norm.weight", model.norm.data
    yield "lm_head.weight", model.lm_head.data


def save(model: RingNano, folder: Path, shards: int = 2) -> None:
    """Write bf16 shards (expert_bias in fp32) and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, value in slots(model):
        kind = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        tensors[name] = value.detach().to("cpu", kind).contiguous()
    total = sum(t.nbytes for t in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        parts[min(shards - 1, done * shards // total)][name] = tensor
        done += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load(folder: Path, config_path: Path | None = None) -> RingNano:
    """The training model with the weights of a checkpoint, in fp32."""
    model = RingNano(Config.load(config_path or folder / "config.json"))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(folder / name, "pt") for name in set(weight_map.values())}
    expected = dict(slots(model))
    if set(expected) != set(weight_map):
        raise SystemExit(f"wrong tensors: {sorted(set(expected) ^ set(weight_map))[:5]}")
    for name, slot in expected.items():
        slot.copy_(files[weight_map[name]].get_tensor(name))
    return model
