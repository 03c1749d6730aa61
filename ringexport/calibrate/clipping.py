"""Where to clip: the magnitude that becomes the largest code, found from a histogram.

There is one clip value per row of a `RangeBank`; scale = clip / half_range. Candidates are the
upper edges of bins, counted in bins, so they scale with the range. Arithmetic is fp64 and
vectorised over rows; a row that observed nothing, or zeros only, gets 0. Bins are represented by
their centres, which moves a result by half a bin, 1/2048 of the largest magnitude, at most.
"""

from enum import StrEnum

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ringexport.calibrate.observers import NUM_BINS, RangeBank
from ringexport.errors import ConfigError
from ringexport.ops.quantization import NumberFormat

__all__ = ["ClipFinder", "ClipMethod", "round_trip"]

_FIRST_EDGE = 128  # as many bins as INT8 has magnitudes, as in TensorRT's calibrator
_EDGE_STEP = 16
_OCTAVES = 5
_PER_OCTAVE = 32
_INT8_CODES = 128
_ROWS_AT_ONCE = 32


class ClipMethod(StrEnum):
    """How the clip value is chosen.

    ABSMAX: the largest magnitude; nothing is clipped.
    PERCENTILE: the magnitude that the given share of all elements does not exceed.
    MSE: the least squared error of quantized elements, clipped ones included.
    ENTROPY: the least Kullback-Leibler divergence between the distribution of the magnitudes and
        that of the quantized ones, as in TensorRT's entropy calibrator.
    """

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


class ClipFinder:
    """Finds clip values; holds the tables that all histograms share.

    Args:
        percentile: percent of all elements, over 0 to 100, for that method.
        device: of the banks.

    Raises:
        ConfigError: a percentile out of range.
    """

    def __init__(self, *, percentile: float, device: torch.device | str = "cpu") -> None:
        if not 0.0 < percentile <= 100.0:
            raise ConfigError(f"percentile is {percentile}, expected more than 0 and at most 100")
        self._share = percentile / 100.0
        # Descending, so that argmin takes the widest of equals.
        edges = torch.arange(NUM_BINS, _FIRST_EDGE - 1, -_EDGE_STEP, device=device)
        centres = torch.arange(NUM_BINS, device=device, dtype=torch.float64) + 0.5
        self._edges = edges
        # FP8 codes repeat with every octave and are not equidistant within: where the octave
        # begins matters, and a clip value above the largest magnitude can be the best.
        steps = torch.arange(_OCTAVES * _PER_OCTAVE, -1, -1, device=device, dtype=torch.float64)
        octaves = 2 * NUM_BINS * torch.exp2(steps / _PER_OCTAVE - _OCTAVES)
        self._clips = {NumberFormat.INT8: edges.double(), NumberFormat.FP8_E4M3: octaves}
        self._errors: dict[NumberFormat, Tensor] = {}
        self._borders: dict[NumberFormat, Tensor] = {}
        for codes, clips in self._clips.items():
            rounded = round_trip(centres, clips[:, None], codes)
            self._errors[codes] = (rounded - centres).square().T.contiguous()
            self._borders[codes] = _code_borders(edges, codes)

    def find(self, bank: RangeBank, method: ClipMethod, codes: NumberFormat) -> Tensor:
        """Return the clip value of every row, fp32 [rows].

        Args:
            bank: what was observed.
            method: how to choose.
            codes: format of the quantized values; absmax and percentile do not depend on it.
        """
        if method is ClipMethod.ABSMAX:
            return bank.absmax
        absmax = bank.absmax.double()
        width = torch.ldexp(torch.ones_like(absmax), bank.exponent.int()) / NUM_BINS
        if method is ClipMethod.PERCENTILE:
            clip = _percentile_edge(bank.counts, self._share) * width
        elif method is ClipMethod.MSE:
            clips = self._clips[codes] * width[:, None]
            errors = bank.counts.double() @ self._errors[codes]
            # Beyond twice the largest magnitude FP8 codes only repeat, up to the subnormal ones.
            errors = errors.masked_fill(clips >= 2 * absmax[:, None], torch.inf)
            clip = clips.gather(1, errors.argmin(1, keepdim=True))[:, 0]
        else:
            starts = range(0, bank.rows, _ROWS_AT_ONCE)
            parts = [bank.counts[start : start + _ROWS_AT_ONCE] for start in starts]
            found = [_least_divergence(part, self._edges, self._borders[codes]) for part in parts]
            clip = torch.cat(found) * width
        if codes is NumberFormat.INT8 or method is not ClipMethod.MSE:
            clip = torch.minimum(clip, absmax)
        return torch.where(absmax > 0, clip, 0.0).float()


