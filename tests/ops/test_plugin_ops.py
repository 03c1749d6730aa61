"""The references of the 8-bit plugin ops, against dequantized operands multiplied in fp64."""

import numpy as np
import numpy.typing as npt
import pytest

from ringexport.errors import ShapeError
from ringexport.ops.moe import experts
from ringexport.ops.plugin_ops import quantize_tokens, quantized_experts, quantized_projection
from ringexport.ops.quantization import Granularity, NumberFormat, Quantized, dequantize
from ringexport.ops.schemes import WeightScheme
from ringexport.quantize.formats import quantize_array

CHANNEL = Granularity.parse("channel")
FORMATS = list(NumberFormat)
Array = npt.NDArray[np.float32]


def quantize(rows: Array, number_format: NumberFormat) -> Quantized:
    """One scale for each row."""
    return quantize_array(rows, WeightScheme(format=number_format, granularity=CHANNEL))


@pytest.mark.parametrize("number_format", FORMATS)
def test_tokens_are_quantized_as_everywhere_else(
    rng: np.random.Generator, number_format: NumberFormat
) -> None:
    hidden = rng.standard_normal((7, 96)).astype(np.float32)
    codes, scale = quantize_tokens(hidden, number_format)
    found = quantize(hidden, number_format)
    np.testing.assert_array_equal(codes, found.values)
    np.testing.assert_array_equal(scale, found.weight_scale)


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_token_of_zeros(number_format: NumberFormat) -> None:
    codes, scale = quantize_tokens(np.zeros((1, 32), np.float32), number_format)
    assert not codes.astype(np.float32).any()
    assert scale[0, 0] > 0


@pytest.mark.parametrize("number_format", FORMATS)
def test_projection(rng: np.random.Generator, number_format: NumberFormat) -> None:
    hidden = rng.standard_normal((5, 64)).astype(np.float32)
    matrix = rng.standard_normal((48, 64)).astype(np.float32)
    weight = quantize(matrix, number_format)
    codes, scale = quantize_tokens(hidden, number_format)
    real = codes.astype(np.float64) * scale
    expected = real @ dequantize(weight).astype(np.float64).T
    found = quantized_projection(hidden, weight.values, weight.weight_scale[:, 0])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("number_format", FORMATS)
def test_experts_are_close_to_unquantized_ones(
    rng: np.random.Generator, number_format: NumberFormat
) -> None:
    count, width, inner, tokens = 6, 64, 32, 9
    hidden = rng.standard_normal((tokens, width)).astype(np.float32)
    ids = np.stack([rng.permutation(count)[:2] for _ in range(tokens)])
    weights = rng.random((tokens, 2), np.float32)
    stacks = [
        rng.standard_normal(shape).astype(np.float32) * 0.1
        for shape in ((count, 2 * inner, width), (count, width, inner))
    ]
    parts = []
    for stack in stacks:
        made = [quantize(one, number_format) for one in stack]
        codes = np.stack([one.values for one in made])
        parts.append((codes, np.stack([one.weight_scale[:, 0] for one in made])))
    found = quantized_experts(hidden, (ids, weights), parts[0], parts[1])
    expected = experts(hidden, ids, weights, *stacks)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # Four roundings: an operand of FP8 is off by about 2.6 %, one of int8 by 0.7 %.
    assert error < (0.02 if number_format is NumberFormat.INT8 else 0.08)


def test_sizes_that_disagree() -> None:
    with pytest.raises(ShapeError):
        quantized_projection(np.ones((2, 32)), np.ones((4, 16), np.int8), np.ones(4))
