"""The fast engine beside torch + flash-linear-attention and beside onnxruntime:cuda, in one run.

python benchmarks/beside.py decode fp8 1,8 [CONTEXT]    recipe bf16 or fp8; batches
python benchmarks/beside.py prefill fp8 1x4096,8x4096
python benchmarks/beside.py onnxruntime 1,8 [CONTEXT]   bf16
python benchmarks/beside.py docs [prefill|onnxruntime]  writes a table of docs/performance.md

Ring-mini's config with random weights, the same for all; every row is checked first (see
torch_reference.py and onnxruntime_cuda.py), and the process stops where a check fails.
"""

import gc
import sys
import tempfile
from pathlib import Path

import engine_point
import torch
from engine_point import engine_weights
from tables import markdown, replace
from torch_reference import check, time_torch, time_torch_prefill

from ringexport.errors import RingExportError
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
BATCHES = (1, 8, 64, 256)
LONG = 130560
"""Almost the whole context of Ring-mini: the steps that are timed have to fit behind it."""
PROMPTS = ((1, 4096), (8, 4096), (1, 32768))


def decode(
    weights: DeviceWeights, recipe: str, batches: tuple[int, ...], context: int = 4096
) -> list[list[object]]:
    """Time decode of engine and torch."""
    rows: list[list[object]] = []
    for batch in batches:
        mine = engine_point.time_decode(weights, batch, context)
        torch.cuda.empty_cache()
        theirs, hit, way, kernels = time_torch(weights, batch, context)
        torch.cuda.empty_cache()
        rows.append([recipe, f"{context:,}", batch, *cells(mine, batch), *cells(theirs, batch)])
        rows[-1] += [kernels, f"{theirs / mine:.2f}x", f"{hit:.1f}", way]
        print(*rows[-1], sep="  ", flush=True)
    return rows


def cells(seconds: float, tokens: int) -> list[str]:
    """Return microseconds and tokens a second."""
    return [f"{seconds * 1e6:,.0f}", f"{tokens / seconds:,.0f}"]


def prefill(
    weights: DeviceWeights, recipe: str, prompts: tuple[tuple[int, int], ...]
) -> list[list[object]]:
    """Time prompts of random tokens, engine and torch."""
    rows: list[list[object]] = []
    for batch, length in prompts:
        mine = engine_point.time_prefill(weights, batch, length)
        torch.cuda.empty_cache()
        theirs = time_torch_prefill(weights, batch, length)
        count = batch * length
        rows.append([recipe, f"{batch} x {length:,}", f"{count / mine:,.0f}"])
        rows[-1] += [f"{theirs * 1e3:.1f}", f"{count / theirs:,.0f}", f"{theirs / mine:.2f}x"]
        torch.cuda.empty_cache()
        print(*rows[-1], sep="  ", flush=True)
    return rows


def onnxruntime(
    weights: DeviceWeights, batches: tuple[int, ...], context: int = 4096
) -> list[list[object]]:
    """Time decode and one prompt of engine and onnxruntime:cuda; bf16 weights.

    Raises:
        BackendUnavailableError: onnxruntime-gpu is not installed.
    """
    import onnxruntime_cuda as ort  # noqa: PLC0415 - needs onnxruntime

    rows: list[list[object]] = []

    def add(what: str, size: int, batch: int, mine: float, theirs: float) -> None:
        count = batch * size if what == "prompt" else batch
        rows.append([what, f"{size:,}", batch, *cells(mine, count), *cells(theirs, count)])
        rows[-1].append(f"{theirs / mine:.2f}x")
        print(*rows[-1], sep="  ", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        runner = ort.open_random(weights, Path(folder), cuda_graph=True)
        ort.check(runner, weights)
        for batch in batches:
            theirs = ort.time_decode(runner, batch, context)
            mine = engine_point.time_decode(weights, batch, context)
            add("decode", context, batch, mine, theirs)
        theirs = ort.time_prefill(runner, 1, context)
        add("prompt", context, 1, engine_point.time_prefill(weights, 1, context), theirs)
        runner.close()
    return rows


def docs() -> None:
    """Measure decode and write it to docs/performance.md, row by row."""
    rows: list[list[object]] = []
    for recipe in ("bf16", "fp8"):
        weights = engine_weights(recipe)
        check(weights, recipe)
        for batch, context in (*((batch, 4096) for batch in BATCHES), (1, LONG)):
            rows += decode(weights, recipe, (batch,), context)
            replace("performance.md", "gpu-torch-decode", markdown(DECODE_HEADER, rows))
        del weights
        gc.collect()  # runners refer to their states and these to them
        torch.cuda.empty_cache()


def docs_onnxruntime() -> None:
    """Measure onnxruntime:cuda and write it to docs/performance.md."""
    table = markdown(ORT_HEADER, onnxruntime(engine_weights("bf16"), BATCHES[:3]))
    replace("performance.md", "gpu-onnxruntime", table)


def docs_prefill() -> None:
    """Measure prompts and write them to docs/performance.md."""
    rows: list[list[object]] = []
    for recipe in ("bf16", "fp8"):
        weights = engine_weights(recipe)
        check(weights, recipe, prompt=True)
        rows += prefill(weights, recipe, PROMPTS)
        replace("performance.md", "gpu-torch-prefill", markdown(PREFILL_HEADER, rows))
        del weights
        gc.collect()  # runners refer to their states and these to them
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> None:
    """Run the command line."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def checked(recipe: str, *, prompt: bool = False) -> DeviceWeights:
        weights = engine_weights(recipe)
        check(weights, recipe, prompt=prompt)
        return weights

    match arguments:
        case ["decode", recipe, batches, *rest]:
            decode(checked(recipe), recipe, numbers(batches), int(rest[0]) if rest else 4096)
        case ["prefill", recipe, prompts]:
            shapes = [one.split("x") for one in prompts.split(",")]
            prefill(
                checked(recipe, prompt=True), recipe, tuple((int(b), int(t)) for b, t in shapes)
            )
        case ["onnxruntime", batches, *rest]:
            weights = engine_weights("bf16")
            onnxruntime(weights, numbers(batches), int(rest[0]) if rest else 4096)
        case ["docs"]:
            docs()
        case ["docs", "prefill"]:
            docs_prefill()
        case ["docs", "onnxruntime"]:
            docs_onnxruntime()
        case _:
            sys.exit(__doc__)


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas."""
    return tuple(int(one) for one in text.split(","))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RingExportError as error:
        sys.exit(str(error))
