"""Our output through the compressed-tensors library: it loads, and means what we say it means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from tests.checkpoints import make_checkpoint
from tests.numerics import assert_same
from tests.quantize.stats import make_stats

pytest.importorskip(
    "compressed_tensors",
    reason="compressed-tensors is not installed; pip install compressed-tensors==0.20.0",
)
torch = pytest.importorskip("torch", reason="compressed-tensors needs torch")

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPES = ("fp8", "fp8-static", "fp8-block", "fp8-all", "int8", "int8-weight-only")
MIXED = """
[[rules]]
targets = ["routed_experts", "shared_experts"]
weights = { format = "fp8_e4m3", granularity = "block(24, 40)", observer = "mse" }
activations = { format = "fp8_e4m3", granularity = "group(8)", mode = "dynamic" }
[[rules]]
targets = ["model.layers.3.*"]
except = ["model.layers.3.mlp.experts.5.*"]
weights = { format = "int8", granularity = "group(8)" }
[[rules]]
targets = ["lm_head", "dense_mlp"]
weights = { format = "int8", granularity = "tensor" }
activations = { format = "int8", granularity = "tensor", mode = "static" }
"""


def load_tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.fixture(scope="module", params=[*RECIPES, "mixed", "ragged"])
def quantized(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: Any
) -> tuple[Path, Path]:
    """The source and the output of each recipe; "ragged" has experts of 18 channels."""
    output: Path = tmp_path_factory.mktemp("ct") / request.param
    name, source = request.param, tiny_checkpoint
    if name == "mixed":
        name = str(output.parent / "mixed.toml")
        Path(name).write_text(MIXED, encoding="utf-8")
    if name == "ragged":
        name = "int8-weight-only"
        source = make_checkpoint(output.parent / "source", moe_intermediate_size=18)
    with CheckpointWeights.open(source) as weights:
        stats = make_stats(weights.config)
    quantize_checkpoint(source, output, load_recipe(name), stats=stats, max_shard_bytes=10**9)
    return source, output


def test_library_dequantizes_to_our_values(quantized: tuple[Path, Path]) -> None:
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    _, output = quantized
    converter = CompressedTensorsDequantizer(str(output), dtype=torch.float32)
    found = converter.process(load_tensors(output))
    with CheckpointWeights.open(output) as weights:
        assert len(weights.schemes) >= 100
        for name in weights.names():
            ours = weights.read(name)
            theirs = found[name].to(torch.float32).numpy()
            assert_same(theirs, ours.astype(np.float32))
        left = set(found) - set(weights.names())
    assert all(name.endswith(("input_scale", "k_scale", "v_scale")) for name in left)


def test_library_quantizes_to_our_values(quantized: tuple[Path, Path]) -> None:
    """From the same bf16 weights and scales it gets the same codes; absmax scales agree too."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.utils.match import match_name

    directory, output = quantized
    stored = json.loads((output / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    if output.name == "int8":
        return  # its weights were smoothed
    source, found = load_tensors(directory), load_tensors(output)
    checked = 0
    for name in [name for name in found if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        assert not any(match_name(module, pattern) for pattern in config.ignore)
        groups = [
            group
            for group in config.config_groups.values()
            if group.targets == ["Linear"]
            or any(match_name(module, target) for target in group.targets)
        ]
        assert len(groups) == 1
        state = {"weight": source[f"{module}.weight"].float(), "weight_scale": found[name]}
        compressor = BaseCompressor.get_value_from_registry(groups[0].format)
        for part, codes in compressor.compress(state, groups[0]).items():
            ours = found[f"{module}.{part}"]
            assert codes.dtype == ours.dtype
            assert torch.equal(codes.view(torch.uint8), ours.view(torch.uint8))
        if groups[0].weights.strategy == "channel":
            weight = state["weight"]
            scale, _ = calculate_qparams(
                weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), groups[0].weights
            )
            assert torch.equal(scale, found[name])
        checked += 1
    assert checked >= 100


def test_router_is_in_no_group(quantized: tuple[Path, Path]) -> None:
    from compressed_tensors.utils.match import match_name

    stored = json.loads((quantized[1] / "config.json").read_text())["quantization_config"]
    for module in ("model.layers.1.mlp.gate", "model.word_embeddings"):
        assert any(match_name(module, pattern) for pattern in stored["ignore"])
        for group in stored["config_groups"].values():
            assert not any(match_name(module, target) for target in group["targets"])
