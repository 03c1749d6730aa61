"""Sensitivity and the gate's loop, with a made-up measure and once with the real one."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.compare.gate import Gate
from ringexport.compare.perplexity import PairScore, Score, Text
from ringexport.errors import ConfigError, ToleranceExceededError
from ringexport.pipeline.gate import HeldOut, settle_recipe, shipped_texts
from ringexport.pipeline.sensitivity import (
    SensitivityRow,
    module_groups,
    only_group,
    parse_size,
    propose,
    sensitivity,
    without_groups,
)
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.run import estimate
from ringexport.quantize.shipped import load_recipe
from ringexport.runtime.registry import RunnerOptions
from ringexport.runtime.tokenizer import ModelTokenizer
from tests.checkpoints import make_checkpoint
from tests.quantize.stats import make_stats

FP8 = load_recipe("fp8")
COSTS = {"linear_attention": 0.004, "routed_experts": 0.001}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("plain"), num_hidden_layers=3, num_experts=8, shards=1
    )


def kind_of(module: str) -> str:
    if ".attention." in module:
        return "linear_attention"
    return "routed_experts" if ".experts." in module else "other"


def score(kl: float, ppl: float = 0.0) -> PairScore:
    against = Score(nats=200.0, tokens=100, num_bytes=300)
    mine = Score(nats=200.0 + 100 * math.log1p(ppl), tokens=100, num_bytes=300)
    return PairScore(score=mine, against=against, kl_mean=kl, kl_p99=kl, top1_agreement=1 - kl)


@pytest.fixture(scope="module")
def measure() -> Callable[[Path], PairScore]:
    """Charge each layer's kind of module a fixed KL, and twice as much in layer 1."""

    def charge(checkpoint: Path) -> PairScore:
        with CheckpointWeights.open(checkpoint) as weights:
            groups = {(name.split(".")[2], kind_of(name)) for name in weights.schemes}
        costs = [COSTS.get(kind, 0.0) * (1 + (layer == "1")) for layer, kind in groups]
        return score(math.fsum(costs), math.fsum(costs))

    return charge


@pytest.fixture(scope="module")
def rows(plain: Path, measure: Callable[[Path], PairScore]) -> tuple[SensitivityRow, ...]:
    return sensitivity(plain, FP8, measure)


def test_groups_cover_every_quantized_module(plain: Path) -> None:
    for name in ("fp8", "fp8-block", "fp8-all", "int8-weight-only"):
        recipe = load_recipe(name)
        groups = module_groups(plain, recipe)
        found = estimate(plain, recipe)
        assert sum(group.modules for group in groups) == len(found.resolved.quantized)
        assert len({group.target for group in groups}) == len(groups)
        with CheckpointWeights.open(plain) as weights:
            union: set[str] = set()
            for group in groups:
                only = set(resolve_recipe(only_group(recipe, group), weights.config).quantized)
                assert len(only) == group.modules
                assert not only & union
                union |= only
            assert union == set(found.resolved.quantized)
            rest = resolve_recipe(without_groups(recipe, groups[:2]), weights.config).quantized
            assert len(rest) == len(union) - groups[0].modules - groups[1].modules
        if name == "fp8":
            shapes = [entry.module.shape for entry in found.resolved.quantized.values()]
            by_hand = sum(rows * columns - 4 * rows for rows, columns in shapes)
            assert sum(group.bytes_saved for group in groups) == by_hand


