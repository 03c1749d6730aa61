"""Time GPU work as an engine runs it: inside a CUDA graph, medians, weights not in the L2."""

import importlib.metadata
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import torch

__all__ = ["conditions", "median_us", "print_rows", "rotating"]

_REPEATS = 15


def median_us(steps: Sequence[Callable[[], None]], *, replays: int = 20) -> float:
    """Return microseconds per step: the median over replays of one graph of all steps.

    Args:
        steps: each launches one step on the current stream; give as many, on different data, as
            it takes to exceed the L2 cache if an engine would find its data there cold.
        replays: graph launches per timing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # where the steps' data is being made
    with torch.cuda.stream(stream):
        for step in steps:
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for step in steps:
                step()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(_REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            stop.record()
            stream.synchronize()
            times.append(start.elapsed_time(stop) * 1000 / (replays * len(steps)))
    return statistics.median(times)


def rotating(nbytes: int, *, l2_bytes: int = 60 << 20, at_least: int = 1) -> int:
    """Return how many copies of `nbytes` of data are needed so that none is found in the L2."""
    return max(at_least, -(-3 * l2_bytes // max(nbytes, 1)))


def conditions(packages: Iterable[str] = ()) -> str:
    """Return GPU, driver, versions and date, as docs/performance.md states them.

    Args:
        packages: to be named besides torch, by their distribution's name, if installed.
    """
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    names = [f"driver {driver}", f"CUDA {torch.version.cuda}"]
    for name in ("torch", *packages):
        try:
            names.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            names.append(f"no {name}")
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"one {torch.cuda.get_device_name(0)}, {', '.join(names)}; {date}"


def print_rows(rows: Iterable[Mapping[str, object]]) -> None:
    """Print each row of a benchmark as soon as it is there."""
    for row in rows:
        cells = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print("  ".join(cells), flush=True)
