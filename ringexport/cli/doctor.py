"""``ringexport doctor``: what works on this machine, what does not, why, and what to install."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, command_options, json_option, pass_app
from ringexport.settings import load_toolchain
from ringexport.version import __version__

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal

__all__ = ["Check", "TargetCheck", "check_machine", "check_targets", "command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One part of the machine: whether it is there, what was found, how to get it."""

    name: str
    found: bool
    detail: str
    install: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCheck:
    """One target: whether it can be built or run here, and if not, why and what to do."""

    target: str
    works: bool
    reason: str
    install: str | None = None
    builds_only: bool = False


@click.command("doctor")
@json_option
@command_options
@pass_app
def command(app: App, *, as_json: bool) -> None:
    """Show which targets work on this machine, which do not, why, and what to install.

    Also lists what killed builds have left in the current directory. Changes nothing.
    """
    checks = check_machine(app.settings.plugin_library, app.settings.kernel_library)
    targets = check_targets({check.name: check for check in checks})
    stale = stale_builds()
    if as_json:
        app.write_json(
            {
                "ringexport": __version__,
                "machine": [asdict(check) for check in checks],
                "targets": [asdict(target) for target in targets],
                "stale_builds": stale,
            }
        )
        return
    terminal = app.terminal
    terminal.table(
        ("target", "works", "why"),
        [(t.target, _works(t), t.reason) for t in targets],
        title=f"Targets of ringexport {__version__} on this machine",
    )
    _show_installs(terminal, {t.target: t.install for t in targets})
    terminal.table(
        ("part", "found", "detail"),
        [(c.name, _yes(c.found), c.detail) for c in checks],
        title="What was looked for",
    )
    _show_installs(terminal, {c.name: c.install for c in checks})
    if stale:
        terminal.result("\nLeft by builds that were killed; the next build to the same output")
        terminal.result("removes them, or remove them yourself: " + ", ".join(stale))


def _show_installs(terminal: "Terminal", installs: Mapping[str, str | None]) -> None:
    """Say how to get what is missing, on lines that can be copied whatever the width."""
    known = {f"  {name}": text for name, text in installs.items() if text}
    if known:
        terminal.result("\nto get what is missing")
        terminal.facts(known)


def check_machine(
    plugin_library: Path | None = None, kernel_library: Path | None = None
) -> list[Check]:
    """Look at Python, packages, drivers, compilers and the disk.

    Args:
        plugin_library: of the TensorRT plugins, None for the default place.
        kernel_library: of the cuda targets, None for the default place.
    """
    return [
        _check_python(),
        _check_package("numpy", "pip install ringexport"),
        _check_package("onnx", "pip install 'ringexport[torch]'"),
        _check_package("torch", "pip install 'ringexport[torch]'"),
        _check_onnxruntime(),
        _check_gpu(),
        _check_nvcc(),
        _check_program("cmake", "cmake 3.25 or newer: pip install cmake"),
        _check_program("g++", "a C++17 compiler, such as the package g++"),
        _check_headers(),
        _check_tensorrt("tensorrt"),
        _check_tensorrt("tensorrt-rtx"),
        _check_plugins(plugin_library),
        _check_kernels(kernel_library),
        _check_disk(),
    ]


def check_targets(machine: dict[str, Check]) -> list[TargetCheck]:
    """Say which targets work, given the checks of the machine by name."""
    ort, onnx, torch = machine["onnxruntime"], machine["onnx"], machine["torch"]
    if not ort.found:
        cpu = TargetCheck(
            target="onnxruntime:cpu",
            works=False,
            reason="onnxruntime is missing",
            install=ort.install,
        )
    elif not onnx.found:
        cpu = TargetCheck(
            target="onnxruntime:cpu",
            works=True,
            reason="runs bundles; building them needs onnx",
            install=onnx.install,
        )
    else:
        cpu = TargetCheck(target="onnxruntime:cpu", works=True, reason="builds and runs bundles")
    reference = TargetCheck(
        target="torch",
        works=torch.found,
        reason="the reference of compare, bench and eval" if torch.found else "torch is missing",
        install=torch.install,
    )
    return [
        cpu,
        reference,
        _tensorrt_target("tensorrt:sm_..", machine, "tensorrt", ["NVIDIA GPU"]),
        _tensorrt_target("tensorrt-rtx:sm_80/86/89/120", machine, "tensorrt-rtx", []),
        _cuda_target(machine),
        _onnxruntime_cuda_target(machine),
    ]