def test_rows_come_by_kl_per_byte(plain: Path, rows: tuple[SensitivityRow, ...]) -> None:
    rates = [row.kl_per_megabyte for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert (rows[0].group.kind, rows[0].group.layer) == ("linear_attention", 1)
    assert rows[0].kl_mean == pytest.approx(0.008)
    assert len(rows) == len(module_groups(plain, FP8))


def test_a_budget_gives_a_recipe(
    plain: Path, rows: tuple[SensitivityRow, ...], tmp_path: Path
) -> None:
    least = estimate(plain, FP8).output_bytes
    budget = least + rows[0].group.bytes_saved + rows[1].group.bytes_saved
    mixed = propose(plain, FP8, "fp8", rows, budget)
    assert mixed.kept[:2] == (rows[0].group, rows[1].group)
    assert mixed.num_bytes <= budget
    path = tmp_path / "mixed.toml"
    path.write_text(mixed.to_toml())
    assert estimate(plain, load_recipe(str(path))).output_bytes == mixed.num_bytes
    total = math.fsum(row.kl_mean for row in rows)
    kept = math.fsum(row.kl_mean for row in rows if row.group in mixed.kept)
    assert mixed.predicted_kl == pytest.approx(total - kept)
    assert propose(plain, FP8, "fp8", rows, least).kept == ()
    assert tomllib.loads(propose(plain, FP8, 'a"\\b', rows, least).to_toml())["base"] == 'a"\\b'
    with pytest.raises(ConfigError, match="budget"):
        propose(plain, FP8, "fp8", rows, least - 1)


def test_a_group_that_saves_nothing_ranks_first(plain: Path) -> None:
    group = module_groups(plain, FP8)[0]
    row = SensitivityRow(group=group, kl_mean=0.5, perplexity_change=0.0)
    assert row.kl_per_megabyte == pytest.approx(0.5e6 / group.bytes_saved)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("9.5MB", 9_500_000), ("2 GiB", 2 << 30), ("3b", 3)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e3", "1..2MB", "5 parsecs", "٣MB", "9" * 99])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_a_recipe_that_passes_is_left_alone(
    plain: Path, measure: Callable[[Path], PairScore]
) -> None:
    result = settle_recipe(plain, FP8, Gate(kl=1.0), measure, fallback=True)
    assert (result.recipe, result.raised, result.tried) == (FP8, (), 1)
    assert result.changes == ()


def test_without_fallback_the_gate_fails(plain: Path, measure: Callable[[Path], PairScore]) -> None:
    with pytest.raises(ToleranceExceededError, match=r"KL mean .* is above 0\.01") as caught:
        settle_recipe(plain, FP8, Gate(kl=0.01), measure)
    assert "--gate-fallback" in (caught.value.hint or "")


def test_the_worst_groups_are_raised_until_it_passes(
    plain: Path, measure: Callable[[Path], PairScore]
) -> None:
    result = settle_recipe(plain, FP8, Gate(kl=0.0105, ppl=0.02), measure, fallback=True)
    assert result.verdict.passed
    assert result.score.kl_mean <= 0.0105
    assert str(result.raised[0]) == "layer 1 linear_attention"
    assert result.changes[0] == "layer 1 linear_attention stays unquantized"
    assert result.tried == 2  # errors of this measure add up, so the prediction is right
    assert result.recipe.rules[: len(FP8.rules)] == FP8.rules
    one_less = without_groups(FP8, result.raised[:-1])
    again = settle_recipe(plain, one_less, Gate(kl=0.0105), measure, fallback=True)
    assert len(again.raised) == 1


def test_a_gate_that_nothing_passes_is_an_error(plain: Path) -> None:
    with pytest.raises(ToleranceExceededError, match="does not pass"):
        settle_recipe(plain, FP8, Gate(kl=0.001), lambda _: score(0.5), fallback=True)


def test_the_real_measure(plain: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 48)
    text = Text(name="noise", tokens=tokens, num_bytes=47)
    with CheckpointWeights.open(plain) as weights:
        stats = make_stats(weights.config)
    with HeldOut(plain, [text], RunnerOptions(threads=1)) as held_out:
        result = settle_recipe(plain, FP8, Gate(kl=10.0), held_out.measure)
        assert 0 < result.score.kl_mean < 1
        int8 = settle_recipe(plain, load_recipe("int8"), Gate(), held_out.measure, stats=stats)
        assert int8.score.kl_mean != result.score.kl_mean


def test_held_out_texts_are_shipped(plain: Path) -> None:
    with CheckpointWeights.open(plain) as weights:
        tokenizer = ModelTokenizer.open(plain, vocab_size=weights.config.vocab_size)
    texts = shipped_texts(tokenizer, 20)
    assert len(texts) >= 2
    assert {len(text.tokens) for text in texts} == {20}
