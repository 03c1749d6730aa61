"""Quantized checkpoints of others as input: block FP8, other scale shapes, and damaged ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import CheckpointError, ConfigError, MissingTensorError, UnknownTensorError
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import WeightScheme
from ringexport.quantize.formats import quantize_array
from ringexport.quantize.layout import OutputTensor, shard_header
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from tests.checkpoints import tiny_config
from tests.numerics import assert_same

Tensors = dict[str, np.ndarray[Any, Any]]


def read_all(path: Path) -> Tensors:
    """Read every stored tensor, scales included."""
    with CheckpointWeights.open(path) as weights:
        found = {}
        for name, owner in weights._owners.items():
            found[name] = owner.read(name).copy()
    return found


def write(path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    path.mkdir()
    header = shard_header(
        [OutputTensor(name=n, dtype=t.dtype, shape=t.shape) for n, t in tensors.items()]
    )
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reader") / "q"
    quantize_checkpoint(tiny_checkpoint, output, load_recipe("fp8"))
    return output


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


BLOCK = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "gate"],
    "quant_method": "fp8",
    "weight_block_size": [32, 24],
}


def block_fp8(source: Path, path: Path) -> Path:
    """Write what DeepSeek's converter would: weight_scale_inv, experts and one projection only."""
    scheme = WeightScheme(
        format=NumberFormat.FP8_E4M3, granularity=Granularity.parse("block(32, 24)")
    )
    tensors: Tensors = {}
    for name, array in read_all(source).items():
        if ".experts." in name or name.endswith("attention.g_proj.weight"):
            found = quantize_array(array, scheme)
            tensors[name] = found.values
            tensors[name.replace(".weight", ".weight_scale_inv")] = found.weight_scale
        else:
            tensors[name] = array
    return write(path, tensors, config_of(source) | {"quantization_config": BLOCK})


def test_block_fp8_with_weight_scale_inv(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = block_fp8(tiny_checkpoint, tmp_path / "block")
    with (
        CheckpointWeights.open(path) as found,
        CheckpointWeights.open(tiny_checkpoint) as source,
    ):
        experts = [name for name in found.schemes if ".experts." in name]
        assert len(experts) == 240
        assert len(found.schemes) == 240 + 4
        for name in source.names():
            real, expected = found.read_f32(name), source.read_f32(name)
            assert np.abs(real - expected).max() <= np.abs(expected).max() / 16
            assert_same(found.read_rows(name, 0, 1).astype(np.float32), real[:1])
        scheme = found.schemes["model.layers.1.mlp.experts.0.up_proj"]
        assert str(scheme.weights) == "fp8_e4m3 block(32, 24)"
        assert str(scheme.activations) == "fp8_e4m3 group(24) dynamic"
        found.check_finite()


def test_a_quantized_checkpoint_runs_in_the_reference_model(quantized: Path) -> None:
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    from ringexport.model import ReferenceModel

    with CheckpointWeights.open(quantized) as weights:
        model = ReferenceModel(weights.config, weights)
        logits = model.forward(torch.arange(6)[None], None, model.new_state(1))
    assert torch.isfinite(logits).all()


def test_other_shapes_of_scales_are_read(quantized: Path, tmp_path: Path) -> None:
    """A channel scale may be [out], and scales may be bf16."""
    tensors = read_all(quantized)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].reshape(-1).astype(ml_dtypes.bfloat16)
    path = write(tmp_path / "flat", tensors, config_of(quantized))
    with CheckpointWeights.open(path) as weights, CheckpointWeights.open(quantized) as other:
        for name in weights.names():
            real, expected = weights.read_f32(name), other.read_f32(name)
            np.testing.assert_allclose(real, expected, rtol=2**-8, atol=0)


def test_stored_values_and_plain_weights(quantized: Path) -> None:
    with CheckpointWeights.open(quantized) as weights:
        name = "model.layers.0.attention.g_proj.weight"
        assert weights.quantized(name).values.dtype == np.dtype(ml_dtypes.float8_e4m3fn)
        assert weights.read(name).dtype == np.float32
        assert weights.input_scale("model.layers.0.attention.g_proj") is None
        with pytest.raises(CheckpointError, match="is not quantized"):
            weights.quantized("model.norm.weight")
        with pytest.raises(MissingTensorError):
            weights.quantized("nothing")


NAME = "model.layers.0.attention.g_proj.weight"


