"""Stats of a whole calibration against the reference model and numpy in fp64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ringexport.calibrate import CalibrationSettings, calibrate
from ringexport.calibrate.coverage import observed_modules
from ringexport.calibrate.prompts import tokenize
from ringexport.checkpoint import CheckpointWeights
from ringexport.model import ReferenceModel
from ringexport.stats import CLIP_OBSERVERS, CalibrationStats, Quantity
from tests.calibrate.samples import PROMPTS, SETTINGS, checkpoint, entry, rms_norm, silu
from tests.numerics import assert_close

torch.set_num_threads(1)
Taps = dict[str, np.ndarray]
MOE_LAYER = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("calibrate") / "model", {}, torch_dtype="float32")


@pytest.fixture(scope="module")
def stats(directory: Path) -> CalibrationStats:
    with CheckpointWeights.open(directory) as weights:
        return calibrate(weights, PROMPTS, SETTINGS)


@pytest.fixture(scope="module")
def taps(directory: Path) -> Taps:
    """The reference model's own view of the same tokens, packed: [N, ...]."""
    with CheckpointWeights.open(directory) as weights:
        samples = tokenize(
            PROMPTS, directory / "tokenizer.json", num_samples=99, max_tokens=48, vocab_size=384
        )
        model = ReferenceModel(weights.config, weights)
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    tokens = torch.zeros(len(samples), int(lengths.max()), dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.ids)] = torch.tensor(sample.ids)
    found: dict[str, torch.Tensor] = {}
    state = model.new_state(len(samples))
    model.forward(tokens, lengths, state, taps=found)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    packed = {name: tensor[valid].numpy() for name, tensor in found.items()}
    packed["lengths"] = lengths.numpy()
    for layer, (key, value) in state.kv_cache.items():
        packed[f"key.{layer}"] = key.transpose(1, 2)[:, : tokens.shape[1]][valid].numpy()
        packed[f"value.{layer}"] = value.transpose(1, 2)[:, : tokens.shape[1]][valid].numpy()
    for layer, recurrent in state.recurrent_state.items():
        packed[f"state.{layer}"] = recurrent.numpy()
    return packed


def test_every_module_has_every_quantity(stats: CalibrationStats, directory: Path) -> None:
    with CheckpointWeights.open(directory) as weights:
        modules = observed_modules(weights.config)
        matrices = [n for n in weights.names() if len(weights.info(n).shape) == 2]
    never = ("gate.weight", "word_embeddings.weight")
    assert set(modules) == {n.removesuffix(".weight") for n in matrices if not n.endswith(never)}
    for module in modules:
        assert entry(stats, module, Quantity.INPUT_ABSMAX).shape == (1,)
        assert entry(stats, module, Quantity.INPUT_CLIPS).shape == (len(CLIP_OBSERVERS),)
        if ".experts." not in module:
            assert entry(stats, module, Quantity.INPUT_TOKENS) == stats.num_tokens
            shares = entry(stats, module, Quantity.INPUT_HISTOGRAM)
            assert shares.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)
        if ".experts." not in module or module.endswith("down_proj"):
            channels = entry(stats, module, Quantity.INPUT_CHANNEL_ABSMAX)
            assert channels.max() == entry(stats, module, Quantity.INPUT_ABSMAX)


