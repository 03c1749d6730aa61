"""The structure that the rest of the code relies on: who imports whom, how large things are."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ringexport"
MODULES = sorted(PACKAGE.rglob("*.py"))

LEAVES = {"errors", "files", "progress", "strict_json", "tensors", "tokenizer_errors", "version"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "strict_json": {"errors", "files"},
    "settings": {"errors"},
    "tensors": {"errors"},
    "tokenizer_errors": {"errors"},
    "progress": set(),
    "bundle": LEAVES,
    "ops": LEAVES,
    "checkpoint": LEAVES | {"ops"},
    "stats": LEAVES,
    "quantize": LEAVES | {"bundle", "checkpoint", "ops", "stats"},
    "model": LEAVES | {"ops", "checkpoint"},
    "calibrate": LEAVES | {"ops", "checkpoint", "model", "stats"},
    "graph": LEAVES | {"ops", "checkpoint"},
    "kernels": LEAVES,
    "engine": LEAVES | {"bundle", "ops"},
    "packing": LEAVES | {"checkpoint", "ops"},
    "runtime.backends.cuda": LEAVES
    | {"runtime", "bundle", "checkpoint", "kernels", "ops", "packing"},
    "runtime": LEAVES | {"ops", "bundle", "settings"},
    "runtime.backends.torch_ref": LEAVES | {"runtime", "bundle", "model", "checkpoint", "ops"},
    "runtime.backends.trt": LEAVES | {"runtime", "bundle", "engine"},
    "runtime.backends.torch_quantized": LEAVES | {"model", "checkpoint", "ops"},
    "batching": LEAVES | {"runtime"},
    "serve": LEAVES | {"batching", "runtime", "bundle"},
    "triton": LEAVES | {"bundle", "runtime", "batching"},
    "compare": LEAVES | {"runtime", "ops"},
    "compare.gpu": LEAVES
    | {"compare", "runtime", "checkpoint", "kernels", "model", "ops", "packing"},
    "pipeline": LEAVES
    | {"bundle", "checkpoint", "engine", "graph", "ops", "runtime", "settings"}
    | {"calibrate", "compare", "packing", "quantize", "stats"},
    "cli": LEAVES
    | {
        "pipeline",
        "runtime",
        "compare",
        "bundle",
        "checkpoint",
        "engine",
        "kernels",
        "ops",
        "settings",
    }
    | {"quantize", "stats", "batching", "serve", "triton"},
    "": LEAVES | {"runtime"},
    "__main__": {"cli"},
}
"""Layer to the layers it may import, besides itself: data flows one way (docs/architecture.md)."""

MAX_FILE_LINES = 500
MAX_REFERENCE_MODEL_LINES = 500


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> str:
    """Return the longest entry of the table that holds the module."""
    while module not in ALLOWED and "." in module:
        module = module.rpartition(".")[0]
    return module


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of ringexport that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "ringexport":
                names = [f"ringexport.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix("ringexport.") for name in names if "ringexport." in name)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_data_flow(path: Path) -> None:
    layer = layer_of(module_name(path))
    family = {layer, layer.partition(".")[0]}
    for imported in imports(path):
        target = layer_of(imported)
        base = target.partition(".")[0]
        assert target in family or base in ALLOWED[layer] | family, f"{path}: imports {imported}"


def test_import_rule_is_broken_by_an_upward_import() -> None:
    assert "graph" not in ALLOWED["runtime"]
    assert "cli" not in ALLOWED["pipeline"]
    assert list(imports(PACKAGE / "tensors.py")) == ["errors"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_file_is_within_its_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


def test_reference_model_stays_readable() -> None:
    files = sorted((PACKAGE / "model").glob("*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) > 0
    code = [
        line
        for file in files
        for line in file.read_text().splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= MAX_REFERENCE_MODEL_LINES


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_public_names_are_declared_and_exist(path: Path) -> None:
    name = module_name(path)
    if name.endswith("__main__"):
        return
    module = importlib.import_module(".".join(filter(None, ["ringexport", name])))
    names = getattr(module, "__all__", None)
    if names is None:
        assert path.name == "__init__.py", f"{path} declares no __all__"
        return
    assert len(set(names)) == len(names)
    assert all(hasattr(module, public) for public in names)


def test_only_settings_reads_the_environment() -> None:
    readers = [
        path.name
        for path in MODULES
        if "os.environ" in path.read_text() or "os.getenv" in path.read_text()
    ]
    assert set(readers) <= {"settings.py"}


def test_import_is_light() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers", "rich", "click")
    code = f"import sys, ringexport; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
