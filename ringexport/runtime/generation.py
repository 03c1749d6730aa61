"""The decode loop: rows of prompts become text, each row with its own sampler and end."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np

from ringexport.errors import ConfigError, RingExportError
from ringexport.runtime.choosing import ChosenTokens, TokenChoice, chooser_of
from ringexport.runtime.runner import Runner
from ringexport.runtime.sampling import SamplingParams, TokenLogprobs, token_logprobs
from ringexport.runtime.state import DecodeState
from ringexport.runtime.streaming import StopMatcher
from ringexport.runtime.tokenizer import ModelTokenizer

__all__ = [
    "Generation",
    "GenerationResult",
    "GenerationStream",
    "Row",
    "StopReason",
    "Timings",
]

StopReason = Literal["stop_token", "stop_text", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long a row took, in wall time; the rows of a batch share it.

    Attributes:
        time_to_first_token_ms: from the start of the prefill to the first chosen token.
        total_ms: from the start of the prefill to the last chosen token.
        prefill_tokens_per_second: prompt tokens over the time to the first token.
        tokens_per_second: tokens after the first over the time after it; 0 without any.
    """

    time_to_first_token_ms: float
    total_ms: float
    prefill_tokens_per_second: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The text that a model wrote.

    Attributes:
        text: without stop token and stop text.
        token_ids: all chosen tokens, with those of the stop token or stop text.
        stop_reason: "stop_token", "stop_text", "length" (max_new_tokens), "context" (it is full)
            or "cancelled" (the stream was closed).
        stop_text: the stop text that was found.
        prompt_tokens: number of tokens that were fed before the first was chosen.
        new_tokens: number of chosen tokens.
        timings: how long it took.
        logprobs: one entry per chosen token if SamplingParams.logprobs asked for them.
        cached_tokens: how many of the prompt's tokens came from a prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    stop_text: str | None
    prompt_tokens: int
    new_tokens: int
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int = 0


