"""See the input of every matrix product of a layer while the reference model runs it.

The model knows nothing of this: inside `InputTaps` every call of `F.linear` is looked up by the
address of its weight. A product that the model computes in another way is therefore not seen, and
its module has no stats: `ringexport.calibrate.coverage` turns that into an error.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringexport.calibrate.observers import ChannelAbsMax, HistogramBank, Segments
from ringexport.errors import CalibrationError

__all__ = ["InputTaps", "Site", "SiteObserver", "layer_sites"]

_WEIGHT = ".weight"
_ROUTER = "mlp.gate"
_EXPERTS = "mlp.experts."
_FUSED = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_FLUSH_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place whose input is observed.

    Attributes:
        name: of its first module without layer and expert, such as "mlp.experts.gate_proj".
        key: of its weight in the model's layer.
        modules: per row the modules that read it, by their names in the checkpoint.
    """

    name: str
    key: str
    modules: tuple[tuple[str, ...], ...]

    @property
    def rows(self) -> int:
        """Number of experts, 1 for everything that is not routed."""
        return len(self.modules)


def layer_sites(prefix: str, weights: Mapping[str, Tensor]) -> tuple[Site, ...]:
    """Return the sites of one layer, the router's input included.

    Args:
        prefix: "model.layers.{i}.", before the names of its modules.
        weights: of the layer as the reference model holds them: MLPs are stacked and fused.
    """
    sites = []
    for key, weight in weights.items():
        if key.endswith(_WEIGHT) and weight.ndim == 2:
            name = key.removesuffix(_WEIGHT)
            sites.append(Site(name=name, key=key, modules=((prefix + name,),)))
            continue
        unit, _, fused = key.rpartition(".")
        if fused not in _FUSED:
            continue
        numbers = range(len(weight)) if unit + "." == _EXPERTS else None
        units = [unit] if numbers is None else [f"{unit}.{expert}" for expert in numbers]
        modules = tuple(
            tuple(f"{prefix}{one}.{projection}" for projection in _FUSED[fused]) for one in units
        )
        sites.append(Site(name=f"{unit}.{_FUSED[fused][0]}", key=key, modules=modules))
    return tuple(sites)


class SiteObserver:
    """What one site has seen.

    Attributes:
        histogram: of each row.
        channels: largest magnitudes per channel, None where nobody needs them.
        tokens: int64 [rows], tokens seen.
    """

    def __init__(self, rows: int, *, per_channel: bool, device: torch.device) -> None:
        self.histogram = HistogramBank(rows, device=device)
        self.channels: ChannelAbsMax | None = None
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self._per_channel = per_channel
        self._pending: list[tuple[int, Tensor]] = []
        self._pending_elements = 0

    def add(self, row: int, values: Tensor) -> None:
        """Take in tokens [N, C] of one row. They may be kept until `flush`: do not modify them."""
        if not values.numel():
            return
        if any(row == other for other, _ in self._pending[-1:]) or (
            self._pending_elements + values.numel() > _FLUSH_ELEMENTS
        ):
            self.flush()
        self._pending.append((row, values))
        self._pending_elements += values.numel()

    def flush(self) -> None:
        """Observe everything that was added; call it after each batch."""
        if not self._pending:
            return
        rows, values = zip(*self._pending, strict=True)
        self._pending, self._pending_elements = [], 0
        lengths = torch.tensor([len(part) for part in values])
        self.tokens.index_add_(0, torch.tensor(rows), lengths)
        device = values[0].device
        segments = Segments(torch.tensor(rows, device=device), lengths.to(device))
        joined = values[0] if len(values) == 1 else torch.cat(values)
        self.histogram.observe(joined, segments)
        if self._per_channel:
            if self.channels is None:
                channels, count = joined.shape[1], self.histogram.rows
                self.channels = ChannelAbsMax(count, channels, device=device)
            self.channels.observe(joined, segments)


class InputTaps(TorchFunctionMode):
    """While entered, shows the input of every known matrix product to its observer.

    Args:
        sites: what to look for.
        weights: of the layer; they must not move while this lives.
        see: called with site, row and input [N, C] of every product.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        weights: Mapping[str, Tensor],
        see: Callable[[Site, int, Tensor], None],
    ) -> None:
        super().__init__()
        self._see = see
        self._known: dict[int, tuple[Site, int, torch.Size]] = {}
        for site in sites:
            weight = weights[site.key]
            matrices = weight.unbind(0) if weight.ndim == 3 else (weight,)
            for row, matrix in enumerate(matrices):
                self._known[matrix.data_ptr()] = (site, row, matrix.shape)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at one call of torch."""
        del types
        if func is F.linear:
            found = self._known.get(args[1].data_ptr())
            if found is not None:
                site, row, shape = found
                if args[1].shape != shape:
                    raise CalibrationError(
                        f"{site.name} is computed in pieces {list(args[1].shape)}, expected "
                        f"{list(shape)}"
                    )
                self._see(site, row, args[0])
        return func(*args, **(kwargs or {}))
