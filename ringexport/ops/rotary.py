"""Rotary tables: computed in fp64, stored in fp32, so that far positions keep their phase."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SplitRotaryTables", "rotary_tables", "split_rotary_tables"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRotaryTables:
    """Tables of a context in two small parts: position = step * coarse row + fine row.

    By the sum of angles, cos = cos_c cos_f - sin_c sin_f and sin = sin_c cos_f + cos_c sin_f. Two
    tables of the root of the context replace one of its length, 134 MB for 512K tokens.

    Attributes:
        step: positions per coarse row.
        coarse: cos and sin of step * row, [rows, R/2] fp32 each, attention factor included.
        fine: cos and sin of 0..step-1, [step, R/2] fp32 each.
    """

    step: int
    coarse: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    fine: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def split_rotary_tables(
    inv_freq: npt.NDArray[np.float64], attention_factor: float, length: int
) -> SplitRotaryTables:
    """Return the tables of `rotary_tables` in two parts; arguments as there."""
    step = 1 << (max(1, length - 1).bit_length() + 1) // 2
    rows = -(-length // step)
    return SplitRotaryTables(
        step=step,
        coarse=rotary_tables(inv_freq * step, attention_factor, rows),
        fine=rotary_tables(inv_freq, 1.0, step),
    )
