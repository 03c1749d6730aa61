"""Time linear attention at Ring-mini's shape beside FLA, as parts of the copy rate and of FLA.

    python benchmarks/kernels_linear_attention.py

Every result is compared with torch in fp64 before it is timed.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import median_us, rotating
from ringexport.kernels.library import DType, KernelCall, KernelLibrary
from ringexport.model.linear_attention import LinearInputs, chunked, fla
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.settings import load_settings

HEADS, DIM, LAYERS = 16, 128, 20
WIDTH = HEADS * DIM
COPY_TBPS = 4.28  # measured on the H200
DECODE_BATCHES = (1, 8, 64, 256)
PREFILLS = ((1, 256), (1, 1024), (1, 4096), (1, 32768), (8, 4096), (32, 512))
LAYERS_TIMED = (0, 9, 18)  # heads forget fast, moderately, slowly
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


def fla_steps(problem: Problem) -> Callable[[], None]:
    """Return a step of FLA's kernel on the same data."""
    inputs = LinearInputs(
        query=problem.inputs.query.contiguous(),
        key=problem.inputs.key.contiguous(),
        value=problem.inputs.value.contiguous(),
        log_decay=problem.inputs.log_decay,
        past_state=problem.state,
        query_scale=problem.inputs.query_scale,
    )
    return lambda: (fla(inputs), None)[1]


def timed(library: KernelLibrary, batch: int, tokens: int, layer: int) -> dict[str, Any]:
    """Check and time one shape; bytes are those that must move at least once."""
    state_bytes = 2 * 4 * batch * WIDTH * DIM
    moved = state_bytes + 4 * 2 * batch * tokens * WIDTH
    copies = rotating(moved)
    problems = [Problem(library, batch, tokens, layer) for _ in range(copies)]
    problems[0].check()
    replays = max(1, min(20, 200 // copies))
    mine = median_us([problem.launch for problem in problems], replays=replays)
    try:
        other = median_us([fla_steps(problem) for problem in problems], replays=replays)
    except ImportError:
        other = float("nan")
    rate = moved / mine * 1e-6
    return {
        "op": problems[0].op,
        "shape": f"B={batch} T={tokens} layer {layer}",
        "us": mine,
        "bytes": moved,
        "TB/s": rate,
        "of copy rate": rate / COPY_TBPS,
        "FLA us": other,
        "speedup": other / mine,
    }


@functools.cache
def _library() -> KernelLibrary:
    path = load_settings().kernel_library
    if path is None:
        raise SystemExit("set RINGEXPORT_KERNEL_LIBRARY to the built kernel library")
    return KernelLibrary.open(path)


def rows() -> list[dict[str, Any]]:
    """Measure and print all shapes."""
    shapes = [(batch, 1, 0) for batch in DECODE_BATCHES]
    shapes += [(batch, tokens, 9) for batch, tokens in PREFILLS]
    shapes += [
        (1, tokens, layer) for tokens in (4096, 32768) for layer in LAYERS_TIMED if layer != 9
    ]
    table = []
    for batch, tokens, layer in shapes:
        table.append(row := timed(_library(), batch, tokens, layer))
        values = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        print(" | ".join(values), flush=True)
    return table


if __name__ == "__main__":
    rows()
