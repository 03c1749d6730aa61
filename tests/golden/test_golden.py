"""The golden files: current, small, labelled, and independent of the package."""

import ast
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.golden import generate

FILES = sorted(generate.DIRECTORY.glob("*.safetensors"))


def test_files_are_what_the_generator_writes() -> None:
    expected = generate.goldens()
    assert {path.stem for path in FILES} == expected.keys()
    for path in FILES:
        stored = load_file(path)
        assert stored.keys() == expected[path.stem].keys()
        for name, value in expected[path.stem].items():
            # Not bitwise: exp and the sums of a matrix product differ between libraries.
            tolerance = 1e-12 * max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(stored[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_say_where_they_come_from(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert metadata["version"] == generate.VERSION
    assert {"seed", "source"} <= metadata.keys()


def test_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 300_000


def test_generator_does_not_import_the_implementation() -> None:
    tree = ast.parse(Path(generate.__file__).read_text())
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        str(node.module).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= {"math", "zlib", "dataclasses", "pathlib", "numpy", "safetensors"}


# heads, layers, layer, head -> log decay of the forms "serving" and "hf", by hand to 6 digits.
DECAYS = {
    (16, 20, 0, 0): (-0.707114, -0.744330),
    (16, 20, 0, 15): (-0.00390629, -0.00411188),
    (16, 20, 10, 0): (-0.334952, -0.372169),
    (16, 20, 18, 0): (-0.0372232, -0.0744394),
    (16, 20, 18, 15): (-0.000205631, -0.000411223),
    (32, 32, 0, 0): (-0.840905, -0.868031),
    (32, 32, 30, 0): (-0.0271341, -0.0542598),
}


@pytest.mark.parametrize(("case", "expected"), DECAYS.items(), ids=str)
def test_decays_of_the_published_sizes(
    case: tuple[int, int, int, int], expected: tuple[float, float]
) -> None:
    heads, layers, layer, head = case
    for form, value in zip(("serving", "hf"), expected, strict=True):
        actual = generate.log_decay(heads, layer, layers, form)[head]
        assert f"{actual:.6g}" == f"{value:.6g}"


def test_slopes_of_a_head_count_that_is_no_power_of_two() -> None:
    expected = [2.0**-n for n in range(1, 9)] + [0.707107, 0.353553, 0.176777, 0.088388]
    actual = [generate.slope(head, 12) for head in range(12)]
    np.testing.assert_allclose(actual, expected, atol=5e-7)


def test_recurrence_of_ones() -> None:
    ones = np.ones((4, 1, 1))
    output, state = generate.linear_attention(ones, ones, ones, np.log([0.5]), np.zeros((1, 1, 1)))
    np.testing.assert_allclose(output.ravel(), [1, 1.5, 1.75, 1.875], atol=1e-15)
    assert state.ravel() == pytest.approx([1.875])
