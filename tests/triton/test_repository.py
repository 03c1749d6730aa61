"""The repository on disk: complete or not there, never over somebody else's files."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from ringexport.bundle import EngineBundle
from ringexport.cli.main import run_cli
from ringexport.errors import ConfigError, OutputError
from ringexport.triton import TritonOptions, repository, write_repository
from ringexport.triton.options import model_name
from ringexport.triton.pbtxt import EnumName, to_pbtxt
from ringexport.triton.tensors import INPUTS, OUTPUTS


def parse(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_the_config_says_what_was_asked_for(nano: EngineBundle, tmp_path: Path) -> None:
    options = TritonOptions(threads=2, max_batch=7, session_idle_seconds=9)
    written = write_repository(nano, tmp_path / "repository", options)
    assert written.models == ("ring-nano",)
    config = parse(tmp_path / "repository/ring-nano/config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("ring-nano", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [entry.name for entry in config.input] == [spec.name for spec in INPUTS]
    assert all(entry.optional for entry in config.input)
    assert [entry.name for entry in config.output] == [spec.name for spec in OUTPUTS]
    assert not config.HasField("sequence_batching")
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters["threads"] == "2"
    assert parameters["max_batch"] == "7"
    assert parameters["session_idle_seconds"] == "9"
    [group] = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_one_instance_per_gpu_keeps_sessions_together(nano: EngineBundle, tmp_path: Path) -> None:
    write_repository(nano, tmp_path / "r", TritonOptions(gpus=(0, 2), max_sessions=5))
    config = parse(tmp_path / "r/ring-nano/config.pbtxt")
    [group] = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert (list(group.gpus), group.count) == ([0, 2], 1)
    assert config.sequence_batching.oldest.max_candidate_sequences == 5
    assert config.sequence_batching.max_sequence_idle_microseconds == 600_000_000
    alone = TritonOptions(gpus=(0, 2), max_sessions=0)
    write_repository(nano, tmp_path / "r", alone, overwrite=True)
    assert not parse(tmp_path / "r/ring-nano/config.pbtxt").HasField("sequence_batching")


def test_the_bundle_is_copied_or_named(nano: EngineBundle, tmp_path: Path) -> None:
    copied = write_repository(nano, tmp_path / "copied", TritonOptions(name="m"))
    copy = EngineBundle.open(tmp_path / "copied/m/1/bundle")
    assert copy.digest == nano.digest
    assert copied.nbytes > nano.nbytes
    named = write_repository(nano, tmp_path / "named", TritonOptions(name="m", reference=True))
    config = parse(tmp_path / "named/m/config.pbtxt")
    assert config.parameters["bundle"].string_value == str(nano.directory)
    assert named.nbytes < 100_000


def test_the_page_has_the_command_and_every_tensor(nano: EngineBundle, tmp_path: Path) -> None:
    written = write_repository(nano, tmp_path / "a b", TritonOptions())
    page = (tmp_path / "a b/README.md").read_text()
    joined = page.replace(" \\\n  ", " ")
    assert shlex.join(written.command) in joined
    assert all(f"| `{spec.name}` |" in page for spec in (*INPUTS, *OUTPUTS))
    assert "No TensorRT step model" in page
    assert "@" not in page
    compile((tmp_path / "a b/client.py").read_text(), "client.py", "exec")
    compile((tmp_path / "a b/ring-nano/1/model.py").read_text(), "model.py", "exec")
    # ringexport is not to be had by its name alone.
    assert "pip install '\"'\"'/ringexport[ort]'" in page
    assert "-v /path/to/ringexport:/ringexport" in page
    assert not [line for line in page.splitlines() if line.endswith(" ")]


def test_the_client_without_a_server(nano: EngineBundle, tmp_path: Path) -> None:
    write_repository(nano, tmp_path / "r", TritonOptions(reference=True))
    client = runpy.run_path(str(tmp_path / "r/client.py"))
    with pytest.raises(SystemExit, match=r"^error: no server at 127\.0\.0\.1:1 serves ring-nano;"):
        client["main"](["Once upon"], url="127.0.0.1:1")


def test_a_repository_is_replaced_only_if_asked(nano: EngineBundle, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    write_repository(nano, path, TritonOptions(name="old", reference=True))
    with pytest.raises(OutputError, match="exists"):
        write_repository(nano, path, TritonOptions(name="new", reference=True))
    assert (path / "old").is_dir()
    (path / "old/1/__pycache__").mkdir()
    (path / "old/1/__pycache__/model.cpython-311.pyc").write_bytes(b"")
    write_repository(nano, path, TritonOptions(name="new", reference=True), overwrite=True)
    assert not (path / "old").exists()
    assert (path / "new").is_dir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]


def test_files_of_others_are_never_lost(nano: EngineBundle, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    options = TritonOptions(name="m", reference=True)
    with pytest.raises(OutputError, match="left alone"):
        write_repository(nano, other, options, overwrite=True)
    path = tmp_path / "repository"
    write_repository(nano, path, options)
    (path / "m/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"m/notes\.txt"):
        write_repository(nano, path, options, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no directory"):
        write_repository(nano, tmp_path / "file", options)


def test_a_failure_leaves_nothing_behind(
    nano: EngineBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TritonOptions(name="m", reference=True)
    write_repository(nano, tmp_path / "repository", options)
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "_write_index", full)
    with pytest.raises(OutputError, match="No space left"):
        write_repository(nano, tmp_path / "repository", options, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "values",
    [
        {"name": "a/b"},
        {"name": ""},
        {"instances": 0},
        {"max_batch": 129},
        {"max_sessions": -1},
        {"session_idle_seconds": 0},
        {"gpus": (0, 0)},
        {"plan_context": 0},
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        TritonOptions(**values)


def test_model_names_fit_triton() -> None:
    assert model_name("ring-nano") == "ring-nano"
    assert model_name("my model (v2)") == "my_model_v2_"
    assert model_name("...") == "ringexport"


def test_text_format_survives_odd_texts() -> None:
    odd = 'a "quoted" \\ name\n\twith ünïcode \x01'
    text = to_pbtxt({"name": odd, "input": [{"name": "x", "data_type": EnumName("TYPE_BOOL")}]})
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == odd
    assert config.input[0].data_type == model_config_pb2.TYPE_BOOL


def test_the_command(
    nano: EngineBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "repository")
    arguments = ["triton", str(nano.directory), "-o", output, "--reference"]
    assert run_cli([*arguments, "--json", "-q"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["models"] == ["ring-nano"]
    assert value["command"] == ["tritonserver", f"--model-repository={output}"]
    assert run_cli(arguments) == 6
    assert "--force" in capsys.readouterr().err
    assert run_cli([*arguments, "--force"]) == 0
    shown = capsys.readouterr().err
    assert f"tritonserver --model-repository={output}" in shown
    assert "left out: the bundle has no target tensorrt:" in shown
    assert run_cli([*arguments, "--force", "--gpus", "0,x"]) == 2
    assert run_cli([*arguments, "--force", "--name", "a/b"]) == 3
    capsys.readouterr()
    for backend in ("nope", "cuda:sm_90"):
        assert run_cli([*arguments, "--force", "--backend", backend]) == 4
        error, hint = capsys.readouterr().err.splitlines()[-2:]
        assert f"has no target '{backend}', it has onnxruntime:cpu" in error
        assert hint == "hint: choose auto or onnxruntime:cpu or torch"
    assert run_cli([*arguments, "--force", "--backend", "torch", "-q"]) == 0
