"""The fast engine beside torch + flash-linear-attention and beside onnxruntime:cuda, in one run.

python benchmarks/beside.py decode fp8 1,8 [CONTEXT]    recipe; batches
python benchmarks/beside.py prefill fp8 1x4096,8x4096
python benchmarks/beside.py flash                       Ring-flash in FP8, decode
python benchmarks/beside.py onnxruntime 1,8 [CONTEXT]   bf16
python benchmarks/beside.py docs [fp8 flash ...]        writes the tables of docs/performance.md

Ring-mini's config with random weights, the same for all; every recipe is checked first (see
torch_reference.py and onnxruntime_cuda.py), and the process stops where a check fails. Torch has
no grouped product of INT8: beside the engine's INT8 stands what torch takes in FP8.
"""

import gc
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from engine_setup import (
    FLASH,
    Table,
    check_names,
    conditions,
    gpu,
    numbers,
    runner_of,
    weights_of,
)
from torch_reference import (
    WITHOUT_TORCH,
    TorchTime,
    check,
    time_torch,
    time_torch_prefill,
)

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu.decode import measure_decode
from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.gpu.prefill import measure_prefill
from ringexport.errors import ConfigError, RingExportError
from ringexport.runtime.backends.cuda.weights import DeviceWeights

DECODE_HEADER = (
    "recipe", "context", "batch", "engine, us a step", "tokens/s", "torch + FLA, us a step",
    "tokens/s", "kernels", "engine is faster by", "experts hit a layer", "torch's way",
)  # fmt: skip
ORT_HEADER = (
    "step", "context", "batch", "engine, us", "tokens/s", "onnxruntime:cuda, us", "tokens/s",
    "engine is faster by",
)  # fmt: skip
PREFILL_HEADER = (
    "recipe", "prompts", "engine, tokens/s", "torch + FLA, ms", "tokens/s", "engine is faster by",
)  # fmt: skip
STEPS = 32
"""Decode steps of the engine that follow each other in one timing."""
LONG = 131008
"""The whole context of the models, but for the steps that are timed behind it."""
AT_4096 = tuple((batch, 4096) for batch in (1, 8, 64, 256))
POINTS = {
    "fp8": (*AT_4096, (1, LONG)),
    "fp8-all": AT_4096[:1],
    "int8": AT_4096[:3],
    "bf16": AT_4096,
}
"""Recipe to batches and contexts of the table; int8 comes after fp8, see `decode`."""
PROMPTS = ((1, 4096), (8, 4096), (1, 32768), (1, 131072))


def decode(
    place: Gpu,
    weights: DeviceWeights,
    recipe: str,
    batch: int,
    context: int,
    fp8: dict[tuple[int, int], TorchTime] | None = None,
) -> list[object]:
    """Time decode of engine and torch.

    Args:
        place: the GPU.
        weights: of both.
        recipe: of the weights.
        batch: rows.
        context: tokens that each has seen.
        fp8: gets torch's times in FP8, which are those of INT8 as well.
    """
    mine = time_decode(place, weights, batch, context)
    free_memory()
    known = {} if fp8 is None else fp8
    if recipe in WITHOUT_TORCH:
        if (batch, context) not in known:
            known[batch, context] = time_torch(weights_of(place, "fp8"), batch, context)
        theirs = known[batch, context]
    else:
        theirs = time_torch(weights, batch, context)
    if recipe == "fp8":
        known[batch, context] = theirs
    free_memory()
    return shown(recipe, batch, context, mine, theirs)


def shown(recipe: str, batch: int, context: int, mine: float, theirs: TorchTime) -> list[object]:
    """Return a row of the table."""
    row: list[object] = [recipe, f"{context:,}", batch, *cells(mine, batch)]
    way = f"FP8, {theirs.way}" if recipe in WITHOUT_TORCH else theirs.way
    row += [*cells(theirs.seconds, batch), theirs.kernels, f"{theirs.seconds / mine:.2f}x"]
    row += [f"{theirs.experts_hit:.1f}", way]
    return row


def time_decode(place: Gpu, weights: DeviceWeights, batch: int, context: int) -> float:
    """Return the engine's seconds a step; see `measure_decode`."""
    with runner_of(place, weights, batch, context + 2 * STEPS) as runner:
        found = measure_decode(
            runner, weights, batch=batch, context=context, read_rate=1.0, steps=STEPS
        )
    return found.step_us / 1e6


def time_prefill(place: Gpu, weights: DeviceWeights, batch: int, length: int) -> float:
    """Return the engine's seconds for prompts; see `measure_prefill`."""
    with runner_of(place, weights, batch, length) as runner:
        return measure_prefill(runner, batch=batch, tokens=length).ms / 1e3


def flash(place: Gpu) -> Iterator[list[object]]:
    """Time decode of Ring-flash in FP8; torch comes last, for it needs the weights in its order."""
    weights = weights_of(place, "fp8", RingConfig.from_file(FLASH))
    check(place, weights, "fp8", split="on demand")
    free_memory()
    points = ((1, 4096), (1, LONG))
    mine = [time_decode(place, weights, batch, context) for batch, context in points]
    split = "in place"
    for (batch, context), seconds in zip(points, mine, strict=True):
        free_memory()
        theirs = time_torch(weights, batch, context, split=split)
        yield shown("fp8, Ring-flash", batch, context, seconds, theirs)
        split = "done"


def cells(seconds: float, tokens: int) -> list[str]:
    """Return microseconds and tokens a second."""
    return [f"{seconds * 1e6:,.0f}", f"{tokens / seconds:,.0f}"]


def free_memory() -> None:
    """Give the memory of what is not used any more to the next."""
    gc.collect()  # runners refer to their states and these to them
    torch.cuda.empty_cache()


