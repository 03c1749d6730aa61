"""Log decay of the linear layers: per-head slopes and the contested layer factor.

Source: docs of the three forms in `DecayIndex`; slopes as in every public implementation
(inclusionAI/Ring-V2.5@c7facea `modeling_bailing_moe_v2_5.py`, SGLang, vLLM, FLOOD, MLX).
"""

import math

import numpy as np
import numpy.typing as npt

from ringexport.ops.decay_index import DecayIndex

__all__ = ["DecayIndex", "layer_factor", "log_decay", "slopes"]


def slopes(num_heads: int) -> npt.NDArray[np.float64]:
    """Return the positive per-head slopes [H], the ALiBi sequence.

    For head counts that are no power of two: the slopes of the power of two below, followed by
    every other slope of the next power of two.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, expected at least 1")
    below = 1 << (num_heads.bit_length() - 1)
    sequence = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    extra = [2.0 ** (-8.0 * (head + 1) / (2 * below)) for head in range(0, 2 * below, 2)]
    return np.array(sequence + extra[: num_heads - below], dtype=np.float64)


def layer_factor(layer: int, num_layers: int, form: DecayIndex) -> float:
    """Return the factor on the slopes of 0-based `layer`; see `DecayIndex` for the forms."""
    span = max(1, num_layers - 1)
    index = {
        DecayIndex.SERVING: layer,
        DecayIndex.HF: layer - 1,
        DecayIndex.CLAMPED: max(0, layer - 1),
    }[form]
    return 1.0 - index / span + 1e-5


def log_decay(
    num_heads: int, layer: int, num_layers: int, form: DecayIndex
) -> npt.NDArray[np.float32]:
    """Return the natural log of the decay per token, [H] fp32, below 0 for every linear layer.

    It stays in the log domain: exp() of it rounds to exactly 1 in bf16 for the slowest heads.
    """
    decay = (-slopes(num_heads) * layer_factor(layer, num_layers, form)).astype(np.float32)
    assert math.isfinite(float(decay.sum()))
    return decay
