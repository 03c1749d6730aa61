"""Hold a quantized model to limits; raise the precision of its worst modules until it passes."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import ringexport
from ringexport.compare.gate import Gate, GateVerdict, check_gate
from ringexport.compare.perplexity import PairScore, Text, perplexity_pair
from ringexport.errors import ConfigError, ToleranceExceededError
from ringexport.ops.decay_index import DecayIndex
from ringexport.pipeline.sensitivity import (
    Measure,
    ModuleGroup,
    SensitivityRow,
    sensitivity,
    without_groups,
)
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.recipe import Recipe
from ringexport.quantize.run import quantize_checkpoint
from ringexport.runtime.registry import RunnerOptions, open_checkpoint_runner
from ringexport.runtime.runner import Runner
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.stats import CalibrationStats

__all__ = ["GateRequest", "GateResult", "HeldOut", "settle_recipe", "shipped_texts"]

_WINDOW = 2048
_TOKENS = 2048
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRequest:
    """A gate as a build asks for it.

    Attributes:
        gate: limits.
        fallback: raise the precision of modules until it passes.
        decay_index: which form of the decay the models run with.
    """

    gate: Gate
    fallback: bool = False
    decay_index: DecayIndex = DecayIndex.SERVING

    @classmethod
    def parse(cls, limits: str | None, *, fallback: bool, decay_index: str) -> Self | None:
        """Read what the command line gives; None without a gate.

        Raises:
            ConfigError: limits that cannot be read, or a fallback without any.
        """
        if limits is None and fallback:
            raise ConfigError("--gate-fallback needs --gate", hint="give limits, such as kl=0.005")
        if limits is None:
            return None
        index = DecayIndex(decay_index)
        return cls(gate=Gate.parse(limits), fallback=fallback, decay_index=index)

    def settle(
        self,
        checkpoint: Path,
        recipe: Recipe,
        stats: CalibrationStats | None,
        progress: Progress | None = None,
    ) -> "GateResult":
        """Return a recipe that passes, measured on the held-out texts that come with ringexport.

        Raises:
            RingExportError: as `settle_recipe`.
        """
        options = RunnerOptions(decay_index=self.decay_index)
        with HeldOut(checkpoint, options=options) as held_out:
            return settle_recipe(
                checkpoint,
                recipe,
                self.gate,
                held_out.measure,
                stats=stats,
                fallback=self.fallback,
                progress=progress,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A recipe that passes a gate.

    Attributes:
        recipe: what to quantize with.
        verdict: of the gate.
        score: that was judged.
        raised: groups of modules whose precision was raised, the worst first.
        tried: how many recipes were measured.
    """

    recipe: Recipe
    verdict: GateVerdict
    score: PairScore
    raised: tuple[ModuleGroup, ...]
    tried: int

    @property
    def changes(self) -> tuple[str, ...]:
        """What was changed, a sentence each."""
        return tuple(f"{group} stays unquantized" for group in self.raised)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a build says of it: the numbers, and what was changed."""
        score = self.score
        found = (
            f"perplexity {100 * score.perplexity_change:+.2f}%",
            f"KL mean {score.kl_mean:.3g}",
            f"top-1 agreement {100 * score.top1_agreement:.1f}%",
        )
        numbers = f"passes the gate {self.verdict.gate}: {', '.join(found)}"
        return (numbers, *(f"for the gate, {change}" for change in self.changes))


class HeldOut(AbstractContextManager["HeldOut"]):
    """Texts that calibration never saw, and the unquantized model to compare with on them.

    Args:
        checkpoint: folder of the unquantized checkpoint.
        texts: scored texts; None for those that come with ringexport, a few thousand tokens.
        options: how runners are opened.
    """

    def __init__(
        self,
        checkpoint: Path,
        texts: Sequence[Text] | None = None,
        options: RunnerOptions | None = None,
    ) -> None:
        self._options = options or RunnerOptions()
        self._reference: Runner = open_checkpoint_runner(checkpoint, "torch", self._options)
        spec = self._reference.spec
        if texts is None:
            tokenizer = ModelTokenizer.open(checkpoint, vocab_size=spec.vocab_size)
            texts = shipped_texts(tokenizer)
        self._texts = texts
        self._window = min(_WINDOW, spec.context_length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reference.close()

    def measure(self, checkpoint: Path) -> PairScore:
        """Score a quantized checkpoint against the unquantized one.

        Raises:
            RingExportError: a checkpoint that cannot be run.
        """
        with open_checkpoint_runner(checkpoint, "torch", self._options) as runner:
            return perplexity_pair(runner, self._reference, self._texts, window=self._window)


def shipped_texts(tokenizer: ModelTokenizer, max_tokens: int = _TOKENS) -> list[Text]:
    """Return the held-out texts that come with ringexport, the first tokens of each.

    Raises:
        ConfigError: they are not installed.
    """
    package = Path(ringexport.__file__).parent
    installed = package / "text"
    folder = installed if installed.is_dir() else package.parent / "calibration" / "text"
    found = [
        Text.encode(tokenizer, path.name, _start(path, max_tokens), max_tokens)
        for path in sorted(folder.glob("heldout-*.txt"))
    ]
    if not found:
        raise ConfigError(
            "this installation has no held-out texts", hint="give your own text with --text"
        )
    return found


def _start(path: Path, max_tokens: int) -> str:
    """Return more of a text than `max_tokens` tokens hold: no tokenizer has many longer ones."""
    return path.read_text(encoding="utf-8")[: _CHARACTERS_PER_TOKEN * max_tokens]


def settle_recipe(
    checkpoint: Path,
    recipe: Recipe,
    gate: Gate,
    measure: Measure,
    *,
    stats: CalibrationStats | None = None,
    fallback: bool = False,
    progress: Progress | None = None,
) -> GateResult:
    """Return `recipe`, or a variant that leaves the worst modules as they are, that passes a gate.

    Nothing is written but temporary checkpoints. How many groups have to be raised is predicted
    from the groups' own KL, as if errors added up, and then measured.

    Args:
        checkpoint: folder of the unquantized checkpoint.
        recipe: where to start.
        gate: limits.
        measure: scores a quantized checkpoint, such as `HeldOut.measure`.
        stats: of a calibration, for recipes that need them.
        fallback: raise the precision of modules; otherwise fail at once.
        progress: told about the recipes that are tried.

    Raises:
        ToleranceExceededError: the gate is not passed, whatever is left unquantized.
        RingExportError: whatever quantizing or measuring raises.
    """
    progress = progress or NoProgress()
    score = _try(checkpoint, recipe, measure, stats)
    verdict, tried = check_gate(gate, score), 1
    if verdict.passed:
        return GateResult(recipe=recipe, verdict=verdict, score=score, raised=(), tried=tried)
    if not fallback:
        raise _failure(recipe, verdict, "--gate-fallback raises the precision of the worst modules")
    rows = sensitivity(checkpoint, recipe, measure, stats=stats, progress=progress)
    count = 0
    while count < len(rows) - 1:
        count = _next_count(rows, count, verdict.excess)
        raised = tuple(row.group for row in rows[:count])
        candidate = without_groups(recipe, raised)
        progress.note(f"{'; '.join(verdict.failures)}: trying with {count} groups unquantized")
        score = _try(checkpoint, candidate, measure, stats)
        verdict, tried = check_gate(gate, score), tried + 1
        if verdict.passed:
            return GateResult(
                recipe=candidate, verdict=verdict, score=score, raised=raised, tried=tried
            )
    raise _failure(recipe, verdict, "use another recipe, or wider limits")


def _try(
    checkpoint: Path, recipe: Recipe, measure: Measure, stats: CalibrationStats | None
) -> PairScore:
    with tempfile.TemporaryDirectory(prefix="ringexport-") as scratch:
        output = Path(scratch) / "checkpoint"
        quantize_checkpoint(checkpoint, output, recipe, stats=stats)
        return measure(output)


def _next_count(rows: Sequence[SensitivityRow], count: int, excess: float) -> int:
    """Return how many groups to raise next: more than `count`, one always stays quantized."""
    remaining = sum(row.kl_mean for row in rows[count:])
    target = remaining / excess if excess > 1 else remaining
    last = len(rows) - 1
    for number in range(count + 1, last):
        if sum(row.kl_mean for row in rows[number:]) <= target:
            return number
    return last


def _failure(recipe: Recipe, verdict: GateVerdict, hint: str) -> ToleranceExceededError:
    return ToleranceExceededError(
        f"recipe {recipe.name} does not pass the gate {verdict.gate}: "
        f"{'; '.join(verdict.failures)}",
        hint=hint,
    )
