"""The TensorRT step model, on a bundle whose engines are made up."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from ringexport.errors import BundleError, ConfigError
from ringexport.triton import TritonOptions, write_repository
from tests.triton.engines import bundle_with


def config_of(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_states_are_kept_by_triton(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", "tensorrt:sm_89", "tensorrt:sm_90")
    written = write_repository(bundle, tmp_path / "r", TritonOptions(name="ring", max_batch=32))
    assert written.models == ("ring", "ring_step")
    assert written.notes == ()
    config = config_of(tmp_path / "r/ring_step/config.pbtxt")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 8)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert dict(config.cc_model_filenames) == {
        "8.9": "model.sm_89.plan",
        "9.0": "model.sm_90.plan",
    }
    for file, content in (("model.sm_89.plan", b"tensorrt:sm_89"), ("model.sm_90.plan", None)):
        found = (tmp_path / "r/ring_step/1" / file).read_bytes()
        assert content in (None, found)
    states = {state.input_name: state for state in config.sequence_batching.state}
    assert list(states) == ["past_state.0", "past_key.1", "past_value.1"]
    recurrent, key = states["past_state.0"], states["past_key.1"]
    assert (recurrent.output_name, list(recurrent.dims)) == ("present_state.0", [2, 4, 4])
    assert (key.output_name, list(key.dims)) == ("present_key.1", [1, 64, 4])
    assert recurrent.data_type == model_config_pb2.TYPE_FP32
    assert key.data_type == model_config_pb2.TYPE_FP16
    for state in states.values():
        assert state.use_same_buffer_for_input_output
        [initial] = state.initial_state
        assert initial.zero_data
        assert (initial.dims, initial.data_type) == (state.dims, state.data_type)


def test_inputs_have_the_shapes_of_the_graph(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", "tensorrt:sm_90")
    write_repository(bundle, tmp_path / "r", TritonOptions(name="ring", plan_context=32))
    config = config_of(tmp_path / "r/ring_step/config.pbtxt")
    inputs = {entry.name: entry for entry in config.input}
    assert list(inputs) == ["tokens", "lengths", "position", "logits_index"]
    assert list(inputs["tokens"].dims) == list(inputs["logits_index"].dims) == [-1]
    for name in ("lengths", "position"):
        assert list(inputs[name].dims) == [1]
        assert inputs[name].HasField("reshape")
        assert list(inputs[name].reshape.shape) == []
    assert list(config.output[0].dims) == [-1, 5]
    key = config.sequence_batching.state[1]
    assert list(key.dims) == [1, 32, 4]


def test_the_plugin_is_wired(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", "tensorrt:sm_90")
    written = write_repository(bundle, tmp_path / "r", TritonOptions(name="ring"))
    library = tmp_path / "r/ring_step/plugins/libringplugins.so"
    assert library.read_bytes() == b"plugin"
    assert written.command[-1] == f"--backend-config=tensorrt,plugins={library}"
    page = (tmp_path / "r/README.md").read_text()
    assert "LD_PRELOAD=ring_step/plugins/libringplugins.so" in page
    assert "TensorRT 10.14.1" in page
    assert written.command[-1] in page


@pytest.mark.parametrize(
    ("target", "dtype", "reason"),
    [
        ("tensorrt-rtx:sm_89", "fp16", "engines of TensorRT-RTX cannot be loaded by Triton"),
        ("tensorrt:sm_90", "fp8", "no state of type fp8"),
    ],
)
def test_what_triton_cannot_do_is_left_out_and_said(
    tmp_path: Path, target: str, dtype: str, reason: str
) -> None:
    bundle = bundle_with(tmp_path / "b", target, dtype=dtype)
    written = write_repository(bundle, tmp_path / "r", TritonOptions(name="ring"))
    assert written.models == ("ring",)
    assert reason in written.notes[0]
    assert reason in (tmp_path / "r/README.md").read_text()


def test_a_target_without_engine_is_refused(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", "tensorrt:sm_90", role="graph")
    with pytest.raises(BundleError, match="names no file as its engine"):
        write_repository(bundle, tmp_path / "r", TritonOptions())
    assert not (tmp_path / "r").exists()


def test_more_context_than_the_engine_has_is_refused(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", "tensorrt:sm_90")
    with pytest.raises(ConfigError, match="the TensorRT engine has 64 tokens"):
        write_repository(bundle, tmp_path / "r", TritonOptions(plan_context=65))
