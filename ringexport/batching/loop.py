"""The loop without its thread: each step reads some chunks of prompts, then decodes one token.

A prompt is read into a state of its own, and joins the others when it is complete: what goes wrong
in it is lost alone, and its logits do not depend on what runs beside it.
"""

from collections import Counter, deque
from collections.abc import Iterable
from functools import partial

from ringexport.batching.chunks import ChunkRule
from ringexport.batching.options import BatchingOptions, BatchingStats
from ringexport.batching.pool import RowPool
from ringexport.batching.prefix_cache import PrefixCache
from ringexport.batching.request import Request, guarded
from ringexport.errors import RingExportError
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.runner import Logits, Runner

__all__ = ["Loop"]

ENDS = ("finished", "cancelled", "failed")
COUNTS = (
    *ENDS,
    *("steps", "decode_steps", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("cache_hits", "cache_misses"),
)


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
        longest = min(options.token_budget, runner.spec.prefill_chunk)
        self._rule = ChunkRule(frozenset(markers), longest)
        self.rows = min(options.max_batch, runner.spec.max_batch or options.max_batch)
        self._pool = RowPool(runner, self.rows)
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()
        self.running: list[Request] = []
        self.cache = PrefixCache(self._rule, options.prefix_cache_bytes)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.reading or self.running)

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
        for queue in (self.running, self.reading, self.waiting):
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
        left = self._options.token_budget
        while self.reading:
            request = self.reading[0]
            size = guarded(partial(self._open, request))
            if isinstance(size, int) and size > left:
                return
            self.reading.popleft()
            if isinstance(size, int):
                left -= size
                error = guarded(partial(self._read, request, size))
            else:
                error = size
            if error is not None:
                self._fail(request, error)
            elif request.phase == "reading":
                self.reading.append(request)

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

    def _read(self, request: Request, size: int) -> None:
        """Read a chunk; behind the last one, choose a token and join those that run."""
        assert request.state is not None
        stop = request.read + size
        chunk = request.tokens[request.read : stop]
        logits = self._runner.prefill([chunk], None, request.state)
        if request.node is not None:
            request.node = self.cache.add(request.node, request.tokens, stop, request.state)
        request.read = stop
        if stop < len(request.tokens):
            return
        if not request.suspect:
            self._count_prompt(request)
        if request.row.params.max_new_tokens == 0:
            request.row.finish("length")
        else:
            self._accept(request, logits[0], stop)
        if request.row.stop_reason is None:
            self._pool.join(request.state)
            request.phase = "running"
            self.running.append(request)
        else:
            self._finish(request)
        request.state = request.node = None

    def _decode(self) -> None:
        """Take a step with all running requests; suspects take theirs alone."""
        rows = range(len(self.running))
        suspects = [row for row in rows if self.running[row].suspect]
        for group in [[row] for row in suspects]:
            self._decode_rows(group)
        together = [row for row in rows if row not in suspects]
        if together:
            self._decode_rows(together)
        self._let_go()

    def _decode_rows(self, rows: list[int]) -> None:
        requests = [self.running[row] for row in rows]
        tokens = [request.row.token_ids[-1] for request in requests]
        logits = guarded(partial(self._pool.decode, tokens, rows))
        if isinstance(logits, RingExportError):
            self._recover(requests, logits)
            return
        self._counts["decode_steps"] += 1
        for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
            request.suspect = False
            position = self._pool.position(row)
            error = guarded(partial(self._accept, request, logits[index], position))
            if error is not None:
                self._fail(request, error)
            elif request.row.stop_reason is not None:
                self._finish(request)

    def _accept(self, request: Request, logits: Logits, position: int) -> None:
        full = position >= self._runner.spec.context_length
        request.accept(logits, context_full=full)
        self._counts["generated_tokens"] += 1

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
