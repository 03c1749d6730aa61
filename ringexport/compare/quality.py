"""What quantization does inside a model: errors per layer, drift of the states, long contexts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from ringexport.compare.metrics import Distance, distance, kl_divergence
from ringexport.compare.perplexity import Text, check_vocabularies
from ringexport.errors import ConfigError
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.runner import ProbeRunner, Runner
from ringexport.runtime.state import DecodeState

__all__ = [
    "DriftPoint",
    "LayerQuality",
    "LongContext",
    "layer_quality",
    "long_context",
    "state_drift",
]

DRIFT_STEPS = 4096
DRIFT_INTERVAL = 64
_CHUNK = 256
_PREFILL_CHUNK = 2048
_LAYER_TOKENS = 2048

Array = npt.NDArray[np.generic]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """How far one layer is from the reference.

    Attributes:
        layer: its index.
        kind: "linear" or "softmax" attention.
        hidden_error: relative error of the residual stream after it.
        expert_agreement: share of chosen experts that the reference chose for the same token,
            None for a layer without experts.
    """

    layer: int
    kind: str
    hidden_error: float
    expert_agreement: float | None

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftPoint:
    """The recurrent states after some decode steps.

    Attributes:
        steps: how many.
        state_error: relative error of all recurrent states together.
        kl_mean: over the steps since the point before, nats per token.
    """

    steps: int
    state_error: float
    kl_mean: float

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContext:
    """Both models at the end of the longest context.

    Attributes:
        tokens: in the context.
        state_error: relative error of all recurrent states together.
        kl_mean: over the last `scored` tokens, nats per token.
        top1_agreement: over the same tokens.
        scored: how many.
    """

    tokens: int
    state_error: float
    kl_mean: float
    top1_agreement: float
    scored: int

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _LayerSums:
    hidden: dict[int, Distance] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)

    def add(self, found: dict[str, Array], expected: dict[str, Array]) -> None:
        """Add the probes of one chunk of one row."""
        for name, reference in expected.items():
            what, _, layer = name.rpartition(".")
            if not layer.isdecimal():
                continue
            if what == "hidden":
                gap = distance(found[name], reference)
                self.hidden[int(layer)] = self.hidden.get(int(layer), Distance()) + gap
            elif what == "expert_ids":
                chosen = found[name][..., :, None] == reference[..., None, :]
                self.same[int(layer)] = self.same.get(int(layer), 0) + int(chosen.sum())
                self.chosen[int(layer)] = self.chosen.get(int(layer), 0) + reference.size


def layer_quality(
    runner: ProbeRunner,
    against: ProbeRunner,
    texts: Sequence[Text],
    *,
    max_tokens: int = _LAYER_TOKENS,
    progress: Progress | None = None,
) -> tuple[LayerQuality, ...]:
    """Compare residual streams and expert choices, on the first tokens of each text.

    Args:
        runner: the model under test.
        against: the reference.
        texts: each fed from an empty state.
        max_tokens: of each text.
        progress: told about the tokens.

    Raises:
        ConfigError: vocabularies or layers differ, or there are no tokens.
        ToleranceExceededError: NaN or infinity in only one of the models.
    """
    progress = progress or NoProgress()
    check_vocabularies(runner, against)
    limit = min(max_tokens, runner.spec.context_length, against.spec.context_length)
    parts = [text.tokens[:limit] for text in texts]
    progress.start("comparing the layers", sum(map(len, parts)), "tokens")
    sums = _LayerSums()
    for tokens in parts:
        states = runner.new_state(1), against.new_state(1)
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[None, start : start + _CHUNK]
            mine, theirs = (
                one.probe(part, None, state)
                for one, state in zip((runner, against), states, strict=True)
            )
            if mine.keys() != theirs.keys():
                raise ConfigError(
                    "the two models do not have the same layers",
                    hint="compare builds of the same checkpoint",
                )
            sums.add(mine, theirs)
            progress.advance(part.shape[1])
    progress.finish()
    linear = against.spec.layout.recurrent
    return tuple(
        LayerQuality(
            layer=layer,
            kind="linear" if layer in linear else "softmax",
            hidden_error=gap.relative,
            expert_agreement=sums.same[layer] / sums.chosen[layer]
            if sums.chosen.get(layer)
            else None,
        )
        for layer, gap in sorted(sums.hidden.items())
    )


def state_drift(
    runner: Runner,
    against: Runner,
    tokens: Tokens,
    *,
    steps: int = DRIFT_STEPS,
    progress: Progress | None = None,
) -> tuple[DriftPoint, ...]:
    """Decode the same tokens with both models and compare their states every 64 steps.

    Args:
        runner, against: models with the same vocabulary.
        tokens: what is decoded; repeated if there are fewer than `steps`.
        steps: at most; the context may hold fewer.
        progress: told about the steps.

    Raises:
        ConfigError: the vocabularies differ, or there are no tokens.
        ToleranceExceededError: NaN or infinity in only one of the models.
    """
    progress = progress or NoProgress()
    check_vocabularies(runner, against)
    steps = min(steps, runner.spec.context_length, against.spec.context_length)
    ids = _repeated(tokens, steps)
    states = runner.new_state(1), against.new_state(1)
    points, divergences = [], []
    progress.start("decoding for the drift of the states", steps, "tokens")
    for step, token in enumerate(ids, start=1):
        mine = runner.decode(token[None], states[0])
        divergences.append(kl_divergence(against.decode(token[None], states[1]), mine)[0])
        if step % DRIFT_INTERVAL == 0:
            points.append(
                DriftPoint(
                    steps=step,
                    state_error=_state_distance(*states).relative,
                    kl_mean=float(np.mean(divergences)),
                )
            )
            divergences = []
        progress.advance()
    progress.finish()
    return tuple(points)


def long_context(
    runner: Runner,
    against: Runner,
    tokens: Tokens,
    *,
    scored: int = _CHUNK,
    progress: Progress | None = None,
) -> LongContext:
    """Fill the context of both models in chunks and compare them at its end.

    Args:
        runner, against: models with the same vocabulary.
        tokens: what is fed; repeated if there are fewer than the shorter context holds.
        scored: tokens at the end whose logits are compared.
        progress: told about the tokens.

    Raises:
        ConfigError: the vocabularies differ, or there are no tokens.
        ToleranceExceededError: NaN or infinity in only one of the models.
    """
    progress = progress or NoProgress()
    check_vocabularies(runner, against)
    length = min(runner.spec.context_length, against.spec.context_length)
    scored = min(scored, length)
    ids = _repeated(tokens, length)[None]
    states = runner.new_state(1), against.new_state(1)
    progress.start(f"filling a context of {length:,} tokens", length, "tokens")
    logits = []
    for start in range(0, length - scored, _PREFILL_CHUNK):
        part = ids[:, start : min(start + _PREFILL_CHUNK, length - scored)]
        for one, state in zip((runner, against), states, strict=True):
            one.prefill(part, None, state)
        progress.advance(part.shape[1])
    for one, state in zip((runner, against), states, strict=True):
        logits.append(one.prefill(ids[:, length - scored :], None, state, every_position=True)[0])
    progress.advance(scored)
    progress.finish()
    mine, theirs = logits
    return LongContext(
        tokens=length,
        state_error=_state_distance(*states).relative,
        kl_mean=float(kl_divergence(theirs, mine).mean()),
        top1_agreement=float((mine.argmax(-1) == theirs.argmax(-1)).mean()),
        scored=scored,
    )


def _state_distance(found: DecodeState, expected: DecodeState) -> Distance:
    mine, theirs = found.snapshot().tensors, expected.snapshot().tensors
    total = Distance()
    for name, reference in theirs.items():
        if name.startswith("recurrent_state."):
            total += distance(mine[name], reference)
    return total


def _repeated(tokens: Tokens, count: int) -> Tokens:
    if len(tokens) == 0:
        raise ConfigError("there are no tokens to compare with", hint="give a longer --text")
    return np.resize(tokens, count)
