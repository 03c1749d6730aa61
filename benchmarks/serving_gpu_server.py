"""The server of serving_gpu.py: decode steps alone, the engine without HTTP, then HTTP.

Each result is a line of JSON; the last one has the address, at which it serves until SIGTERM.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_setup import gpu, weights_of
from serving_clients import BATCH, LOADS, STEP_CONTEXT, Work
from serving_vocabulary import write_tokenizer

from ringexport import Engine, SamplingParams
from ringexport.batching import BatchingEngine, BatchingOptions, Event, PieceEvent
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.tokenizer import ModelTokenizer
from ringexport.serve import ServeOptions, Server, bind, create_app, url_of

RECIPE = "fp8"
CONTEXT = 2048
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8, "seed": 1},
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    "temperature 0.8, top-k 50": {"temperature": 0.8, "top_k": 50, "seed": 1},
    "temperature 0.8, repetition penalty 1.1": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "seed": 1,
    },
}


@dataclass(frozen=True)
class Alone:
    """What the engine reaches without HTTP.

    Attributes:
        whole: new tokens per second from the first request to the last answer.
        steady: while all rows decode.
        first_ms: median time to the first token when all requests come at once.
    """

    whole: float
    steady: float
    first_ms: float


def open_engine() -> Engine:
    """Return Ring-mini's shape with random weights, and a tokenizer with as many ids."""
    place = gpu()
    weights = weights_of(place, RECIPE)
    config = weights.config
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), config.vocab_size)
        tokenizer = ModelTokenizer.open(Path(folder), vocab_size=config.vocab_size)
    options = CudaOptions(max_batch=BATCH, max_context=CONTEXT)
    runner = CudaRunner(weights, place.library, model_digest=str, options=options)
    return Engine(runner, tokenizer)


def step_seconds(engine: Engine, context: int) -> float:
    """Return what a decode step alone takes: tokens fed and chosen on the GPU, ids to the host."""

    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    state, times = runner.new_state(BATCH), []
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, BATCH)
    for _ in range(6):
        state.position[:] = context
        torch.cuda.synchronize()
        begin = time.perf_counter()
        runner.replay(tokens, state, range(BATCH), steps=32)
        times.append((time.perf_counter() - begin) / 32)
    return statistics.median(times[1:])


def engine_alone(engine: Engine, prompt_tokens: int, new_tokens: int, sampling: Any) -> Alone:
    """Send requests to the batching engine, all at once."""
    arrived: list[list[float]] = [[] for _ in range(BATCH)]

    def watch(times: list[float]) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, PieceEvent):
                times.append(time.perf_counter())

        return on_event

    work = Work(BATCH, prompt_tokens, new_tokens, engine.runner.spec.vocab_size)
    prompts = [json.loads(next(work.bodies(row)))["prompt"] for row in range(BATCH)]
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, **sampling)
    options = BatchingOptions(max_batch=BATCH, prefix_cache_bytes=0)
    with BatchingEngine(engine, options) as batching:
        begin = time.perf_counter()
        tickets = [
            batching.submit(prompt, params, on_event=watch(times))
            for prompt, times in zip(prompts, arrived, strict=True)
        ]
        new = sum(ticket.result().new_tokens for ticket in tickets)
        seconds = time.perf_counter() - begin
    first = statistics.median(times[0] - begin for times in arrived)
    return Alone(new / seconds, steady_rate(arrived), 1e3 * first)


def steady_rate(arrived: list[list[float]]) -> float:
    """Return tokens per second of the steps with all rows, from the times of each row's tokens.

    The last row to begin has a token from every such step; its first one is from its prompt.
    """
    stop = min(times[-1] for times in arrived)
    last = [moment for moment in max(arrived, key=lambda times: times[0])[1:] if moment <= stop]
    return len(arrived) * (len(last) - 1) / (last[-1] - last[0]) if len(last) > 1 else math.nan


def tell(**values: Any) -> None:
    """Send a result to the process that asked for this one."""
    print(json.dumps(values), flush=True)


def serve(*, quick: bool) -> None:
    """Measure without HTTP, then serve until SIGTERM."""
    begin = time.perf_counter()
    engine = open_engine()
    tell(kind="opened", seconds=time.perf_counter() - begin)
    tell(kind="step", seconds=step_seconds(engine, STEP_CONTEXT))
    engine_alone(engine, 16, 8, {})  # captures the graphs of all batch sizes
    for name, sampling in SAMPLED.items():
        if not quick or name == "greedy":
            found = engine_alone(engine, 512, 64, sampling)
            tell(kind="sampling", name=name, **asdict(found))
    for prompt_tokens, new_tokens in LOADS:
        found = engine_alone(engine, prompt_tokens, new_tokens, {})
        tell(kind="engine", load=[prompt_tokens, new_tokens], **asdict(found))
    options = ServeOptions(model_name="ring-mini")
    batching_options = BatchingOptions(max_batch=BATCH, prefix_cache_bytes=0)
    with bind("127.0.0.1", 0) as listener, BatchingEngine(engine, batching_options) as batching:
        app = create_app(engine, batching, options)
        server = Server(
            app, batching, options, on_start=lambda: tell(kind="url", url=url_of(listener))
        )
        server.run(sockets=[listener])


if __name__ == "__main__":
    serve(quick="--quick" in sys.argv)
