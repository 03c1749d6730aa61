"""SmoothQuant's strengths against the quantizer itself, strength by strength."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ringexport.calibrate import calibrate
from ringexport.calibrate.smoothing import Products, best_strength
from ringexport.checkpoint import CheckpointWeights
from ringexport.ops.quantization import Granularity, NumberFormat, dequantize
from ringexport.ops.schemes import WeightScheme
from ringexport.ops.smoothing import smooth_factors
from ringexport.quantize.formats import quantize_array
from ringexport.quantize.transforms import fold_sites
from ringexport.stats import Quantity
from tests.calibrate.samples import PROMPTS, SETTINGS, SMALL, checkpoint
from tests.conftest import SEED

torch.set_num_threads(1)
ROWS = WeightScheme(format=NumberFormat.INT8, granularity=Granularity.parse("channel"))
Array = npt.NDArray[np.float32]


def int8(array: Array) -> Array:
    return dequantize(quantize_array(np.ascontiguousarray(array), ROWS))


def error(inputs: Array, weight: Array, strength: float) -> float:
    factors = smooth_factors(np.abs(inputs).max(0), np.abs(weight).max(0), strength)
    found = int8(inputs / factors).astype(np.float64) @ int8(weight * factors).T.astype(np.float64)
    exact = inputs.astype(np.float64) @ weight.T.astype(np.float64)
    return float(np.square(found - exact).sum())


def case(outlier: float, weight_outlier: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(SEED)
    inputs = rng.standard_normal((48, 64)).astype(np.float32)
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    inputs[:, [3, 17]] *= outlier
    weight[:, [5, 30]] *= weight_outlier
    return inputs, weight


def products_of(inputs: Array, weight: Array) -> Products:
    left, right = torch.from_numpy(inputs)[None], torch.from_numpy(weight)[None]
    return Products(
        inputs=left,
        weight=right,
        activation_absmax=left.abs().amax(1),
        weight_absmax=right.abs().amax(1),
    )


@pytest.mark.parametrize(("outlier", "weight_outlier"), [(60, 1), (1, 60), (20, 20), (1, 1)])
def test_the_best_strength_is_that_of_the_quantizer(outlier: float, weight_outlier: float) -> None:
    inputs, weight = case(outlier, weight_outlier)
    found = best_strength([products_of(inputs, weight)])
    errors = {step / 10: error(inputs, weight, step / 10) for step in range(11)}
    assert errors[found] <= 1.0001 * min(errors.values())
    assert max(errors.values()) > 1.02 * min(errors.values())  # otherwise any would do


def test_outliers_in_activations_move_into_weights() -> None:
    inputs, weight = case(60, 1)
    assert error(inputs, weight, best_strength([products_of(inputs, weight)])) < 0.2 * error(
        inputs, weight, 0.0
    )


def test_stacked_products_are_those_of_their_parts() -> None:
    cases = [case(60, 1), case(1, 60), case(5, 5)]
    parts = [products_of(*one) for one in cases]
    stack = Products(
        inputs=torch.cat([part.inputs for part in parts]),
        weight=torch.cat([part.weight for part in parts]),
        activation_absmax=torch.cat([part.activation_absmax for part in parts]),
        weight_absmax=torch.cat([part.weight_absmax for part in parts]),
    )
    errors = [sum(error(*one, step / 10) for one in cases) for step in range(11)]
    assert best_strength([stack]) == best_strength(parts) == np.argmin(errors) / 10


def test_every_module_that_absorbs_has_a_strength(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", {}, **SMALL)
    with CheckpointWeights.open(path) as weights:
        sites = fold_sites(weights.config)
        stats = calibrate(weights, PROMPTS, SETTINGS)
    strengths = {module for module, quantity in stats.entries if quantity == "smooth_strength"}
    assert strengths == {site.absorber for site in sites}
    for site in sites:
        assert 0 <= stats.get(site.absorber, Quantity.SMOOTH_STRENGTH)[0] <= 1
        reader = site.consumers[0]
        assert stats.get(reader, Quantity.INPUT_CHANNEL_ABSMAX, (site.channels,)).max() > 0
    assert len({float(stats.get(name, Quantity.SMOOTH_STRENGTH)[0]) for name in strengths}) > 1
