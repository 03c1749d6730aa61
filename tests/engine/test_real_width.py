"""Two layers of Ring-mini at their real width: sizes that only the big model has."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.names import expected_tensors
from ringexport.pipeline.build import build
from ringexport.pipeline.request import BuildRequest

NANO = Path(__file__).parents[2] / "models" / "ring-nano"
RING_MINI = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "layer_group_size": 2,
    "group_norm_size": 4,
    "max_position_embeddings": 32768,
}
"""All of Ring-mini-linear-2.0 but the vocabulary, whose size would only cost time."""

BLOCK_ELEMENTS = 1 << 20


def write_checkpoint(folder: Path) -> None:
    """Write random weights without holding them in memory: one random block is repeated."""
    folder.mkdir()
    for path in NANO.iterdir():
        if path.suffix == ".json" and "index" not in path.name and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((NANO / "config.json").read_text()) | RING_MINI
    (folder / "config.json").write_text(json.dumps(values))
    config = RingConfig.from_file(folder / "config.json")
    block = (np.random.default_rng(1).standard_normal(BLOCK_ELEMENTS) * 0.02).astype(np.float32)
    halves = (block.view(np.uint32) >> 16).astype(np.uint16)  # bf16, rounded down
    header: dict[str, object] = {}
    end = 0
    kinds = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}
    tensors = expected_tensors(config)
    for name, info in tensors.items():
        kind, size = kinds["float32" if name.endswith("expert_bias") else "bfloat16"]
        nbytes = int(np.prod(info.shape)) * size
        header[name] = {"dtype": kind, "shape": info.shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            source = block if name.endswith("expert_bias") else halves
            count = int(np.prod(info.shape))
            while count > 0:
                file.write(source[:count].tobytes())
                count -= len(source)


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.timeout(900)
def test_ring_mini_builds_at_its_real_width(tmp_path: Path, host_plugins: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    target = "tensorrt-rtx:sm_89+sm_120"
    result = build(
        BuildRequest(
            checkpoint=tmp_path / "checkpoint",
            output=tmp_path / "bundle",
            targets=(target,),
            plugin_library=host_plugins,
        )
    )
    files = result.manifest.targets[target].files
    table = json.loads((result.path / files["layers"]).read_text())
    shapes = {
        layer["name"]: [tensor["shape"] for tensor in layer["inputs"]]
        for layer in table["layers"]
        if layer["plugin"]
    }
    assert shapes["layers.1.mlp.experts"][3:] == [[256, 1024, 2048], [256, 2048, 512]]
    assert shapes["layers.0.linear_attention"][3] == [-1, 16, 128, 128]
    assert shapes["layers.1.attention"][3] == [-1, 4, -1, 128]
    parameters = result.manifest.model.num_parameters
    assert table["engine_bytes"] > 1.9 * parameters  # equal tensors are stored once
