"""Compare two runners from inside: per layer, per state and at the logits, on the same tokens."""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from ringexport.compare.metrics import Distance, cosine, distance, kl_divergence, top1_agreement
from ringexport.compare.perplexity import check_vocabularies
from ringexport.compare.report import Comparison, Row
from ringexport.compare.tolerances import TOLERANCES
from ringexport.errors import BackendUnavailableError, ConfigError, ToleranceExceededError
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.runner import Logits, ProbeRunner, Runner
from ringexport.runtime.state import DecodeState

__all__ = ["compare_runners", "require_probe"]

Array = npt.NDArray[np.generic]
CHUNK = 128
DECODE_STEPS = 16


@dataclass(slots=True)
class _Seen:
    """What the probes of both runners add up to."""

    hidden: dict[str, Distance] = field(default_factory=dict)
    equal_experts: dict[str, int] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    found_logits: list[Logits] = field(default_factory=list)
    expected_logits: list[Logits] = field(default_factory=list)

    def add(self, found: dict[str, Array], expected: dict[str, Array]) -> None:
        """Add the probes of one chunk of one row."""
        for name, reference in expected.items():
            mine = found[name]
            if name.startswith("expert_ids."):
                self._add_experts(name, mine, reference)
            elif name.startswith("hidden."):
                self._add_hidden(name, mine, reference)
        self.found_logits.append(found["logits"][0].astype(np.float32))
        self.expected_logits.append(expected["logits"][0].astype(np.float32))

    def _add_hidden(self, name: str, found: Array, expected: Array) -> None:
        try:
            self.hidden[name] = self.hidden.get(name, Distance()) + distance(found, expected)
        except ToleranceExceededError as error:
            self.hidden.setdefault(name, Distance())
            self.broken[name] = error.message

    def _add_experts(self, name: str, found: Array, expected: Array) -> None:
        same = np.sort(found, axis=-1) == np.sort(expected, axis=-1)
        self.equal_experts[name] = self.equal_experts.get(name, 0) + int(same.sum())
        self.num_experts[name] = self.num_experts.get(name, 0) + same.size


def compare_runners(
    found: ProbeRunner,
    expected: ProbeRunner,
    tokens: npt.ArrayLike,
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Feed both runners the same tokens and compare everything that can be seen.

    Most tokens go through `probe` in chunks; the last few through `decode`, one at a time.

    Args:
        found: the runner under test.
        expected: the reference.
        tokens: [N] integers, at least 2.
        progress: told about the tokens.

    Returns:
        Rows for the residual stream and the experts of each layer, for each state, and for the
        logits of both ways, each with its bound.

    Raises:
        ConfigError: vocabularies, layers or the context do not fit.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    progress = progress or NoProgress()
    _check(found, expected, len(ids))
    num_decoded = min(DECODE_STEPS, len(ids) // 2)
    prompt = ids[: len(ids) - num_decoded]
    states = found.new_state(1), expected.new_state(1)
    stage = f"comparing {found.spec.name} with {expected.spec.name}"
    progress.start(stage, len(ids), "tokens")
    seen = _Seen()
    for start in range(0, len(prompt), CHUNK):
        part = prompt[None, start : start + CHUNK]
        mine = found.probe(part, None, states[0])
        theirs = expected.probe(part, None, states[1])
        _check_probes(mine, theirs)
        seen.add(mine, theirs)
        progress.advance(part.shape[1])
    rows = [*_layer_rows(seen), *_state_rows(*states)]
    rows += _logits_rows("prefill", np.concatenate(seen.found_logits), seen.expected_logits)
    steps: tuple[list[Logits], list[Logits]] = ([], [])
    for token in ids[len(prompt) :]:
        for runner, state, logits in zip((found, expected), states, steps, strict=True):
            logits.append(runner.decode([token], state))
        progress.advance()
    rows += _logits_rows("decode", np.concatenate(steps[0]), steps[1])
    progress.finish()
    return Comparison(
        found=found.spec.name, expected=expected.spec.name, tokens=len(ids), rows=tuple(rows)
    )


def require_probe(runner: Runner) -> ProbeRunner:
    """Return the runner as one that can show its inside.

    Raises:
        BackendUnavailableError: it cannot.
    """
    if not callable(getattr(runner, "probe", None)):
        raise BackendUnavailableError(
            f"the backend {runner.spec.name} cannot show what its layers compute",
            hint="compare with another backend",
        )
    return cast("ProbeRunner", runner)


def _check(found: Runner, expected: Runner, num_tokens: int) -> None:
    check_vocabularies(found, expected)
    limit = min(found.spec.context_length, expected.spec.context_length)
    if not 2 <= num_tokens <= limit:
        raise ConfigError(f"{num_tokens} tokens cannot be compared, expected 2 to {limit}")


def _check_probes(found: dict[str, Array], expected: dict[str, Array]) -> None:
    different = sorted(found.keys() ^ expected.keys())
    if different:
        raise ConfigError(
            f"the two models do not have the same layers: only one of them has {different[0]}",
            hint="compare builds of the same checkpoint",
        )
    for name, array in expected.items():
        if array.shape != found[name].shape:
            raise ConfigError(
                f"the two models do not have the same sizes: {name} is {list(found[name].shape)}"
                f" in one and {list(array.shape)} in the other",
                hint="compare builds of the same checkpoint",
            )


def _layer_rows(seen: _Seen) -> list[Row]:
    rows = []
    for name, gap in seen.hidden.items():
        value = float("nan") if name in seen.broken else gap.relative
        layer = name.removeprefix("hidden.")
        rows.append(
            Row.judge("hidden", layer, value, TOLERANCES["hidden_fp32"], seen.broken.get(name))
        )
        experts = f"expert_ids.{layer}"
        if experts in seen.num_experts:
            share = seen.equal_experts[experts] / max(1, seen.num_experts[experts])
            rows.append(Row.judge("experts", layer, share, TOLERANCES["expert_agreement_fp32"]))
    return rows


def _state_rows(found: DecodeState, expected: DecodeState) -> list[Row]:
    mine, theirs = found.snapshot().tensors, expected.snapshot().tensors
    rows = []
    for name, reference in theirs.items():
        note = None
        try:
            value = distance(mine[name], reference).relative
        except ToleranceExceededError as error:
            value, note = float("nan"), error.message
        rows.append(Row.judge("state", name, value, TOLERANCES["state_fp32"], note))
    return rows


def _logits_rows(way: str, found: Logits, expected_parts: list[Logits]) -> list[Row]:
    expected = np.concatenate(expected_parts)
    bound = TOLERANCES["logits_cosine"]
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        note = f"NaN or infinity among the logits of {way}"
        return [Row.judge("logits", f"{way} cosine", float("nan"), bound, note)]
    smallest = float(cosine(found, expected).min(initial=1.0))
    divergence = kl_divergence(expected, found)
    p99 = float(np.quantile(divergence, 0.99))
    return [
        Row.judge("logits", f"{way} cosine", smallest, bound),
        Row.show(
            "logits", f"{way} top-1", top1_agreement(found, expected), "share of equal best tokens"
        ),
        Row.show("logits", f"{way} KL mean", float(divergence.mean()), "nats per token"),
        Row.show("logits", f"{way} KL p99", p99, "nats per token"),
    ]
