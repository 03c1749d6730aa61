"""Tables that benchmarks write into docs/: a run of some recipes keeps the rows of the others."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HEADER = ("recipe", "batch", "us")
OLD = [["fp8", "1", "900"], ["fp8", "8", "2,100"], ["int8", "1", ""], ["fp8, large", "1", "9"]]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("benchmark_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_other_recipes_stay_in_their_place(tables: ModuleType) -> None:
    old = tables.markdown(HEADER, OLD)
    found = tables.merged(old, "", HEADER, [["fp8", 1, 800]], key=1)
    assert found == tables.markdown(HEADER, [["fp8", 1, 800], *OLD[2:]])
    found = tables.merged(old, "", HEADER, [["fp8", 8, 800], ["bf16", 1, 5]], key=2)
    expected = [OLD[0], ["fp8", 8, 800], *OLD[2:], ["bf16", 1, 5]]
    assert found == tables.markdown(HEADER, expected)


def test_a_whole_table_and_one_of_another_header_are_replaced(tables: ModuleType) -> None:
    new = tables.markdown(HEADER, [["fp8", 1, 800]])
    for old, key in ((tables.markdown(HEADER, OLD), 0), (tables.markdown(HEADER[1:], OLD), 1)):
        assert tables.merged(old, "", HEADER, [["fp8", 1, 800]], key=key) == new
        with_lead = tables.merged(f"before\n\n{old}", "now", HEADER, [["fp8", 1, 800]], key=key)
        assert with_lead == f"now\n\n{new}"


def test_conditions_stay_with_their_rows(tables: ModuleType) -> None:
    """A row must not come to stand below the date and the read rate of another run."""
    first = tables.merged("", "card, day 1:", HEADER, OLD, key=1)
    assert first.startswith("card, day 1:\n\n| recipe")
    second = tables.merged(first, "card, day 2:", HEADER, [["fp8", "1", "8"]], key=1)
    leads = second.partition("\n\n| recipe")[0].split("\n\n")
    assert leads == ["Rows of `fp8`: card, day 2:", "Rows of `int8`, `fp8, large`: card, day 1:"]
    third = tables.merged(second, "day 3", HEADER, [["int8", "1", "7"]], key=1)
    assert third.partition("\n\n| recipe")[0].split("\n\n") == [
        "Rows of `int8`: day 3",
        "Rows of `fp8`: card, day 2:",
        "Rows of `fp8, large`: card, day 1:",
    ]
    rows = [[name, "1", "1"] for name in ("fp8", "int8", "fp8, large")]
    whole = tables.merged(third, "day 4", HEADER, rows, key=1)
    assert whole == f"day 4\n\n{tables.markdown(HEADER, rows)}"


def test_markers_are_found(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("top\n<!-- begin one -->\n\n<!-- end one -->\nend\n", encoding="utf-8")
    assert tables.read("page.md", "one") == ""
    tables.replace("page.md", "one", "text\n\n| a |")
    assert tables.read("page.md", "one") == "text\n\n| a |"
    assert tables.read("page.md", "two") == ""
