"""The loop without its thread: each step reads some chunks of prompts, then decodes one token.

A prompt is read into a state of its own, and joins the others when it is complete: what goes wrong
in it is lost alone, and its logits do not depend on what runs beside it.

With an asynchronous chooser the loop is one step behind: it takes over the tokens of a step while
the next one runs already. A request that turns out to have ended loses the token that was chosen
for it meanwhile.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ringexport.batching.chunks import ChunkRule
from ringexport.batching.options import BatchingOptions, BatchingStats
from ringexport.batching.pool import RowPool
from ringexport.batching.prefix_cache import PrefixCache
from ringexport.batching.request import Request, as_own_error, guarded
from ringexport.errors import RingExportError
from ringexport.runtime.choosing import ChosenTokens, PendingTokens, TokenChoice, chooser_of
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.runner import Runner
from ringexport.runtime.state import DecodeState

__all__ = ["Loop"]

ENDS = ("finished", "cancelled", "failed")
COUNTS = (
    *ENDS,
    *("steps", "decode_steps", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("cache_hits", "cache_misses"),
)


class _Place(NamedTuple):
    """Where a request finds its token among those of a step.

    Attributes:
        request: whose token it is.
        row: of the step.
        position: tokens that the request's state has seen after the step.
        attempt: of the request when the step was started; a later one wants nothing of it.
    """

    request: Request
    row: int
    position: int
    attempt: int


PREFILL_BOOST = 4
"""Factor on the runner's own token budget while at most this many requests decode for each one that
reads its prompt: a device reads more tokens at once faster, and few requests are held up by it."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was started.

    Attributes:
        tokens: what it chooses.
        places: of the requests that take part.
        decodes: it is no step that read prompts.
    """

    tokens: PendingTokens
    places: Sequence[_Place]
    decodes: bool


class Loop:
    """Runs requests step by step. Not for several threads, but for `stats`.

    Args:
        runner: the model.
        options: limits.
        markers: ids after which prompts are cut; see `ChunkRule`.

    Attributes:
        waiting: requests that nothing was done for yet.
        reading: requests whose prompt is being read; the first is the next to read a chunk.
        running: requests that are being continued, in the order of their rows in the pool.
        cache: states of prompts.
        rows: requests that run at once; the runner may allow fewer than the options.
    """

    def __init__(self, runner: Runner, options: BatchingOptions, markers: Iterable[int]) -> None:
        self._runner = runner
        self._options = options
        self._chooser = chooser_of(runner)
        self._budget = options.token_budget or runner.spec.token_budget
        longest = min(self._budget, runner.spec.prefill_chunk)
        self._rule = ChunkRule(frozenset(markers), longest)
        self.rows = min(options.max_batch, runner.spec.max_batch or options.max_batch)
        self._pool = RowPool(runner, self.rows)
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._started: deque[_Step] = deque()
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()
        self.running: list[Request] = []
        self.cache = PrefixCache(self._rule, options.prefix_cache_bytes)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.reading or self.running or self._started)

    @property
    def ended(self) -> int:
        """How many requests have ended, however they did."""
        return sum(self._counts[name] for name in ENDS)

    def stats(self) -> BatchingStats:
        """Return what has happened."""
        return BatchingStats(
            running=len(self.reading) + len(self.running),
            waiting=len(self.waiting),
            cache_entries=len(self.cache),
            cache_bytes=self.cache.nbytes,
            cache_evictions=self.cache.evictions,
            **self._counts,
        )

    def step(self) -> None:
        """End what was cancelled, read up to a budget of prompt tokens, and decode one token."""
        self._counts["steps"] += 1
        self._drop_cancelled()
        active = len(self.reading) + len(self.running)
        for _ in range(min(self.rows - active, len(self.waiting))):
            self.reading.append(self.waiting.popleft())
            self.reading[-1].phase = "reading"
        self._read_prompts()
        self._decode()

    def end_all(self, error: RingExportError) -> None:
        """Fail every request."""
        requests = [*self.running, *self.reading, *self.waiting]
        for queue in (self.running, self.reading, self.waiting, self._started):
            queue.clear()
        self._pool.drop()
        for request in requests:
            if request.phase != "ended":
                self._fail(request, error)

    def _drop_cancelled(self) -> None:
        for queue in (self.waiting, self.reading):
            for request in [request for request in queue if request.cancelled]:
                queue.remove(request)
                self._finish(request)
        for request in self.running:
            if request.cancelled:
                self._finish(request)
        self._let_go()

    def _read_prompts(self) -> None:
        """Read chunks in turn, until one more would exceed the budget."""
        left = self._budget
        if self._chooser.asynchronous and not self._options.prefix_cache_bytes:
            few_wait = len(self.running) <= PREFILL_BOOST * len(self.reading)
            if self._options.token_budget is None and few_wait:
                left *= PREFILL_BOOST
            left = self._read_together(left)
        while self.reading:
            request = self.reading[0]
            size = guarded(partial(self._open, request))
            if isinstance(size, int) and size > left:
                return
            self.reading.popleft()
            if isinstance(size, int):
                left -= size
                error = guarded(partial(self._read, [request], [size], request.state))
            else:
                error = size
            if error is not None:
                self._fail(request, error)
            elif request.phase == "reading":
                self.reading.append(request)

    def _read_together(self, left: int) -> int:
        """Read chunks of several prompts in one call, which no cache asks to be read one by one.

        Returns:
            What is left of the budget; 0 unless those that wait have to be read alone.
        """
        requests: list[Request] = []
        sizes: list[int] = []
        while left and self.reading and not self.reading[0].suspect:
            requests.append(self.reading.popleft())
            sizes.append(min(len(requests[-1].tokens) - requests[-1].read, left))
            left -= sizes[-1]
        if requests:
            error = guarded(partial(self._read_rows, requests, sizes))
            lost = [request for request in requests if request.phase == "reading"]
            if error is not None and len(requests) == 1:
                self._fail(requests[0], error)
            elif error is not None:
                self._recover(lost, error)
            else:
                self.reading.extend(lost)
        return left

    def _read_rows(self, requests: list[Request], sizes: list[int]) -> None:
        """Read chunks into the rows of one state; prompts that go on get one of their own again."""
        state = self._runner.new_state(len(requests))
        for row, request in enumerate(requests):
            if request.state is None:
                request.row.start()
            else:
                state.move_rows([row], request.state, [0])
        self._read(requests, sizes, state)
        for row, request in enumerate(requests):
            if request.phase == "reading":
                request.state = self._runner.new_state(1)
                request.state.move_rows([0], state, [row])

    def _open(self, request: Request) -> int:
        """Take over the longest cached prefix; return the size of the chunk to read next."""
        if request.state is None:
            request.state = self._runner.new_state(1)
            request.node = self.cache.root if self._options.prefix_cache_bytes else None
            if not request.suspect:
                request.row.start()
        if request.node is not None:
            request.node = self.cache.find(request.tokens, request.node)
            if request.node.end > request.read:
                request.state.restore(request.node.snapshot())
                if not request.suspect:
                    request.row.cached_tokens += request.node.end - request.read
                request.read = request.node.end
        return self._rule.stop(request.tokens, request.read) - request.read

    def _read(
        self, requests: Sequence[Request], sizes: Sequence[int], state: DecodeState | None
    ) -> None:
        """Read chunks; behind the last one of a prompt choose a token, and join those that run.

        Args:
            requests: whose prompts are read.
            sizes: of the chunks.
            state: with a row for each.
        """
        assert state is not None
        stops = [one.read + size for one, size in zip(requests, sizes, strict=True)]
        tokens = np.zeros((len(requests), max(sizes)), dtype=np.int64)
        for row, request in enumerate(requests):
            tokens[row, : sizes[row]] = request.tokens[request.read : stops[row]]
        choices = [_choice(one, stop) for one, stop in zip(requests, stops, strict=True)]
        chosen = self._chooser.choose_prefill(tokens, sizes, state, choices)
        places = []
        for row, request in enumerate(requests):
            if request.node is not None:
                request.node = self.cache.add(request.node, request.tokens, stops[row], state)
            request.read = stops[row]
            if choices[row] is not None:
                places.append(self._place(request, row, stops[row]))
        if places:
            self._started.append(_Step(chosen, places, decodes=False))
        if not self._chooser.asynchronous:
            self._take_over(0)
        for row, request in enumerate(requests):
            if request.read == len(request.tokens):
                self._join(request, state, row)

    def _join(self, request: Request, state: DecodeState, row: int) -> None:
        """Let a request whose prompt was read run, unless it has ended already."""
        if not request.suspect:
            self._count_prompt(request)
        if request.row.params.max_new_tokens == 0:
            request.row.finish("length")
            self._finish(request)
        if request.phase == "reading":
            self._pool.join(state, row)
            request.phase = "running"
            self.running.append(request)
        request.state = request.node = None

    def _decode(self) -> None:
        """Start a step of all running requests, and take over the one before it.

        Suspects take theirs alone.
        """
        before = len(self._started)
        limit, positions = self._runner.spec.context_length, self._pool.positions()
        # A row goes on if it can, as far as is known before its last token is.
        rows = [
            row
            for row, request in enumerate(self.running)
            if request.phase == "running"
            and request.steps < request.row.params.max_new_tokens
            and positions[row] < limit
        ]
        suspects = [row for row in rows if self.running[row].suspect]
        for group in [[row] for row in suspects]:
            self._decode_rows(group)
        together = [row for row in rows if not self.running[row].suspect]
        if together:
            self._decode_rows(together)
        new = max(0, len(self._started) - before)
        self._take_over(new if self._chooser.asynchronous else 0)
        self._let_go()

    def _decode_rows(self, rows: list[int]) -> None:
        requests = [self.running[row] for row in rows]
        choices = [request.row.choice for request in requests]
        tokens = guarded(partial(self._pool.decode, self._chooser, rows, choices))
        if isinstance(tokens, RingExportError):
            self._take_over(0)
            self._recover([one for one in requests if one.phase == "running"], tokens)
            return
        self._counts["decode_steps"] += 1
        positions = self._pool.positions()
        places = [
            self._place(request, index, positions[row])
            for index, (row, request) in enumerate(zip(rows, requests, strict=True))
        ]
        self._started.append(_Step(tokens, places, decodes=True))

    def _place(self, request: Request, row: int, position: int) -> _Place:
        request.steps += 1
        return _Place(request, row, position, request.attempt)

    def _take_over(self, left: int) -> None:
        """Take over the tokens of all steps that were started but the `left` last ones."""
        while len(self._started) > left:
            step = self._started.popleft()
            chosen = guarded(step.tokens.result)
            live = [
                place
                for place in step.places
                if place.request.phase in {"reading", "running"}
                and place.request.attempt == place.attempt
            ]
            if isinstance(chosen, RingExportError):
                self._recover([place.request for place in live], chosen)
                continue
            if step.decodes:
                for place in live:
                    place.request.suspect = False
            self._accept(live, chosen)

    def _accept(self, places: Sequence[_Place], chosen: ChosenTokens) -> None:
        """Give requests their tokens, and end those that have their last one."""
        limit, accepted = self._runner.spec.context_length, 0
        ended: list[Request] = []
        for request, row, position, _ in places:
            try:
                request.accept(chosen, row, context_full=position >= limit)
            except Exception as error:  # noqa: BLE001 - it is logged
                self._fail(request, as_own_error(error))
                continue
            accepted += 1
            if request.row.stop_reason is not None:
                ended.append(request)
        self._counts["generated_tokens"] += accepted
        for request in ended:
            self._finish(request)

    def _let_go(self) -> None:
        """Free the rows of requests that do not run any more."""
        kept = [row for row, request in enumerate(self.running) if request.phase == "running"]
        if len(kept) == len(self.running):
            return
        order = guarded(partial(self._pool.keep, kept))
        if isinstance(order, RingExportError):
            self._pool.drop()
            self._recover([self.running[row] for row in kept], order)
            order = []
        self.running = [self.running[row] for row in order]

    def _recover(self, requests: list[Request], error: RingExportError) -> None:
        """Read the tokens of requests again, whose rows a failed step has left half advanced.

        After that they take one step alone. The one that fails then fails for good, and no other
        does because of it.
        """
        for request in requests:
            if request.suspect:
                self._fail(request, error)
            else:
                request.rewind()
                self.reading.append(request)

    def _count_prompt(self, request: Request) -> None:
        cached = request.row.cached_tokens
        self._counts["prompt_tokens"] += len(request.row.prompt)
        self._counts["cached_tokens"] += cached
        self._counts["cache_hits" if cached else "cache_misses"] += 1

    def _finish(self, request: Request) -> None:
        result = request.row.result()
        self._end(request, "cancelled" if result.stop_reason == "cancelled" else "finished", result)

    def _fail(self, request: Request, error: RingExportError) -> None:
        self._end(request, "failed", error)

    def _end(self, request: Request, how: str, outcome: GenerationResult | RingExportError) -> None:
        request.phase, request.state, request.node = "ended", None, None
        self._counts[how] += 1
        request.end(outcome)


def _choice(request: Request, stop: int) -> TokenChoice | None:
    """Return how the token behind a chunk is chosen; None if the prompt goes on, or none is."""
    complete = stop == len(request.tokens) and request.row.params.max_new_tokens > 0
    return request.row.choice if complete else None
