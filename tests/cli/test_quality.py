"""eval --against of a quantized checkpoint, its report, and quantize --sensitivity."""

import tomllib
from pathlib import Path

import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.quantize.run import estimate
from ringexport.quantize.shipped import load_recipe
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Call, assert_refused
from tests.quantize.stats import make_stats

TEXT = "The gulls over the harbour said nothing of it, and the boats came home late. " * 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("plain") / "plain",
        num_hidden_layers=3,
        num_experts=8,
        shards=1,
        max_position_embeddings=64,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_quantized_checkpoint_against_the_plain_one(
    call: Call, plain: Path, text: Path, tmp_path: Path
) -> None:
    with CheckpointWeights.open(plain) as weights:
        make_stats(weights.config).save(tmp_path / "stats")
    assert call("quantize", plain, "-o", tmp_path / "q", "--recipe", "fp8").code == 0
    arguments = ("eval", tmp_path / "q", "--text", text, "--against", plain)
    found = call(*arguments, "--json").json
    assert found["kl_mean"] > 0
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert [row["kind"] for row in found["layers"]] == ["linear", "linear", "softmax"]
    assert found["layers"][0]["expert_agreement"] is None
    assert all(0 < row["hidden_error"] < 1 for row in found["layers"])
    assert found["drift"] == []
    table = call(*arguments)
    assert "same experts" in table.out
    assert "perplexity change" in table.out
    report = tmp_path / "report.html"
    called = call(*arguments, "--report", report, "--stats", tmp_path / "stats", "--json")
    assert called.code == 0, called.err
    assert [point["steps"] for point in called.json["drift"]] == [64]
    assert called.json["longest_context"]["tokens"] == 64
    assert report.read_text(encoding="utf-8").count("<svg") == 5  # no expert counts in the stats
    assert [path.name for path in tmp_path.glob("*.tmp-*")] == []


def test_a_report_needs_a_reference_and_a_place(
    call: Call, plain: Path, text: Path, tmp_path: Path
) -> None:
    called = call("eval", plain, "--text", text, "--report", tmp_path / "r.html")
    assert_refused(called, 3, "--report needs --against")
    arguments = ("eval", plain, "--text", text, "--against", plain, "--max-tokens", 8)
    called = call(*arguments, "--report", tmp_path / "no" / "r.html")
    assert_refused(called, 6, "cannot write", "no such file")
    assert_refused(call(*arguments, "--report", tmp_path), 6, "it is a folder")
    # A folder that is there, where even root may make no file: found out before the measuring.
    assert_refused(call(*arguments, "--report", "/proc/r.html"), 6, "cannot write /proc/r.html")
    assert "scoring" not in call(*arguments, "--report", "/proc/r.html").err
    called = call(*arguments, "--stats", text)
    assert_refused(called, 3, "--stats needs --report")


def test_sensitivity_writes_a_recipe_for_a_budget(
    call: Call, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringexport.pipeline.gate.shipped_texts.__defaults__", (24,))
    output = tmp_path / "mixed.toml"
    size = str(estimate(plain, load_recipe("fp8")).output_bytes + 20_000)
    called = call("quantize", plain, "-o", output, "--sensitivity", size, "--json")
    assert called.code == 0, called.err
    found = called.json
    assert len(found["groups"]) == 7
    assert found["mixed"]["bytes"] <= int(size)
    recipe = tomllib.loads(output.read_text(encoding="utf-8"))
    assert recipe["base"] == "fp8"
    assert recipe["rules"][0]["targets"] == found["mixed"]["kept"]
    assert estimate(plain, load_recipe(str(output))).output_bytes == found["mixed"]["bytes"]


def test_sensitivity_refuses(call: Call, plain: Path, tmp_path: Path) -> None:
    arguments = ("quantize", plain, "--sensitivity")
    assert_refused(call(*arguments, "1MB", "-o", tmp_path / "out"), 3, "not a .toml file")
    assert_refused(call(*arguments, "big", "-o", tmp_path / "o.toml"), 3, "the size 'big'")
    for size, output, code, message in (
        ("1kB", tmp_path / "o.toml", 3, "alone takes"),
        ("1GB", Path("/proc/o.toml"), 6, "cannot write"),
    ):
        called = call(*arguments, size, "-o", output)
        assert_refused(called, code, message)
        assert "groups" not in called.err  # before any is measured


@pytest.fixture
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringexport.pipeline.gate.shipped_texts.__defaults__", (24,))


@pytest.mark.usefixtures("_few_tokens")
def test_a_build_passes_its_gate_or_leaves_nothing(call: Call, plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    arguments = ("build", plain, "-o", output, "--recipe", "fp8", "--json")
    called = call(*arguments, "--gate", "kl=1e9")
    assert_refused(called, 3, "kl of the gate", "kl=0.005")
    assert_refused(call(*arguments, "--gate", "kld=1"), 3, "did you mean 'kl'?")
    assert_refused(call(*arguments, "--gate-fallback"), 3, "--gate-fallback needs --gate")
    refused = call("build", plain, "-o", output, "--gate", "kl=1")
    assert_refused(refused, 3, "quantizes nothing")
    called = call(*arguments, "--gate", "kl=0.0000001")
    assert_refused(called, 1, "does not pass the gate", "--gate-fallback")
    assert sorted(tmp_path.iterdir()) == []
    called = call(*arguments, "--gate", "kl=1000")
    assert called.code == 0, called.err
    assert any("passes the gate kl=1000" in note for note in called.json["notes"])


@pytest.mark.usefixtures("_few_tokens")
def test_a_build_says_what_it_left_unquantized(call: Call, plain: Path, tmp_path: Path) -> None:
    arguments = ("build", plain, "-o", tmp_path / "bundle", "--recipe", "fp8")
    found = call(*arguments, "--gate", "kl=1000", "--json").json["notes"]
    kl = float(next(note for note in found if "gate" in note).split("KL mean ")[1].split(",")[0])
    called = call(*arguments, "--gate", f"kl={kl / 3:.9f}", "--gate-fallback", "--json")
    assert called.code == 0, called.err
    changes = [note for note in called.json["notes"] if "stays unquantized" in note]
    assert changes
    manifest = (tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8")
    assert all(change in manifest for change in changes)
