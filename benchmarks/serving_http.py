"""What a token costs the server besides the model: 128 streams of a runner that computes nothing.

    python benchmarks/serving_http.py [--step-ms 8] [--seconds 10] [--clients 128] [--profile]

The stub gives made-up tokens of a vocabulary of full size, one step after each other or at a pace.
"""

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from serving_clients import Work, drive
from serving_vocabulary import VOCAB_SIZE, write_tokenizer

from ringexport import Engine
from ringexport.batching import BatchingEngine, BatchingOptions
from ringexport.runtime.choosing import ChosenTokens, TokenChoice
from ringexport.runtime.runner import BaseRunner, RunnerSpec
from ringexport.runtime.state import BaseState, StateLayout
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.serve import ServeOptions, Server, bind, create_app, url_of

ROWS = 128


class StubState(BaseState):
    """Counts tokens."""

    nbytes = 0
    model_digest = "stub"

    def _read_rows(self, _rows: list[int], _tokens: slice) -> dict[str, Any]:
        return {}

    def _write_rows(self, rows: list[int], snapshot: Any) -> None:
        pass

    def _copy_rows(self, rows: list[int], source: Any, source_rows: list[int]) -> None:
        pass

    def _clear_rows(self, rows: list[int]) -> None:
        pass

    def _fork(self, rows: list[int]) -> Any:
        raise NotImplementedError


class StubRunner(BaseRunner[StubState]):
    """Chooses tokens from a table; a step is over `step_seconds` after the one before it."""

    asynchronous = True

    def __init__(self, step_seconds: float) -> None:
        layout = StateLayout(recurrent={}, kv_cache={})
        spec = RunnerSpec(
            name="stub",
            vocab_size=VOCAB_SIZE,
            context_length=4096,
            layout=layout,
            token_budget=2048,
        )
        super().__init__(spec, str)
        self._step = step_seconds
        self._free = 0.0
        rng = np.random.default_rng(0)
        self._table = rng.integers(0, VOCAB_SIZE, (512, ROWS)).tolist()
        self._turn = 0

    def choose_prefill(
        self, _tokens: Any, lengths: Any, state: Any, choices: Sequence[TokenChoice | None]
    ) -> "StubTokens":
        state.position += np.asarray(lengths)
        return self._tokens(len(choices))

    def choose_decode(self, state: Any, rows: Any, choices: Sequence[TokenChoice]) -> "StubTokens":
        state.position[list(rows)] += 1
        return self._tokens(len(choices))

    def _tokens(self, count: int) -> "StubTokens":
        self._turn = (self._turn + 1) % len(self._table)
        self._free = max(self._free, time.perf_counter()) + self._step
        ids = self._table[self._turn][:count]
        return StubTokens(ChosenTokens(ids=ids, largest=[0.0] * count), self._free)

    def _new_state(self, batch: int) -> StubState:
        return StubState(self, self.spec.layout, batch, context_length=self.spec.context_length)

    def _prefill_chunk(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def _decode(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def _close(self) -> None:
        pass


class StubTokens:
    """Tokens that are there at a certain time."""

    def __init__(self, tokens: ChosenTokens, due: float) -> None:
        self._tokens, self._due = tokens, due

    def result(self) -> ChosenTokens:
        time.sleep(max(0.0, self._due - time.perf_counter()))
        return self._tokens


def serve(step_seconds: float, *, profile: bool) -> None:
    """Serve the stub until SIGTERM."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB_SIZE)
        tokenizer = ModelTokenizer.open(Path(folder), vocab_size=VOCAB_SIZE)
    engine = Engine(StubRunner(step_seconds), tokenizer)
    options = ServeOptions(model_name="stub")
    batching_options = BatchingOptions(max_batch=ROWS, prefix_cache_bytes=0)
    profiler = cProfile.Profile() if profile else None
    with bind("127.0.0.1", 0) as listener, BatchingEngine(engine, batching_options) as batching:
        app = create_app(engine, batching, options)
        server = Server(
            app, batching, options, on_start=lambda: print(url_of(listener), flush=True)
        )
        with profiler or contextlib.nullcontext():
            server.run(sockets=[listener])
    if profiler is not None:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(35)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Return the processor time that a process has used in all, and its event loop alone."""
    return _ticks(Path(f"/proc/{pid}/stat")), _ticks(Path(f"/proc/{pid}/task/{pid}/stat"))


def _ticks(path: Path) -> float:
    fields = path.read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace) -> None:
    """Start a server, drive it, and print what a token costs it."""
    command = [sys.executable, __file__, "--serve", "--step-ms", str(arguments.step_ms)]
    command += ["--profile"] if arguments.profile else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().rpartition("//")[2].partition(":")
        work = Work(arguments.clients, 512, 256, VOCAB_SIZE)
        before = cpu_seconds(process.pid)
        outcome = asyncio.run(drive(host, int(port), work, arguments.seconds))
        after = cpu_seconds(process.pid)
    finally:
        process.terminate()
        process.wait(60)
    whole, loop = (1e3 * (b - a) / outcome.tokens for a, b in zip(before, after, strict=True))
    print(
        f"{arguments.clients} clients, steps of {arguments.step_ms} ms:"
        f" {outcome.rate:,.0f} tokens/s,"
        f" {whole:.4f} ms of processor time a token, {loop:.4f} of them in the event loop,"
        f" {outcome.events / outcome.tokens:.2f} events a token,"
        f" first token {outcome.median_ms:.0f} ms, p99 {outcome.first_token_ms(0.99):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=ROWS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.step_ms / 1e3, profile=arguments.profile)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
