"""How fast the fast engine is: decode, prompts, and time by kind of layer, on this GPU."""

import itertools
import statistics
from collections.abc import Sequence

from engine_checks import agreement_row, agreement_table
from engine_setup import FLASH, Table, check_names, conditions, runner_of, weights_of

from ringexport.checkpoint import RingConfig
from ringexport.compare.gpu.decode import measure_decode
from ringexport.compare.gpu.drift import time_steps
from ringexport.compare.gpu.grid import GridPoint, check_engine, measure_point
from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.gpu.prefill import PrefillSpeed, measure_prefill
from ringexport.compare.gpu.traffic import measure_read_rate
from ringexport.compare.speed import BenchConfig
from ringexport.errors import RingExportError
from ringexport.runtime.backends.cuda.network import Crossovers
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["docs", "flash", "flat", "sweep"]

_DECODE_HEADER = (
    "recipe", "context", "batch", "us a step", "tokens/s", "GB a step", "limit, tokens/s",
    "of the limit", "experts hit a layer", "kernels",
)  # fmt: skip
_KINDS = ("linear", "softmax", "dense", "experts", "several layers", "head", "embedding")
_KINDS_HEADER = ("recipe", "context", "batch", *_KINDS, "sum, us", "chained, us")
_PREFILL_HEADER = ("recipe", "prompts", "ms", "tokens/s")
_PAGE = "performance.md"
_FLAT_HEADER = (
    "recipe", "tokens generated", "us a token, median", "fastest", "slowest", "last over first",
)  # fmt: skip

_CONFIG = BenchConfig(decode=32, repeat=5)
_LONG = 131008
"""Almost the whole context: the steps that are timed have to fit behind it."""
_DECODE_POINTS = ((1, 4096), (8, 4096), (64, 4096), (256, 4096), (1, _LONG))
_PROMPTS = {
    "fp8": ((1, 4096), (8, 4096), (1, 32768), (1, 131072)),
    "fp8-all": ((1, 4096),),
    "int8": ((1, 4096), (8, 4096)),
    "bf16": ((1, 4096), (8, 4096)),
}
"""Recipe to prompts and their length."""
_FLASH_POINTS = ((1, 4096), (1, _LONG), (8, 4096), (64, 4096))
_GENERATED = 4096


def docs(place: Gpu, recipes: Sequence[str] = ()) -> None:
    """Measure decode, prompts and where the time goes, in the recipes given or all.

    A recipe is checked before it is timed. Tables are written as soon as a point is known, so that
    nothing is lost if the process is stopped; what they hold of other recipes stays.

    Raises:
        ConfigError: a recipe without points.
    """
    check_names(recipes, tuple(_PROMPTS))
    rate = measure_read_rate(place.device)
    agreements = agreement_table()
    decode = Table(_PAGE, "gpu-decode", _DECODE_HEADER, key=1)
    decode.lead = f"{conditions(place)}; read rate in the same run {rate / 1e12:.2f} TB/s."
    kinds = Table(_PAGE, "gpu-kinds", _KINDS_HEADER, key=1)
    prompts = Table(_PAGE, "gpu-prefill", _PREFILL_HEADER, key=1)
    for recipe in recipes or _PROMPTS:
        weights = weights_of(place, recipe)
        batches = tuple(dict.fromkeys(batch for batch, _ in _DECODE_POINTS))
        checked = check_engine(weights, place.library, batches)
        agreements.add(*(agreement_row(recipe, one) for one in checked))
        for shape in _DECODE_POINTS:
            point = measure_point(place, weights, _CONFIG, rate, shape)
            decode.add(_decode_row(recipe, point))
            kinds.add(_kinds_row(recipe, point))
        for batch, length in _PROMPTS[recipe]:
            prompts.add(_prefill_row(recipe, _prompt(place, weights, batch, length)))
        del weights


def _prompt(place: Gpu, weights: DeviceWeights, batch: int, length: int) -> PrefillSpeed:
    with runner_of(place, weights, batch, length) as runner:
        return measure_prefill(runner, batch=batch, tokens=length)


