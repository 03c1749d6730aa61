"""SmoothQuant: move the scale of input channels from activations into weights, exactly.

A matrix product does not change when its input is divided by a factor per channel and the columns
of its weight are multiplied by the same factors. The division is folded into what produces the
input, so nothing is left to do at run time:

- a norm before several matrices: its weight is divided; *every* matrix that reads the norm is
  compensated, the router's included, so that routing does not change;
- g_norm before attention.dense: elementwise gating lies between them and does not mind;
- the rows of up_proj before down_proj: silu(gate) x up is linear in up.

Factors are powers of two: then no fold rounds, in any dtype, and the router computes bit for bit
the same logits in any order of summation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint.config import RingConfig
from ringexport.errors import ShapeError
from ringexport.ops.smoothing import smooth_factors
from ringexport.quantize.recipe import Fold

__all__ = [
    "FoldSite",
    "TensorFold",
    "column_absmax",
    "fold_sites",
    "fold_tensor",
    "folds_of_sites",
    "smooth_factors",
]

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSite:
    """One place where factors can be folded.

    Attributes:
        fold: which kind of place.
        absorber: module that the factors are divided out of: a norm, or an up_proj (its rows).
        consumers: every module that reads the divided activations; their columns are multiplied.
        channels: number of factors.
    """

    fold: Fold
    absorber: str
    consumers: tuple[str, ...]
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFold:
    """What happens to one tensor.

    Attributes:
        rows: divide row i (or element i of a vector) by rows[i]; None for nothing.
        columns: multiply column j by columns[j]; None for nothing.
    """

    rows: npt.NDArray[np.float32] | None = None
    columns: npt.NDArray[np.float32] | None = None


def fold_sites(config: RingConfig) -> tuple[FoldSite, ...]:
    """Return every place of the model where factors can be folded, in the order of the model."""
    return tuple(
        site for layer in range(config.num_hidden_layers) for site in _layer(config, layer)
    )


def folds_of_sites(
    factors: Mapping[FoldSite, npt.NDArray[np.float32]],
) -> dict[str, TensorFold]:
    """Return what happens to each tensor, by its name in the checkpoint.

    Args:
        factors: [channels] of each site that is folded; a tensor may be touched by two sites (an
            up_proj reads a norm and feeds a down_proj).

    Raises:
        ShapeError: a wrong number of factors.
    """
    folds: dict[str, TensorFold] = {}
    for site, factor in factors.items():
        if factor.shape != (site.channels,):
            raise ShapeError(
                f"the factors of {site.absorber} have shape {list(factor.shape)}, expected "
                f"[{site.channels}]"
            )
        old = folds.get(f"{site.absorber}.weight", TensorFold())
        folds[f"{site.absorber}.weight"] = TensorFold(rows=factor, columns=old.columns)
        for consumer in site.consumers:
            old = folds.get(f"{consumer}.weight", TensorFold())
            folds[f"{consumer}.weight"] = TensorFold(rows=old.rows, columns=factor)
    return folds


def fold_tensor(array: Floats, fold: TensorFold, rows: slice = slice(None)) -> Floats:
    """Return `array` with factors folded in, in its own dtype; the input is not modified.

    Args:
        array: [out, in] weights, or [channels] of a norm; fp32 or fp64.
        fold: what to divide and multiply by.
        rows: which rows of the whole tensor `array` holds.
    """
    result = array
    if fold.rows is not None:
        divisor = fold.rows[rows].astype(array.dtype)
        result = result / (divisor if array.ndim == 1 else divisor[:, None])
    if fold.columns is not None:
        result = result * fold.columns.astype(array.dtype)
    return result


def column_absmax(array: npt.NDArray[Any], rows_at_once: int = 64) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of each column, fp32 [columns], with bounded memory."""
    largest = np.zeros(array.shape[1], np.float32)
    for start in range(0, array.shape[0], rows_at_once):
        part = np.abs(array[start : start + rows_at_once].astype(np.float32)).max(axis=0)
        np.maximum(largest, part, out=largest)
    return largest


def _layer(config: RingConfig, layer: int) -> list[FoldSite]:
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "attention.", prefix + "mlp."
    linear = config.is_linear_layer(layer)
    readers = ("query_key_value", "g_proj") if linear else ("query_key_value",)
    sites = [
        FoldSite(
            fold=Fold.INPUT_NORM,
            absorber=prefix + "input_layernorm",
            consumers=tuple(attention + name for name in readers),
            channels=config.hidden_size,
        )
    ]
    if linear:
        sites.append(
            FoldSite(
                fold=Fold.OUTPUT_NORM,
                absorber=attention + "g_norm",
                consumers=(attention + "dense",),
                channels=config.linear_dim,
            )
        )
    widths = {mlp: config.intermediate_size}
    if config.is_moe_layer(layer):
        experts = (f"{mlp}experts.{expert}." for expert in range(config.num_experts))
        widths = dict.fromkeys(experts, config.moe_intermediate_size)
        widths[mlp + "shared_experts."] = config.shared_intermediate_size
    router = (mlp + "gate",) if config.is_moe_layer(layer) else ()
    sites.append(
        FoldSite(
            fold=Fold.POST_ATTENTION_NORM,
            absorber=prefix + "post_attention_layernorm",
            consumers=router
            + tuple(unit + name for unit in widths for name in ("gate_proj", "up_proj")),
            channels=config.hidden_size,
        )
    )
    sites += [
        FoldSite(
            fold=Fold.UP_PROJ,
            absorber=unit + "up_proj",
            consumers=(unit + "down_proj",),
            channels=width,
        )
        for unit, width in widths.items()
    ]
    return sites
