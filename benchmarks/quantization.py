"""Measure what each recipe costs on ring-nano and write the tables to docs/numerics.md.

    python benchmarks/quantization.py

takes about fifteen minutes on two cores. Texts are held out: neither training nor calibration saw
them. Quantized checkpoints run in torch with inputs, weights and caches rounded as an engine does.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tables import markdown, replace

from ringexport.calibrate import CalibrationSettings, calibrate, load_prompts
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.cli.opening import texts_from_files
from ringexport.compare.gate import Gate, check_gate
from ringexport.compare.metrics import kl_divergence
from ringexport.compare.perplexity import PairScore, Text, perplexity_pair
from ringexport.model import layers
from ringexport.model.linear_attention import LinearInputs
from ringexport.ops.schemes import StateFormat
from ringexport.quantize.recipe import Recipe
from ringexport.quantize.resolve import resolve_recipe
from ringexport.quantize.run import quantize_checkpoint
from ringexport.quantize.shipped import load_recipe
from ringexport.runtime.backends.torch_quantized import QuantizedModel, round_state
from ringexport.runtime.registry import RunnerOptions, open_checkpoint_runner
from ringexport.runtime.runner import Runner
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.stats import CalibrationStats

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "ring-nano"
TEXTS = sorted((ROOT / "calibration" / "text").glob("heldout-*.txt"))
WINDOW = 2048
CHUNK = 256
DRIFT_STEPS = 4096
DRIFT_POINTS = (64, 512, 4096)
RECIPES = ("fp8", "fp8-block", "fp8-static", "fp8-all", "int8", "int8-weight-only")
STRICT, LOOSE = Gate.parse("ppl=0.5%,kl=0.005,top1=97%"), Gate.parse("ppl=1%")
BARS = {"fp8": STRICT, "fp8-block": STRICT, "int8": STRICT, "fp8-static": LOOSE, "fp8-all": LOOSE}
SAMPLES = (256, 64)

_FP8 = '{ format = "fp8_e4m3", granularity = "group(%d)", observer = "%s" }'
_TOKEN = 'activations = { format = "fp8_e4m3", granularity = "token", mode = "dynamic" }'
_TARGETS = '["routed_experts", "shared_experts", "dense_mlp", "linear_attention"]'
REMEDIES = {
    "fp8, scales of least squared error": f"""
        [[rules]]
        targets = {_TARGETS}
        weights = {{ format = "fp8_e4m3", granularity = "channel", observer = "mse" }}
        {_TOKEN}""",
    "fp8, one scale per 32 weights": f"""
        [[rules]]
        targets = {_TARGETS}
        weights = {_FP8 % (32, "absmax")}
        {_TOKEN}""",
    "fp8, one scale per 32 weights, of least squared error": f"""
        [[rules]]
        targets = {_TARGETS}
        weights = {_FP8 % (32, "mse")}
        {_TOKEN}""",
    "fp8 weights alone, inputs as they are": f"""
        [[rules]]
        targets = {_TARGETS}
        weights = {{ format = "fp8_e4m3", granularity = "channel" }}""",
    "fp8, linear attention bf16": """
        base = "fp8"
        [[rules]]
        targets = ["linear_attention"]
        scheme = "unquantized" """,
    "fp8, query_key_value of linear attention bf16": """
        base = "fp8"
        [[rules]]
        targets = ["linear_attention"]
        except = ["*.g_proj", "*.dense"]
        scheme = "unquantized" """,
    "fp8, linear attention int8": """
        base = "fp8"
        [[rules]]
        targets = ["linear_attention"]
        scheme = "int8_w8a8" """,
    "int8 without SmoothQuant": """
        base = "int8"
        smoothquant = false""",
}
"""Variants of a recipe that were tried against the error of FP8, as TOML."""


class Bench:
    """The reference and the texts that everything is compared on."""

    def __init__(self, max_tokens: int, scratch: Path) -> None:
        self.scratch = scratch
        self.reference = self._open(MODEL)
        tokenizer = ModelTokenizer.open(MODEL, vocab_size=self.reference.spec.vocab_size)
        self.texts = texts_from_files(tokenizer, TEXTS, max_tokens)
        with CheckpointWeights.open(MODEL) as weights:
            self.config = weights.config

    @staticmethod
    def _open(checkpoint: Path) -> Runner:
        return open_checkpoint_runner(checkpoint, "torch", RunnerOptions(threads=1))

    @contextmanager
    def quantized(self, recipe: Recipe, stats: CalibrationStats) -> Iterator[Runner]:
        output = self.scratch / recipe.name.replace(" ", "-")
        quantize_checkpoint(MODEL, output, recipe, stats=stats)
        with self._open(output) as runner:
            yield runner

    def score(self, recipe: Recipe, stats: CalibrationStats) -> dict[str, PairScore]:
        found = {}
        with self.quantized(recipe, stats) as runner:
            for text in self.texts:
                found[Path(text.name).name] = self._pair(runner, text)
                print(recipe.name, text.name, found[Path(text.name).name], flush=True)
        return found

    def _pair(self, runner: Runner, text: Text) -> PairScore:
        return perplexity_pair(runner, self.reference, [text], window=WINDOW)


def row(name: str, text: str, score: PairScore, bar: Gate | None) -> tuple[str, ...]:
    missed = () if bar is None else check_gate(bar, score).missed
    verdict = "" if bar is None else f"missed: {', '.join(missed)}" if missed else "met"
    return (
        name,
        f"`{text}`",
        f"{100 * score.perplexity_change:+.2f} %",
        f"{score.kl_mean:.4f}",
        f"{score.kl_p99:.4f}",
        f"{100 * score.top1_agreement:.2f} %",
        verdict,
    )


HEADER = ("recipe", "text", "perplexity", "KL mean", "KL p99", "top-1", "bar")


def recipes(bench: Bench, stats: dict[int, CalibrationStats]) -> str:
    """Table of the shipped recipes, with few samples where calibration matters."""
    rows = []
    for name in RECIPES:
        recipe = load_recipe(name)
        calibrated = bool(resolve_recipe(recipe, bench.config).stats_reasons)
        for samples in SAMPLES if calibrated else SAMPLES[:1]:
            label = f"`{name}`" + (f", {samples} samples" if calibrated else "")
            scores = bench.score(recipe, stats[samples])
            rows += [row(label, text, score, BARS.get(name)) for text, score in scores.items()]
    return markdown(HEADER, rows)


def remedies(bench: Bench, stats: CalibrationStats) -> str:
    """Table of what was tried against the error of FP8."""
    rows = []
    for label, toml in REMEDIES.items():
        path = bench.scratch / (label.replace(" ", "-").replace(",", "") + ".toml")
        path.write_text("\n".join(line.strip() for line in toml.splitlines()), encoding="utf-8")
        scores = bench.score(load_recipe(str(path)), stats)
        rows += [row(label, text, score, None)[:-1] for text, score in scores.items()]
    return markdown(HEADER[:-1], rows)


class Routing:
    """Replaces the reference's `route`: notes its choices, or repeats those that were noted."""

    def __init__(self) -> None:
        self.plain = layers.route
        self.noted: list[torch.Tensor] = []
        self.repeat = False

    def __call__(
        self, logits: torch.Tensor, bias: torch.Tensor, config: RingConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        expert_ids, weights = self.plain(logits, bias, config)
        if not self.repeat:
            self.noted.append(expert_ids)
            return expert_ids, weights
        expert_ids = self.noted.pop(0)
        weights = logits.sigmoid().gather(1, expert_ids)
        total = weights.sum(-1, keepdim=True) if config.norm_topk_prob else 1.0
        return expert_ids, weights / total * config.routed_scaling_factor


def routing(bench: Bench, stats: CalibrationStats) -> str:
    """Table of the KL of `fp8` with its own choice of experts and with the reference's."""
    rows = []
    route = Routing()
    layers.route = route
    with bench.quantized(load_recipe("fp8"), stats) as runner:
        for text in bench.texts:
            own, forced = [], []
            models = bench.reference, runner, runner
            states = [model.new_state(1) for model in models]
            for start in range(0, min(len(text.tokens), WINDOW), CHUNK):
                part = text.tokens[None, start : start + CHUNK]
                logits = []
                for index, (model, state) in enumerate(zip(models, states, strict=True)):
                    route.repeat = index == 2
                    kept = list(route.noted)
                    logits.append(model.prefill(part, None, state, every_position=True)[0])
                    route.noted = kept if index == 1 else route.noted
                own.append(kl_divergence(logits[0], logits[1]))
                forced.append(kl_divergence(logits[0], logits[2]))
            means = [np.concatenate(found).mean() for found in (own, forced)]
            rows.append((f"`{Path(text.name).name}`", *(f"{mean:.4f}" for mean in means)))
            print("routing", rows[-1], flush=True)
    layers.route = route.plain
    return markdown(("text", "KL mean, own experts", "KL mean, experts of the reference"), rows)


def states(bench: Bench) -> str:
    """Table of the drift that each format of the recurrent state causes, all else in fp32."""
    formats = list(StateFormat)
    with CheckpointWeights.open(MODEL) as weights:
        model = QuantizedModel(weights)
    plain = model._kernel  # noqa: SLF001

    def kernel(inputs: LinearInputs) -> tuple[torch.Tensor, torch.Tensor]:
        output, state = plain(inputs)
        rows = [round_state(state[i : i + 1], found) for i, found in enumerate(formats)]
        return output, torch.cat(rows)

    model._kernel = kernel  # noqa: SLF001
    state = model.new_state(len(formats))
    tokens = np.concatenate([text.tokens for text in bench.texts])[:DRIFT_STEPS]
    divergences, errors = [], []
    for step, token in enumerate(tokens.tolist(), start=1):
        logits = model.forward(torch.full((len(formats), 1), token), None, state).numpy()
        divergences.append(kl_divergence(np.repeat(logits[:1], len(formats), 0), logits))
        if step in DRIFT_POINTS:
            every = torch.stack(list(state.recurrent_state.values()), 1).flatten(1)
            errors.append(((every - every[:1]).norm(dim=1) / every[0].norm()).tolist())
            print("states", step, errors[-1], flush=True)
    late = np.mean(divergences[-512:], axis=0)
    rows = [
        (f"`{found.value}`", *(f"{error[row]:.2g}" for error in errors), f"{late[row]:.2g}")
        for row, found in enumerate(formats)
    ][1:]
    points = [f"after {point:,} steps" for point in DRIFT_POINTS]
    return markdown(("state", *points, "KL mean of the last 512"), rows)


def calibration() -> dict[int, CalibrationStats]:
    found = {}
    with CheckpointWeights.open(MODEL) as weights:
        for samples in SAMPLES:
            settings = CalibrationSettings(num_samples=samples)
            found[samples] = calibrate(weights, load_prompts("all"), settings)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument(
        "--only", choices=("recipes", "remedies", "routing", "states"), help="write one table"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stats = calibration()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.max_tokens, Path(scratch))
        note = f"{arguments.max_tokens:,} tokens of each text in windows of {WINDOW:,}:\n\n"
        every = arguments.only is None
        if every or arguments.only == "recipes":
            replace("numerics.md", "quantization", note + recipes(bench, stats))
        if every or arguments.only == "remedies":
            replace("numerics.md", "remedies", note + remedies(bench, stats[SAMPLES[0]]))
        if every or arguments.only == "routing":
            replace("numerics.md", "routing", routing(bench, stats[SAMPLES[0]]))
        if every or arguments.only == "states":
            replace("numerics.md", "states", states(bench))


if __name__ == "__main__":
    main()
