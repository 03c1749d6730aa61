"""Rotary tables: computed in fp64, stored in fp32, so that far positions keep their phase."""

import numpy as np
import numpy.typing as npt

__all__ = ["rotary_tables"]


def rotary_tables(
    inv_freq: npt.NDArray[np.float64], attention_factor: float, length: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cos and sin, each [length, R/2] fp32, for half-split (NeoX) pairing.

    Args:
        inv_freq: [R/2] radians per token, YaRN already applied.
        attention_factor: YaRN's factor on both tables; 1.0 without YaRN.
        length: number of positions, from 0.

    Dimension j of the rotated part pairs with j + R/2.
    """
    angles = np.arange(length, dtype=np.float64)[:, None] * inv_freq[None, :]
    return (
        (np.cos(angles) * attention_factor).astype(np.float32),
        (np.sin(angles) * attention_factor).astype(np.float32),
    )
