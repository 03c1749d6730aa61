"""Under which conditions a number was measured."""

import importlib.metadata
import os
import platform
from pathlib import Path

from ringexport.version import __version__

__all__ = ["measurement_conditions"]

_PACKAGES = ("numpy", "onnxruntime", "torch")


def measurement_conditions(threads: int | None) -> dict[str, str]:
    """Return machine and versions, by name.

    Args:
        threads: per operation of CPU backends, None for their own choice.
    """
    conditions = {
        "cpu": _cpu_name(),
        "cpus": str(_usable_cpus()),
        "load": _load(),
        "threads": "chosen by the backend" if threads is None else str(threads),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "ringexport": __version__,
    }
    for name in _PACKAGES:
        try:
            conditions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            conditions[name] = "not installed"
    return conditions


def _load() -> str:
    """Return how busy the machine was in the last minute, in running processes."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):
        return "unknown"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
