import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from ringexport.bundle import EngineBundle
from ringexport.pipeline import BuildRequest, resolve
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Call, assert_refused

SCHEMA = Path(__file__).parents[2] / "engines" / "manifest.schema.json"


def test_a_built_bundle_fits_the_schema(bundle: Path) -> None:
    value = json.loads((bundle / "manifest.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))


def test_a_built_bundle_is_complete(bundle: Path, tiny_checkpoint: Path) -> None:
    opened = EngineBundle.open(bundle)
    manifest = opened.manifest
    assert opened.source_path == tiny_checkpoint.resolve()
    assert manifest.build.targets == ("onnxruntime:cpu",)
    assert manifest.model.num_layers == 6
    assert set(manifest.decay.table) == {"0", "1", "3", "4"}
    assert all(value < 0 for values in manifest.decay.table.values() for value in values)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        copied = opened.path(f"model/{name}").read_bytes()
        assert copied == (tiny_checkpoint / name).read_bytes()


def test_two_builds_are_byte_identical(
    call: Call, bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    again = bundle.parent / "again"
    called = call("build", tiny_checkpoint, "-o", again, "--json")
    assert called.code == 0
    assert called.json["build"] == json.loads((bundle / "manifest.json").read_text())["build"]
    for path in bundle.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(bundle)).read_bytes(), path
    shutil.rmtree(again)
    assert list(tmp_path.iterdir()) == []


def test_progress_and_summary_go_to_stderr(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", "--recipe", "bf16")
    assert called.code == 0
    assert called.out == ""
    lines = called.err.splitlines()
    assert lines[0].startswith("checking the checkpoint: ")
    assert any(line.startswith("hashing the checkpoint: ") for line in lines)
    assert f"built {tmp_path / 'out'}: " in called.err
    assert "recipe bf16" in called.err
    assert "\x1b" not in called.err
    assert EngineBundle.open(tmp_path / "out").manifest.build.compute_dtype == "fp32"


def test_quiet_says_nothing(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", "--quiet")
    assert (called.code, called.out, called.err) == (0, "", "")


def test_decay_index_is_built_in(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "hf", "--decay-index", "hf", "-q")
    assert called.code == 0
    decay = EngineBundle.open(tmp_path / "hf").manifest.decay
    assert decay.form == "hf"
    assert decay.table["1"][0] == pytest.approx(-0.25, rel=1e-3)


def test_dry_run_writes_nothing(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "a" / "b", "--dry-run", "--json")
    assert called.code == 0
    assert called.json["build"] == {
        "recipe": "fp32",
        "compute_dtype": "fp32",
        "decay_index": "serving",
        "targets": ["onnxruntime:cpu"],
    }
    assert called.json["bundle_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    text = call("build", tiny_checkpoint, "-o", tmp_path / "a", "--dry-run")
    assert re.search("^decay index +serving$", text.out, re.MULTILINE)


def test_resolve_gives_one_hashable_value() -> None:
    request = BuildRequest(checkpoint=Path("a"), output=Path("b"))
    named = BuildRequest(
        checkpoint=Path("c"), output=Path("d"), recipe="fp32", targets=("onnxruntime:cpu",) * 2
    )
    assert {resolve(request), resolve(named)} == {resolve(request)}


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["--recipe", "fp9"], 3, ["unknown recipe 'fp9'", "did you mean fp8?", "int8"]),
        (["--target", "onnxruntime:cup"], 3, ["unknown target", "did you mean onnxruntime:cpu?"]),
        (["--target", "onnxruntime:cuda", "--recipe", "int8"], 3, ["not quantized", "fp32, bf16"]),
        (["--target", "cuda:sm_90"], 3, ["no kernels for head_dim 16", "64 or 128"]),
        (["--target", "cuda:sm_90", "--recipe", "fp8-static"], 3, ["quantize inputs per token"]),
        (["--target", "cuda:sm_91"], 3, ["unknown target 'cuda:sm_91'"]),
        (["--target", "tensorrt:sm_90"], 3, ["no kernels for head_dim 16", "64 or 128"]),
        (["--target", "tensorrt:sm_90+sm_100"], 3, ["is for one architecture"]),
        (["--target", "tensorrt-rtx:sm_90"], 3, ["do not run on sm_90", "sm_120"]),
        (["--target", "tensorrt-rtx:sm_89", "--recipe", "fp32"], 3, ["compute in bf16"]),
        (
            ["--target", "tensorrt-rtx:sm_80+sm_89", "--recipe", "fp8-block"],
            3,
            ["does not run the recipe fp8-block", "recipes that it runs: bf16, fp8, fp8-static"],
        ),
        (["--target", "tensorrt-rtx:sm_89", "--profile", "fast"], 3, ["unknown engine profile"]),
        (["--target", "tensorrt-rtx:sm_89", "--profile", ""], 3, ["unknown engine profile ''"]),
        (["--profile", "nope"], 3, ["no TensorRT engine is built for onnxruntime:cpu"]),
        (["--profile", "default"], 3, ["an engine profile is given", "leave out --profile"]),
        (["--stats", "no.stats"], 3, ["a calibration is given", "fp32 quantizes nothing"]),
        (["--calibration", "no", "--recipe", "bf16"], 3, ["bf16 quantizes nothing", "--stats"]),
        (["--calibration-samples", "2", "--dry-run"], 3, ["a calibration is given"]),
        (["--stats", "no", "--recipe", "fp8"], 3, ["cannot read the calibration stats no"]),
    ],
)
def test_requests_that_are_refused(
    call: Call,
    tiny_checkpoint: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    texts: list[str],
) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", *arguments)
    assert_refused(called, code, *texts)
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint(call: Call, tmp_path: Path) -> None:
    assert_refused(call("build", tmp_path / "no", "-o", tmp_path / "out"), 3, "does not exist")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_missing_file(call: Call, tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shards=1)
    (checkpoint / name).unlink()
    called = call("build", checkpoint, "-o", tmp_path / "out")
    assert_refused(called, 3)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite(call: Call, tmp_path: Path) -> None:
    """Found in the middle of the build: nothing is left behind."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shards=1)
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-200:] = b"\xff" * 200
    path.write_bytes(content)
    called = call("build", checkpoint, "-o", tmp_path / "out")
    assert_refused(called, 3, "nan")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_an_output_whose_name_is_not_utf8(call: Call, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"bad\xff")
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    assert_refused(call("build", checkpoint, "-o", output), 6, "is not UTF-8")


def test_output_and_checkpoint_must_be_apart(call: Call, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "parent" / "checkpoint")
    for output, how in {
        checkpoint: "is the checkpoint",
        checkpoint / "bundle": "is inside the checkpoint",
        checkpoint.parent: "holds the checkpoint",
    }.items():
        assert_refused(call("build", checkpoint, "-o", output), 6, f"the output {output} {how}")


def test_places_where_an_output_would_harm(
    call: Call, bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing takes the place of the current directory, and nothing is put into a bundle."""
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    own = shutil.copytree(bundle, tmp_path / "own")
    for output, text in {
        ".": "is the current directory",
        "..": "is the current directory",
        own / "sub": f"is inside the bundle {own}",
        own / "model" / "sub": f"is inside the bundle {own}",
    }.items():
        for command in (
            ("build", tiny_checkpoint),
            ("build", tiny_checkpoint, "--dry-run"),
            ("quantize", tiny_checkpoint),
            ("triton", own),
        ):
            assert_refused(call(*command, "-o", output), 6, text)
    assert list(here.iterdir()) == []
    EngineBundle.open(own)


def test_link_loops_are_refused(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for command in ("build", "quantize"):
        assert_refused(call(command, tiny_checkpoint, "-o", loop), 6, str(loop))
        assert_refused(call(command, tiny_checkpoint, "-o", loop / "x"), 6, str(loop))
        assert_refused(call(command, loop, "-o", tmp_path / "x"), 3, str(loop))


def test_foreign_directory_is_left_alone(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    called = call("build", tiny_checkpoint, "-o", tmp_path)
    assert_refused(called, 6, "is not a ringexport bundle; it is left alone")


def test_unwritable_output_is_refused_before_the_work(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    called = call("build", tiny_checkpoint, "-o", tmp_path / "file" / "out")
    assert_refused(called, 6, "cannot write", f"{tmp_path / 'file'} is not a directory")
    assert "writing the graph" not in called.err


def test_too_little_space_is_refused_before_the_work(
    call: Call, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out")
    assert_refused(called, 6, "not enough space", "may need up to", "1,000 bytes are free")
    assert "writing the graph" not in called.err
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_honest(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Enough, and not so much more that a disk that is large enough would be refused."""
    arguments = ("build", tiny_checkpoint, "-o", tmp_path / "out", "--json")
    bound = call(*arguments, "--dry-run").json["bundle_bytes"]
    size = call(*arguments).json["bytes"]
    assert size <= bound <= size * 1.02 + (3 << 20)


def test_output_names_that_are_too_long(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("n" * 300, "n" * 250):
        called = call("build", tiny_checkpoint, "-o", tmp_path / name)
        assert_refused(called, 6, "File name too long")


def test_a_pipe_is_no_config(call: Call, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    called = call("build", checkpoint, "-o", tmp_path / "out")
    assert_refused(called, 3, "config.json is not a regular file")


def test_hidden_files_of_the_user_survive(call: Call, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("ref")
    checkpoint = EngineBundle.open(bundle).source_path
    called = call("build", checkpoint, "-o", copy)
    assert_refused(called, 6, "such as .git/HEAD; replacing it would lose them")
    assert (copy / ".git" / "HEAD").exists()


def test_a_bundle_that_does_not_fit_into_memory_is_not_tried(
    call: Call, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringexport.pipeline.build._memory_bytes", lambda: 1000)
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", "--json")
    assert called.code == 0
    assert called.json["notes"] == [
        "onnxruntime:cpu was not tried: this machine has too little memory to load it"
    ]
    assert "note: onnxruntime:cpu was not tried" in called.err


def test_verbose_shows_the_decisions(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", "--verbose")
    assert called.code == 0
    assert "DEBUG ringexport.pipeline.build: BuildRequest" in called.err
    called = call("build", tiny_checkpoint, "-o", tmp_path / "out", "--quiet")
    assert called.err == "", "the next call is quiet again"