def _tensorrt_target(
    target: str, machine: dict[str, Check], flavor: str, needs: list[str]
) -> TargetCheck:
    """Say whether engines can be built here; running them needs a GPU that they are for."""
    missing = [
        machine[name]
        for name in ("onnx", flavor, "TensorRT plugins", *needs)
        if not machine[name].found
    ]
    if missing:
        return TargetCheck(
            target=target,
            works=False,
            reason="; ".join(f"no {check.name} here" for check in missing),
            install=missing[0].install,
        )
    gpu = machine["NVIDIA GPU"]
    where = "here, if its GPU is the target's" if gpu.found else "on another machine: no GPU here"
    return TargetCheck(
        target=target,
        works=True,
        reason=f"builds bundles; they run {where}",
        builds_only=not gpu.found,
    )


def _cuda_target(machine: dict[str, Check]) -> TargetCheck:
    """Packing needs nothing but numpy; running needs torch, the kernels and a GPU."""
    needs = [machine[name] for name in ("NVIDIA GPU", "torch", "CUDA kernels")]
    missing = [check for check in needs if not check.found]
    reason = "builds and runs bundles"
    if missing:
        reason = "builds bundles; running them needs " + ", ".join(one.name for one in missing)
    return TargetCheck(
        target="cuda:sm_80/86/89/90/100/120",
        works=True,
        reason=reason,
        install=missing[0].install if missing else None,
        builds_only=bool(missing),
    )


def _onnxruntime_cuda_target(machine: dict[str, Check]) -> TargetCheck:
    """Building needs onnx; running needs the CUDA provider of onnxruntime-gpu and a GPU."""
    from ringexport.runtime.registry import available_backends

    name = "onnxruntime:cuda"
    onnx = machine["onnx"]
    info = next(one for one in available_backends() if one.name == name)
    if info.missing is None:
        works = "builds and runs bundles" if onnx.found else "runs bundles; building needs onnx"
        return TargetCheck(target=name, works=True, reason=works, install=onnx.install)
    reason = f"builds bundles; they do not run here: {info.missing}"
    if not onnx.found:
        return TargetCheck(target=name, works=False, reason="onnx is missing", install=onnx.install)
    return TargetCheck(target=name, works=True, reason=reason, install=info.hint, builds_only=True)


def stale_builds() -> list[str]:
    """Return temporary directories of dead builds in the current directory and one below it."""
    from ringexport.bundle import find_stale_builds

    here = Path()
    folders = [here, *(path for path in here.iterdir() if path.is_dir())]
    kinds = ("tmp", "old", "work")
    return [str(path) for folder in folders for path in find_stale_builds(folder, kinds=kinds)]


def _check_python() -> Check:
    version = platform.python_version()
    return Check(
        name="python",
        found=sys.version_info >= (3, 11),
        detail=f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        install=None if sys.version_info >= (3, 11) else "Python 3.11 or newer",
    )


def _check_package(name: str, install: str) -> Check:
    """Look a package up without importing it."""
    if importlib.util.find_spec(name) is None:
        return Check(name=name, found=False, detail="not installed", install=install)
    try:
        version = importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return Check(name=name, found=True, detail=version)


def _check_tensorrt(name: str) -> Check:
    """Import the module of a flavour in a process of its own: the two do not mix in one."""
    from ringexport.engine.flavor import FLAVORS, find_module

    flavor = FLAVORS[name]
    module = find_module(flavor)
    if module is None:
        return Check(name=name, found=False, detail="not installed", install=flavor.hint)
    packages = importlib.metadata.packages_distributions().get(module, [module])
    try:
        version = importlib.metadata.version(packages[0])
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    detail = f"{version}, module {module}"
    problem = _import_problem(module)
    if problem is not None:
        detail += f", cannot be loaded: {problem}"
        return Check(name=name, found=False, detail=detail, install=flavor.hint)
    return Check(name=name, found=True, detail=detail)


