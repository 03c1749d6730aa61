"""`make sanitize` looks at every kernel, and reads what the tools say."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ringexport.kernels.library import OPS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels"
COMMON = "common"
CLEAN = """
tests/kernels/test_norm.py::test_quantize PASSED
======== 80 passed, 614 deselected in 20.74s ========
========= ERROR SUMMARY: 0 errors
"""
RACES = """
======== 6 passed, 249 deselected in 29.31s ========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
UNINITIALIZED = """
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>()+0x100 in Loops.cuh:58
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void ringkernels::<unnamed>::embed_kernel<__half>(EmbedParams)+0x100 in embed.cu:24
======== 2 passed in 3.10s ========
========= ERROR SUMMARY: 2 errors
"""


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "benchmarks" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def strings(name: str) -> set[str]:
    """Return what stands in quotes in tests/kernels/<name>.py."""
    tree = ast.parse((TESTS / f"{name}.py").read_text(encoding="utf-8"))
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {value for value in constants if isinstance(value, str)}


def test_every_folder_of_kernels_is_in_a_family(sanitize: ModuleType) -> None:
    folders = {path.parent.name for path in (ROOT / "plugins" / "kernels").rglob("*.cu")}
    assert folders == {family.kernels for family in sanitize.FAMILIES.values()} - {COMMON}


def test_every_file_of_tests_is_in_a_family(sanitize: ModuleType) -> None:
    files = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    families = {family.tests for family in sanitize.FAMILIES.values()}
    assert families.isdisjoint(sanitize.ELSEWHERE)
    assert files == families | set(sanitize.ELSEWHERE)


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_called_by_a_family(sanitize: ModuleType, op: str) -> None:
    assert any(op in strings(f"test_{family.tests}") for family in sanitize.FAMILIES.values())


def test_a_run_without_findings_is_clean(sanitize: ModuleType) -> None:
    found = sanitize.read("memcheck", "norm", CLEAN, ended="ended with code 0", code=0)
    assert found.clean
    assert (found.passed, found.errors) == (80, 0)
    assert found.tests == "80 passed, 614 deselected in 20.74s"


@pytest.mark.parametrize(
    ("output", "code"), [(CLEAN, 1), (RACES, 9), (CLEAN.partition("=")[0], 0), ("", -1)]
)
def test_anything_else_is_not(sanitize: ModuleType, output: str, code: int) -> None:
    found = sanitize.read("racecheck", "norm", output, ended="not ended within 9 s", code=code)
    assert not found.clean
    assert found.errors == int(output == RACES)


def test_errors_that_are_not_printed_count(sanitize: ModuleType) -> None:
    """The tool ends with the number of those that it did not print."""
    output = CLEAN.replace(" 0 errors", " 832 errors")
    output += "========= ERROR SUMMARY: 732 errors were not printed. Use --print-limit\n"
    found = sanitize.read("synccheck", "norm", output, ended="", code=9)
    assert (found.errors, found.summary) == (832, "ERROR SUMMARY: 832 errors")


def test_torch_may_read_what_nobody_wrote(sanitize: ModuleType) -> None:
    found = sanitize.read("initcheck", "embed", UNINITIALIZED, ended="", code=0)
    assert not found.clean
    assert found.errors == 1
    assert found.summary.endswith("2 errors, 1 in this library")
    of_torch = UNINITIALIZED.replace("ringkernels::", "cub::")
    assert sanitize.read("initcheck", "embed", of_torch, ended="", code=0).clean


def test_a_table_ends_with_its_sum(sanitize: ModuleType) -> None:
    clean = sanitize.read("memcheck", "norm", CLEAN, ended="", code=0)
    late = sanitize.read("memcheck", "router", "", ended="not ended within 9 s", code=-1)
    races = sanitize.read("racecheck", "norm", RACES, ended="", code=9)
    lines = sanitize.table("memcheck", [clean, races, late])
    assert lines[-1] == "memcheck: 80 tests passed, 0 errors, 1 of 2 families clean"
    assert [line.split()[1] for line in lines[1:-1]] == ["norm", "router"]
    assert sanitize.table("racecheck", [clean, races, late])[-1].endswith(
        "1 errors, 0 of 1 families clean"
    )
