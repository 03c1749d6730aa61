"""What doctor finds on this machine."""

from pathlib import Path

import pytest

from ringexport.cli.doctor import Check, check_targets
from ringexport.engine.plugins import ABI_VERSION
from ringexport.runtime.registry import BackendInfo
from ringexport.version import __version__
from tests.cli.conftest import Call


def test_doctor(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    dead = tmp_path / "bundles" / "out.tmp-0123"
    dead.mkdir(parents=True)
    (dead / ".building").touch()
    called = call("doctor", "--json")
    assert called.code == 0
    targets = {target["target"]: target for target in called.json["targets"]}
    assert targets["onnxruntime:cpu"]["works"]
    assert not targets["tensorrt:sm_.."]["works"]
    assert not targets["onnxruntime:cpu"]["builds_only"]
    machine = {check["name"]: check for check in called.json["machine"]}
    assert {"nvcc", "cmake", "g++", "TensorRT headers"} <= machine.keys()
    assert called.json["stale_builds"] == ["bundles/out.tmp-0123"]
    assert "out.tmp-0123" in call("doctor").out


def test_doctor_without_packages(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = call("doctor", "--json").json
    targets = {target["target"]: target for target in found["targets"]}
    assert not targets["onnxruntime:cpu"]["works"]
    assert targets["onnxruntime:cpu"]["install"] == "pip install 'ringexport[ort]'"
    assert targets["torch"]["install"] == "pip install 'ringexport[torch]'"


@pytest.mark.parametrize("gpu", [True, False])
def test_doctor_tells_building_from_running(monkeypatch: pytest.MonkeyPatch, *, gpu: bool) -> None:
    names = ("numpy", "onnx", "torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
    names += ("TensorRT plugins", "CUDA kernels")
    machine = {name: Check(name=name, found=True, detail="") for name in names}
    machine["NVIDIA GPU"] = Check(name="NVIDIA GPU", found=gpu, detail="")
    backend = BackendInfo(name="onnxruntime:cuda", missing=None if gpu else "no GPU")
    monkeypatch.setattr("ringexport.runtime.registry.available_backends", lambda: (backend,))
    found = {one.target.partition(":sm_")[0]: one for one in check_targets(machine)}
    assert [name for name, one in found.items() if not one.works] == ([] if gpu else ["tensorrt"])
    builds_only = {name for name, one in found.items() if one.builds_only}
    on_gpus = {"tensorrt-rtx", "cuda", "onnxruntime:cuda"}
    assert builds_only == (set() if gpu else on_gpus)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_doctor_shows_what_builds_only(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = call("doctor").out.splitlines()
    lines = [line.split() for line in shown if ":" in line and not line.startswith(" ")]
    rows = {words[0]: words[1] for words in lines}
    assert rows["cuda:sm_80/86/89/90/100/120"] == rows["onnxruntime:cuda"] == "builds"
    assert rows["onnxruntime:cpu"] == "yes"


def test_doctor_breaks_no_command(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ringexport.cli.console._PIPE_COLUMNS", 80)
    monkeypatch.setenv("RINGEXPORT_KERNEL_LIBRARY", str(tmp_path / "none.so"))
    lines = [line.strip() for line in call("doctor").out.splitlines()]
    machine = call("doctor", "--json").json["machine"]
    missing = [part for part in machine if part["install"]]
    assert "CUDA kernels" in {part["name"] for part in missing}
    for part in missing:
        assert any(line.startswith(part["name"]) and part["install"] in line for line in lines)


def test_doctor_names_the_variable_of_the_kernels(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RINGEXPORT_KERNEL_LIBRARY", str(tmp_path / "none.so"))
    machine = {check["name"]: check for check in call("doctor", "--json").json["machine"]}
    kernels = machine["CUDA kernels"]["install"]
    assert kernels.endswith("or name it in RINGEXPORT_KERNEL_LIBRARY")


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ("none", "without kernels: engines build, nothing runs"),
        ("80+90a", "kernels 80+90a: engines for sm_100, sm_120 build, and do not run"),
        ("80+86+89+90a+100+120", "kernels 80+86+89+90a+100+120"),
    ],
)
def test_doctor_says_which_gpus_the_plugins_are_for(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernels: str, said: str
) -> None:
    path = tmp_path / "libringplugins.so"
    facts = f"version={__version__};abi={ABI_VERSION};kernels={kernels};tensorrt_headers=10.14;"
    path.write_text(f"@(#)ringplugins;{facts}")
    monkeypatch.setenv("RINGEXPORT_PLUGIN_LIBRARY", str(path))
    machine = {check["name"]: check for check in call("doctor", "--json").json["machine"]}
    assert machine["TensorRT plugins"]["detail"] == f"{path}, {said}"


def test_doctor_names_a_tensorrt_that_cannot_be_loaded(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package registry has its Python module without the libraries."""
    (tmp_path / "tensorrt.py").write_text("raise ImportError('no libnvinfer.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    machine = {check["name"]: check for check in call("doctor", "--json").json["machine"]}
    assert not machine["tensorrt"]["found"]
    assert machine["tensorrt"]["detail"].endswith("cannot be loaded: ImportError: no libnvinfer.so")


def test_doctor_without_tools(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What compiling the kernels needs is named, with where it was looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    machine = {check["name"]: check for check in call("doctor", "--json").json["machine"]}
    for name in ("nvcc", "cmake", "g++"):
        assert not machine[name]["found"]
        assert machine[name]["install"]
    assert machine["nvcc"]["detail"] == f"no nvcc at {tmp_path / 'nvcc'}"
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    machine = {check["name"]: check for check in call("doctor", "--json").json["machine"]}
    assert machine["TensorRT headers"]["detail"] == str(tmp_path / "include")
