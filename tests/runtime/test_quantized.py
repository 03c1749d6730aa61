"""The torch runner of quantized checkpoints against slow numpy: inputs, caches and states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.state_format import REPORT_NAME, stored_state_format
from ringexport.errors import CheckpointError
from ringexport.model.network import ReferenceModel
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import StateFormat
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from ringexport.runtime.backends import torch_quantized
from ringexport.runtime.backends.torch_quantized import QuantizedModel, fake_quantize, round_state
from ringexport.runtime.backends.torch_ref import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.quantize.golden import golden_absmax, golden_codes, golden_dequantize
from tests.quantize.stats import make_stats

TOKENS = torch.arange(3, 27).view(1, 24)
FORMATS = list(NumberFormat)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("plain"), num_hidden_layers=3, num_experts=8, shards=1
    )


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    with CheckpointWeights.open(plain) as weights:
        stats = make_stats(weights.config)
    for name in ("fp8", "fp8-block", "fp8-static", "fp8-all", "int8"):
        quantize_checkpoint(plain, root / name, load_recipe(name), stats=stats)
    return {path.name: path for path in root.iterdir()}


def golden(
    values: np.ndarray, number_format: NumberFormat, granularity: Granularity, scale: float | None
) -> np.ndarray:
    """Round every element by trying all codes."""
    if scale is None:
        largest = golden_absmax(values, granularity).astype(np.float32)
        scales = largest / np.float32(number_format.half_range)
        scales[scales == 0] = np.finfo(np.float32).eps
    else:
        scales = np.full_like(golden_absmax(values, granularity), scale, dtype=np.float32)
    codes = golden_codes(values, scales, granularity, number_format)
    return golden_dequantize(codes, scales, granularity)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize(
    ("granularity", "scale"),
    [("token", None), ("group(16)", None), ("tensor", None), ("tensor", 0.01), ("tensor", 0.5)],
)
def test_inputs_are_rounded_as_by_trying_all_codes(
    rng: np.random.Generator, number_format: NumberFormat, granularity: str, scale: float | None
) -> None:
    values = (rng.standard_normal((6, 40)) * np.exp(rng.standard_normal((6, 1)))).astype(np.float32)
    values[1] = 0
    values[2, :8] = [0.5, -0.5, 1.5, 2.5, 100, -100, 1e-6, -0.0]
    kind = Granularity.parse(granularity)
    found = fake_quantize(torch.from_numpy(values), number_format, kind, scale).numpy()
    expected = golden(values, number_format, kind, scale)
    assert np.array_equal(found, expected.astype(np.float32))
    assert fake_quantize(torch.zeros(0, 40), number_format, kind, scale).shape == (0, 40)


class Watch(TorchFunctionMode):
    """Notes input and output of every product, under the address of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            entry = (args[1].data_ptr(), args[0].numpy().copy(), result.numpy().copy())
            self.seen.append(entry)
        return result


