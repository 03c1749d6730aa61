"""Full TensorRT as far as a package registry brings it: its Python module and its lean runtime.

The builder and the ONNX parser are in a library that only NVIDIA's own index has, so no engine is
built here. What is real: every name of the Python interface, the registry, the plugins in it.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringexport.ops.plugin_ops import PLUGIN_CONTRACTS
from tests.plugins.native import ROOT, compile_shared

FOLDER = ROOT / "build" / "tensorrt"
STUBS = ("nvinfer_plugin", "nvonnxparser")
BUILDER = """extern "C" {
void* createInferBuilder_INTERNAL(void*, int) { return nullptr; }
void* getBuilderPluginRegistry(int) { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int) { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int) { return nullptr; }
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins(void*, char const*) { return true; }
}
"""
"""What the Python module links besides the runtime."""

SOURCES = (
    "engine/build.py", "engine/callbacks.py", "engine/layers.py", "engine/plugins.py",
    "runtime/backends/trt.py",
)  # fmt: skip
CLASS_OF = {
    "trt": "", "config": "IBuilderConfig", "builder": "Builder", "network": "INetworkDefinition",
    "parser": "OnnxParser", "profile": "IOptimizationProfile", "registry": "IPluginRegistry",
    "engine": "ICudaEngine", "_engine": "ICudaEngine", "context": "IExecutionContext",
    "_runtime": "Runtime", "layer": "ILayer", "cache": "ITimingCache",
}  # fmt: skip
"""Name of a variable or an attribute in these files to the class that it is of."""
OURS = {
    *(("layer", name) for name in ("kind", "plugin", "isdigit")),
    *(("engine", name) for name in ("stat", "is_file")),
    *(("profile", name) for name in ("name", "options", "shapes")),
}
"""Rows of the layer table, paths and shape profiles: they have the same names."""
FLAVOR_ONLY = {
    "ComputeCapability", "num_compute_capabilities", "set_compute_capability",
    "is_stream_capturable",
}  # fmt: skip
"""What the code asks TensorRT-RTX only."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, host_plugins: Path) -> dict[str, Any]:
    lean = next(FOLDER.glob("tensorrt_lean_libs/libnvinfer_lean.so.*"), None)
    if lean is None:
        pytest.skip(f"no TensorRT in {FOLDER.relative_to(ROOT)}: make tensorrt")
    libraries = tmp_path_factory.mktemp("tensorrt")
    version = lean.name.rpartition(".")[2]
    (libraries / f"libnvinfer.so.{version}").symlink_to(lean)
    for name in STUBS:
        compile_shared(libraries, f"lib{name}.so.{version}", BUILDER)
    more = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{FOLDER}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("full_tensorrt.py"), host_plugins],
        capture_output=True,
        text=True,
        env=os.environ | more,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_plugins_are_found_and_made(found: dict[str, Any]) -> None:
    assert set(found["plugins"]) == {spec.name for spec in PLUGIN_CONTRACTS}
    for spec in PLUGIN_CONTRACTS:
        plugin = found["plugins"][spec.name]
        assert plugin["name"] == spec.name
        assert plugin["namespace"] == "ringexport"
        assert plugin["outputs"] == len(spec.outputs)


def test_a_missing_attribute_is_refused_in_one_sentence(found: dict[str, Any]) -> None:
    for spec in PLUGIN_CONTRACTS:
        plugin = found["plugins"][spec.name]
        assert plugin["refused"]
        if spec.attributes:
            assert f"attribute {next(iter(spec.attributes))} is missing" in plugin["said"][0]


def test_the_callbacks_derive_from_its_classes(found: dict[str, Any]) -> None:
    assert found["made"] == ["ILogger", "IProgressMonitor", "IStreamWriter"]


def used_names() -> set[tuple[str, str, str]]:
    """Return (class, attribute, place) of everything that the package asks of TensorRT."""
    used = set()
    for source in SOURCES:
        tree = ast.parse((ROOT / "ringexport" / source).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = getattr(owner, "attr", getattr(owner, "id", ""))
            if name == "module" or (name in CLASS_OF and (name, node.attr) not in OURS):
                used.add((CLASS_OF.get(name, ""), node.attr, f"{source}:{node.lineno}"))
    return used


def test_every_name_that_is_used_exists(found: dict[str, Any]) -> None:
    names, used = found["names"], used_names()
    assert len(used) > 60
    missing = [
        f"{cls or 'module'}.{name} ({place})"
        for cls, name, place in sorted(used)
        if name not in names[cls] and name not in FLAVOR_ONLY
    ]
    assert not missing, "\n".join(missing)
    for enumeration, members in {
        "BuilderFlag": ("VERSION_COMPATIBLE", "REFIT", "WEIGHT_STREAMING", "STRIP_PLAN"),
        "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
        "PreviewFeature": ("ALIASED_PLUGIN_IO_10_03",),
        "LayerType": ("PLUGIN_V3",),
        "DataType": ("FLOAT", "HALF", "BF16"),
    }.items():
        assert set(members) <= set(names[enumeration])