def test_sites_after_norms_match_fp64(stats: CalibrationStats, taps: Taps, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for layer in range(1, 6):
        prefix = f"model.layers.{layer}."
        norm = tensors[prefix + "input_layernorm.weight"].astype(np.float64)
        expected = np.abs(rms_norm(taps[f"hidden.{layer - 1}"], norm)).max(0)
        module = prefix + "attention.query_key_value"
        found = entry(stats, module, Quantity.INPUT_CHANNEL_ABSMAX)
        assert_close(found, expected, rtol=1e-5)
        samples = entry(stats, module, Quantity.INPUT_SAMPLES)
        assert samples.shape == (SETTINGS.sample_tokens, 64)
        assert (np.abs(samples).max(0) <= found).all()
    final = entry(stats, "lm_head", Quantity.INPUT_CHANNEL_ABSMAX)
    assert_close(final, np.abs(taps["hidden.final"]).max(0), rtol=1e-5)


def test_caches_and_states_are_those_of_the_reference(stats: CalibrationStats, taps: Taps) -> None:
    for layer in (2, 5):
        attention = f"model.layers.{layer}.attention"
        for name, quantity in (("key", Quantity.KEY_ABSMAX), ("value", Quantity.VALUE_ABSMAX)):
            cache = np.abs(taps[f"{name}.{layer}"])
            assert_close(entry(stats, attention, quantity), [cache.max()], rtol=1e-5)
            channels = entry(stats, f"{attention}.{name}_cache", Quantity.INPUT_CHANNEL_ABSMAX)
            assert_close(channels, cache.max(0).ravel(), rtol=1e-5)
            counted = entry(stats, f"{attention}.{name}_cache", Quantity.INPUT_TOKENS)
            assert counted == stats.num_tokens  # padding has slots in the cache, but is no token
    for layer in (0, 1, 3, 4):
        found = entry(stats, f"model.layers.{layer}.attention", Quantity.STATE_ABSMAX)
        assert_close(found, np.abs(taps[f"state.{layer}"]).max((0, 2, 3)), rtol=1e-5)


def test_experts_saw_exactly_the_tokens_that_chose_them(
    stats: CalibrationStats, taps: Taps
) -> None:
    for layer in range(1, 6):
        router = f"model.layers.{layer}.mlp.gate"
        expected = np.bincount(taps[f"expert_ids.{layer}"].ravel(), minlength=16)
        np.testing.assert_array_equal(entry(stats, router, Quantity.EXPERT_TOKENS), expected)
        forced = entry(stats, router, Quantity.EXPERT_FORCED)
        for expert in range(16):
            module = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            seen = entry(stats, module, Quantity.INPUT_TOKENS)
            assert seen == expected[expert] + forced[expert]


def test_input_of_down_proj_matches_fp64(
    stats: CalibrationStats, taps: Taps, directory: Path
) -> None:
    """Recomputed from the router's sampled inputs, whose tokens are all tokens here."""
    settings = CalibrationSettings(
        max_tokens=48, min_expert_tokens=0, max_blind_share=1.0, sample_tokens=4096
    )
    with CheckpointWeights.open(directory) as weights:
        everything = calibrate(weights, PROMPTS, settings)
    tensors = load_file(directory / "model.safetensors")
    mlp = f"model.layers.{MOE_LAYER}.mlp."
    normed = entry(everything, mlp + "gate", Quantity.INPUT_SAMPLES).astype(np.float64)
    expert_ids = taps[f"expert_ids.{MOE_LAYER}"]
    assert len(normed) == len(expert_ids) == stats.num_tokens
    checked = 0
    for expert in range(16):
        tokens = normed[(expert_ids == expert).any(1)]
        if not len(tokens):
            continue
        unit = f"{mlp}experts.{expert}."
        gate = tokens @ tensors[unit + "gate_proj.weight"].T.astype(np.float64)
        up = tokens @ tensors[unit + "up_proj.weight"].T.astype(np.float64)
        inner = np.abs(silu(gate) * up)
        found = entry(everything, unit + "down_proj", Quantity.INPUT_CHANNEL_ABSMAX)
        assert_close(found, inner.max(0), rtol=1e-5)
        absmax = entry(everything, unit + "gate_proj", Quantity.INPUT_ABSMAX)
        assert_close(absmax, [np.abs(tokens).max()], rtol=1e-6)
        checked += 1
    assert checked > 8


def test_batches_do_not_matter_beyond_rounding(stats: CalibrationStats, directory: Path) -> None:
    settings = replace(SETTINGS, batch_tokens=1)
    with CheckpointWeights.open(directory) as weights:
        alone = calibrate(weights, PROMPTS, settings)
    assert alone.entries.keys() == stats.entries.keys()
    for (module, quantity), found in alone.entries.items():
        exact = {Quantity.INPUT_TOKENS, Quantity.EXPERT_TOKENS, Quantity.EXPERT_FORCED}
        expected = stats.entries[module, quantity]
        if quantity in exact:
            np.testing.assert_array_equal(found, expected)
        elif quantity not in {Quantity.INPUT_HISTOGRAM, Quantity.INPUT_CLIPS}:
            assert_close(found, expected, rtol=1e-4)
