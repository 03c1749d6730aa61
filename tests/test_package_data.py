"""What is no Python file but belongs to the package is in the wheel, too."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ringexport"


def test_every_other_file_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["ringexport"]
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    others = [str(path) for path in files if path.suffix not in {".py", ".pyc"}]
    assert {"serve/page.html", "triton/templates/model.py.in"} <= set(others)
    assert [name for name in others if not any(fnmatch(name, each) for each in patterns)] == []
