"""Starved and blind experts, against the router's rules written out in numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from ringexport.calibrate import CalibrationSettings, calibrate
from ringexport.calibrate.coverage import Candidates, check_blind
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import CalibrationError
from ringexport.model.layers import route
from ringexport.stats import CalibrationStats, Quantity
from tests.calibrate.samples import PROMPTS, Recorder, checkpoint, entry, experts_of
from tests.checkpoints import tiny_config

torch.set_num_threads(1)
CONFIG = {"num_hidden_layers": 4, "layer_group_size": 2}
NUM_EXPERTS, GROUPS, OPEN_GROUPS = 16, 4, 2
STARVED_LAYER, STARVED = 1, 5
BLIND_LAYER, BLIND = 2, (12, 13, 14, 15)
BIASES = {STARVED_LAYER: {STARVED: -0.9}, BLIND_LAYER: dict.fromkeys(BLIND, -2.0)}
MINIMUM = 8
SETTINGS = CalibrationSettings(
    max_tokens=48,
    batch_tokens=100,
    min_expert_tokens=MINIMUM,
    max_blind_share=1.0,
    sample_tokens=4096,  # more than there are: all inputs are kept
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coverage") / "model"
    return checkpoint(path, BIASES, torch_dtype="float32", **CONFIG)


@pytest.fixture(scope="module")
def progress() -> Recorder:
    """What was said while `stats` were made."""
    return Recorder()


@pytest.fixture(scope="module")
def stats(directory: Path, progress: Recorder) -> CalibrationStats:
    return run(directory, SETTINGS, progress)


def run(
    directory: Path, settings: CalibrationSettings, progress: Recorder | None = None
) -> CalibrationStats:
    with CheckpointWeights.open(directory) as weights:
        return calibrate(weights, PROMPTS, settings, progress=progress)


def open_ranks(
    stats: CalibrationStats, directory: Path, layer: int, expert: int
) -> npt.NDArray[np.int64]:
    """Rank of an expert among those of each token's open groups, -1 where its group is closed."""
    tensors = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{layer}.mlp.gate"
    normed = entry(stats, prefix, Quantity.INPUT_SAMPLES)
    logits = normed.astype(np.float64) @ tensors[f"{prefix}.weight"].T.astype(np.float64)
    biased = 1 / (1 + np.exp(-logits)) + tensors[f"{prefix}.expert_bias"]
    grouped = np.sort(biased.reshape(len(biased), GROUPS, -1), axis=-1)
    best_groups = np.argsort(-grouped[..., -2:].sum(-1), axis=-1)[:, :OPEN_GROUPS]
    size = NUM_EXPERTS // GROUPS
    is_open = np.zeros(biased.shape, bool)
    for token, groups in enumerate(best_groups):
        for group in groups:
            is_open[token, group * size : (group + 1) * size] = True
    better = is_open & (biased > biased[:, expert : expert + 1])
    return np.where(is_open[:, expert], better.sum(1), -1)


def test_a_starved_expert_gets_the_minimum(stats: CalibrationStats) -> None:
    chosen = experts_of(stats, STARVED_LAYER, Quantity.EXPERT_TOKENS)
    forced = experts_of(stats, STARVED_LAYER, Quantity.EXPERT_FORCED)
    assert chosen[STARVED] == 0
    assert forced[STARVED] == MINIMUM
    np.testing.assert_array_equal(forced[chosen >= MINIMUM], 0)
    module = f"model.layers.{STARVED_LAYER}.mlp.experts.{STARVED}.down_proj"
    assert entry(stats, module, Quantity.INPUT_TOKENS) == MINIMUM
    assert entry(stats, module, Quantity.INPUT_ABSMAX) > 0


def test_it_sees_the_tokens_that_came_closest_to_choosing_it(
    stats: CalibrationStats, directory: Path
) -> None:
    ranks = open_ranks(stats, directory, STARVED_LAYER, STARVED)
    assert 0 < (ranks >= 0).sum() < len(ranks)  # its group is open for some and closed for others
    best = sorted((rank, token) for token, rank in enumerate(ranks) if rank >= 0)[:MINIMUM]
    normed = entry(stats, f"model.layers.{STARVED_LAYER}.mlp.gate", Quantity.INPUT_SAMPLES)
    expected = np.abs(normed[[token for _, token in best]]).max()
    module = f"model.layers.{STARVED_LAYER}.mlp.experts.{STARVED}.gate_proj"
    assert entry(stats, module, Quantity.INPUT_ABSMAX) == expected


