"""run, eval, compare, bench and inspect on a tiny bundle."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from ringexport.bundle import EngineBundle
from ringexport.cli import main as main_module
from ringexport.errors import ConfigError, ToleranceExceededError
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Call, assert_refused

TEXT = "the rain in the plain and the sun on the hill\n" * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def other(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A bundle of the same checkpoint with another decay."""
    path = tmp_path / "other"
    arguments = ("build", tiny_checkpoint, "-o", path, "--decay-index", "hf", "-q")
    assert call(*arguments).code == 0
    return path


def test_run_streams_text_to_stdout_and_numbers_to_stderr(call: Call, bundle: Path) -> None:
    called = call("run", bundle, "the rain", "--max-new-tokens", 5)
    assert called.code == 0
    assert called.out.endswith("\n")
    assert "prompt tokens, 5 new tokens, first token" in called.err
    assert "stopped by: --max-new-tokens reached" in called.err


def test_run_gives_the_same_text_in_every_form(call: Call, bundle: Path) -> None:
    arguments = ("run", bundle, "the rain", "--max-new-tokens", 8)
    streamed = call(*arguments)
    whole = call(*arguments, "--no-stream", "--quiet")
    from_stdin = call("run", bundle, "-", "--max-new-tokens", 8, stdin=b"the rain\n")
    as_json = call(*arguments, "--json").json
    assert streamed.out == whole.out == from_stdin.out == as_json["text"] + "\n"
    assert whole.err == ""
    assert as_json["stop_reason"] == "length"
    assert as_json["new_tokens"] == len(as_json["token_ids"]) == 8
    assert as_json["timings"]["total_ms"] > 0
    assert as_json["backend"] == "onnxruntime:cpu"


def test_run_gives_the_same_text_with_the_reference(
    call: Call, bundle: Path, tiny_checkpoint: Path
) -> None:
    arguments = ("the rain", "--max-new-tokens", 16, "-q")
    text = call("run", bundle, *arguments).out
    assert call("run", bundle, *arguments, "--backend", "torch").out == text
    assert call("run", tiny_checkpoint, *arguments).out == text


