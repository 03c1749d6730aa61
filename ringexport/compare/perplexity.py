"""Perplexity and bits per byte of texts, for one runner or for two side by side."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ringexport.compare.metrics import kl_divergence, log_softmax
from ringexport.compare.windows import Predictions, num_predictions, predict
from ringexport.errors import ConfigError
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.runner import Runner
from ringexport.runtime.tokenizer import ModelTokenizer

__all__ = ["PairScore", "Score", "Text", "perplexity", "perplexity_pair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text that is scored.

    Attributes:
        name: what reports call it.
        tokens: its token ids.
        num_bytes: UTF-8 bytes of the tokens that are predicted: all but the first.
    """

    name: str
    tokens: npt.NDArray[np.int64]
    num_bytes: int

    @classmethod
    def encode(
        cls, tokenizer: ModelTokenizer, name: str, content: str, max_tokens: int | None = None
    ) -> Self:
        """Tokenize a text, cut after `max_tokens`."""
        tokens = tokenizer.encode(content)[:max_tokens]
        num_bytes = sum(len(tokenizer.token_bytes(token)) for token in tokens[1:])
        return cls(name=name, tokens=np.asarray(tokens, dtype=np.int64), num_bytes=num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well texts were predicted.

    Attributes:
        nats: sum of the negative log probabilities.
        tokens: number of predicted tokens.
        num_bytes: UTF-8 bytes of these tokens.
    """

    nats: float = 0.0
    tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    @property
    def perplexity(self) -> float:
        """Inverse geometric mean of the token probabilities."""
        return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text; comparable across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def to_dict(self) -> dict[str, float | int]:
        """Return the numbers that `ringexport eval` reports."""
        return {
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "nats": self.nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScore:
    """Two runners on the same tokens; "against" is the reference.

    Attributes:
        score, against: of either runner.
        kl_mean, kl_p99: KL(against || runner) per token in nats.
        top1_agreement: share of positions where both find the same token most likely.
    """

    score: Score
    against: Score
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity from `against` to `score`; 0.01 is one percent."""
        return self.score.perplexity / self.against.perplexity - 1.0

    def to_dict(self) -> dict[str, object]:
        """Return the numbers that `ringexport eval --against` reports."""
        numbers = {key: value for key, value in asdict(self).items() if isinstance(value, float)}
        return {
            "score": self.score.to_dict(),
            "against": self.against.to_dict(),
            "perplexity_change": self.perplexity_change,
            **numbers,
        }


def perplexity(
    runner: Runner,
    texts: Sequence[Text],
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Score texts, teacher-forced.

    Args:
        runner: the model.
        texts: each scored from an empty state.
        window: tokens per window, None for the context length; see `windows.predict`.
        progress: told about the tokens.

    Returns:
        Score by name of the text, in the order of `texts`.

    Raises:
        ConfigError: no text has two tokens.
    """
    progress = progress or NoProgress()
    _start(progress, f"scoring with {runner.spec.name}", texts)
    scores = {}
    for text in texts:
        nats = 0.0
        for predictions in predict(runner, text.tokens, window=window):
            nats += _nats(predictions)
            progress.advance(len(predictions.targets))
        scores[text.name] = _score(text, nats)
    progress.finish()
    return scores


def perplexity_pair(
    runner: Runner,
    against: Runner,
    texts: Sequence[Text],
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> PairScore:
    """Score the same texts with two runners, position by position.

    Args:
        runner, against: models with the same vocabulary.
        texts: as for `perplexity`.
        window: tokens per window, None for the shorter context length.
        progress: told about the tokens.

    Raises:
        ConfigError: the vocabularies differ, or no text has two tokens.
    """
    progress = progress or NoProgress()
    check_vocabularies(runner, against)
    if window is None:
        window = min(runner.spec.context_length, against.spec.context_length)
    _start(progress, f"scoring {runner.spec.name} against {against.spec.name}", texts)
    score, reference = Score(), Score()
    divergences: list[npt.NDArray[np.float64]] = []
    same = 0
    for text in texts:
        nats, reference_nats = 0.0, 0.0
        left = predict(runner, text.tokens, window=window)
        right = predict(against, text.tokens, window=window)
        for mine, theirs in zip(left, right, strict=True):
            nats += _nats(mine)
            reference_nats += _nats(theirs)
            divergences.append(kl_divergence(theirs.logits, mine.logits))
            same += int((mine.logits.argmax(axis=-1) == theirs.logits.argmax(axis=-1)).sum())
            progress.advance(len(mine.targets))
        score += _score(text, nats)
        reference += _score(text, reference_nats)
    progress.finish()
    all_divergences = np.concatenate(divergences)
    return PairScore(
        score=score,
        against=reference,
        kl_mean=float(all_divergences.mean()),
        kl_p99=float(np.quantile(all_divergences, 0.99)),
        top1_agreement=same / score.tokens,
    )


def check_vocabularies(left: Runner, right: Runner) -> None:
    """Refuse runners whose tokens do not mean the same.

    Raises:
        ConfigError: the vocabularies have different sizes.
    """
    if left.spec.vocab_size != right.spec.vocab_size:
        raise ConfigError(
            f"cannot compare models with vocabularies of {left.spec.vocab_size} and"
            f" {right.spec.vocab_size} tokens",
            hint="compare builds of the same checkpoint",
        )


def _start(progress: Progress, stage: str, texts: Sequence[Text]) -> None:
    total = sum(num_predictions(len(text.tokens)) for text in texts)
    if total == 0:
        raise ConfigError(
            "there is nothing to score: no text has two tokens", hint="give a longer --text"
        )
    progress.start(stage, total, "tokens")


def _nats(predictions: Predictions) -> float:
    total = 0.0
    for start in range(0, len(predictions.targets), 64):
        log_probabilities = log_softmax(predictions.logits[start : start + 64])
        targets = predictions.targets[start : start + 64]
        total -= float(np.take_along_axis(log_probabilities, targets[:, None], axis=-1).sum())
    return total


def _score(text: Text, nats: float) -> Score:
    return Score(nats=nats, tokens=num_predictions(len(text.tokens)), num_bytes=text.num_bytes)
