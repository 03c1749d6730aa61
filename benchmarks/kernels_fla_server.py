"""Time flash-linear-attention at the shapes of a line of JSON on stdin: the process of kernels_fla.

python benchmarks/kernels_fla_server.py serve
python benchmarks/kernels_fla_server.py compile PART PARTS   fills Triton's cache with a part
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from fla.ops import simple_gla  # takes 18 s
from fla.ops.common.chunk_h import chunk_fwd_kernel_h

from benchmarks.gpu_timing import median_us, rotating
from benchmarks.kernels_fla import Shape
from ringexport.model.linear_attention import LinearInputs, chunked
from ringexport.ops.decay import DecayIndex, log_decay

HEADS, DIM, LAYERS = 16, 128, 20
TOLERANCE = 0.05  # of the largest output: it keeps states between chunks in bf16
TUNED_AT: Shape = (1, 32768, 9)


def data(shape: Shape) -> LinearInputs:
    """Return random inputs of Ring-mini's heads."""
    batch, tokens, layer = shape
    query, key, value = torch.randn(3, batch, tokens, HEADS, DIM, device="cuda").bfloat16()
    decay = torch.from_numpy(log_decay(HEADS, layer, LAYERS, DecayIndex.SERVING)).cuda()
    return LinearInputs(
        query=query,
        key=key,
        value=value,
        log_decay=decay,
        past_state=torch.randn(batch, HEADS, DIM, DIM, device="cuda"),
        query_scale=DIM**-0.5,
    )


def step_of(x: LinearInputs) -> Callable[[], Any]:
    """Return FLA's call, as its users make it: recurrent for one token, else chunked."""
    short = x.query.shape[1] == 1
    run = simple_gla.fused_recurrent_simple_gla if short else simple_gla.chunk_simple_gla
    options = {"initial_state": x.past_state, "output_final_state": True}
    return lambda: run(x.query, x.key, x.value, g_gamma=x.log_decay, scale=x.query_scale, **options)


def check(x: LinearInputs, output: torch.Tensor) -> None:
    """Compare the first row with torch's in fp64."""
    truth, _ = chunked(
        LinearInputs(
            query=x.query[:1],
            key=x.key[:1],
            value=x.value[:1],
            log_decay=x.log_decay.double(),
            past_state=x.past_state[:1].double(),
            query_scale=x.query_scale,
        )
    )
    error = ((output[:1].double() - truth).abs().max() / truth.abs().max()).item()
    if not error < TOLERANCE:
        raise AssertionError(f"FLA's result for {list(x.query.shape)} is wrong by {error:.2e}")


def steps_at(shape: Shape) -> list[Callable[[], Any]]:
    """Return checked steps on data that together exceed the L2 cache."""
    batch, tokens, _ = shape
    moved = 8 * batch * HEADS * DIM * (DIM + tokens)
    made = [data(shape) for _ in range(rotating(moved))]
    steps = [step_of(x) for x in made]
    check(made[0], steps[0]()[0])
    return steps


def serve(shapes: list[Shape]) -> None:
    """Print a line [shape, microseconds] for each; the longest prompt is tuned for, before all."""
    if any(tokens > 1 for _, tokens, _ in shapes):
        steps_at(TUNED_AT)
    for shape in shapes:
        steps = steps_at(shape)
        us = median_us(steps, replays=max(1, min(20, 200 // len(steps))))
        print(json.dumps([shape, us]), flush=True)
        del steps
        torch.cuda.empty_cache()


def compile_part(part: int, parts: int) -> None:
    """Compile every `parts`-th variant of the kernel that has many."""
    tuner = chunk_fwd_kernel_h
    while not hasattr(tuner, "configs"):
        tuner = tuner.fn
    tuner.configs = tuner.configs[part::parts]
    for shape in ((1, 1, 0), TUNED_AT):
        steps_at(shape)


if __name__ == "__main__":
    with torch.inference_mode():
        match sys.argv[1:]:
            case ["serve"]:
                serve([tuple(shape) for shape in json.loads(sys.stdin.readline() or "[]")])
            case ["compile", *numbers]:
                compile_part(*map(int, numbers))
            case _:
                sys.exit(__doc__)
