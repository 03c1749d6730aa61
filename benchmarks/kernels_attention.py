"""Decode attention of one softmax layer of Ring-mini beside torch: fraction of the read rate."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import median_us, print_rows, rotating
from tests.kernels.support import DTYPES, library, workspace

READ_RATE = 4.59e12
"""Bytes per second of a pure read of the H200, measured."""
KV_HEADS, GROUP, WIDTH = 4, 4, 128
SHAPES = ((1, 4096), (1, 32768), (1, 131072), (8, 4096), (64, 4096), (256, 1024), (64, 16384))


class Layer:
    """One launch on its own data."""

    def __init__(self, batch: int, context: int, cache: torch.dtype) -> None:
        shape = (batch, KV_HEADS, context, WIDTH)
        self.caches = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache) for _ in range(2)
        ]
        self.fused = torch.randn(batch, (GROUP + 2) * KV_HEADS * WIDTH, device="cuda").bfloat16()
        heads = self.fused.view(batch, -1, WIDTH)
        self.query, key, value = heads.split((GROUP * KV_HEADS, KV_HEADS, KV_HEADS), dim=1)
        self.output = torch.empty(
            batch, GROUP * KV_HEADS * WIDTH, device="cuda", dtype=torch.bfloat16
        )
        self.position = torch.full((batch,), context - 1, device="cuda", dtype=torch.int32)
        fields = {
            "query": self.query, "key": key, "value": value,
            "key_cache": self.caches[0], "value_cache": self.caches[1],
            "position": self.position, "output": self.output,
            "key_scale": torch.ones(1, device="cuda"), "value_scale": torch.ones(1, device="cuda"),
            "query_norm": torch.ones(WIDTH, device="cuda"),
            "key_norm": torch.ones(WIDTH, device="cuda"),
            "rotary_cos": torch.ones(context, 32, device="cuda"),
            "rotary_sin": torch.zeros(context, 32, device="cuda"),
            "row_stride": self.fused.stride(0), "output_row_stride": self.output.stride(0),
            "capacity": context, "max_context": context, "batch": batch,
            "num_heads": GROUP * KV_HEADS,
            "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "rotary_dim": 64,
            "softmax_scale": WIDTH**-0.5,
            "norm_eps": 1e-6, "dtype": DTYPES[torch.bfloat16], "cache_dtype": DTYPES[cache],
            "programmatic_launch": 1,
        }  # fmt: skip
        fields |= workspace("attention_decode", **fields)
        self.call = library().call("attention_decode", **fields)

    def launch(self) -> None:
        self.call.launch(torch.cuda.current_stream().cuda_stream)

    def reference(self) -> torch.Tensor:
        """Attend with torch, the new token already in the cache, norms and rotation left out."""
        batch = len(self.query)
        query = self.query.reshape(batch, KV_HEADS, GROUP, WIDTH)
        keys, values = (cache.to(torch.bfloat16) for cache in self.caches)
        return F.scaled_dot_product_attention(query, keys, values)

    def check(self) -> None:
        """Compare with torch (norm done there, no rotation as the tables are trivial)."""
        self.launch()
        torch.cuda.synchronize()
        query = self.query.float()
        query = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6)
        query = query.reshape(len(query), KV_HEADS, GROUP, WIDTH)
        row = len(query) - 1
        keys, values = (cache[row].float() for cache in self.caches)
        wanted = F.scaled_dot_product_attention(query[row, None].float(), keys[None], values[None])
        got = self.output[row].float()
        error = (got - wanted.flatten()).abs().max().item() / wanted.abs().max().item()
        if not error < 0.02:
            raise AssertionError(f"relative error {error}")


def rows(shapes: Iterable[tuple[int, int]] = SHAPES) -> Iterator[dict[str, object]]:
    """Measure (rows, context) with both caches."""
    for cache, name in ((torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "FP8")):
        for batch, context in shapes:
            nbytes = 2 * batch * KV_HEADS * context * WIDTH * cache.itemsize
            layers = [Layer(batch, context, cache) for _ in range(rotating(nbytes))]
            layers[0].check()
            us = median_us([layer.launch for layer in layers], replays=5)
            rate = nbytes / us * 1e6
            row = {
                "op": f"decode attention, {name} cache",
                "shape": f"B = {batch}, {context:,} tokens",
                "us": us,
                "bytes": nbytes,
                "TB/s": rate / 1e12,
                "fraction": rate / READ_RATE,
            }
            if cache == torch.bfloat16:
                row["reference us"] = median_us([layer.reference for layer in layers], replays=2)
            yield row
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    print_rows(rows())