def _drop_scale(tensors: Tensors) -> None:
    del tensors[NAME + "_scale"]


def _add_scale(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.gate.weight_scale"] = np.ones((16, 1), np.float32)


def _plain_weight(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].astype(np.float32)


def _quantized_router(tensors: Tensors) -> None:
    router = "model.layers.1.mlp.gate.weight"
    tensors[router] = tensors[router].astype(ml_dtypes.float8_e4m3fn)


def _wrong_shape(tensors: Tensors) -> None:
    tensors[NAME + "_scale"] = tensors[NAME + "_scale"][:-1]


def _zero_scale(tensors: Tensors) -> None:
    tensors[NAME + "_scale"][3] = 0


def _nan_code(tensors: Tensors) -> None:
    tensors[NAME].view(np.uint8)[5, 7] = 0x7F


DAMAGE = {
    _drop_scale: (MissingTensorError, "g_proj.weight_scale"),
    _add_scale: (UnknownTensorError, "gate.weight_scale"),
    _plain_weight: (CheckpointError, "has dtype float32, expected float8_e4m3fn"),
    _quantized_router: (CheckpointError, "has dtype float8_e4m3fn, expected bfloat16"),
    _wrong_shape: (CheckpointError, r"has shape \[63, 1\], expected \[64, 1\]"),
    _zero_scale: (CheckpointError, "not positive and finite"),
    _nan_code: (CheckpointError, r"holds nan at \[5, 7\]"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_refused(damage: Any, quantized: Path, tmp_path: Path) -> None:
    tensors = read_all(quantized)
    damage(tensors)
    path = write(tmp_path / "damaged", tensors, config_of(quantized))
    error, message = DAMAGE[damage]
    with pytest.raises(error, match=message), CheckpointWeights.open(path) as weights:
        weights.read_f32(NAME)


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a good quantization_config with one value replaced, `...` removes it."""
    good: dict[str, Any] = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": None,
            }
        },
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
    }
    inner = good
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value is ...:
        del inner[path[-1]]
    return good


GROUP = ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")
REFUSED = [
    (("quant_method",), "gptq", "quant_method is 'gptq'"),
    (("format",), "marlin-24", "format is 'marlin-24'"),
    (("format",), "pack-quantized", "group_0 packs what is not INT8 weights alone"),
    (("format",), ..., "lacks format"),
    (("formatt",), "x", "unknown key 'formatt'"),
    (("config_groups",), {}, "at least one group"),
    (("quantization_status",), "frozen", "quantization_status is 'frozen'"),
    (("sparsity_config",), {"format": "x"}, "sparsity_config"),
    (("ignore",), ["re:("], "regular expressions"),
    (("kv_cache_scheme",), {"num_bits": 8, "type": "float", "strategy": "token"}, "'tensor'"),
    ((*GROUP, "targets"), [], "targets"),
    ((*GROUP, "output_activations"), {}, "output_activations"),
    ((*GROUP, "group_size"), 3, "unknown key 'group_size'"),
    ((*WEIGHTS, "num_bits"), 4, "num_bits is 4"),
    ((*WEIGHTS, "type"), "fp", "type is 'fp'"),
    ((*WEIGHTS, "strategy"), "tensor_group", "strategy is 'tensor_group'"),
    ((*WEIGHTS, "strategy"), "token", "per token"),
    ((*WEIGHTS, "symmetric"), False, "symmetric is False"),
    ((*WEIGHTS, "dynamic"), True, "dynamic is True"),
    ((*WEIGHTS, "actorder"), "group", "actorder is 'group'"),
    (WEIGHTS, None, "expected an object"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_strange_configs_are_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    config = tiny_config() | {"quantization_config": changed(path, value)}
    with pytest.raises(ConfigError) as caught:
        RingConfig.from_dict(config, source="config.json")
    assert message in caught.value.message
    assert "config.json" in caught.value.message or "token" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": None}, "no weight_block_size"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"scale": 1}, "unknown key 'scale'"),
    ],
)
def test_strange_block_fp8_is_refused(change: dict[str, Any], message: str) -> None:
    config = tiny_config() | {"quantization_config": BLOCK | change}
    with pytest.raises(ConfigError, match=message):
        RingConfig.from_dict(config, source="config.json")


def test_a_config_survives_its_copy(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "copy")
    assert RingConfig.from_file(quantized / "config.json") == RingConfig.from_file(
        tmp_path / "copy" / "config.json"
    )