def _import_problem(module: str) -> str | None:
    """Return the last line of what Python says to an import, None if it works."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return said[-1] if done.returncode else None


def _check_kernels(path: Path | None) -> Check:
    """Load the kernel library, which needs no GPU."""
    from ringexport.errors import BackendUnavailableError
    from ringexport.kernels.library import BUILD_HINT, DEFAULT_LIBRARY, OPS, KernelLibrary

    place = path or DEFAULT_LIBRARY
    if not place.is_file():
        detail = f"there is no library at {place}"
        install = f"{BUILD_HINT}, or name it in RINGEXPORT_KERNEL_LIBRARY"
        return Check(name="CUDA kernels", found=False, detail=detail, install=install)
    try:
        KernelLibrary.open(place)
    except BackendUnavailableError as error:
        return Check(name="CUDA kernels", found=False, detail=error.message, install=error.hint)
    return Check(name="CUDA kernels", found=True, detail=f"{place}, {len(OPS)} ops")


def _check_plugins(path: Path | None) -> Check:
    """Read what the plugin library says about itself."""
    from ringexport.engine.plugins import BUILD_HINT, NO_KERNELS, find_library
    from ringexport.engine.target import PLUGIN_ARCHITECTURES
    from ringexport.errors import RingExportError

    try:
        library = find_library(path)
    except RingExportError as error:
        return Check(name="TensorRT plugins", found=False, detail=error.message, install=BUILD_HINT)
    missing = ", ".join(f"sm_{number}" for number in library.lacks(PLUGIN_ARCHITECTURES))
    what = f"kernels {library.kernels}"
    if library.kernels == NO_KERNELS:
        what = "without kernels: engines build, nothing runs"
    elif missing:
        what += f": engines for {missing} build, and do not run"
    return Check(name="TensorRT plugins", found=True, detail=f"{library.path}, {what}")


def _check_onnxruntime() -> Check:
    from ringexport.runtime.onnxruntime_import import import_onnxruntime

    install = "pip install 'ringexport[ort]'"
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        detail = "not installed" if error.name == "onnxruntime" else str(error).splitlines()[0]
        return Check(name="onnxruntime", found=False, detail=detail, install=install)
    providers = [
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    ]
    detail = f"{onnxruntime.__version__} with {', '.join(providers)}"
    return Check(name="onnxruntime", found=True, detail=detail)


def _check_gpu() -> Check:
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    output = _matching_line("", "nvidia-smi", query, "--format=csv,noheader")
    if output is None:
        return Check(
            name="NVIDIA GPU",
            found=False,
            detail="no NVIDIA GPU or driver",
            install="the NVIDIA driver, on a machine with a GPU",
        )
    return Check(name="NVIDIA GPU", found=True, detail=output)


def _check_nvcc() -> Check:
    """Look where plugins/CMakeLists.txt does."""
    toolchain = load_toolchain()
    named = toolchain.nvcc
    places = ["nvcc", *(str(root / "bin" / "nvcc") for root in toolchain.cuda_roots)]
    for place in [named] if named else places:
        output = _matching_line("release", place, "--version")
        if output is not None:
            return Check(name="nvcc", found=True, detail=f"{output}, {shutil.which(place)}")
    return Check(
        name="nvcc",
        found=False,
        detail=f"no nvcc at {named}" if named else "no nvcc on PATH or in /usr/local/cuda",
        install="the CUDA toolkit, 12.8 or newer; compiling needs no GPU",
    )


def _check_program(name: str, install: str) -> Check:
    output = _matching_line("", name, "--version")
    if output is None:
        return Check(name=name, found=False, detail=f"no {name} on PATH", install=install)
    return Check(name=name, found=True, detail=output)


def _check_headers() -> Check:
    """Look for TensorRT's headers in the order of plugins/hosts/tensorrt/CMakeLists.txt."""
    spec = importlib.util.find_spec("kernel_lens")
    wheels = list(spec.submodule_search_locations or []) if spec is not None else []
    folders = [root / "include" for root in load_toolchain().tensorrt_roots]
    folders.append(Path(f"/usr/include/{platform.machine()}-linux-gnu"))
    folders += [Path(wheel) / "include" / "tensorrt" for wheel in wheels]
    name = "TensorRT headers"
    for folder in folders:
        if (folder / "NvInferRuntime.h").is_file():
            return Check(name=name, found=True, detail=str(folder))
    return Check(
        name=name,
        found=False,
        detail="no NvInferRuntime.h: the TensorRT plugins cannot be compiled",
        install="set TENSORRT_ROOT, or: pip install --no-deps kernel-lens==2.0.1",
    )


def _matching_line(text: str, program: str, *arguments: str) -> str | None:
    """Return the first line with `text` of what a program prints, None if it fails or lacks it."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and text in line]
    return lines[0] if lines and done.returncode == 0 else None


def _check_disk() -> Check:
    usage = shutil.disk_usage(Path())
    detail = f"{usage.free / 1e9:.1f} GB free in the current directory"
    return Check(name="disk", found=usage.free > 1 << 30, detail=detail)


def _works(target: TargetCheck) -> str:
    return "builds" if target.builds_only else _yes(target.works)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