class Row:
    """One prompt on its way to a text.

    Args:
        prompt: ids to feed; not empty.
        params: how to continue.
        tokenizer: for text and stop ids.
        vocab_size: width of the logits.
        history: ids that the state has already seen, for the repetition penalty.

    Attributes:
        prompt, params: as given.
        choice: how the next token is chosen.
        token_ids: the chosen tokens.
        logprobs: of the chosen tokens, if the params ask for them.
        stop_reason: None while the row goes on.
        cached_tokens: of the prompt, if whoever feeds it has a prefix cache.

    Raises:
        ConfigError: the prompt is empty.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: ModelTokenizer,
        vocab_size: int,
        *,
        history: Sequence[int] = (),
    ) -> None:
        if not prompt:
            raise ConfigError("the prompt is empty", hint="give at least one character")
        self.prompt = list(prompt)
        self.params = params
        self.token_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self.cached_tokens = 0
        self._stop_ids = frozenset() if params.ignore_eos else tokenizer.stop_ids
        self.choice = TokenChoice(params, vocab_size, (*history, *prompt))
        self._decoder = tokenizer.decoder(skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop)
        self._parts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self._started = self._first = self._last = time.perf_counter()

    def start(self) -> None:
        """Start the clock, when the prompt of the row is about to be read."""
        self._started = self._first = self._last = time.perf_counter()

    def accept(self, chosen: ChosenTokens, index: int) -> str:
        """Take over a chosen token and return the text that can be shown now.

        Args:
            chosen: the tokens of a step.
            index: which of them is this row's.

        Raises:
            RingExportError: the logits are not finite.
        """
        chosen.check(index)
        token = chosen.ids[index]
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(token)
        self.choice.note(token)
        if self.params.logprobs is not None:
            entry = token_logprobs(chosen.logits[index], token, self.params.logprobs)
            self.logprobs.append(entry)
        if token in self._stop_ids:
            return self.finish("stop_token")
        piece = self._matcher.feed(self._decoder.feed(token))
        if piece:
            self._parts.append(piece)
        if self._matcher.matched is not None:
            self.stop_reason = "stop_text"
        elif len(self.token_ids) >= self.params.max_new_tokens:
            piece += self.finish("length")
        return piece

    def finish(self, reason: StopReason) -> str:
        """End the row and return the text that was held back."""
        self.stop_reason = reason
        held = self._matcher.feed(self._decoder.flush()) + self._matcher.flush()
        if held:
            self._parts.append(held)
        return held

    def result(self) -> GenerationResult:
        """Return what was generated so far; the reason of an unfinished row is "cancelled"."""
        count = len(self.token_ids)
        first, decode = self._first - self._started, self._last - self._first
        return GenerationResult(
            text="".join(self._parts),
            token_ids=tuple(self.token_ids),
            stop_reason=self.stop_reason or "cancelled",
            stop_text=self._matcher.matched,
            prompt_tokens=len(self.prompt),
            new_tokens=count,
            timings=Timings(
                time_to_first_token_ms=1e3 * first,
                total_ms=1e3 * (self._last - self._started),
                prefill_tokens_per_second=len(self.prompt) / first if first > 0 else 0.0,
                tokens_per_second=(count - 1) / decode if count > 1 and decode > 0 else 0.0,
            ),
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            cached_tokens=self.cached_tokens,
        )


class Generation:
    """Runs rows together until all are finished.

    Finished rows leave the batch, so they cost nothing any more. Rows do not influence each
    other: each has its own state, sampler and random numbers.

    Attributes:
        rows: in the order given.
        state: the state of the rows that still run.
        fed: for each row the number of its tokens, prompt first, that its state has seen.
        consistent: False while a step runs; a state that an exception left so is lost.
    """

    def __init__(self, runner: Runner, rows: Sequence[Row], state: DecodeState) -> None:
        self.rows = list(rows)
        self.state = state
        self.fed = [0] * len(rows)
        self.consistent = True
        self._runner = runner
        self._chooser = chooser_of(runner)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield row index and text whenever a row has new text to show."""
        for row in self.rows:
            row.start()
        running = list(range(len(self.rows)))
        chosen = self._prefill()
        for index in running:
            if self.rows[index].params.max_new_tokens == 0:
                self.rows[index].finish("length")
        while True:
            yield from self._accept(running, chosen)
            slots = [
                slot for slot, index in enumerate(running) if self.rows[index].stop_reason is None
            ]
            if not slots:
                return
            if len(slots) < len(running):
                self.state = self.state.fork(slots)
                running = [running[slot] for slot in slots]
            chosen = self._decode(running)

    def _accept(self, running: Sequence[int], chosen: ChosenTokens) -> Iterator[tuple[int, str]]:
        """Take over the next token of each running row, and end those whose context is full."""
        limit = self._runner.spec.context_length
        position = self.state.position
        for slot, index in enumerate(running):
            row = self.rows[index]
            if row.stop_reason is not None:
                continue
            piece = row.accept(chosen, slot)
            if row.stop_reason is None and position[slot] >= limit:
                piece += row.finish("context")
            if piece:
                yield index, piece

    def _prefill(self) -> ChosenTokens:
        lengths = [len(row.prompt) for row in self.rows]
        tokens = np.zeros((len(self.rows), max(lengths)), dtype=np.int64)
        for index, row in enumerate(self.rows):
            tokens[index, : lengths[index]] = row.prompt
        self.consistent = False
        choices = [None if row.params.max_new_tokens == 0 else row.choice for row in self.rows]
        chosen = self._chooser.choose_prefill(tokens, lengths, self.state, choices).result()
        self.fed = lengths
        self.consistent = True
        return chosen

    def _decode(self, running: Sequence[int]) -> ChosenTokens:
        choices = [self.rows[index].choice for index in running]
        self.consistent = False
        rows = range(len(running))
        chosen = self._chooser.choose_decode(self.state, rows, choices).result()
        for index in running:
            self.fed[index] += 1
        self.consistent = True
        return chosen


class GenerationStream:
    """The text of one row, piece by piece; pieces never split a character.

    Iterate over it, then ask for `result`. Closing it early, or leaving its `with` block, ends the
    generation; what was generated so far is in `result`.
    """

    def __init__(self, generation: Generation, pieces: Iterator[str]) -> None:
        self._generation = generation
        self._pieces = pieces
        self._done = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BaseException:  # StopIteration and interrupts alike: nothing follows
            self._done = True
            raise

    @property
    def result(self) -> GenerationResult:
        """What was generated.

        Raises:
            RingExportError: the stream has not ended yet.
        """
        if not self._done:
            raise RingExportError(
                "the text is still being generated", hint="read the stream to its end, or close it"
            )
        return self._generation.rows[0].result()

    def close(self) -> None:
        """End the generation."""
        self._done = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