def test_no_group_is_opened_for_it(stats: CalibrationStats, directory: Path) -> None:
    """With a minimum beyond all tokens, an expert sees each token of its open groups once."""
    everything = run(directory, replace(SETTINGS, min_expert_tokens=100_000))
    for layer in (1, 2, 3):
        seen = sum(
            experts_of(everything, layer, quantity)
            for quantity in (Quantity.EXPERT_TOKENS, Quantity.EXPERT_FORCED)
        )
        expected = [(open_ranks(stats, directory, layer, e) >= 0).sum() for e in range(NUM_EXPERTS)]
        np.testing.assert_array_equal(seen, expected)


def test_forcing_changes_nothing_else(stats: CalibrationStats, directory: Path) -> None:
    without = run(directory, replace(SETTINGS, min_expert_tokens=0))
    assert without.entries.keys() == stats.entries.keys()
    changed = {
        key
        for key, array in without.entries.items()
        if not np.array_equal(array, stats.entries[key])
    }
    allowed = {f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)}
    allowed |= {f"model.layers.{layer}.mlp.experts.{p}_proj" for layer in (1, 2, 3) for p in PARTS}
    for layer in (1, 2, 3):
        starved = np.flatnonzero(experts_of(stats, layer, Quantity.EXPERT_FORCED))
        blind = np.flatnonzero(experts_of(stats, layer, Quantity.EXPERT_TOKENS) == 0)
        allowed |= {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
            for expert in (*starved, *blind)
            for part in PARTS
        }
    assert {module for module, _ in changed} <= allowed
    assert (f"model.layers.{STARVED_LAYER}.mlp.experts.{STARVED}.up_proj") in dict(changed)
    assert {q for m, q in changed if m.endswith("gate")} == {Quantity.EXPERT_FORCED}


PARTS = ("gate", "up", "down")


def test_blind_experts_borrow_from_their_layer(stats: CalibrationStats) -> None:
    tokens = experts_of(stats, BLIND_LAYER, Quantity.EXPERT_TOKENS)
    forced = experts_of(stats, BLIND_LAYER, Quantity.EXPERT_FORCED)
    assert set(np.flatnonzero(tokens + forced == 0)) == set(BLIND)
    for part in PARTS:
        units = [f"model.layers.{BLIND_LAYER}.mlp.experts.{e}.{part}_proj" for e in range(16)]
        for quantity in (Quantity.INPUT_ABSMAX, Quantity.INPUT_CLIPS):
            found = [entry(stats, unit, quantity) for unit in units]
            expected = np.max([found[e] for e in range(12)], axis=0)
            for expert in BLIND:
                np.testing.assert_array_equal(found[expert], expected)
        assert all(entry(stats, units[e], Quantity.INPUT_TOKENS) == 0 for e in BLIND)


def test_too_many_blind_experts_are_an_error(directory: Path) -> None:
    message = (
        r"4 of 48 experts saw no token, at most 1\.00% may: model\.layers\.2\.mlp\.experts\.12,"
    )
    with pytest.raises(CalibrationError, match=message):
        run(directory, replace(SETTINGS, max_blind_share=0.01))


def test_the_share_of_blind_experts_is_exact() -> None:
    names = ["a", "b", "c", "d"]
    check_blind(names, 400, 0.01)
    check_blind([], 400, 0.0)
    with pytest.raises(CalibrationError, match="a, b, c and 1 more"):
        check_blind(names, 399, 0.01)


@pytest.mark.usefixtures("stats")
def test_people_are_told_of_starved_experts(progress: Recorder) -> None:
    assert any("fewer than 8 tokens" in note for note in progress.notes)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_candidates_do_not_depend_on_batches(size: int) -> None:
    config = RingConfig.from_dict(tiny_config(), source="test")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(50, 64, generator=generator)
    bias = torch.zeros(16)
    bias[[2, 9]] = -0.4
    weights = {
        "mlp.gate.weight": torch.randn(16, 64, generator=generator) / 8,
        "mlp.gate.expert_bias": bias,
    }
    expert_ids, _ = route(hidden @ weights["mlp.gate.weight"].T, bias, config)
    found = []
    for step in (50, size):
        candidates = Candidates(config, 30)
        for start in range(0, 50, step):
            part = slice(start, start + step)
            candidates.observe(hidden[part], weights, expert_ids[part], start)
        found.append(candidates.forced())
    whole, parts = found
    assert whole is not None
    assert parts is not None
    assert int(whole.counts[2]) > 0
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.expert_ids, parts.expert_ids)
    # In any order: it only matters which tokens they are.
    for expert in range(16):
        left, right = (one.hidden[one.expert_ids[:, 0] == expert] for one in found)
        assert torch.equal(left.sort(0).values, right.sort(0).values)
