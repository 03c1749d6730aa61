"""Identity of stats, refusals, and that no module can go unobserved."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from ringexport.calibrate import CalibrationSettings, calibrate, collect, load_prompts
from ringexport.calibrate.clipping import ClipFinder
from ringexport.calibrate.coverage import check_complete, observed_modules
from ringexport.calibrate.stream import Batch, LayerResult, LayerStream, batches_of
from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.digest import checkpoint_digest
from ringexport.errors import BackendUnavailableError, CalibrationError, ConfigError
from ringexport.model import layers
from ringexport.ops.decay import DecayIndex
from ringexport.stats import CLIP_OBSERVERS, CalibrationStats, Quantity
from tests.calibrate import samples
from tests.calibrate.samples import PROMPTS, SMALL, Recorder, checkpoint, entry

torch.set_num_threads(1)
SETTINGS = replace(samples.SETTINGS, sample_tokens=0)  # faster: nothing is searched


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("calibrate") / "small", {}, **SMALL)


@pytest.fixture(scope="module")
def stats(small: Path) -> CalibrationStats:
    with CheckpointWeights.open(small) as weights:
        return calibrate(weights, PROMPTS, SETTINGS)


def test_two_runs_give_the_same_bytes_and_the_file_keeps_them(
    stats: CalibrationStats, small: Path, tmp_path: Path
) -> None:
    with CheckpointWeights.open(small) as weights:
        again = calibrate(weights, PROMPTS, SETTINGS)
        digest = checkpoint_digest(weights)
    assert again.to_bytes() == stats.to_bytes()
    assert again.model_digest == digest
    stats.save(tmp_path / "stats")
    assert CalibrationStats.load(tmp_path / "stats").to_bytes() == stats.to_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        replace(SETTINGS, max_tokens=20),
        replace(SETTINGS, decay_index=DecayIndex.HF),
        replace(SETTINGS, dtype="bfloat16"),
    ],
    ids=["max_tokens", "decay_index", "dtype"],
)
def test_other_settings_are_other_stats(
    stats: CalibrationStats, small: Path, changed: CalibrationSettings
) -> None:
    with CheckpointWeights.open(small) as weights:
        other = calibrate(weights, PROMPTS, changed)
    assert other.settings != stats.settings or other.calibration_set != stats.calibration_set
    module = "model.layers.3.mlp.shared_experts.down_proj"
    found, old = (entry(s, module, Quantity.INPUT_CHANNEL_ABSMAX) for s in (other, stats))
    assert (found != old).any()
    np.testing.assert_allclose(found, old, rtol=0.5)


def test_checkpoint_digest_covers_config_and_values(small: Path, tmp_path: Path) -> None:
    with CheckpointWeights.open(small) as weights:
        digest = checkpoint_digest(weights)
    same = checkpoint(tmp_path / "same", {}, **SMALL)
    value = checkpoint(tmp_path / "value", {2: {0: 0.125}}, **SMALL)
    config = checkpoint(tmp_path / "config", {}, **SMALL, rope_theta=20000)
    found = []
    for path in (same, value, config):
        with CheckpointWeights.open(path) as weights:
            found.append(checkpoint_digest(weights))
    assert found[0] == digest
    assert len({digest, *found}) == 3


def test_a_product_that_bypasses_the_taps_is_an_error(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What made others ship models with experts that were never calibrated."""

    def fused(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    monkeypatch.setattr(layers, "_swiglu", fused)
    with (
        CheckpointWeights.open(small) as weights,
        pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.gate_proj was observed with 0 tok"),
    ):
        calibrate(weights, PROMPTS, SETTINGS)


def test_one_expert_that_bypasses_the_taps_is_an_error(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_swiglu: Callable[..., torch.Tensor] = layers._swiglu
    dropped: list[int] = []

    def dropping(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        if len(hidden) < 20 and not dropped:  # one expert, once
            dropped.append(len(hidden))
            return true_swiglu(hidden, gate_up.clone(), down)
        return true_swiglu(hidden, gate_up, down)

    monkeypatch.setattr(layers, "_swiglu", dropping)
    with (
        CheckpointWeights.open(small) as weights,
        pytest.raises(CalibrationError, match=r"experts\.\d+\.gate_proj was observed with"),
    ):
        calibrate(weights, PROMPTS, SETTINGS)


@pytest.mark.parametrize("shared", [True, False])
def test_the_output_gate_has_to_read_what_the_projection_reads(small: Path, shared: bool) -> None:
    """Both are one site, observed once, which is right only while their input is one tensor."""
    with CheckpointWeights.open(small) as weights:
        config = weights.config
    shapes = {"query_key_value": (192, 64), "g_proj": (64, 64)}
    layer = {f"attention.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    index = torch.zeros(0, dtype=torch.int64)  # without samples nothing is searched
    collector = collect.LayerCollector(0, layer, config, min_expert_tokens=0, sample_index=index)
    batch = Batch(lengths=torch.tensor([5]), start=0, stop=5)
    hidden = torch.ones(5, 64)
    with collector.watch(batch):
        F.linear(hidden, layer["attention.query_key_value.weight"])
        F.linear(hidden if shared else hidden.clone(), layer["attention.g_proj.weight"])
    nothing = LayerResult(
        hidden=hidden, expert_ids=None, key=None, value=None, recurrent_state=None
    )
    collector.finish(batch, nothing)
    finder = ClipFinder(percentile=99.9)
    if shared:
        found = collector.entries(finder)
        absmax = [
            found[f"model.layers.0.attention.{name}", Quantity.INPUT_ABSMAX] for name in shapes
        ]
        assert absmax == [1.0, 1.0]
        return
    with pytest.raises(CalibrationError, match="g_proj was observed with 0 tokens, expected 5"):
        collector.entries(finder)


def test_a_site_that_is_forgotten_is_an_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_sites = collect.layer_sites

    def forgetful(prefix: str, weights: dict[str, torch.Tensor]) -> tuple[object, ...]:
        return tuple(s for s in true_sites(prefix, weights) if s.name != "attention.dense")

    monkeypatch.setattr(collect, "layer_sites", forgetful)
    with (
        CheckpointWeights.open(small) as weights,
        pytest.raises(CalibrationError, match=r"4 of \d+ modules were not observed: model\.la"),
    ):
        calibrate(weights, PROMPTS, SETTINGS)


def test_stats_without_a_module_are_refused(small: Path) -> None:
    with CheckpointWeights.open(small) as weights:
        config = weights.config
    modules = observed_modules(config)
    check_complete(modules, config)
    with pytest.raises(CalibrationError, match=r"1 of .* not observed: lm_head"):
        check_complete(modules[:-1], config)
    with pytest.raises(CalibrationError, match=r"1 modules that the model does not have: x\.y"):
        check_complete((*modules, "x.y"), config)


def test_infinity_in_an_activation_names_the_module(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "overflow", {}, **SMALL, torch_dtype="float32")
    tensors = load_file(path / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.2.mlp.experts.5.{name}.weight"] *= np.float32(1e30)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with (
        CheckpointWeights.open(path) as weights,
        pytest.raises(CalibrationError, match=r"layers\.2\.mlp\.experts\.down_proj holds a NaN"),
    ):
        calibrate(weights, PROMPTS, SETTINGS)


def test_tied_embeddings_have_an_lm_head(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "tied", {}, tie_word_embeddings=True, **SMALL)
    with CheckpointWeights.open(path) as weights:
        found = calibrate(weights, PROMPTS, SETTINGS)
    assert found.find("lm_head", Quantity.INPUT_ABSMAX) is not None


def test_weights_of_one_layer_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    true_load = LayerStream.load

    def load(self: LayerStream, layer: int) -> dict[str, torch.Tensor]:
        assert not [reference for reference in alive if reference() is not None]
        loaded = true_load(self, layer)
        alive.extend(weakref.ref(tensor) for tensor in loaded.values())
        return loaded

    monkeypatch.setattr(LayerStream, "load", load)
    with CheckpointWeights.open(small) as weights:
        calibrate(weights, PROMPTS, SETTINGS)
    assert len(alive) > 30


def test_progress_counts_tokens_times_layers(small: Path) -> None:
    progress = Recorder()
    with CheckpointWeights.open(small) as weights:
        found = calibrate(weights, PROMPTS, SETTINGS, progress=progress)
    assert ("calibrate", 4 * found.num_tokens, "tokens x layers") in progress.stages
    assert progress.amounts["calibrate"] == 4 * found.num_tokens
    digest_stage = next(stage for stage in progress.stages if stage[2] == "bytes")
    assert progress.amounts[digest_stage[0]] == digest_stage[1]


def test_samples_are_cut_and_counted(small: Path) -> None:
    settings = CalibrationSettings(num_samples=2, max_tokens=5, max_blind_share=1.0)
    with CheckpointWeights.open(small) as weights:
        found = calibrate(weights, PROMPTS, settings)
    assert (found.num_samples, found.num_tokens) == (2, 5 + 3)  # the second is "a", " b", " c"


def test_batches_are_consecutive_and_bounded() -> None:
    lengths = [5, 3, 9, 1, 1, 20, 2]
    batches = list(batches_of(lengths, 12))
    assert [batch.lengths.tolist() for batch in batches] == [[5, 3], [9], [1, 1], [20], [2]]
    assert [(batch.start, batch.stop) for batch in batches] == [
        (0, 8), (8, 17), (17, 19), (19, 39), (39, 41)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_blind_share": 1.5}, "max_blind_share is 1.5"),
        ({"percentile": 0.0}, "percentile is 0.0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**values)


@pytest.mark.parametrize(
    ("device", "error"),
    [("cuda:99", BackendUnavailableError), ("mps", ConfigError), ("no such", ConfigError)],
)
def test_devices_that_are_not_there(small: Path, device: str, error: type[Exception]) -> None:
    with CheckpointWeights.open(small) as weights, pytest.raises(error, match="device"):
        calibrate(weights, PROMPTS, CalibrationSettings(device=device))


def test_shipped_prompts_are_found_by_name() -> None:
    prompts = load_prompts("english")
    assert len(prompts.texts) > 64
    assert all(prompts.sources)


def test_with_ranges_takes_one_observer(stats: CalibrationStats) -> None:
    module = "model.layers.1.attention.dense"
    clips = entry(stats, module, Quantity.INPUT_CLIPS)
    assert stats.input_range(module) == entry(stats, module, Quantity.INPUT_ABSMAX)
    for column, name in enumerate(CLIP_OBSERVERS):
        assert stats.with_ranges(name).input_range(module) == clips[column]
    assert stats.with_ranges("int8:mse").with_ranges("absmax").to_bytes() == stats.to_bytes()
    with pytest.raises(CalibrationError, match="observer 'maximum' is not known"):
        stats.with_ranges("maximum")
