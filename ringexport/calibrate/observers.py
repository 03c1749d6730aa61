"""Accumulators of magnitudes: exact integers and maxima, so that merging in any order is the same.

A bank observes many tensors of one kind at once, one row each: the experts of a layer, or a single
row for everything else. No Python runs per expert.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ringexport.errors import ShapeError
from ringexport.ops.quantization import Granularity, GranularityKind

__all__ = ["NUM_BINS", "AbsMax", "ChannelAbsMax", "HistogramBank", "Segments"]

NUM_BINS = 2048
_LOG_BINS = NUM_BINS.bit_length() - 1
_MIN_EXPONENT = -100  # ranges below 2**-100 are 0 for every purpose, and 2**-x stays normal
_MAX_EXPONENT = 127
_CHUNK_ELEMENTS = 1 << 22


class HistogramBank:
    """Histograms of magnitudes, one per row, whose ranges grow by powers of two.

    Row r counts |x| in `NUM_BINS` bins of equal width over [0, 2 ** exponent[r]), where the range
    is the smallest power of two above the largest magnitude seen. Bin edges of a wider range are
    edges of every narrower one, so widening adds neighbouring counts and loses nothing: counts
    depend on the values observed, not on their order or on how they came in batches.

    Attributes:
        counts: int64 [rows, NUM_BINS].
        exponent: int64 [rows].
        absmax: fp32 [rows]; NaN or infinity once either was observed.
    """

    def __init__(self, rows: int, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(rows, NUM_BINS, dtype=torch.int64, device=device)
        self.exponent = torch.full((rows,), _MIN_EXPONENT, dtype=torch.int64, device=device)
        self.absmax = torch.zeros(rows, dtype=torch.float32, device=device)

    @property
    def rows(self) -> int:
        """Number of histograms."""
        return self.counts.shape[0]

    def observe(self, values: Tensor, segments: "Segments | None" = None) -> None:
        """Count the elements of `values` [N, C], any float dtype.

        Args:
            values: one token per row.
            segments: which tokens belong to which histogram; None: all to row 0.
        """
        if values.numel() == 0:
            return
        parts = Segments.whole(values) if segments is None else segments
        token_absmax = values.abs().amax(1, keepdim=True).float()
        _raise_rows(self.absmax, parts.rows, parts.amax(token_absmax)[:, 0])
        self._widen(exponent_above(self.absmax))
        factor = power_of_two(_LOG_BINS - self.exponent)
        token_rows = parts.token_rows().to(torch.int32)
        tokens = max(1, _CHUNK_ELEMENTS // values.shape[1])
        for start in range(0, len(values), tokens):
            rows = token_rows[start : start + tokens, None]
            # Multiplying by a power of two is exact, so every value falls into the same bin
            # whatever else was observed before.
            scaled = values[start : start + tokens].abs().float() * factor[rows]
            bins = scaled.to(torch.int32).clamp_(0, NUM_BINS - 1) + (rows * NUM_BINS)
            found = torch.bincount(bins.flatten(), minlength=self.counts.numel())
            self.counts += found.view_as(self.counts)

    def merge(self, other: "HistogramBank") -> None:
        """Add what `other`, which is left alone, has observed.

        Raises:
            ShapeError: another number of rows.
        """
        if other.rows != self.rows:
            raise ShapeError(f"a bank of {other.rows} histograms, expected {self.rows}")
        exponent = torch.maximum(self.exponent, other.exponent)
        self._widen(exponent)
        self.counts += _widened(other.counts, exponent - other.exponent)
        self.absmax = torch.maximum(self.absmax, other.absmax)

    def total(self) -> "HistogramBank":
        """Return a bank of one row that has observed what all rows have."""
        result = HistogramBank(1, device=self.counts.device)
        result.absmax = self.absmax.amax(0, keepdim=True)
        result.exponent = self.exponent.amax(0, keepdim=True)
        widened = _widened(self.counts, result.exponent - self.exponent)
        result.counts = widened.sum(0, keepdim=True)
        return result

    def _widen(self, exponent: Tensor) -> None:
        """Grow the ranges to `exponent` [rows], which is nowhere below the present one."""
        self.counts = _widened(self.counts, exponent - self.exponent)
        self.exponent = exponent


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive tokens that belong to one row of a bank.

    Attributes:
        rows: int64 [S], the row of each segment, each row at most once.
        lengths: int64 [S], tokens of each segment; their sum is N.
    """

    rows: Tensor
    lengths: Tensor

    @classmethod
    def whole(cls, values: Tensor) -> Self:
        """Return one segment for row 0 that covers all of `values` [N, C]."""
        zero = torch.zeros(1, dtype=torch.int64, device=values.device)
        return cls(zero, zero + len(values))

    def amax(self, values: Tensor) -> Tensor:
        """Return the maximum of each segment, [S, C] of values [N, C] that are all >= 0."""
        if len(self.rows) == 1:
            return values.amax(0, keepdim=True)
        return torch.segment_reduce(values, "max", lengths=self.lengths, axis=0, initial=0.0)

    def token_rows(self) -> Tensor:
        """Return the row of every token, int64 [N]."""
        return self.rows.repeat_interleave(self.lengths)


class ChannelAbsMax:
    """Largest magnitude per channel, for each row of a bank: `absmax` fp32 [rows, C]."""

    def __init__(self, rows: int, channels: int, *, device: torch.device | str = "cpu") -> None:
        self.absmax = torch.zeros(rows, channels, dtype=torch.float32, device=device)

    def observe(self, values: Tensor, segments: Segments | None = None) -> None:
        """Take in `values` [N, C], as `HistogramBank.observe` does."""
        if values.numel() == 0:
            return
        parts = Segments.whole(values) if segments is None else segments
        found = parts.amax(values.abs().float())
        _raise_rows(self.absmax, parts.rows, found)

    def merge(self, other: "ChannelAbsMax") -> None:
        """Take in what `other` has observed."""
        self.absmax = torch.maximum(self.absmax, other.absmax)


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


def _raise_rows(absmax: Tensor, rows: Tensor, found: Tensor) -> None:
    """Raise `absmax[rows]` to `found` in place; no row is named twice."""
    absmax[rows] = torch.maximum(absmax[rows], found)


def _widened(counts: Tensor, steps: Tensor) -> Tensor:
    """Add up 2 ** steps neighbouring bins of each row; counts [R, bins], steps [R] >= 0."""
    target = torch.arange(NUM_BINS, device=counts.device) >> steps.clamp(max=_LOG_BINS)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