def weights_by_address(model: ReferenceModel) -> dict[int, list[str]]:
    """Return address -> modules that are fused there, in the order of its rows."""
    found = {model._head.data_ptr(): ["lm_head"]}
    for layer, tensors in enumerate(model._layers):
        prefix = f"model.layers.{layer}."
        for key, tensor in tensors.items():
            unit, _, last = key.rpartition(".")
            parts = {"gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}.get(last)
            if parts is None:
                found.setdefault(tensor.data_ptr(), [prefix + unit])
                continue
            for number, matrix in enumerate(tensor):
                one = f"{unit}.{number}" if unit.endswith(".experts") else unit
                names = [f"{prefix}{one}.{part}" for part in parts]
                found[matrix.data_ptr()] = names
                for index, name in enumerate(names[1:], start=1):  # where parts are multiplied
                    found[matrix[index * len(matrix) // len(names) :].data_ptr()] = [name]
    return found


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "fp8-static", "fp8-all", "int8"])
def test_every_product_is_that_of_the_codes(
    quantized: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: list[np.ndarray] = []

    def recording(values: torch.Tensor, *rest: Any) -> torch.Tensor:
        raw.append(values.numpy().copy())
        return fake_quantize(values, *rest)

    monkeypatch.setattr(torch_quantized, "fake_quantize", recording)
    with CheckpointWeights.open(quantized[name]) as weights:
        model = QuantizedModel(weights)
        model._cache_format = None  # only products are looked at here
        modules = weights_by_address(model)
        with Watch() as watch:
            model.forward(TOKENS, None, model.new_state(1), every_position=True)
        rounded = 0
        for address, values, output in watch.seen:
            names = modules[address]
            if len(names) == 2 and output.shape[1] == weights.info(f"{names[0]}.weight").shape[0]:
                names = names[:1]  # made-up stats give gate and up scales of their own
            scheme = weights.schemes.get(names[0])
            if scheme is None or scheme.activations is None:
                continue
            inputs, given = scheme.activations, raw[rounded]
            rounded += 1
            scale = weights.input_scale(names[0])
            expected = golden(given, inputs.format, inputs.granularity, scale)
            assert np.array_equal(values, expected.astype(np.float32))
            matrix = np.concatenate([weights.read(f"{one}.weight") for one in names])
            product = expected.astype(np.float64) @ matrix.astype(np.float64).T
            assert np.abs(output - product).max() <= 1e-5 * np.abs(product).max()
        assert rounded == len(raw)
        seen = {one for address, *_ in watch.seen for one in modules[address]}
        assert seen >= {one for one in weights.schemes if ".experts." not in one}


def test_keys_and_values_are_rounded_with_their_own_scales(quantized: dict[str, Path]) -> None:
    with CheckpointWeights.open(quantized["fp8-all"]) as weights:
        model = QuantizedModel(weights)
        state = model.new_state(1)
        model.forward(TOKENS, None, state)
        model.forward(TOKENS[:, :3], None, state)
        forked = state.snapshot([0, 0])
        model.forward(TOKENS[:, :1].repeat(2, 1), None, forked)
        tensor = Granularity.parse("tensor")
        for layer in weights.config.softmax_layers:
            scales = weights.kv_scales(layer)
            assert scales is not None
            assert scales[0] != scales[1]
            for cached, scale in zip(forked.kv_cache[layer], scales, strict=True):
                values = cached[:, :, :28].numpy().reshape(-1, 16)
                again = golden(values, NumberFormat.FP8_E4M3, tensor, scale)
                assert np.array_equal(values, again.astype(np.float32))
                assert np.abs(values).max() > 0


@pytest.mark.parametrize("state_format", list(StateFormat))
def test_states_are_rounded_when_they_are_written(plain: Path, state_format: StateFormat) -> None:
    states = {}
    with CheckpointWeights.open(plain) as weights:
        for one in (StateFormat.FP32, state_format):
            model = QuantizedModel(weights, state_format=one)
            state = model.new_state(1)
            model.forward(TOKENS, None, state)
            states[one] = state.recurrent_state[0].numpy()
    exact, found = states[StateFormat.FP32], states[state_format]
    if state_format in {StateFormat.FP8_E4M3, StateFormat.INT8}:
        heads = exact.reshape(exact.shape[1], -1)
        row = Granularity.parse("token")
        number_format = NumberFormat(state_format.value)
        top = np.float32(127 if number_format is NumberFormat.INT8 else 448)
        scales = np.abs(heads).max(axis=1, keepdims=True) / top
        codes = golden_codes(heads, scales, row, number_format)
        expected = golden_dequantize(codes, scales, row).reshape(exact.shape)
    else:
        names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        expected = torch.from_numpy(exact).to(names[state_format.value]).float().numpy()
    assert np.array_equal(found, expected.astype(np.float32))
    assert np.array_equal(found, exact) == (state_format is StateFormat.FP32)


@pytest.mark.parametrize("state_format", list(StateFormat))
def test_a_state_that_is_written_often_does_not_grow(state_format: StateFormat) -> None:
    state = torch.tensor([[[[-0.3, 0.1], [0.2, -0.05]]]])
    for _ in range(1000):
        state = round_state(state, state_format)
    assert state.abs().max() == pytest.approx(0.3, rel=0.01)


def test_a_half_precision_state_saturates() -> None:
    state = torch.full((1, 1, 2, 2), 1e6)
    assert round_state(state, StateFormat.FP16).max() == torch.finfo(torch.float16).max


def test_the_state_format_comes_from_the_recipe(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = replace(load_recipe("fp8"), recurrent_state=StateFormat.INT8)
    quantize_checkpoint(plain, output, recipe)
    assert stored_state_format(output) is StateFormat.INT8
    assert stored_state_format(plain) is StateFormat.FP32
    with TorchRunner(output, model_digest=lambda: "", threads=1) as runner:
        state = runner.new_state(1)
        runner.prefill(TOKENS.numpy(), None, state)
        head = state.inner.recurrent_state[0][0, 0]
        assert head.unique().numel() <= 256
    text = (output / REPORT_NAME).read_text(encoding="utf-8")
    (output / REPORT_NAME).write_text(text.replace('"int8"', '"int9"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="int9"):
        stored_state_format(output)


def test_only_quantized_checkpoints_are_rounded(plain: Path, quantized: dict[str, Path]) -> None:
    with TorchRunner(plain, model_digest=lambda: "", threads=1) as runner:
        assert type(runner._model) is ReferenceModel
    with TorchRunner(quantized["fp8"], model_digest=lambda: "", threads=1) as runner:
        assert isinstance(runner._model, QuantizedModel)
        assert runner._model.rounded_products > 0


def test_parts_of_a_fused_product_may_differ(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text('base = "fp8"\n[[rules]]\ntargets = ["*.up_proj"]\nscheme = "unquantized"\n')
    quantize_checkpoint(plain, tmp_path / "out", load_recipe(str(path)))
    with CheckpointWeights.open(tmp_path / "out") as weights:
        model = QuantizedModel(weights)
        parts = model._known[model._layers[0]["mlp.gate_up"][0].data_ptr()]
        assert [part[2] is None for part in parts] == [False, True]
        with Watch() as watch:
            model.forward(TOKENS, None, model.new_state(1))
    gate = model._layers[0]["mlp.gate_up"][0].data_ptr()
    up = model._layers[0]["mlp.gate_up"][0][96:].data_ptr()
    inputs = {address: values for address, values, _ in watch.seen if address in {gate, up}}
    token = Granularity.parse("token")
    expected = golden(inputs[up], NumberFormat.FP8_E4M3, token, None).astype(np.float32)
    assert np.array_equal(inputs[gate], expected)
    assert not np.array_equal(inputs[up], expected)