def _decode_row(name: str, point: GridPoint) -> list[object]:
    one = point.speed
    return [
        name,
        f"{one.context:,}",
        one.batch,
        f"{one.step_us:,.0f}",
        f"{one.tokens_per_s:,.0f}",
        f"{one.bytes_moved / 1e9:.2f}",
        f"{one.limit_tokens_per_s:,.0f}",
        f"{one.fraction:.0%}",
        f"{one.experts_hit:.1f}",
        point.profile.launches,
    ]


def _kinds_row(name: str, point: GridPoint) -> list[object]:
    times = [point.profile.kinds.get(kind, 0.0) for kind in _KINDS]
    cells = [f"{us:,.0f}" for us in (*times, sum(times), point.speed.step_us)]
    return [name, f"{point.speed.context:,}", point.speed.batch, *cells]


def _prefill_row(name: str, one: PrefillSpeed) -> list[object]:
    return [name, f"{one.batch} x {one.tokens:,}", f"{one.ms:,.1f}", f"{one.tokens_per_s:,.0f}"]


def flash(place: Gpu) -> None:
    """Check Ring-flash in FP8 on one GPU, then time decode and a prompt."""
    rate = measure_read_rate(place.device)
    weights = weights_of(place, "fp8", RingConfig.from_file(FLASH))
    checked = check_engine(weights, place.library, (1, 8))
    agreement_table("gpu-flash-agreement").add(*(agreement_row("fp8", one) for one in checked))
    table = Table(_PAGE, "gpu-flash-decode", _DECODE_HEADER)
    table.lead = f"{conditions(place)}; read rate in the same run {rate / 1e12:.2f} TB/s."
    for point in _FLASH_POINTS:
        table.add(_decode_row("fp8", measure_point(place, weights, _CONFIG, rate, point)))
    prompts = Table(_PAGE, "gpu-flash-prefill", _PREFILL_HEADER)
    prompts.add(_prefill_row("fp8", _prompt(place, weights, 1, 4096)))


def flat(place: Gpu, recipes: Sequence[str]) -> None:
    """Time tokens that are generated from an empty context on."""
    table = Table(_PAGE, "gpu-flat", _FLAT_HEADER, key=1)
    table.lead = f"{conditions(place)}; windows of 128 tokens."
    for recipe in recipes:
        weights = weights_of(place, recipe)
        with runner_of(place, weights, 1, _GENERATED) as runner:
            times = time_steps(runner, _GENERATED)
        middle = statistics.median(times)
        off = (min(times) / middle, max(times) / middle, times[-1] / times[0])
        cells = [f"1 to {_GENERATED:,}", f"{middle * 1e6:.1f}", *(f"{one - 1:+.1%}" for one in off)]
        table.add([recipe, *cells])
        del weights


def sweep(place: Gpu, recipe: str, batches: Sequence[int], context: int = 4096) -> None:
    """Time decode steps with different crossovers between the ways to compute."""
    weights = weights_of(place, recipe)
    rate = measure_read_rate(place.device)
    for batch, fused, (eight, plain) in itertools.product(
        batches, (False, True), ((0, 0), (1, 0), (1, 1))
    ):
        if (fused and not plain) or (batch > 64 and (fused or eight)):
            continue
        chosen = Crossovers(
            fused=fused * batch, skinny_8bit=eight * batch, skinny_bf16=plain * batch
        )
        options = CudaOptions(max_batch=batch, max_context=context + 64, crossovers=chosen)
        try:
            with CudaRunner(weights, place.library, model_digest=str, options=options) as runner:
                found = measure_decode(
                    runner, weights, batch=batch, context=context, read_rate=rate
                )
        except RingExportError as error:
            print(f"b{batch} {chosen}: {error}", flush=True)
            continue
        print(f"{recipe} b{batch} {chosen}: {found.step_us:.0f} us", flush=True)
