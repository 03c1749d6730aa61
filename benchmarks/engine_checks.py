"""Whether the fast engine is right: tables of docs/numerics.md."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine_setup import NANO, ROOT, Table, gpu, nano_weights, runner_of, weights_of

from ringexport.compare.gpu.agreement import Agreement
from ringexport.compare.gpu.drift import DRIFT_STEPS, measure_drift
from ringexport.compare.gpu.grid import compare_engine
from ringexport.compare.gpu.opening import Gpu
from ringexport.compare.speed import greedy, prompt_tokens
from ringexport.compare.tolerances import TOLERANCES, Tolerance
from ringexport.errors import ToleranceExceededError
from ringexport.runtime.backends.torch_ref import TorchRunner

__all__ = ["agree", "agreement_row", "agreement_table", "conformance", "drift", "text"]

AGREE_HEADER = (
    "recipe", "compared", "positions", "largest error", "mean error", "of their size",
    "bf16 alone", "smallest cosine", "bf16 alone", "L4", "same top token", "bf16 alone",
    "same experts", "bf16 alone",
)  # fmt: skip
_TEXT_TOKENS = 64


def agree(place: Gpu, recipes: Sequence[str], batches: tuple[int, ...] = (1, 8, 64)) -> None:
    """Compare logits at full size with the reference over the same weights.

    Rows of a recipe that errs too much are printed, but not written.

    Raises:
        ToleranceExceededError: a recipe errs too much; the others have been compared as well.
    """
    table = agreement_table()
    wrong: list[str] = []
    for recipe in recipes:
        weights = weights_of(place, recipe)
        found = compare_engine(weights, place.library, batches)
        rows = [agreement_row(recipe, one) for one in found]
        try:
            _check(recipe, found)
        except ToleranceExceededError as error:
            wrong.append(str(error))
            for row in rows:
                print("not written", *row, sep=" | ", flush=True)
        else:
            table.add(*rows)
        del weights
    if wrong:
        raise ToleranceExceededError("; ".join(wrong))


def _check(recipe: str, found: Sequence[Agreement]) -> None:
    """Stop unless the engine errs no more than bf16 explains, and within level L4."""
    bound = _cosine_bound(recipe)
    for one in found:
        one.check()
        if not bound.accepts(one.engine.min_cosine):
            raise ToleranceExceededError(
                f"{recipe}, {one.what}: the {bound.metric} is {one.engine.min_cosine:.6f}, "
                f"expected {bound.sense.value} {bound.bound:g}"
            )


def _cosine_bound(recipe: str) -> Tolerance:
    names = {"bf16": "logits_cosine"}
    return TOLERANCES[names.get(recipe, "logits_cosine_fp8")]


def agreement_table(name: str = "gpu-agreement") -> Table:
    """Return the table of `agreement_row`."""
    return Table("numerics.md", name, AGREE_HEADER, key=2)


def agreement_row(recipe: str, found: Agreement) -> list[object]:
    """Return the cells below `AGREE_HEADER`."""
    engine, rounding = found.engine, found.rounding
    return [
        recipe,
        found.what,
        found.positions,
        f"{engine.max_error:.3f}",
        f"{engine.mean_error:.4f}",
        f"{engine.median_relative:.2%}",
        f"{rounding.median_relative:.2%}",
        f"{engine.min_cosine:.5f}",
        f"{rounding.min_cosine:.5f}",
        f"{_cosine_bound(recipe).bound:g}",
        f"{engine.top1:.1%}",
        f"{rounding.top1:.1%}",
        f"{found.experts:.2%}",
        f"{found.experts_rounding:.2%}",
    ]


def drift(place: Gpu, folder: Path) -> None:
    """Compare states after up to 4,096 steps with those of the reference."""
    table = Table(
        "numerics.md",
        "gpu-drift",
        ("weights", "steps", "engine", "bf16 alone", "engine, median", "bf16, median"),
    )
    measured = []
    for name in ("full size, fp8", "ring-nano, bf16"):
        weights = nano_weights(place, folder) if "nano" in name else weights_of(place, "fp8")
        steps = min(DRIFT_STEPS[-1], weights.config.context_length)
        with runner_of(place, weights, 1, steps) as runner:
            found = measure_drift(runner, weights, [one for one in DRIFT_STEPS if one <= steps])
        measured += found
        for one in found:
            errors = (one.engine, one.rounding, one.engine_median, one.rounding_median)
            table.add([name, f"{one.steps:,}", *(f"{error:.2e}" for error in errors)])
        del weights, runner
    for one in measured:
        one.check()


def text(place: Gpu, folder: Path) -> None:
    """Compare ring-nano's greedy text with that of the fp32 reference on the CPU."""
    weights = nano_weights(place, folder)
    truth = TorchRunner(NANO, model_digest=str)
    table = Table("numerics.md", "gpu-text", ("prompt, tokens", "equal greedy tokens", "then"))
    with runner_of(place, weights, 1, 1024) as runner:
        for length in (8, 64, 300):
            prompt = prompt_tokens(length, weights.config.vocab_size)
            found, _ = greedy(runner, prompt, _TEXT_TOKENS)
            expected, logits = greedy(truth, prompt, _TEXT_TOKENS)
            same = next((i for i in range(_TEXT_TOKENS) if found[i] != expected[i]), _TEXT_TOKENS)
            then = ""
            if same < _TEXT_TOKENS:
                gap = logits[same][expected[same]] - logits[same][found[same]]
                then = f"{gap / logits[same].std():.4f} standard deviations of the logits apart"
            table.add([length, f"{same} of {_TEXT_TOKENS}", then])


def conformance() -> None:
    """Run the conformance suite on the GPU."""
    place = gpu()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--tb=short", "-rs", "tests/conformance"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        sys.exit("the conformance suite fails")
    result = done.stdout.strip().splitlines()[-1].strip("= ").split(" in ")[0]
    suite = f"`pytest -m gpu tests/conformance`, {place.conditions['gpu']}"
    Table("numerics.md", "gpu-conformance", ("suite", "result")).add([suite, result])
