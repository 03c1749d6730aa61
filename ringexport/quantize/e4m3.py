"""Round fp32 to FP8-E4M3 with integer arithmetic: to nearest even, bit for bit as ml_dtypes.

Adding 2**20 times the power of two below |x| makes the fp32 adder round to 3 mantissa bits, by
the default rounding mode; below 2**-6, where E4M3 is subnormal, the addend stays that of 2**-6.
The low bits of the sum then are the mantissa, hidden bit included, and the exponent is added to
them as an integer. A cast with ml_dtypes gives the same bytes and takes several times as long.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["E4M3_LARGEST", "E4M3_SATURATION", "e4m3_bits"]

E4M3_LARGEST = 448.0
E4M3_SATURATION = 464.0
"""Magnitudes up to here round to 448 or less; the tie goes to 448, whose mantissa is even."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)
_SMALLEST_NORMAL = np.float32(2.0**-6).view(np.uint32)
_LARGEST = np.float32(E4M3_LARGEST).view(np.uint32)
_TWENTY_EXPONENTS = np.uint32(20 << 23)
_MANTISSA_BITS = np.uint32(20)
_BIAS = np.uint8(((127 + 20 - 6) << 3) & 0xFF)
_SIGN = np.uint8(0x80)
_SIGN_SHIFT = np.uint32(24)


def e4m3_bits(
    values: npt.NDArray[np.float32], out: npt.NDArray[np.uint8], *, clip: bool = True
) -> None:
    """Write the E4M3 byte of each value to `out`.

    Args:
        values: fp32, contiguous, no NaN; overwritten.
        out: uint8 of the same shape.
        clip: saturate at 448; without it no magnitude may exceed `E4M3_SATURATION`.
    """
    bits = values.view(np.uint32)
    addend = np.right_shift(bits, _SIGN_SHIFT)
    np.copyto(out, addend, casting="unsafe")
    np.bitwise_and(out, _SIGN, out=out)
    np.bitwise_and(bits, _MAGNITUDE, out=bits)
    if clip:
        np.minimum(bits, _LARGEST, out=bits)
    np.maximum(bits, _SMALLEST_NORMAL, out=addend)
    np.bitwise_and(addend, _EXPONENT, out=addend)
    np.add(addend, _TWENTY_EXPONENTS, out=addend)
    np.add(values, addend.view(np.float32), out=values)
    np.subtract(bits, addend, out=bits)
    np.right_shift(addend, _MANTISSA_BITS, out=addend)
    np.add(bits, addend, out=bits)
    codes = bits.astype(np.uint8)
    np.subtract(codes, _BIAS, out=codes)
    np.bitwise_or(out, codes, out=out)
