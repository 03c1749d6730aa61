"""The packed engine holds exactly the checkpoint's values, rearranged."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import ConfigError
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import ActivationMode, ActivationScheme, ModuleScheme, WeightScheme
from ringexport.packing.layout import MatrixFormat, packed_tensors
from ringexport.packing.writer import WEIGHTS_FILE, formats_of, write_packed
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe

RING_NANO = Path(__file__).parents[2] / "models" / "ring-nano"
CHANNEL, TOKEN = Granularity.parse("channel"), Granularity.parse("token")


def scheme(
    number_format: NumberFormat = NumberFormat.FP8_E4M3,
    mode: ActivationMode = ActivationMode.DYNAMIC,
) -> ModuleScheme:
    inputs = TOKEN if mode is ActivationMode.DYNAMIC else Granularity.parse("tensor")
    return ModuleScheme(
        weights=WeightScheme(format=number_format, granularity=CHANNEL),
        activations=ActivationScheme(format=number_format, granularity=inputs, mode=mode),
    )


def read_packed(directory: Path) -> dict[str, np.ndarray]:
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        return {
            name: file.get_tensor(name).view(torch.uint8).numpy()
            if file.get_slice(name).get_dtype() == "F8_E4M3"
            else as_numpy(file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118
        }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def test_plain_checkpoint_is_rearranged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        config = weights.config
        size = write_packed(weights, tmp_path, decay_index=DecayIndex.HF)
        packed = read_packed(tmp_path)
        expected = packed_tensors(config, {})
        assert {t.name: (t.shape, t.dtype) for t in expected} == {
            name: (array.shape, array.dtype) for name, array in packed.items()
        }
        assert sum(t.nbytes for t in expected) < size
        layer = config.linear_layers[0]
        qkv, gate = (
            weights.read(f"model.layers.{layer}.attention.{name}.weight")
            for name in ("query_key_value", "g_proj")
        )
        joined = np.concatenate([qkv, gate])
        assert np.array_equal(packed[f"layers.{layer}.attention.input"], joined)
        moe = config.moe_layers[-1]
        for expert in (0, config.num_experts - 1):
            prefix = f"model.layers.{moe}.mlp.experts.{expert}."
            gate_up = packed[f"layers.{moe}.experts.gate_up"][expert]
            assert np.array_equal(gate_up[0::2], weights.read(prefix + "gate_proj.weight"))
            assert np.array_equal(gate_up[1::2], weights.read(prefix + "up_proj.weight"))
            down = packed[f"layers.{moe}.experts.down"][expert]
            assert np.array_equal(down, weights.read(prefix + "down_proj.weight"))
        table = log_decay(
            config.num_attention_heads, layer, config.num_hidden_layers, DecayIndex.HF
        )
        assert np.array_equal(packed[f"layers.{layer}.attention.log_decay"], table)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-block"])
def test_codes_and_scales_keep_their_places(recipe: str, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantize_checkpoint(RING_NANO, quantized, load_recipe(recipe))
    out = tmp_path / "packed"
    out.mkdir()
    with CheckpointWeights.open(quantized) as weights:
        write_packed(weights, out)
        packed = read_packed(out)
        config = weights.config
        moe = config.moe_layers[0]
        for half, name in enumerate(("gate_proj", "up_proj")):
            module = f"model.layers.{moe}.mlp.experts.1.{name}.weight"
            stored = weights.quantized(module)
            codes = packed[f"layers.{moe}.experts.gate_up"][1][half::2]
            assert np.array_equal(codes, stored.values.view(np.uint8))
            scale = packed[f"layers.{moe}.experts.gate_up.scale"][1]
            chosen = scale[half] if recipe == "fp8-block" else scale[half::2, None]
            assert np.array_equal(chosen, stored.weight_scale)


def test_modules_of_one_matrix_need_one_format(tiny_checkpoint: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        config = weights.config
    layer = config.linear_layers[0]
    name = f"model.layers.{layer}.attention.query_key_value"
    with pytest.raises(ConfigError, match="g_proj are in different formats"):
        formats_of(config, {name: scheme()})
    experts = {
        f"model.layers.{config.moe_layers[0]}.mlp.experts.{expert}.{part}_proj": scheme()
        for expert in range(config.num_experts)
        for part in ("gate", "up", "down")
    }
    with pytest.raises(ConfigError, match="different formats"):
        formats_of(config, experts)


def test_static_inputs_are_refused(tiny_checkpoint: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        config = weights.config
    static = {"lm_head": scheme(mode=ActivationMode.STATIC)}
    with pytest.raises(ConfigError, match="lm_head have static scales"):
        formats_of(config, static)
    assert formats_of(config, {"lm_head": scheme()})["lm_head"] == MatrixFormat(
        NumberFormat.FP8_E4M3
    )


def test_blocks_do_not_cross_modules(tiny_checkpoint: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        config = weights.config
    tile = Granularity.parse("block(128, 128)")
    block = ModuleScheme(
        weights=WeightScheme(format=NumberFormat.FP8_E4M3, granularity=tile),
        activations=ActivationScheme(
            format=NumberFormat.FP8_E4M3,
            granularity=Granularity.parse("group(128)"),
            mode=ActivationMode.DYNAMIC,
        ),
    )
    prefix = f"model.layers.{config.linear_layers[0]}.attention."
    with pytest.raises(ConfigError, match="blocks of 128 do not divide"):
        formats_of(config, {prefix + name: block for name in ("query_key_value", "g_proj")})