def test_the_backend_can_come_from_the_environment(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGEXPORT_BACKEND", "torch")
    called = call("run", bundle, "x", "--max-new-tokens", 1, "--json")
    assert called.json["backend"] == "torch"


def test_an_unknown_backend(call: Call, bundle: Path, tiny_checkpoint: Path) -> None:
    called = call("run", bundle, "x", "--backend", "nope")
    assert_refused(called, 4, "no backend 'nope'", "choose auto or onnxruntime:cpu or torch")
    called = call("run", tiny_checkpoint, "x", "--backend", "nope")
    assert_refused(called, 4, "no backend 'nope'", "choose auto or torch")


def test_a_missing_value_names_the_help_of_its_command(call: Call, bundle: Path) -> None:
    called = call("serve", bundle, "--model-name")
    assert_refused(called, 2, "requires an argument", "ringexport serve --help shows")


def test_a_truncated_manifest_is_told_in_plain_words(
    call: Call, bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "manifest.json").write_text('{"format": "ring')
    called = call("run", copy, "x")
    assert_refused(called, 3, "not valid JSON: Unterminated string starting at line 1, column 12")


def test_run_samples_with_a_seed(call: Call, bundle: Path) -> None:
    arguments = ("run", bundle, "the", "--max-new-tokens", 12, "--temperature", 1, "--top-k", 50)
    texts = [call(*arguments, "--seed", seed, "-q").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_run_stops_at_a_text(call: Call, bundle: Path) -> None:
    whole = call("run", bundle, "the rain", "--max-new-tokens", 8, "--json").json["text"]
    stop = whole[2:4]
    result = call("run", bundle, "the rain", "--stop", stop, "--json").json
    assert result["stop_reason"] == "stop_text"
    assert result["text"] == whole[: whole.index(stop)]


def test_run_chat_uses_the_template(call: Call, bundle: Path) -> None:
    plain = call("run", bundle, "hello", "--max-new-tokens", 1, "--json").json
    chat = call("run", bundle, "hello", "--chat", "--max-new-tokens", 1, "--json").json
    brief = call(
        "run", bundle, "hello", "--chat", "--no-thinking", "--max-new-tokens", 1, "--json"
    ).json
    assert plain["prompt_tokens"] < min(chat["prompt_tokens"], brief["prompt_tokens"])
    assert chat["prompt_tokens"] != brief["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        ([""], 3, ["the prompt is empty"]),
        (["x", "--top-p", "2"], 2, ["'--top-p'", "0<x<=1"]),
        (["x", "--top-p", "nan"], 2, ["'--top-p'", "not a finite number"]),
        (["x", "--top-p", "0"], 2, ["'--top-p'"]),
        (["x", "--min-p", "1.5"], 2, ["'--min-p'"]),
        (["x", "--min-p", "nan"], 2, ["'--min-p'"]),
        (["x", "--temperature", "inf"], 2, ["'--temperature'"]),
        (["x", "--temperature", "nan"], 2, ["'--temperature'"]),
        (["x", "--repetition-penalty", "0"], 2, ["'--repetition-penalty'"]),
        (["x", "--repetition-penalty", "inf"], 2, ["'--repetition-penalty'"]),
        (["x", "--top-k", "9" * 30], 2, ["'--top-k'"]),
        (["x", "--max-new-tokens", "9" * 30], 2, ["'--max-new-tokens'"]),
        (["x", "--backend", "gpu"], 4, ["no backend 'gpu'", "onnxruntime:cpu", "torch"]),
        (["x", "--backend", "onnxruntime:cuda"], 4, ["has no target onnxruntime:cuda"]),
        (["x", "--backend", "cuda:sm_90"], 4, ["no target cuda:sm_90, it has onnxruntime:cpu"]),
        (["x", "--backend", "tensorrt:sm_90"], 4, ["has no target tensorrt:sm_90, it has"]),
        (["x", "--backend", "tensorrt-rtx:sm_89+sm_120"], 4, ["has no target tensorrt-rtx:"]),
        (["--input", "no.jsonl", "--output", "out.jsonl"], 3, ["no.jsonl", "check the path"]),
        (["x", "--temperature", "-1"], 2, ["temperature"]),
        (["x" * 9000], 3, ["holds 4,096"]),
        (["\udcff"], 3, ["not UTF-8"]),
        (["x", "--stop", ""], 2, ["'--stop'", "may not be empty"]),
        (["\udcff"], 3, ["hint: convert the prompt to UTF-8"]),
    ],
)
def test_run_refuses(
    call: Call, bundle: Path, arguments: list[str], code: int, texts: list[str]
) -> None:
    assert_refused(call("run", bundle, *arguments), code, *texts)


def test_run_refuses_bytes_on_stdin(call: Call, bundle: Path) -> None:
    assert_refused(call("run", bundle, "-", stdin=b"\xff\xfe"), 3, "not UTF-8")


def test_run_refuses_a_damaged_bundle(call: Call, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = copy / "targets/onnxruntime-cpu/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(call("run", copy, "x"), 3, "was not copied completely")


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_missing_bundle(call: Call, tmp_path: Path, command: str) -> None:
    extra = ["x"] if command == "run" else []
    assert_refused(call(command, tmp_path / "none", *extra), 3)


def test_eval(call: Call, bundle: Path, text: Path) -> None:
    called = call("eval", bundle, "--text", text, "--json")
    assert called.code == 0
    total = called.json["total"]
    assert total["bytes"] == len(TEXT) - 1
    assert total["tokens"] > 0
    assert total["perplexity"] > 1
    assert called.json["files"] == {str(text): total}
    table = call("eval", bundle, "--text", text, "--text", text)
    assert "bits per byte" in table.out


def test_eval_windows_and_limits(call: Call, bundle: Path, text: Path) -> None:
    whole = call("eval", bundle, "--text", text, "--json").json["total"]
    cut = call("eval", bundle, "--text", text, "--window", 16, "--json").json["total"]
    few = call("eval", bundle, "--text", text, "--max-tokens", 16, "--json").json["total"]
    assert cut["tokens"] == whole["tokens"]
    assert cut["nats"] != whole["nats"]
    assert few["tokens"] == 15


def test_eval_against_the_checkpoint(
    call: Call, bundle: Path, tiny_checkpoint: Path, text: Path
) -> None:
    found = call("eval", bundle, "--text", text, "--against", tiny_checkpoint, "--json").json
    assert abs(found["perplexity_change"]) < 1e-5
    assert found["top1_agreement"] == 1
    assert found["kl_mean"] < 1e-9


def test_eval_of_another_decay_differs(call: Call, bundle: Path, other: Path, text: Path) -> None:
    found = call("eval", other, "--text", text, "--against", bundle)
    assert found.code == 0
    assert "perplexity change" in found.out
    as_json = call("eval", other, "--text", text, "--against", bundle, "--json").json
    assert as_json["kl_mean"] > 1e-6


def test_eval_refuses(call: Call, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    called = call("eval", bundle, "--text", tmp_path / "short")
    assert_refused(called, 3, f"nothing to score in {tmp_path / 'short'}")
    assert_refused(call("eval", bundle, "--text", tmp_path / "binary"), 3, "not UTF-8", "0xff")
    assert_refused(call("eval", bundle, "--text", tmp_path / "no"), 3, "cannot read")
    assert_refused(call("eval", bundle, "--text", tmp_path), 3, "cannot read")
    assert_refused(call("eval", bundle), 2, "missing option '--text'")
    arguments = ("eval", bundle, "--text", tmp_path / "short", "--decay-index", "hf")
    assert_refused(call(*arguments), 3, "was built with the decay index serving")


def test_eval_reads_only_regular_files(
    call: Call, bundle: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (Path("/dev/zero"), tmp_path / "fifo"):
        assert_refused(call("eval", bundle, "--text", path), 3, f"{path}: it is not a regular file")
    monkeypatch.setattr("ringexport.cli.opening._MAX_TEXT_BYTES", 10)
    assert_refused(call("eval", bundle, "--text", text), 3, "expected at most 10")


def test_eval_refuses_a_window_beyond_the_context(call: Call, bundle: Path, text: Path) -> None:
    called = call("eval", bundle, "--text", text, "--window", 4097)
    assert_refused(called, 2, "'--window'", "expected 2 to 4096")


def test_no_verify_reads_no_digests(call: Call, bundle: Path, text: Path) -> None:
    for arguments in (
        ("eval", bundle, "--text", text),
        ("compare", bundle, "--against", bundle, "--tokens", 8),
    ):
        assert "verifying" in call(*arguments).err
        called = call(*arguments, "--no-verify")
        assert called.code == 0
        assert "verifying" not in called.err


def test_compare_with_torch(call: Call, bundle: Path) -> None:
    called = call("compare", bundle, "--against", "torch", "--tokens", 64, "--json")
    assert called.code == 0
    rows = called.json["rows"]
    assert called.json["passed"]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("hidden") == 7
    assert kinds.count("experts") == 5
    assert kinds.count("state") == 4 + 2 * 2
    bounded = [row for row in rows if row["bound"] is not None]
    assert all(row["passed"] for row in bounded)
    hidden = [row["value"] for row in rows if row["kind"] == "hidden"]
    assert 0 < max(hidden) < 1e-5


def test_compare_breaks_no_name_at_80_columns(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringexport.cli.console._PIPE_COLUMNS", 80)
    called = call("compare", bundle, "--against", bundle, "--tokens", 8)
    rows = [line.split() for line in called.out.splitlines() if line.startswith("state ")]
    assert any(row[1] == "recurrent_state.0" for row in rows)
    assert any(re.fullmatch(r"kv_cache\.\d+\.value", row[1]) for row in rows)
    assert max(map(len, called.out.splitlines())) <= 80


def test_compare_finds_another_decay(call: Call, bundle: Path, other: Path) -> None:
    called = call("compare", other, "--against", bundle, "--tokens", 48)
    assert called.code == 1
    assert "FAIL" in called.out
    assert "error: " in called.err
    assert "out of bounds, first hidden 0" in called.err
    expected = f"built with different decay indices, so nothing will agree: {other} with hf"
    assert called.out.startswith(expected)
    as_json = call("compare", other, "--against", bundle, "--tokens", 48, "--json")
    assert as_json.code == 1
    assert not as_json.json["passed"]
    assert as_json.json["warning"].startswith(expected)


def test_compare_refuses(
    call: Call, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compare", bundle, "--against", "torch")
    another = make_checkpoint(tmp_path / "another", seed=1)
    for path in (tmp_path / "moved", another):
        called = call(*arguments, "--checkpoint", path)
        expected = f"error: {path} is not the checkpoint that the bundle was built from"
        assert_refused(called, 3, expected, "--checkpoint")
    called = call("compare", bundle, "--against", "torhc")
    assert_refused(called, 2, "'--against'", "no bundle at torhc; did you mean torch?")
    monkeypatch.setattr("ringexport.compare.sample.SAMPLE_TEXT", None)  # never comes that far
    called = call("compare", bundle, "--against", bundle, "--tokens", 1_000_000_000)
    assert_refused(called, 2, "'--tokens'", "expected 2 to 4096")
    monkeypatch.undo()
    called = call("compare", bundle, "--against", bundle, "--tokens", 5000)
    assert_refused(called, 2, "'--tokens'", "expected 2 to 4096")
    (tmp_path / "one").write_text("a")
    assert_refused(call(*arguments, "--text", tmp_path / "one"), 3, "expected at least 2")


BENCH = ("--prefill", "8,16", "--context", "8", "--decode", "4", "--repeat", "1")


def test_bench(call: Call, bundle: Path) -> None:
    called = call("bench", bundle, *BENCH, "--batch", "1,2", "--context", "8,12", "--json")
    assert called.code == 0
    results = called.json["results"]
    assert [result["backend"] for result in results] == ["onnxruntime:cpu", "torch"]
    for result in results:
        assert set(result["first_token_ms"]) == {"8", "16"}
        assert set(result["decode_tokens_per_s"]) == {"8", "12"}
        for speeds in result["decode_tokens_per_s"].values():
            assert set(speeds) == {"1", "2"}
    assert called.json["agreed_greedy_tokens"] == 32
    for name in ("cpu", "onnxruntime", "torch", "ringexport"):
        assert called.json["conditions"][name]


def test_bench_table(call: Call, bundle: Path) -> None:
    only = ("--backend", "onnxruntime:cpu")
    called = call("bench", bundle, *BENCH, "--context", "8,12", "--no-verify", *only)
    assert called.code == 0
    assert "verifying" not in called.err
    assert "decode after 8 tokens, batch 1" in called.out
    assert "decode after 12 tokens, batch 1" in called.out
    assert "first token, prompt of 16 tokens" in called.out
    assert "faster" not in called.out


def test_bench_without_the_checkpoint_says_so(call: Call, bundle: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(bundle, tmp_path / "deep" / "er" / "copy"))
    called = call("bench", moved, *BENCH)
    assert called.code == 0
    assert "not measured: torch: " in called.out


def test_bench_refuses_wrong_results(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(runners: list[object]) -> None:
        raise ToleranceExceededError(f"{len(runners)} runners disagree")

    monkeypatch.setattr("ringexport.compare.speed.check_agreement", disagree)
    assert_refused(call("bench", bundle, *BENCH), 1, "2 runners disagree")


def test_bench_refuses(call: Call, bundle: Path) -> None:
    assert_refused(call("bench", bundle, "--batch", "1,x"), 2, "'1,x' is no list")
    only = ("--backend", "onnxruntime:cpu")
    for option, value, text in (
        ("--prefill", "9999", "holds 4096"),
        ("--context", "8,4090", "holds 4096"),
        ("--decode", "4090", "with --context it makes 4218 tokens"),
        ("--decode", "16777216", "holds 4096"),
        ("--batch", "100000000", "1 to 1,024"),
        ("--batch", "1,0", "1 to 1,024"),
        ("--context", "9" * 18, "not in the range"),
    ):
        called = call("bench", bundle, *only, option, value)
        assert_refused(called, 2, f"'{option}'", text)
        assert "loading" not in called.err


def test_inspect_a_checkpoint(call: Call, tiny_checkpoint: Path) -> None:
    found = call("inspect", tiny_checkpoint, "--json").json
    assert found["kind"] == "checkpoint"
    assert sum(row["bytes"] for row in found["kinds"]) == found["bytes"]
    assert [row["attention"] for row in found["layers"]][:3] == ["linear", "linear", "softmax"]
    assert "6: 4 linear, 2 softmax" in call("inspect", tiny_checkpoint).out


def test_inspect_a_bundle(call: Call, bundle: Path) -> None:
    found = call("inspect", bundle, "--json").json
    assert found["kind"] == "bundle"
    assert found["digest"] == EngineBundle.open(bundle).digest
    assert found["targets"][0]["target"] == "onnxruntime:cpu"
    assert len(found["files"][0]["sha256"]) == 64
    shown = call("inspect", bundle, "--no-verify").out
    assert "decay index     serving" in shown


def test_inspect_files(call: Call, bundle: Path, tiny_checkpoint: Path) -> None:
    tensors = call("inspect", next(tiny_checkpoint.glob("*.safetensors")))
    assert tensors.code == 0
    assert "more; --all shows them" in tensors.out
    graph = call("inspect", bundle / "targets/onnxruntime-cpu/model.onnx", "--json").json
    assert graph["kind"] == "onnx"
    assert {"name": "position", "dtype": "int32", "shape": "B"} in graph["inputs"]


def test_inspect_refuses(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08nonsense")
    (tmp_path / "b.onnx").write_bytes(b"")
    (tmp_path / "c.safetensors").write_bytes(b"12")
    (tmp_path / "d.txt").write_text("x")
    assert_refused(call("inspect", tmp_path / "a.onnx"), 3, "is no ONNX file")
    assert_refused(call("inspect", tmp_path / "b.onnx"), 3, "is no ONNX file")
    assert_refused(call("inspect", tmp_path / "c.safetensors"), 3)
    assert_refused(call("inspect", tmp_path / "d.txt"), 3, "nothing that ringexport knows")


def test_a_bug_is_reported_in_two_lines(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("ringexport.pipeline.inspect.describe", fail)
    called = call("inspect", bundle)
    assert called.code == main_module.EXIT_BUG
    assert called.err.splitlines() == [
        "error: this is a bug in ringexport: ZeroDivisionError: division",
        f"hint: {main_module.ISSUES_HINT}",
    ]
    assert "Traceback" in call("inspect", bundle, "-v").err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_too_little_memory_is_no_bug(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ringexport.pipeline.inspect.describe", fail)
    called = call("inspect", bundle)
    assert_refused(called, 7, "error: out of memory while running ringexport inspect")
    assert f"hint: {main_module.MEMORY_HINT}" in called.err


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_names_that_are_too_long(call: Call, command: str) -> None:
    extra = ["x"] if command == "run" else []
    assert_refused(call(command, "n" * 300, *extra), 3, "ile name too long")


def test_hints_help_or_are_left_out(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_attention_heads": -3}))
    published = "hint: use the config.json published with the weights"
    assert_refused(call("inspect", checkpoint), 3, published)

    def fail(*_: object, **__: object) -> None:
        raise ConfigError("cannot read x") from cause

    monkeypatch.setattr("ringexport.pipeline.inspect.describe", fail)
    cause = PermissionError(13, "permission denied")
    assert_refused(call("inspect", bundle), 3, "hint: check the permissions of the file")
    cause = None
    assert "hint" not in call("inspect", bundle).err


def test_an_interrupt_ends_with_130(
    call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ringexport.pipeline.inspect.describe", interrupt)
    called = call("inspect", bundle)
    assert (called.code, called.err.strip()) == (130, "interrupted")


def test_json_is_all_there_is_on_stdout(call: Call, bundle: Path, text: Path) -> None:
    for arguments in (
        ("inspect", bundle),
        ("doctor",),
        ("eval", bundle, "--text", text),
        ("run", bundle, "x", "--max-new-tokens", 1),
    ):
        json.loads(call(*arguments, "--json").out)
