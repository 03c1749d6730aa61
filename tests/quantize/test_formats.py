"""Fast quantization against the slow golden one, bit for bit, and its properties."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringexport.errors import ConfigError, QuantizationError, ShapeError
from ringexport.ops.quantization import Granularity, NumberFormat, Quantized, dequantize
from ringexport.ops.schemes import WeightObserver, WeightScheme
from ringexport.quantize.e4m3 import e4m3_bits
from ringexport.quantize.formats import quantize_array
from ringexport.quantize.scales import absmax_tiles
from tests.numerics import assert_same
from tests.quantize.golden import golden_absmax, golden_codes, golden_dequantize

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FORMATS = list(NumberFormat)
GRANULARITIES = ("tensor", "channel", "group(8)", "group(7)", "block(4, 8)", "block(5, 3)")
SHAPES = ((1, 1), (1, 40), (40, 1), (8, 16), (13, 37), (63, 130))
DTYPES = (BF16, np.dtype(np.float16), np.dtype(np.float32))


def scheme(
    number_format: NumberFormat, granularity: str, observer: WeightObserver = WeightObserver.ABSMAX
) -> WeightScheme:
    return WeightScheme(
        format=number_format, granularity=Granularity.parse(granularity), observer=observer
    )


def draw(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype[Any]) -> Any:
    """Values over many magnitudes, with zeros of both signs, and an outlier."""
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)
    values.flat[rng.integers(values.size, size=3)] = (0.0, -0.0, 0.0)
    values.flat[rng.integers(values.size)] = 30.0
    return values.astype(dtype)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_golden(
    number_format: NumberFormat,
    granularity: str,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    for dtype in DTYPES:
        array = draw(rng, shape, dtype)
        before = array.tobytes()
        found = quantize_array(array, scheme(number_format, granularity))
        tiles = Granularity.parse(granularity)
        absmax = golden_absmax(array, tiles)
        scale = (absmax.astype(np.float32) / np.float32(number_format.half_range)).reshape(
            tiles.scale_shape(shape)
        )
        assert_same(found.weight_scale, np.where(scale == 0, np.finfo(np.float32).eps, scale))
        codes = golden_codes(array, found.weight_scale, tiles, number_format)
        assert_same(found.values, codes)
        real = golden_dequantize(codes, found.weight_scale, tiles)
        assert_same(dequantize(found), real.astype(np.float32))
        assert found.saturated == 0
        assert array.tobytes() == before


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group(128)", "block(128, 128)"])
def test_slabs_agree_with_the_whole(granularity: str, rng: np.random.Generator) -> None:
    """Shapes beyond one slab, ragged in both directions."""
    array = rng.standard_normal((700, 300)).astype(BF16)
    tiles = Granularity.parse(granularity)
    for number_format in FORMATS:
        found = quantize_array(array, scheme(number_format, granularity))
        absmax = golden_absmax(array, tiles).astype(np.float32)
        scale = (absmax / np.float32(number_format.half_range)).reshape(found.weight_scale.shape)
        assert_same(found.weight_scale, scale)
        full = np.repeat(np.repeat(np.atleast_2d(scale), tiles.tile(array.shape)[0], 0), 1, 1)
        full = np.repeat(full, tiles.tile(array.shape)[1], 1)[:700, :300]
        scaled = array.astype(np.float32) / full
        expected = (
            np.clip(np.rint(scaled), -128, 127).astype(np.int8)
            if number_format is NumberFormat.INT8
            else np.clip(scaled, -448, 448).astype(E4M3)
        )
        assert_same(found.values, expected)


def test_fp8_equals_ml_dtypes_on_every_bf16_pattern_and_many_scales() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    values = patterns[np.isfinite(patterns.astype(np.float32))].reshape(1, -1)
    rng = np.random.default_rng(1)
    powers = 2.0 ** np.arange(-126, 120, 9)
    scales = np.concatenate([powers, rng.uniform(1, 2, 40) * 10.0 ** rng.uniform(-9, 9, 40)])
    for scale in scales.astype(np.float32):
        found = quantize_array(
            values, scheme(NumberFormat.FP8_E4M3, "tensor"), scale=np.array([scale])
        )
        with np.errstate(over="ignore"):
            scaled = np.clip(values.astype(np.float32) / scale, -448, 448)
        assert_same(found.values, scaled.astype(E4M3))


def test_fp8_equals_ml_dtypes_on_random_fp32_bits(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    bits = np.concatenate(
        [bits, (bits & 0x80FFFFFF) | 0x3A000000, (bits & 0x83FFFFFF) | (0x3C << 24)]
    )
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = np.clip(values, -448, 448).astype(E4M3).view(np.uint8)
    codes = np.empty(values.shape, np.uint8)
    e4m3_bits(values.copy(), codes)
    assert_same(codes, expected)
    small = np.abs(values) <= 464
    codes = np.empty(int(small.sum()), np.uint8)
    e4m3_bits(values[small].copy(), codes, clip=False)
    assert_same(codes, expected[small])


def test_fp8_ties_and_neighbours_of_ties() -> None:
    """Every midpoint between two codes, and the fp32 values on either side of it."""
    raw = np.arange(127, dtype=np.uint8)
    values = raw.view(E4M3).astype(np.float64)
    middles = np.append((values[:-1] + values[1:]) / 2, 464.0).astype(np.float32)
    near = np.concatenate(
        [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(1e9))]
    )
    near = np.concatenate([near, -near, [0.0, -0.0, 448, -448, 1e-45, -1e-45]]).astype(np.float32)
    codes = np.empty(near.shape, np.uint8)
    e4m3_bits(near.copy(), codes)
    assert_same(codes, np.clip(near, -448, 448).astype(E4M3).view(np.uint8))
    assert codes[-4] == 0x7E
    assert codes[-5] == 0x80, "negative zero keeps its sign"


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused(number_format: NumberFormat, value: float) -> None:
    array = np.zeros((300, 400), BF16)
    array[217, 33] = value
    for granularity in ("tensor", "channel", "block(128, 128)"):
        with pytest.raises(QuantizationError, match=r"w holds -?(nan|inf) at \[217, 33\]"):
            quantize_array(array, scheme(number_format, granularity), name="w")


@pytest.mark.parametrize("number_format", FORMATS)
def test_extremes(number_format: NumberFormat) -> None:
    """Zeros, subnormals and the largest values, each in a row of its own."""
    largest = 3.3e38
    array = np.array(
        [[0, -0.0, 0], [1e-45, 0, -1e-45], [1e-38, -5e-39, 0], [largest, -largest, 0], [1, 2, 3]],
        np.float32,
    )
    found = quantize_array(array, scheme(number_format, "channel"))
    assert np.isfinite(found.weight_scale).all()
    assert (found.weight_scale > 0).all()
    real = dequantize(found)
    assert np.isfinite(real).all()
    np.testing.assert_allclose(real[2:4], array[2:4], rtol=0.05, atol=1e-39)
    assert (real[0] == 0).all()
    assert found.saturated == 0


def test_int8_range_is_that_of_compressed_tensors() -> None:
    array = np.array([[1.0, -1.0, 0.5, 0.25]], np.float32)
    found = quantize_array(array, scheme(NumberFormat.INT8, "channel"))
    assert found.values.tolist() == [[127, -127, 64, 32]]
    assert found.weight_scale[0, 0] == np.float32(1 / 127.5)
    scale = np.ones((1, 1), np.float32)
    edges = np.array([[-128.4, -127.5, 126.5, 127.4, 0.5, 1.5]], np.float32)
    found = quantize_array(edges, scheme(NumberFormat.INT8, "channel"), scale=scale)
    assert found.values.tolist() == [[-128, -128, 126, 127, 0, 2]]
    assert found.saturated == 1


@pytest.mark.parametrize("number_format", FORMATS)
def test_saturation_is_counted(number_format: NumberFormat, rng: np.random.Generator) -> None:
    array = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    scale = np.array([0.5 / number_format.half_range], np.float32)
    found = quantize_array(array, scheme(number_format, "tensor"), scale=scale)
    assert found.saturated == int((np.abs(array / scale) > number_format.saturation).sum()) > 1000
    largest = 448.0 if number_format is NumberFormat.FP8_E4M3 else 128.0
    assert np.abs(found.values.astype(np.float32)).max() == largest


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group(16)", "block(128, 128)"])
def test_mse_is_never_worse_than_absmax(
    number_format: NumberFormat, granularity: str, rng: np.random.Generator
) -> None:
    array = (rng.standard_t(4, (200, 160)) * 0.02).astype(BF16)
    real = array.astype(np.float64)
    tiles = Granularity.parse(granularity)
    errors = []
    for observer in WeightObserver:
        found = quantize_array(array, scheme(number_format, granularity, observer))
        errors.append(np.square(dequantize(found) - real))
    absmax, mse = (
        np.sqrt(golden_absmax(np.array([[error.sum()]]), Granularity.parse("tensor"))).item()
        for error in errors
    )
    assert mse <= absmax * (1 + 1e-6)
    assert errors[0].shape == errors[1].shape == array.shape
    assert tiles.scale_shape(array.shape) == found.weight_scale.shape


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("value", [1e-45, 1.862325659087682e-42, 1e-38, 1e-37])
def test_small_scales_keep_enough_bits(number_format: NumberFormat, value: float) -> None:
    """A scale of a few bits put the code 4 steps beside its number."""
    array = np.full((1, 1), value, np.float32)
    found = quantize_array(array, scheme(number_format, "tensor"))
    step = float(found.weight_scale.reshape(-1)[0])
    assert step >= 2.0**-129
    error = abs(float(dequantize(found)[0, 0]) - float(array[0, 0]))
    assert error <= (
        0.5001 * step if number_format is NumberFormat.INT8 else value / 16 + step / 2**10
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    number_format=st.sampled_from(FORMATS),
    granularity=st.sampled_from(("tensor", "channel", "group(3)", "block(2, 5)")),
    rows=st.integers(1, 9),
    columns=st.integers(1, 13),
)
def test_round_trip_error_is_bounded(
    data: st.DataObject, number_format: NumberFormat, granularity: str, rows: int, columns: int
) -> None:
    """|x - dequantized| <= half a step; signs survive; quantizing again changes nothing."""
    numbers = st.floats(-1e6, 1e6, width=32)
    drawn = data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    array = np.array(drawn, np.float32).reshape(rows, columns)
    wanted = scheme(number_format, granularity)
    found = quantize_array(array, wanted)
    real = dequantize(found).astype(np.float64)
    ones = Quantized(
        values=np.full(array.shape, 1, number_format.dtype),
        weight_scale=found.weight_scale,
        granularity=found.granularity,
    )
    step = dequantize(ones).astype(np.float64)
    magnitude = np.abs(array.astype(np.float64))
    if number_format is NumberFormat.INT8:
        bound = 0.5001 * step
    else:
        bound = np.maximum(magnitude / 16 * 1.0001, step * 2.0**-10 * 1.0001)
    assert (np.abs(real - array) <= bound).all()
    assert (real * array >= 0).all()
    again = quantize_array(dequantize(found), wanted, scale=found.weight_scale)
    assert_same(
        again.values + np.zeros_like(again.values), found.values + np.zeros_like(found.values)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50))
def test_absmax_of_any_block(rows: int, columns: int, height: int, width: int) -> None:
    rng = np.random.default_rng(rows * 41 + columns)
    array = rng.standard_normal((rows, columns)).astype(BF16)
    tiles = Granularity.parse(f"block({height}, {width})")
    expected = golden_absmax(array, tiles).astype(np.float32)
    assert_same(absmax_tiles(array, tiles), expected)


def test_views_and_empty_arrays(rng: np.random.Generator) -> None:
    array = rng.standard_normal((50, 60)).astype(BF16)
    wanted = scheme(NumberFormat.FP8_E4M3, "channel")
    part = quantize_array(array[10:20], wanted)
    assert_same(part.values, quantize_array(array[10:20].copy(), wanted).values)
    transposed = quantize_array(array.T, wanted)
    assert_same(transposed.values, quantize_array(array.T.copy(), wanted).values)
    assert quantize_array(np.zeros((0, 4), BF16), wanted).values.shape == (0, 4)


def test_wrong_arguments() -> None:
    wanted = scheme(NumberFormat.INT8, "channel")
    with pytest.raises(ShapeError, match="expected 2 dimensions"):
        quantize_array(np.zeros(4, np.float32), wanted)
    with pytest.raises(ShapeError, match="float64, expected"):
        quantize_array(np.zeros((2, 2)), wanted)
    with pytest.raises(ShapeError, match=r"expected float32 \[2, 1\]"):
        quantize_array(np.zeros((2, 2), np.float32), wanted, scale=np.ones((1, 2), np.float32))
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(QuantizationError, match="not positive"):
            quantize_array(
                np.zeros((1, 2), np.float32), wanted, scale=np.full((1, 1), bad, np.float32)
            )
    good = quantize_array(np.ones((2, 2), np.float32), wanted)
    broken = Quantized(
        values=good.values, weight_scale=np.ones(2, np.float32), granularity=good.granularity
    )
    with pytest.raises(ShapeError, match="weight_scale has shape"):
        dequantize(broken)


@pytest.mark.parametrize("text", ["tensor", "channel", "token", "group(64)", "block(128, 128)"])
def test_granularity_text_round_trips(text: str) -> None:
    assert str(Granularity.parse(text)) == text
    assert Granularity.parse(f" {text} ") == Granularity.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "row",
        "group",
        "group()",
        "group(0)",
        "group(1,2)",
        "block(1)",
        "tensor(1)",
        "block(1,0)",
        "group(99999999999999999999)",
    ],
)
def test_wrong_granularity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="granularity"):
        Granularity.parse(text)
