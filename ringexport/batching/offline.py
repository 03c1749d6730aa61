"""Many prompts from a file: those that have no result yet are continued together."""

import queue
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial

from ringexport.batching.engine import BatchingEngine
from ringexport.batching.events import Event, FailedEvent, FinishedEvent, PieceEvent
from ringexport.batching.jsonl import Json, PromptLine, ResultFile
from ringexport.batching.options import BatchingOptions
from ringexport.errors import EngineClosedError, RingExportError
from ringexport.progress import Progress
from ringexport.runtime.generation import GenerationResult
from ringexport.runtime.session import Engine

__all__ = ["OfflineRun"]


class OfflineRun:
    """Continues prompts and writes their results.

    Args:
        engine: the model.
        results: the output.
        progress: told about every prompt that has ended.
        options: limits of the batching engine.

    Attributes:
        failed: prompts that ended with an error.
        prompt_tokens, new_tokens: of those that did not.
    """

    def __init__(
        self,
        engine: Engine,
        results: ResultFile,
        progress: Progress,
        options: BatchingOptions | None = None,
    ) -> None:
        self._engine = engine
        self._results = results
        self._progress = progress
        self._options = options or BatchingOptions()
        self._ended: queue.SimpleQueue[tuple[PromptLine, Event]] = queue.SimpleQueue()
        self._pending = 0
        self.failed = self.prompt_tokens = self.new_tokens = 0

    def run(self, lines: Iterable[PromptLine], *, chat: bool, thinking: bool) -> None:
        """Continue all prompts that have no result yet.

        Only so many are read ahead that the engine is never idle; those that the model refuses
        get a line that says why.

        Args:
            lines: of the input.
            chat, thinking: as `PromptLine.encode`.

        Raises:
            OutputError: a result cannot be written.
            EngineClosedError: the batching engine ended early.
        """
        with BatchingEngine(self._engine, self._options) as batching:
            for line in lines:
                if line.id in self._results.finished:
                    continue
                while self._pending >= batching.capacity:
                    self._collect()
                try:
                    ids = line.encode(self._engine, chat=chat, thinking=thinking)
                    batching.submit(ids, line.params, on_event=partial(self._on_event, line))
                    self._pending += 1
                except RingExportError as error:
                    self._write_failure(line, error)
            while self._pending:
                self._collect()

    def _on_event(self, line: PromptLine, event: Event) -> None:
        """Pass the end of a prompt on to the thread that writes."""
        if not isinstance(event, PieceEvent):
            self._ended.put((line, event))

    def _collect(self) -> None:
        """Wait for a prompt to end and write its result."""
        line, event = self._ended.get()
        self._pending -= 1
        if isinstance(event, FinishedEvent):
            self._write_result(line, event.result)
        elif isinstance(event, FailedEvent):
            if isinstance(event.error, EngineClosedError):
                raise event.error
            self._write_failure(line, event.error)

    def _write_result(self, line: PromptLine, result: GenerationResult) -> None:
        self.prompt_tokens += result.prompt_tokens
        self.new_tokens += result.new_tokens
        names = ("text", "stop_reason", "stop_text", "prompt_tokens", "new_tokens")
        values: dict[str, Json] = {name: getattr(result, name) for name in names}
        if result.logprobs is not None:
            values["logprobs"] = [asdict(one) for one in result.logprobs]
        self._write({"id": line.id} | values)

    def _write_failure(self, line: PromptLine, error: RingExportError) -> None:
        self.failed += 1
        self._write({"id": line.id, "error": error.message})

    def _write(self, values: Mapping[str, Json]) -> None:
        self._results.write(values)
        self._progress.advance()
