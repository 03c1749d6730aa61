"""Time linear attention at Ring-mini's shape beside FLA, as parts of the copy rate and of FLA.

    python benchmarks/kernels_linear_attention.py

Every result is compared with torch in fp64 before it is timed.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import median_us, print_rows, rotating
from benchmarks.kernels_fla import Reference, Shape
from ringexport.kernels.library import DType, KernelCall, KernelLibrary
from ringexport.model.linear_attention import LinearInputs, chunked
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.settings import load_settings

HEADS, DIM, LAYERS = 16, 128, 20
WIDTH = HEADS * DIM
COPY_TBPS = 4.28  # measured on the H200
# Rows, tokens, layer: heads of layer 0 forget fast, of 9 moderately, of 18 slowly.
DECODES: tuple[Shape, ...] = ((1, 1, 0), (8, 1, 0), (64, 1, 0), (256, 1, 0))
PREFILLS: tuple[Shape, ...] = (
    (1, 256, 9), (1, 1024, 9), (1, 4096, 0), (1, 4096, 9), (1, 4096, 18), (8, 4096, 9),
    (32, 512, 9), (1, 32768, 0), (1, 32768, 9), (1, 32768, 18),
)  # fmt: skip
FLA_SECONDS = 60.0
TOLERANCE = 0.02  # of the largest output: two bf16 roundings


def decays(layer: int) -> Tensor:
    """Return log_decay [H] of a layer on the GPU."""
    return torch.from_numpy(log_decay(HEADS, layer, LAYERS, DecayIndex.SERVING)).cuda()


class Problem:
    """One op at one shape on fresh data, for our kernel and for FLA."""

    def __init__(self, library: KernelLibrary, batch: int, tokens: int, layer: int) -> None:
        """Make data for `batch` rows of `tokens` tokens."""
        self.op = "linear_attention_decode" if tokens == 1 else "linear_attention_prefill"
        qkv = torch.randn(batch * tokens, 3, HEADS, DIM, device="cuda").bfloat16()
        self.state = torch.randn(batch, HEADS, DIM, DIM, device="cuda")
        self.output = torch.empty(batch * tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        query, key, value = qkv.view(batch, tokens, 3, HEADS, DIM).unbind(2)
        self.inputs = LinearInputs(
            query=query,
            key=key,
            value=value,
            log_decay=decays(layer),
            past_state=self.state,
            query_scale=DIM**-0.5,
        )
        self.call = self._call(library, batch, tokens)

    def _call(self, library: KernelLibrary, batch: int, tokens: int) -> KernelCall:
        inputs = self.inputs
        fields: dict[str, Any] = {
            "query": inputs.query,
            "key": inputs.key,
            "value": inputs.value,
            "log_decay": inputs.log_decay,
            "state": self.state,
            "output": self.output,
            "row_stride": 3 * WIDTH,
            "output_row_stride": WIDTH,
            "batch": batch,
            "num_heads": HEADS,
            "head_dim": DIM,
            "query_scale": inputs.query_scale,
            "dtype": DType.BFLOAT16,
            "programmatic_launch": 1,  # as an engine launches it
        }
        if tokens > 1:
            lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
            fields |= {"lengths": lengths, "max_length": tokens}
            size = library.workspace_bytes(self.op, **fields)
            room = torch.empty(max(size, 16), dtype=torch.uint8, device="cuda")
            fields |= {"workspace": room, "workspace_bytes": size}
        return library.call(self.op, **fields)

    def launch(self) -> None:
        """Start our kernel on the current stream."""
        self.call.launch(torch.cuda.current_stream().cuda_stream)

    def check(self) -> None:
        """Compare our result with torch's in fp64; stop if it is wrong."""
        past = self.state.clone()
        self.launch()
        for row in range(0, past.shape[0], 17):
            inputs = LinearInputs(
                query=self.inputs.query[row : row + 1],
                key=self.inputs.key[row : row + 1],
                value=self.inputs.value[row : row + 1],
                log_decay=self.inputs.log_decay.double(),
                past_state=past[row : row + 1].double(),
                query_scale=self.inputs.query_scale,
            )
            truth, state = chunked(inputs)
            got = self.output.view(past.shape[0], -1, WIDTH)[row].double()
            for name, mine, true in (
                ("output", got, truth[0].flatten(1)),
                ("state", self.state[row].double(), state[0]),
            ):
                error = ((mine - true).abs().max() / true.abs().max()).item()
                if not error < TOLERANCE:
                    raise SystemExit(f"{self.op}: wrong {name}, relative error {error:.2e}")


def timed(library: KernelLibrary, shape: Shape) -> dict[str, Any]:
    """Check and time one shape; bytes are those that must move at least once."""
    batch, tokens, layer = shape
    state_bytes = 2 * 4 * batch * WIDTH * DIM
    moved = state_bytes + 4 * 2 * batch * tokens * WIDTH
    copies = rotating(moved)
    problems = [Problem(library, batch, tokens, layer) for _ in range(copies)]
    problems[0].check()
    us = median_us([problem.launch for problem in problems], replays=max(1, min(20, 200 // copies)))
    rate = moved / us * 1e-6
    return {
        "op": "linear attention " + ("decode, fp32 state" if tokens == 1 else "prefill, bf16"),
        "shape": f"B = {batch}" if tokens == 1 else f"{batch} x {tokens:,}, layer {layer}",
        "us": us,
        "bytes": moved,
        "TB/s": rate,
        "fraction": rate / COPY_TBPS,
    }


@functools.cache
def _library() -> KernelLibrary:
    path = load_settings().kernel_library
    if path is None:
        raise SystemExit("set RINGEXPORT_KERNEL_LIBRARY to the built kernel library")
    return KernelLibrary.open(path)


def rows(
    shapes: Iterable[Shape] = (*DECODES, *PREFILLS),
    reference: Reference | None = None,
    fla_seconds: float = FLA_SECONDS,
) -> list[dict[str, Any]]:
    """Measure all shapes, then FLA at the same ones.

    Args:
        shapes: rows, tokens and layer.
        reference: FLA's process if it was started before; None starts one.
        fla_seconds: how long FLA may take, its tuning included; without it rows have no
            `reference us`.
    """
    theirs = reference or Reference()
    try:
        found = {shape: timed(_library(), shape) for shape in shapes}
        torch.cuda.empty_cache()
        for shape, us in theirs.times(found, fla_seconds).items():
            found[shape] |= {"reference us": us, "speedup": us / found[shape]["us"]}
    finally:
        theirs.close()
    return list(found.values())


if __name__ == "__main__":
    print_rows(rows())
