"""Accumulators of magnitudes: exact integers and maxima, so that merging in any order is the same.

A bank observes many tensors of one kind, one row each: the experts of a layer, or a single row for
everything else.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.ops.quantization import Granularity, GranularityKind

__all__ = ["NUM_BINS", "AbsMax", "RangeBank", "exponent_above", "power_of_two"]

NUM_BINS = 2048
_LOG_BINS = NUM_BINS.bit_length() - 1
_MIN_EXPONENT = -100  # ranges below 2**-100 are 0 for every purpose, and 2**-x stays normal
_MAX_EXPONENT = 128
_CPU_CHUNK = 1 << 17  # temporary arrays stay in the cache
_GPU_CHUNK = 1 << 24


class RangeBank:
    """Largest magnitudes and histograms of magnitudes, one per row, that grow by powers of two.

    Row r counts |x| in `NUM_BINS` bins of equal width over [0, 2 ** exponent[r]), where the range
    is the smallest power of two above the largest magnitude seen. Bin edges of a wider range are
    edges of every narrower one, so widening adds neighbouring counts and loses nothing: counts
    depend on the values observed, not on their order or on how they came in batches.

    Attributes:
        counts: int64 [rows, NUM_BINS].
        exponent: int64 [rows].
        channel_absmax: fp32 [rows, C]; NaN or infinity once either was observed.
    """

    def __init__(self, rows: int, channels: int, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(rows, NUM_BINS, dtype=torch.int64, device=device)
        self.exponent = torch.full((rows,), _MIN_EXPONENT, dtype=torch.int64, device=device)
        self.channel_absmax = torch.zeros(rows, channels, dtype=torch.float32, device=device)

    @property
    def rows(self) -> int:
        """Number of histograms."""
        return self.counts.shape[0]

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each row, fp32 [rows]."""
        return self.channel_absmax.amax(1)

    def observe(self, parts: Iterable[tuple[int, Tensor]], *, count: bool = True) -> None:
        """Take in the elements of tokens.

        Args:
            parts: row, and values [N, C] of it, bf16, fp32 or fp64; N may be 0.
            count: also in the histograms; they stay empty otherwise.
        """
        found = [(row, values) for row, values in parts if len(values)]
        for row, values in found:
            largest = self.channel_absmax[row]
            torch.maximum(largest, values.abs().amax(0).float(), out=largest)
        absmax = self.absmax
        if not count or not bool(absmax.isfinite().all()):
            return
        self._widen(exponent_above(absmax))
        factors = power_of_two(_LOG_BINS - self.exponent).tolist()
        size = _CPU_CHUNK if self.counts.device.type == "cpu" else _GPU_CHUNK
        for row, values in found:
            # Multiplying by a power of two is exact in every dtype, so a value falls into the
            # same bin whatever else was observed before.
            for chunk in torch.split(values.reshape(-1), size):
                bins = chunk.abs().mul_(factors[row]).to(torch.int32)
                self.counts[row] += bins.bincount(minlength=NUM_BINS)

    def merge(self, other: "RangeBank") -> None:
        """Add what `other`, which is left alone, has observed.

        Raises:
            ShapeError: another number of rows or channels.
        """
        theirs, ours = tuple(other.channel_absmax.shape), tuple(self.channel_absmax.shape)
        if theirs != ours:
            raise ShapeError(f"a bank of {list(theirs)} rows and channels, expected {list(ours)}")
        exponent = torch.maximum(self.exponent, other.exponent)
        self._widen(exponent)
        self.counts += _widened(other.counts, exponent - other.exponent)
        self.channel_absmax = torch.maximum(self.channel_absmax, other.channel_absmax)

    def total(self) -> "RangeBank":
        """Return a bank of one row that has observed what all rows have."""
        result = RangeBank(1, self.channel_absmax.shape[1], device=self.counts.device)
        result.channel_absmax = self.channel_absmax.amax(0, keepdim=True)
        result.exponent = self.exponent.amax(0, keepdim=True)
        widened = _widened(self.counts, result.exponent - self.exponent)
        result.counts = widened.sum(0, keepdim=True)
        return result

    def _widen(self, exponent: Tensor) -> None:
        """Grow the ranges to `exponent` [rows], which is nowhere below the present one."""
        if not torch.equal(exponent, self.exponent):
            self.counts = _widened(self.counts, exponent - self.exponent)
            self.exponent = exponent


class AbsMax:
    """Largest magnitude at any granularity of activations [tokens, channels].

    Attributes:
        granularity: tensor; channel: one column each; token: one row each; group(n): n
            neighbouring columns of one token; block(r, c): r tokens by c columns, where blocks
            start anew with every call.
    """

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._found: list[Tensor] = []

    def observe(self, values: Tensor) -> None:
        """Take in `values` [N, C], any float dtype; no tokens are nothing to observe."""
        if values.numel():
            self._found.append(self._reduce(values.abs().float()))
            self._fold()

    def merge(self, other: "AbsMax") -> None:
        """Take in what `other` has observed, after what this one has."""
        theirs = other.result()
        if theirs.numel():
            self._found.append(theirs)
            self._fold()

    def result(self) -> Tensor:
        """Return fp32: tensor [1, 1]; channel [1, C]; token [N, 1]; others [rows, groups]."""
        return torch.cat(self._found) if self._found else torch.zeros(0, 0)

    def _fold(self) -> None:
        """Keep one maximum where all tokens share it; list them where tokens have their own."""
        if self.granularity.kind in {GranularityKind.TENSOR, GranularityKind.CHANNEL}:
            self._found = [torch.cat(self._found).amax(0, keepdim=True)] if self._found else []

    def _reduce(self, magnitudes: Tensor) -> Tensor:
        kind = self.granularity.kind
        if kind is GranularityKind.TENSOR:
            return magnitudes.amax().view(1, 1)
        if kind is GranularityKind.CHANNEL:
            return magnitudes.amax(0, keepdim=True)
        rows, columns = self.granularity.tile(tuple(magnitudes.shape))
        padding = (0, -magnitudes.shape[1] % columns, 0, -magnitudes.shape[0] % rows)
        padded = torch.nn.functional.pad(magnitudes, padding)
        tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        return tiles.amax((1, 3))


def exponent_above(absmax: Tensor) -> Tensor:
    """Return the smallest e with absmax < 2 ** e, int64, within what the bins can express."""
    exponent = torch.frexp(absmax.nan_to_num()).exponent.to(torch.int64)
    exponent = exponent.masked_fill(absmax == 0, _MIN_EXPONENT)
    return exponent.clamp(_MIN_EXPONENT, _MAX_EXPONENT)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 ** exponent in fp32, exact; exponent int64, -126..127."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _widened(counts: Tensor, steps: Tensor) -> Tensor:
    """Add up 2 ** steps neighbouring bins of each row; counts [R, bins], steps [R] >= 0."""
    target = torch.arange(NUM_BINS, device=counts.device) >> steps.clamp(max=_LOG_BINS)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
