"""SmoothQuant's folds: the network in fp64 stays what it was, and the router exactly so."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ringexport.checkpoint import CheckpointWeights, RingConfig, expected_tensors
from ringexport.errors import QuantizationError, ShapeError
from ringexport.quantize.recipe import Fold
from ringexport.quantize.transforms import (
    FoldSite,
    TensorFold,
    column_absmax,
    fold_sites,
    fold_tensor,
    folds_of_sites,
    smooth_factors,
)

torch = pytest.importorskip("torch", reason="the reference model needs torch")


class FoldedWeights:
    """Stands in for CheckpointWeights: fp64 weights with factors folded in."""

    def __init__(self, weights: CheckpointWeights, folds: dict[str, TensorFold]) -> None:
        self._weights, self._folds = weights, folds
        self.names, self.info, self.config = weights.names, weights.info, weights.config

    def read_f32(self, name: str) -> npt.NDArray[np.float64]:
        values = self._weights.read_f32(name).astype(np.float64)
        fold = self._folds.get(name)
        return values if fold is None else np.asarray(fold_tensor(values, fold))


def sites_by_kind(config: RingConfig) -> dict[Fold, list[FoldSite]]:
    found: dict[Fold, list[FoldSite]] = {fold: [] for fold in Fold}
    for site in fold_sites(config):
        found[site.fold].append(site)
    return found


def logits(weights: Any) -> Any:
    from ringexport.model import ReferenceModel

    model = ReferenceModel(weights.config, weights, dtype=torch.float64)
    tokens = torch.arange(2 * 11).reshape(2, 11) * 7 % weights.config.vocab_size
    taps: dict[str, Any] = {}
    out = model.forward(tokens, None, model.new_state(2), every_position=True, taps=taps)
    assert out.dtype == torch.float64
    experts = {name: value for name, value in taps.items() if name.startswith("expert_ids")}
    return out.numpy(), experts


@pytest.fixture(scope="module")
def unfolded(tiny_checkpoint: Path) -> Any:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        return logits(FoldedWeights(weights, {}))


@pytest.mark.parametrize("powers_of_two", [True, False], ids=["powers", "any"])
@pytest.mark.parametrize("fold", [*Fold, None], ids=lambda fold: fold or "all")
def test_network_is_unchanged_in_fp64(
    fold: Fold | None,
    powers_of_two: bool,
    tiny_checkpoint: Path,
    unfolded: Any,
    rng: np.random.Generator,
) -> None:
    expected, expected_experts = unfolded
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        factors = {}
        for site in fold_sites(weights.config):
            if fold in {None, site.fold}:
                exponents = rng.uniform(-5, 5, site.channels)
                factors[site] = np.exp2(np.rint(exponents) if powers_of_two else exponents).astype(
                    np.float32
                )
        found, experts = logits(FoldedWeights(weights, folds_of_sites(factors)))
    assert len(factors) >= 4
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()
    if powers_of_two:
        np.testing.assert_array_equal(found, expected)
    for name, ids in expected_experts.items():
        assert torch.equal(ids, experts[name])


def test_a_forgotten_consumer_is_noticed(tiny_checkpoint: Path, unfolded: Any) -> None:
    """The test above fails if one reader of a norm is not compensated."""
    expected, _ = unfolded
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        site = sites_by_kind(weights.config)[Fold.POST_ATTENTION_NORM][2]
        folds = folds_of_sites({site: np.full(site.channels, 2.0, np.float32)})
        router = next(name for name in folds if name.endswith("mlp.gate.weight"))
        del folds[router]
        found, _ = logits(FoldedWeights(weights, folds))
    assert np.abs(found - expected).max() > 1e-6


def test_sites_cover_every_reader(tiny_checkpoint: Path) -> None:
    config = RingConfig.from_file(tiny_checkpoint / "config.json")
    specs = expected_tensors(config)
    by_kind = sites_by_kind(config)
    assert len(by_kind[Fold.INPUT_NORM]) == config.num_hidden_layers
    assert len(by_kind[Fold.OUTPUT_NORM]) == len(config.linear_layers)
    units = 1 + len(config.moe_layers) * (config.num_experts + 1)
    assert len(by_kind[Fold.UP_PROJ]) == units
    for site in fold_sites(config):
        absorber = specs[f"{site.absorber}.weight"]
        assert absorber.shape[0] == site.channels
        for consumer in site.consumers:
            assert specs[f"{consumer}.weight"].shape[1] == site.channels
    touched = {name for sites in by_kind.values() for site in sites for name in site.consumers}
    matrices = {
        name.removesuffix(".weight") for name, spec in specs.items() if len(spec.shape) == 2
    }
    softmax_dense = {f"model.layers.{i}.attention.dense" for i in config.softmax_layers}
    assert matrices - touched == softmax_dense | {"model.word_embeddings", "lm_head"}


def test_factors_balance_activations_and_weights() -> None:
    activations = np.array([1.0, 100.0, 1.0, 0.0, 4.0], np.float32)
    columns = np.array([1.0, 1.0, 0.01, 1.0, 0.0], np.float32)
    factors = smooth_factors(activations, columns, 0.5)
    assert factors.dtype == np.float32
    np.testing.assert_array_equal(np.log2(factors) % 1, 0)
    assert factors[3] == factors[4] == 1, "unused channels stay"
    assert factors[1] == factors[2] > factors[0]
    spread = activations[:2] / factors[:2]
    assert spread.max() / spread.min() <= 100 / 10 * 2, "half of the spread, in the log domain"
    np.testing.assert_array_equal(smooth_factors(activations, np.ones(5, np.float32), 0.0)[:3], 1)


def test_wrong_factors_are_refused(tiny_checkpoint: Path) -> None:
    ones = np.ones(4, np.float32)
    with pytest.raises(QuantizationError, match=r"migration strength is 1\.5"):
        smooth_factors(ones, ones, 1.5)
    with pytest.raises(ShapeError, match="same number of channels"):
        smooth_factors(ones, ones[:3], 0.5)
    site = fold_sites(RingConfig.from_file(tiny_checkpoint / "config.json"))[0]
    with pytest.raises(ShapeError, match=r"factors of model\.layers\.0\.input_layernorm"):
        folds_of_sites({site: ones})


def test_fold_of_some_rows_is_the_fold_of_all(rng: np.random.Generator) -> None:
    array = rng.standard_normal((12, 5))
    fold = TensorFold(
        rows=rng.uniform(1, 2, 12).astype(np.float32), columns=np.arange(1, 6, dtype=np.float32)
    )
    whole = fold_tensor(array, fold)
    np.testing.assert_array_equal(fold_tensor(array[3:7], fold, slice(3, 7)), whole[3:7])
    np.testing.assert_array_equal(
        column_absmax(array.astype(np.float32)), np.abs(array.astype(np.float32)).max(axis=0)
    )
