"""Quantize a checkpoint of a published size, with random weights, and compare with the disk.

    python benchmarks/full_size.py WORK_DIRECTORY [--config CONFIG.json] [--recipe fp8]
        [--shard-bytes 10000000000] [--result RESULT.json] [--keep] [--docs]

Writes a checkpoint with the real names, shapes and shard layout, measures the disk while doing so,
drops the files from the cache and runs `ringexport quantize`. Ring-mini-linear-2.0 takes 51 GB.
With --docs the table goes to docs/performance.md; a result that exists is only shown again.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tables import markdown, replace

from ringexport.checkpoint import RingConfig, TensorSpec, expected_tensors

ROOT = Path(__file__).parents[1]
MINI = ROOT / "tests" / "checkpoint" / "data" / "ring-mini-linear-2.0.json"
BLOCK_ELEMENTS = 1 << 23
CHUNK_BYTES = 8 << 20
READ_SAMPLE_BYTES = 8 << 30
STREAMS = 4
SECONDS_BAR, MEMORY_BAR = 180.0, 6 << 30


@dataclass(frozen=True)
class Shard:
    """One weight file: name and the tensors in it."""

    name: str
    tensors: dict[str, TensorSpec]


def plan(config: RingConfig, shard_bytes: int) -> list[Shard]:
    """Fill files in the order of the model, as the published checkpoint does."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in expected_tensors(config).items():
        nbytes = _nbytes(name, spec)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += nbytes
    count = len(groups)
    return [
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def write_checkpoint(directory: Path, config_path: Path, shard_bytes: int) -> tuple[int, float]:
    """Write config, index and weights; return bytes and seconds of the weights, synced."""
    directory.mkdir(parents=True)
    shutil.copyfile(config_path, directory / "config.json")
    shards = plan(RingConfig.from_file(config_path), shard_bytes)
    normal = np.random.default_rng(0).standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
    widths = {spec.shape[-1] for shard in shards for spec in shard.tensors.values()}
    blocks = {n: (normal * np.float32(n**-0.5)).astype(ml_dtypes.bfloat16) for n in widths}
    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        written = list(pool.map(lambda shard: _write_shard(directory, shard, blocks), shards))
    seconds = time.perf_counter() - start
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": sum(written)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(written), seconds


def read_rate(paths: list[Path]) -> float:
    """Return bytes a second of reading cold files with several streams."""
    share = READ_SAMPLE_BYTES // STREAMS

    def read(path: Path) -> int:
        done = 0
        buffer = bytearray(CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            while done < share and (count := file.readinto(buffer)):
                done += count
        return done

    drop_from_cache(paths)
    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        total = sum(pool.map(read, paths[:STREAMS]))
    return total / (time.perf_counter() - start)


def drop_from_cache(paths: list[Path]) -> None:
    """Make the next read of synced files come from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def quantize(source: Path, output: Path, recipe: str) -> dict[str, Any]:
    """Run the command and return what it says, with the wall time of the whole process."""
    command = [sys.executable, "-m", "ringexport", "quantize", str(source), "-o", str(output)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--recipe", recipe, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"wall_seconds": time.perf_counter() - start}


def table(result: dict[str, Any]) -> str:
    """Return the table of docs/performance.md."""
    read, write = result["disk_read_bytes_per_s"], result["disk_write_bytes_per_s"]
    source, output, wall = result["source_bytes"], result["output_bytes"], result["wall_seconds"]
    memory = result["memory_above_start_bytes"]
    alone = source / read + output / write
    rows = [
        ("recipe", result["recipe"], ""),
        ("read and written", f"{source / 1e9:.1f} GB and {output / 1e9:.1f} GB", ""),
        ("wall time of the process", f"{wall:.0f} s", f"{SECONDS_BAR:.0f} s"),
        (
            "host memory above the interpreter, peak",
            f"{memory / 2**30:.2f} GiB",
            f"{MEMORY_BAR >> 30} GiB",
        ),
        ("GPU memory", "0: no GPU is used", "12 GiB"),
        ("read and written per second", f"{(source + output) / wall / 1e9:.2f} GB/s", ""),
        ("the disk alone: reads", f"{read / 1e9:.2f} GB/s", ""),
        ("the disk alone: writes, synced", f"{write / 1e9:.2f} GB/s", ""),
        ("share of the disk's rate, reading all and then writing all", f"{alone / wall:.0%}", ""),
    ]
    where = f"{result['cpus']} CPUs, Python {result['python']}, numpy {result['numpy']}"
    return f"{markdown(('', 'measured', 'bar'), rows)}\n\nMachine: {where}."


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, quantize it, and return all numbers."""
    source, output = options.directory / "bf16", options.directory / options.recipe
    try:
        written, seconds = write_checkpoint(source, options.config, options.shard_bytes)
        sys.stderr.write(f"wrote {written / 1e9:.1f} GB in {seconds:.1f} s\n")
        files = sorted(source.glob("*.safetensors"))
        reading = read_rate(files)
        drop_from_cache(files)
        result = quantize(source, output, options.recipe)
    finally:
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(output, ignore_errors=True)
    return result | {
        "disk_read_bytes_per_s": reading,
        "disk_write_bytes_per_s": written / seconds,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> int:
    """Run all steps; the exit status says whether the bars were met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="on the disk that is to be used")
    parser.add_argument("--config", type=Path, default=MINI)
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--shard-bytes", type=int, default=10_000_000_000)
    parser.add_argument("--result", type=Path, help="file to keep the numbers in, as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints on the disk")
    parser.add_argument("--docs", action="store_true", help="write the table to docs/")
    options = parser.parse_args()
    if options.result is not None and options.result.exists():
        result = json.loads(options.result.read_text())
    else:
        result = measure(options)
    sys.stdout.write(table(result) + "\n")
    if options.result is not None:
        options.result.write_text(json.dumps(result, indent=2))
    if options.docs:
        replace("performance.md", "full-size", table(result))
    good = result["wall_seconds"] <= SECONDS_BAR
    return 0 if good and result["memory_above_start_bytes"] <= MEMORY_BAR else 1


def _nbytes(name: str, spec: TensorSpec) -> int:
    return math.prod(spec.shape) * (4 if name.endswith("expert_bias") else 2)


def _write_shard(directory: Path, shard: Shard, blocks: dict[int, Any]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in shard.tensors.items():
        end = position + _nbytes(name, spec)
        dtype = "F32" if name.endswith("expert_bias") else "BF16"
        header[name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (directory / shard.name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, spec) in enumerate(shard.tensors.items()):
            for part in _parts(name, spec, blocks[spec.shape[-1]], number):
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return position


def _parts(name: str, spec: TensorSpec, block: Any, number: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor: the random block, entered at another place for each tensor."""
    count = math.prod(spec.shape)
    if name.endswith("expert_bias"):
        yield memoryview(np.zeros(count, np.float32).view(np.uint8))
        return
    place = number * 7919 * 64 % len(block)
    while count:
        part = block[place : place + count]
        yield memoryview(part.view(np.uint8))
        count -= len(part)
        place = 0


if __name__ == "__main__":
    raise SystemExit(main())
