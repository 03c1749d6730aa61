"""Turn calibration stats into SmoothQuant's factors, reading each layer's weights once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint import CheckpointWeights
from ringexport.progress import Progress
from ringexport.quantize.recipe import SmoothQuant
from ringexport.quantize.resolve import ResolvedRecipe
from ringexport.quantize.transforms import (
    FoldSite,
    TensorFold,
    column_absmax,
    fold_sites,
    folds_of_sites,
    smooth_factors,
)
from ringexport.stats import CalibrationStats, Quantity

__all__ = ["channel_absmax", "used_sites", "weight_folds"]

_DEFAULT_STRENGTH = 0.5


def used_sites(weights: CheckpointWeights, resolved: ResolvedRecipe) -> tuple[FoldSite, ...]:
    """Return the sites that the recipe asks for and that feed a quantized input."""
    smooth = resolved.recipe.smoothquant
    if smooth is None:
        return ()
    quantized = {
        name for name, entry in resolved.quantized.items() if entry.scheme.activations is not None
    }
    return tuple(
        site
        for site in fold_sites(weights.config)
        if site.fold in smooth.folds and any(name in quantized for name in site.consumers)
    )


def weight_folds(
    weights: CheckpointWeights,
    resolved: ResolvedRecipe,
    stats: CalibrationStats,
    progress: Progress,
) -> dict[str, TensorFold]:
    """Return what SmoothQuant does to each tensor, by its name; empty without SmoothQuant.

    The strength of a site is the recipe's; for "search" it is SMOOTH_STRENGTH in the stats of the
    site's absorber, and 0.5 where calibration did not search.

    Raises:
        CalibrationError: stats that lack the channels of a quantized module.
    """
    sites = used_sites(weights, resolved)
    smooth = resolved.recipe.smoothquant
    if smooth is None or not sites:
        return {}
    progress.start("find smoothing factors", len(sites), "sites")
    factors = {}
    quantized = resolved.quantized
    for site in sites:
        consumers = [name for name in site.consumers if name in quantized]
        activations = channel_absmax(stats, consumers, site.channels)
        columns = np.zeros(site.channels, np.float32)
        for name in consumers:
            weight = f"{name}.weight"
            np.maximum(columns, column_absmax(weights.read(weight)), out=columns)
            weights.release(weight)
        strength = _strength(site, smooth, stats)
        factors[site] = smooth_factors(activations, columns, strength)
        progress.advance()
    progress.finish()
    return folds_of_sites(factors)


def channel_absmax(
    stats: CalibrationStats, modules: Sequence[str], channels: int
) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of each channel that `modules` read, fp32 [channels].

    They read the same activations, but an expert saw only the tokens routed to it, if any.

    Raises:
        CalibrationError: none of them was observed.
    """
    seen = [name for name in modules if stats.find(name, Quantity.INPUT_CHANNEL_ABSMAX) is not None]
    arrays = [
        stats.get(name, Quantity.INPUT_CHANNEL_ABSMAX, (channels,)) for name in seen or modules[:1]
    ]
    return np.asarray(np.max(arrays, axis=0), np.float32)


def _strength(site: FoldSite, smooth: SmoothQuant, stats: CalibrationStats) -> float:
    if smooth.strength is not None:
        return smooth.strength
    found = stats.find(site.absorber, Quantity.SMOOTH_STRENGTH)
    return _DEFAULT_STRENGTH if found is None else float(found[0])