def round_trip(magnitudes: Tensor, clip: Tensor, number_format: NumberFormat) -> Tensor:
    """Return fp64 `magnitudes` >= 0 quantized with scale clip / half_range, and back.

    The two broadcast. Rounding is to nearest even and saturating, as `ringexport.quantize` does.
    """
    scale = clip / number_format.half_range
    scaled = magnitudes / scale
    if number_format is NumberFormat.INT8:
        return scaled.round().clamp(max=127.0) * scale
    _, exponent = torch.frexp(scaled.clamp(min=2.0**-6))
    step = torch.ldexp(torch.ones_like(scaled), exponent - 4)
    return ((scaled / step).round() * step).clamp(max=448.0) * scale


def _percentile_edge(counts: Tensor, share: float) -> Tensor:
    """Return where the cumulative count reaches `share`, interpolated within its bin."""
    cumulative = counts.cumsum(1)
    wanted = cumulative[:, -1:].double() * share
    index = torch.searchsorted(cumulative.double(), wanted).clamp(max=NUM_BINS - 1)
    inside = counts.gather(1, index).double()
    below = cumulative.gather(1, index).double() - inside
    return (index + ((wanted - below) / inside.clamp(min=1.0)).clamp(0.0, 1.0))[:, 0]


def _least_divergence(counts: Tensor, edges: Tensor, borders: Tensor) -> Tensor:
    """Return the candidate of `edges` with the least KL(p | q), fp64 [rows].

    For a candidate of n bins, p is the histogram with everything beyond added to bin n - 1, and q
    the histogram cut at n whose bins that share a code are averaged, empty ones left out. The
    count of bin 0 is replaced by that of bin 1, because zeros are exact at any scale. All of this
    is TensorRT's definition. Averages are constant within a code, so the sum over bins of p log q
    is one over codes, and cumulative sums give those of all candidates at once.
    """
    counts = torch.cat((counts[:, 1:2], counts[:, 1:]), dim=1).double()
    mass = _between(counts, borders)  # [rows, candidates, codes]
    filled = _between((counts > 0).double(), borders)
    kept = mass.sum(-1)
    total = counts.sum(1, keepdim=True)
    beyond = total - kept
    last = counts[:, edges - 1]
    below = _cumulative(counts * counts.clamp(min=1.0).log())[:, edges - 1]
    entropy = below + _x_log_x(last + beyond)
    average = mass / filled.clamp(min=1.0)
    reference = torch.cat((mass[..., :-1], mass[..., -1:] + beyond[..., None]), dim=-1)
    likelihood = (reference * (average / kept[..., None]).clamp(min=1e-300).log()).sum(-1)
    divergence = entropy - likelihood - total * total.log()
    # Mass beyond the edge with an empty bin below it: q is 0 where p is not.
    impossible = (kept == 0) | ((last == 0) & (beyond > 0))
    divergence = (divergence / total).masked_fill(impossible, torch.inf).nan_to_num(nan=torch.inf)
    return edges[divergence.argmin(1)].double()


def _code_borders(edges: Tensor, number_format: NumberFormat) -> Tensor:
    """Return where the bins of each code start, int64 [candidates, codes + 1]."""
    wide = edges[:, None]
    if number_format is NumberFormat.INT8:
        codes = torch.arange(_INT8_CODES + 1, device=edges.device)
        return (codes * wide + _INT8_CODES - 1) // _INT8_CODES
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    middles = torch.from_numpy((values[:-1] + values[1:]) / (2 * values[-1])).to(edges.device)
    inner = (middles * wide - 0.5).floor().to(torch.int64) + 1
    return torch.cat((torch.zeros_like(wide), inner.clamp(min=0), wide), dim=1)


def _between(counts: Tensor, borders: Tensor) -> Tensor:
    """Return sums of counts [R, bins] from each border to the next, [R, candidates, codes]."""
    sums = _cumulative(counts)[:, borders.flatten()].view(len(counts), *borders.shape)
    return sums.diff(dim=-1)


def _cumulative(counts: Tensor) -> Tensor:
    """Return sums of the bins below each edge, [R, bins + 1]."""
    return torch.nn.functional.pad(counts.cumsum(1), (1, 0))


def _x_log_x(values: Tensor) -> Tensor:
    return values * values.clamp(min=1e-300).log()
