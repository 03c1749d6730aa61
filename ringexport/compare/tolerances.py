"""The table of tolerances: one row per kind of comparison, each with its reason.

docs/numerics.md explains the levels. A bound is never looser in CI than at home, and changing one
needs a measurement in the commit that does it.
"""

import math
from dataclasses import dataclass
from enum import Enum

__all__ = ["TOLERANCES", "Sense", "Tolerance", "drift_bound", "reference_state_bound"]


class Sense(Enum):
    """On which side of the bound a value has to be."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """One row.

    Attributes:
        level: L0 exact to L5 drift, as in docs/numerics.md.
        what: what is compared with what.
        metric: which number is bounded.
        bound: its limit.
        sense: on which side of the limit the number has to be.
        reason: why the limit is where it is.
    """

    level: str
    what: str
    metric: str
    bound: float
    sense: Sense = Sense.AT_MOST
    reason: str

    def accepts(self, value: float) -> bool:
        """Tell whether `value` is within the bound; NaN never is."""
        return value <= self.bound if self.sense is Sense.AT_MOST else value >= self.bound


TOLERANCES = {
    "exact": Tolerance(
        level="L0",
        what="pack and unpack, save and load, snapshot and restore, expert ids without ties",
        metric="largest difference",
        bound=0.0,
        reason="no arithmetic changes",
    ),
    "reference_values": Tolerance(
        level="L1",
        what="fp32 contract against fp64 golden, values",
        metric="largest difference over largest value",
        bound=1e-5,
        reason="sums in fp32",
    ),
    "kernel_factor": Tolerance(
        level="L2",
        what="kernel against fp64, and torch in the same dtype against fp64",
        metric="error of the kernel over error of torch, after 1 ulp at the largest value",
        bound=2.0,
        reason="the bound follows the dtype instead of a magic number",
    ),
    "quantized_gemm": Tolerance(
        level="L3",
        what="quantized GEMM with fp32 output against dequantized operands in fp32",
        metric="symmetric difference",
        bound=1e-6,
        reason="only the order of the sums differs",
    ),
    "quantization_loss_fp8": Tolerance(
        level="L3",
        what="FP8 GEMM against the unquantized bf16 product",
        metric="symmetric difference",
        bound=1e-3,
        reason="rounding to 3 bits of mantissa, as measured by DeepGEMM",
    ),
    "hidden_fp32": Tolerance(
        level="L4",
        what="residual stream after a layer, fp32 target against the torch reference",
        metric="relative error",
        bound=1e-4,
        reason="sums in another order, through all layers below; a wrong op gives 1e-2 and more",
    ),
    "state_fp32": Tolerance(
        level="L4",
        what="recurrent state or KV cache after the text, fp32 target against the torch reference",
        metric="relative error",
        bound=1e-4,
        reason="as for the residual stream; states are fp32 in every target",
    ),
    "expert_agreement_fp32": Tolerance(
        level="L4",
        what="chosen experts, fp32 target against the torch reference",
        metric="share of equal ids",
        bound=0.999,
        sense=Sense.AT_LEAST,
        reason="only scores that are equal to the last bits may be ordered differently",
    ),
    "logits_cosine": Tolerance(
        level="L4",
        what="logits, fp32 or bf16 target against the torch reference",
        metric="smallest cosine over positions",
        bound=0.9999,
        sense=Sense.AT_LEAST,
        reason="fusion reorders sums",
    ),
    "logits_cosine_fp8": Tolerance(
        level="L4",
        what="logits, FP8 target against the torch reference",
        metric="smallest cosine over positions",
        bound=0.999,
        sense=Sense.AT_LEAST,
        reason="quantization loss of all layers together",
    ),
}
"""By name; commands and tests take their bounds from here and from the two functions below."""


def reference_state_bound(tokens: int) -> float:
    """Return the L1 bound on a recurrent state after `tokens` tokens: 1e-5 times their root.

    Rounding errors of a sum of `tokens` terms grow like a random walk.
    """
    return 1e-5 * math.sqrt(max(1, tokens))


def drift_bound(steps: int, error_at_64: float) -> float:
    """Return the L5 bound on the relative state error after `steps` decode steps.

    Random-walk growth from the error at step 64 is expected; linear growth means a bias, a state
    in bf16 or a wrong decay.
    """
    return error_at_64 * math.sqrt(max(64, steps) / 64)
