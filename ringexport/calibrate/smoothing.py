"""Search SmoothQuant's migration strength of each fold of a layer.

For a strength, inputs are divided and columns of weights multiplied by the factors that
quantization will use; both are rounded to INT8, per token and per channel. The strength with the
least squared error of the product, over the sampled tokens, wins. Routed experts share one strength
per layer, searched over some of them; each still gets factors of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.ops.quantization import NumberFormat
from ringexport.ops.smoothing import smooth_factors
from ringexport.stats import Quantity

__all__ = ["Products", "best_strength", "layer_strengths"]

_STRENGTHS = tuple(step / 10 for step in sorted(range(11), key=lambda step: (abs(step - 5), step)))
"""Candidates; of equals the one nearest to 0.5 wins."""

_MAX_EXPERTS = 16
Strengths = dict[tuple[str, Quantity], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Matrix products of equal shape whose input channels can be scaled; U of them, or 1 for all.

    Attributes:
        inputs: fp32 [U, R, C], of some tokens.
        weight: [U, out, C] any float.
        activation_absmax: [U, C], over all tokens.
        weight_absmax: [U, C], over all weights that share the factors.
    """

    inputs: Tensor
    weight: Tensor
    activation_absmax: Tensor
    weight_absmax: Tensor

    def factors(self, strength: float) -> Tensor:
        """Return the factors of a strength, fp32 [U, 1, C]."""
        pairs = zip(
            self.activation_absmax.float().cpu().numpy(),
            self.weight_absmax.float().cpu().numpy(),
            strict=True,
        )
        factors = np.stack([smooth_factors(left, right, strength) for left, right in pairs])
        return torch.from_numpy(factors)[:, None].to(self.inputs.device)


def best_strength(products: Sequence[Products]) -> float:
    """Return the strength with which INT8 changes `products` least, in total."""
    totals = np.zeros(len(_STRENGTHS))
    for product in products:
        weight = product.weight.float()
        reference = product.inputs @ weight.mT
        for index, strength in enumerate(_STRENGTHS):
            factors = product.factors(strength)
            found = _int8_rows(product.inputs / factors) @ _int8_rows(weight * factors).mT
            totals[index] += float((found - reference).square().sum(dtype=torch.float64))
    return _STRENGTHS[int(totals.argmin())]


def layer_strengths(
    prefix: str,
    weights: Mapping[str, Tensor],
    samples: Mapping[str, Tensor],
    absmax: Mapping[str, Tensor],
) -> Strengths:
    """Return SMOOTH_STRENGTH of every module of one layer that can absorb factors.

    Args:
        prefix: "model.layers.{i}.".
        weights: of the layer as the reference model holds them.
        samples: fp32 [R, C] by site name, on the weights' device; nothing is searched without.
        absmax: per channel, [rows, C], by site name.
    """
    found: dict[str, float] = {}
    site = "attention.query_key_value"
    readers = [
        weights[key] for key in (f"{site}.weight", "attention.g_proj.weight") if key in weights
    ]
    found["input_layernorm"] = best_strength(_shared(samples[site], readers, absmax[site][0]))
    if "attention.g_norm.weight" in weights:
        site = "attention.dense"
        dense = [weights["attention.dense.weight"]]
        found["attention.g_norm"] = best_strength(_shared(samples[site], dense, absmax[site][0]))
    routed = "mlp.experts.gate_up" in weights
    site = "mlp.gate" if routed else "mlp.gate_proj"
    units = ("mlp.experts", "mlp.shared_experts") if routed else ("mlp",)
    stacks = {unit: weights[f"{unit}.gate_up"] for unit in units if f"{unit}.gate_up" in weights}
    norm = "post_attention_layernorm"
    found[norm] = best_strength(_shared(samples[site], [*stacks.values()], absmax[site][0]))
    for unit, gate_up in stacks.items():
        down = weights[f"{unit}.down"]
        products = _down_products(samples[site], gate_up, down, absmax[f"{unit}.down_proj"])
        strength = best_strength([products])
        numbers = range(len(down)) if unit == "mlp.experts" else None
        names = [unit] if numbers is None else [f"{unit}.{expert}" for expert in numbers]
        found |= dict.fromkeys((f"{name}.up_proj" for name in names), strength)
    return {
        (prefix + name, Quantity.SMOOTH_STRENGTH): np.array([strength], np.float32)
        for name, strength in found.items()
    }


def _chosen(stack: Tensor) -> Tensor:
    """Return the experts [U, out, in] of a stack [E, out, in] that take part in the search."""
    return stack[:: -(-len(stack) // _MAX_EXPERTS)]


def _shared(inputs: Tensor, readers: Sequence[Tensor], absmax: Tensor) -> list[Products]:
    """Return the products of weights [out, C] or [E, out, C] that share inputs and factors."""
    columns = [weight.abs().flatten(0, -2).amax(0).float() for weight in readers]
    weight_absmax = torch.stack(columns).amax(0)
    return [
        Products(
            inputs=inputs[None],
            weight=weight[None] if weight.ndim == 2 else _chosen(weight),
            activation_absmax=absmax[None],
            weight_absmax=weight_absmax[None],
        )
        for weight in readers
    ]


def _down_products(hidden: Tensor, gate_up: Tensor, down: Tensor, absmax: Tensor) -> Products:
    """Return the down projections of some experts, each with inputs and factors of its own."""
    gate, up = (hidden @ _chosen(gate_up).float().mT).chunk(2, dim=-1)
    weight = _chosen(down)
    return Products(
        inputs=F.silu(gate) * up,
        weight=weight,
        activation_absmax=_chosen(absmax),
        weight_absmax=weight.abs().amax(1),
    )


def _int8_rows(values: Tensor) -> Tensor:
    """Return fp32 [..., rows, C] rounded to INT8 with one scale per row, and back."""
    scale = values.abs().amax(-1, keepdim=True) / NumberFormat.INT8.half_range
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).round().clamp(-128, 127) * scale
