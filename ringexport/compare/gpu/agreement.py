"""Compare the logits of the engine with the reference over the same weights, position by position.

Routers hang on the last bits: among 256 experts two scores are nearly equal in some layer for
almost every token, and once another expert is chosen, all that follows differs. So the reference
uses the experts that the engine chose, and its own choices are compared with them apart. How far
bf16 alone moves logits and choices is measured beside, by the reference in bf16.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringexport.compare.gpu.reference import PackedReference
from ringexport.compare.tolerances import TOLERANCES
from ringexport.errors import ToleranceExceededError
from ringexport.runtime.backends.cuda.runner import CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.runner import Logits, Runner, Tokens

__all__ = ["Agreement", "LogitsError", "References", "check_decode", "check_prefill"]

_MAX_ROWS = 4
"""Rows of a batch that the reference computes: the others run in the same kernels."""
_STEPS = 16
_FEW_CHOICES = 0.005
"""Share of experts that a comparison of a few thousand choices may miss by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsError:
    """How far logits are from those of the fp32 reference.

    Attributes:
        max_error: largest absolute difference.
        mean_error: mean absolute difference.
        relative: root of the mean squared difference over that of the reference.
        median_relative: the same of each position, the median of them.
        min_cosine: smallest cosine over positions.
        mean_cosine: mean cosine over positions.
        top1: share of positions with the same most likely token.
    """

    max_error: float
    mean_error: float
    relative: float
    median_relative: float
    min_cosine: float
    mean_cosine: float
    top1: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> "LogitsError":
        """Compare [N, vocab] fp32.

        Raises:
            ToleranceExceededError: infinities or NaN.
        """
        if not bool(torch.isfinite(found).all()):
            raise ToleranceExceededError("the engine's logits hold infinities or NaN")
        difference = found - expected
        relative = difference.norm(dim=-1) / expected.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(found.double(), expected.double(), dim=-1)
        return cls(
            max_error=float(difference.abs().max()),
            mean_error=float(difference.abs().mean()),
            relative=float(difference.norm() / expected.norm()),
            median_relative=float(relative.median()),
            min_cosine=float(cosine.min()),
            mean_cosine=float(cosine.mean()),
            top1=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The engine against the reference, and the reference in bf16 against itself in fp32.

    Attributes:
        what: was compared, such as "decode, batch 8".
        positions: compared positions of all rows.
        engine: error of the engine.
        rounding: error of the reference in bf16: what to measure the engine's by.
        experts: share of the engine's experts that the reference chose as well.
        experts_rounding: the same for the reference in bf16; both 1 where they are not known.
    """

    what: str
    positions: int
    engine: LogitsError
    rounding: LogitsError
    experts: float = 1.0
    experts_rounding: float = 1.0

    @property
    def factor(self) -> float:
        """The engine's error over that of bf16 alone, medians of positions."""
        return self.engine.median_relative / max(self.rounding.median_relative, 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"factor": self.factor}

    def check(self) -> None:
        """Raise ToleranceExceededError unless the engine errs about as much as bf16 alone."""
        bound = TOLERANCES["kernel_factor"].bound
        hint = f"at most {bound:g} times is allowed; run the kernel tests: pytest -m gpu"
        if not self.factor <= bound:
            raise ToleranceExceededError(
                f"{self.what}: the engine's logits are off by {self.engine.median_relative:.2e} of "
                f"their size, bf16 alone by {self.rounding.median_relative:.2e}: no speed is "
                "reported for wrong results",
                hint=hint,
            )
        if 1 - self.experts > bound * (1 - self.experts_rounding) + _FEW_CHOICES:
            raise ToleranceExceededError(
                f"{self.what}: {1 - self.experts:.2%} of the engine's experts are others than the "
                f"reference's, in bf16 alone {1 - self.experts_rounding:.2%}: no speed is "
                "reported for wrong results",
                hint=hint,
            )


Choices = dict[int, Tensor]
"""MoE layer -> [B, T, top_k] experts."""


class References:
    """The reference over one engine's weights, in fp32 and in bf16."""

    def __init__(self, weights: DeviceWeights) -> None:
        exact = PackedReference(weights)
        self._models = (exact, exact.in_dtype(torch.bfloat16))

    def compare(self, what: str, found: Logits, ids: Tokens, engine: Choices | None) -> Agreement:
        """Compare logits of the last positions.

        Args:
            what: for the report.
            found: [B, positions, vocab] fp32 of the engine.
            ids: [B, T] the tokens fed.
            engine: the experts that it chose for all of them, None if they are not known.
        """
        last = found.shape[1]
        (exact, own), (rounded, others) = (
            self._run(model, ids, last, engine) for model in self._models
        )
        logits = torch.from_numpy(found).to(exact.device)
        return Agreement(
            what=what,
            positions=len(ids) * last,
            engine=LogitsError.of(logits.flatten(0, 1), exact),
            rounding=LogitsError.of(rounded, exact),
            experts=1.0 if engine is None else _share(engine, own, last),
            experts_rounding=1.0 if engine is None else _share(others, own, last),
        )

    @staticmethod
    def _run(
        model: PackedReference, ids: Tokens, last: int, engine: Choices | None
    ) -> tuple[Tensor, Choices]:
        """Return logits [B * last, vocab] and the experts that the model itself would choose."""
        forced = None
        if engine is not None:
            forced = {layer: one.flatten(0, 1) for layer, one in engine.items()}
        tokens = torch.from_numpy(ids)
        logits = model.forward(
            tokens, None, model.new_state(len(ids)), every_position=True, experts=forced
        )
        own = {layer: one.view(*ids.shape, -1) for layer, one in model.own_choices.items()}
        return logits[:, -last:].flatten(0, 1).float(), own


def _share(found: Choices, expected: Choices, last: int) -> float:
    """Return the share of equal experts of the last positions, in any order."""
    shares = []
    for layer, ids in found.items():
        ours, theirs = ids[:, -last:], expected[layer][:, -last:]
        same = ours.to(theirs.device)[..., None] == theirs[..., None, :]
        shares.append(same.any(-1).double().mean())
    return float(torch.stack(shares).mean()) if shares else 1.0


def check_prefill(
    runner: Runner, references: References, *, tokens: int, last: int = 48, seed: int = 0
) -> Agreement:
    """Compare the logits of the last positions of a prompt that is read in two calls.

    Args:
        runner: the engine.
        references: over its weights.
        tokens: of the prompt.
        last: positions compared, the tokens of the second call.
        seed: of the tokens.
    """
    ids, last = _tokens(runner, 1, tokens, seed), min(last, tokens)
    state, chosen = runner.new_state(1), []
    if tokens > last:
        runner.prefill(ids[:, :-last], None, state)
        chosen.append(_chosen(runner, (1, tokens - last)))
    found = runner.prefill(ids[:, -last:], None, state, every_position=True)
    chosen.append(_chosen(runner, (1, last)))
    return references.compare(f"prompt of {tokens:,} tokens", found, ids, _joined(chosen))


def check_decode(
    runner: Runner,
    references: References,
    *,
    batch: int,
    prompt: int = 4,
    steps: int | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare the logits of the last token of a prompt and of the decode steps after it.

    Args:
        runner: the engine, with room for `batch` rows.
        references: over its weights.
        batch: rows that are decoded together; a few of them are compared.
        prompt: tokens read before.
        steps: decoded; None for as many as make 16 positions of the compared rows.
        seed: of the tokens.
    """
    steps = max(4, _STEPS // batch) if steps is None else steps
    ids = _tokens(runner, batch, prompt + steps, seed)
    rows = np.unique(np.linspace(0, batch - 1, min(batch, _MAX_ROWS)).astype(np.int64))
    state = runner.new_state(batch)
    found = [runner.prefill(ids[:, :prompt], None, state)[rows]]
    chosen = [_chosen(runner, (batch, prompt))]
    for place in range(prompt, prompt + steps):
        found.append(runner.decode(ids[:, place], state)[rows])
        chosen.append(_chosen(runner, (batch, 1), decoded=True))
    experts = _joined(chosen)
    if experts is not None:
        experts = {layer: one[torch.from_numpy(rows)] for layer, one in experts.items()}
    logits = np.stack(found, axis=1)
    return references.compare(f"decode, batch {batch}", logits, ids[rows], experts)


def _chosen(runner: Runner, shape: tuple[int, int], *, decoded: bool = False) -> Choices | None:
    """Return the experts of the last call for `shape` = (rows, tokens) on the host.

    Args:
        runner: only the fast engine tells.
        shape: of the call; all its tokens went through the model at once.
        decoded: it was a decode step, not a prompt.
    """
    if not isinstance(runner, CudaRunner):
        return None
    found = runner.network.expert_ids
    if decoded:
        found = runner.graphs.step(shape[0]).expert_ids
    rows, tokens = shape
    chosen = {}
    for layer, ids in found.items():
        # The last layer may choose for the last token of each row only: what it does with the
        # others is not used, here neither.
        known = tokens if len(ids) >= rows * tokens else 1
        some = ids[: rows * known].cpu().view(rows, known, -1)
        chosen[layer] = some if known == tokens else some.expand(-1, tokens, -1)
    return chosen


def _joined(parts: list[Choices | None]) -> Choices | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return {layer: torch.cat([part[layer] for part in known], dim=1) for layer in known[0]}


def _tokens(runner: Runner, batch: int, count: int, seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    return rng.integers(0, runner.spec.vocab_size, (batch, count), dtype=np.int64)