def prefill(
    place: Gpu, weights: DeviceWeights, recipe: str, prompts: Iterable[tuple[int, int]]
) -> Iterator[list[object]]:
    """Time prompts of random tokens, engine and torch."""
    for batch, length in prompts:
        mine = time_prefill(place, weights, batch, length)
        free_memory()
        count = batch * length
        row: list[object] = [recipe, f"{batch} x {length:,}", f"{count / mine:,.0f}"]
        try:
            theirs = time_torch_prefill(weights, batch, length)
        except torch.OutOfMemoryError:
            yield [*row, "out of memory", "", ""]
        else:
            time_ms = f"{theirs * 1e3:.1f}"
            yield [*row, time_ms, f"{count / theirs:,.0f}", f"{theirs / mine:.2f}x"]
        free_memory()


def onnxruntime(
    place: Gpu, weights: DeviceWeights, batches: tuple[int, ...], context: int = 4096
) -> Iterator[list[object]]:
    """Time one prompt and decode of engine and onnxruntime:cuda; bf16 weights.

    Raises:
        BackendUnavailableError: onnxruntime-gpu is not installed.
    """
    import onnxruntime_cuda as ort  # noqa: PLC0415 - needs onnxruntime

    def row(what: str, size: int, batch: int, mine: float, theirs: float) -> list[object]:
        count = batch * size if what == "prompt" else batch
        found: list[object] = [what, f"{size:,}", batch]
        found += [*cells(mine, count), *cells(theirs, count), f"{theirs / mine:.2f}x"]
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        ort.open_random(weights, Path(folder), cuda_graph=True) as runner,
    ):
        ort.check(runner, weights)
        for batch in batches:
            mine = time_decode(place, weights, batch, context)
            free_memory()
            yield row("decode", context, batch, mine, ort.time_decode(runner, batch, context))
        mine = time_prefill(place, weights, 1, context)
        free_memory()
        theirs = measure_prefill(runner, batch=1, tokens=context).ms / 1e3
        yield row("prompt", context, 1, mine, theirs)


def docs(place: Gpu, recipes: Sequence[str]) -> None:
    """Write the tables of recipes, of Ring-flash and of onnxruntime:cuda."""
    beside_torch = Table("performance.md", "gpu-torch-decode", DECODE_HEADER, key=1)
    prompts = Table("performance.md", "gpu-torch-prefill", PREFILL_HEADER, key=1)
    beside_torch.lead = prompts.lead = f"{conditions(place)}, {version('flash-linear-attention')}:"
    fp8: dict[tuple[int, int], TorchTime] = {}
    for recipe in recipes:
        if recipe == "flash":
            for row in flash(place):
                beside_torch.add(row)
        elif recipe == "onnxruntime":
            docs_onnxruntime(place)
        else:
            weights = weights_of(place, recipe)
            check(place, weights, recipe, prompt=recipe == "fp8")
            for batch, context in POINTS[recipe]:
                beside_torch.add(decode(place, weights, recipe, batch, context, fp8))
            for row in prefill(place, weights, recipe, PROMPTS if recipe == "fp8" else ()):
                prompts.add(row)
            del weights
        free_memory()


def docs_onnxruntime(place: Gpu) -> None:
    """Write the table of onnxruntime:cuda."""
    table = Table("performance.md", "gpu-onnxruntime", ORT_HEADER)
    table.lead = f"{conditions(place)}, {version('onnxruntime-gpu')}:"
    for row in onnxruntime(place, weights_of(place, "bf16"), (1, 8, 64)):
        table.add(row)


def version(package: str) -> str:
    """Return a package and its version."""
    return f"{package} {importlib.metadata.version(package)}"


def main(arguments: list[str]) -> None:
    """Run the command line; what is wrong with it is said before anything is measured."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: Iterable[list[object]] = ()
    match arguments:
        case ["decode", recipe, batches, *rest] if len(rest) <= 1:
            sizes, context = numbers(batches), context_of(rest)
            place = gpu()
            weights = weights_of(place, recipe)
            check(place, weights, recipe)
            rows = (decode(place, weights, recipe, one, context) for one in sizes)
        case ["prefill", recipe, prompts]:
            shapes = [shape_of(one) for one in prompts.split(",")]
            place = gpu()
            weights = weights_of(place, recipe)
            check(place, weights, recipe, prompt=True)
            rows = prefill(place, weights, recipe, shapes)
        case ["flash"]:
            rows = flash(gpu())
        case ["onnxruntime", batches, *rest] if len(rest) <= 1:
            sizes, context = numbers(batches), context_of(rest)
            place = gpu()
            rows = onnxruntime(place, weights_of(place, "bf16"), sizes, context)
        case ["docs", *recipes]:
            known = (*POINTS, "flash", "onnxruntime")
            check_names(recipes, known)
            docs(gpu(), recipes or known)
        case _:
            sys.exit(__doc__)
    for row in rows:
        print(*row, sep="  ", flush=True)


def context_of(rest: Sequence[str]) -> int:
    """Return the context that was asked for, or else 4,096 tokens.

    Raises:
        ConfigError: it is not a number.
    """
    if not rest:
        return 4096
    context, *others = numbers(rest[0])
    if others:
        raise ConfigError(f"'{rest[0]}' is no context: one number of tokens is taken")
    return context


def shape_of(text: str) -> tuple[int, int]:
    """Return prompts and their length of a text like 8x4096.

    Raises:
        ConfigError: it is not like that.
    """
    batch, *length = numbers(text, "x")
    if len(length) != 1:
        raise ConfigError(f"'{text}' is no number of prompts and their length, like 8x4096")
    return batch, length[0]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RingExportError as error:
        sys.exit(str(error))
