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

from ringexport.calibrate.observers import RangeBank
from ringexport.errors import CalibrationError

__all__ = ["InputTaps", "Site", "SiteObserver", "layer_sites"]

_WEIGHT = ".weight"
_QKV, _OUTPUT_GATE = "attention.query_key_value.weight", "attention.g_proj.weight"
_EXPERTS = "mlp.experts."
_FUSED = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_FLUSH_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place whose input is observed.

    Attributes:
        name: of its first module without layer and expert, such as "mlp.experts.gate_proj".
        keys: of the weights in the model's layer that are multiplied by the input.
        modules: per row the modules that read it, by their names in the checkpoint.
    """

    name: str
    keys: tuple[str, ...]
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
        if key.endswith(_WEIGHT) and weight.ndim == 2 and key != _OUTPUT_GATE:
            name = key.removesuffix(_WEIGHT)
            keys = [key, *(_OUTPUT_GATE for _ in range(key == _QKV and _OUTPUT_GATE in weights))]
            readers = tuple(prefix + one.removesuffix(_WEIGHT) for one in keys)
            sites.append(Site(name=name, keys=tuple(keys), modules=(readers,)))
            continue
        unit, _, fused = key.rpartition(".")
        if fused not in _FUSED:
            continue
        numbers = range(len(weight)) if unit + "." == _EXPERTS else None
        units = [unit] if numbers is None else [f"{unit}.{expert}" for expert in numbers]
        modules = tuple(
            tuple(f"{prefix}{one}.{projection}" for projection in _FUSED[fused]) for one in units
        )
        sites.append(Site(name=f"{unit}.{_FUSED[fused][0]}", keys=(key,), modules=modules))
    return tuple(sites)


class SiteObserver:
    """What one site has seen.

    Args:
        site: what is observed.
        count: keep histograms, not only the largest magnitudes.

    Attributes:
        site: what is observed.
        tokens: tokens that each row has seen.
        bank: None before the first token.
    """

    def __init__(self, site: Site, *, count: bool = True) -> None:
        self.site = site
        self.tokens = [0] * site.rows
        self.bank: RangeBank | None = None
        self.count = count
        self._pending: list[tuple[int, Tensor]] = []
        self._pending_elements = 0

    def add(self, row: int, values: Tensor) -> None:
        """Take in tokens [N, C] of one row. They may be kept until `flush`: do not modify them."""
        self.tokens[row] += len(values)
        self._pending.append((row, values))
        self._pending_elements += values.numel()
        if self._pending_elements > _FLUSH_ELEMENTS:
            self.flush()

    def flush(self) -> None:
        """Observe everything that was added; call it after each batch."""
        if self._pending and self.bank is None:
            values = self._pending[0][1]
            self.bank = RangeBank(self.site.rows, values.shape[1], device=values.device)
        if self.bank is not None:
            self.bank.observe(self._pending, count=self.count)
        self._pending, self._pending_elements = [], 0


class InputTaps(TorchFunctionMode):
    """While entered, shows the input of every known matrix product to its observer.

    Args:
        sites: what to look for.
        weights: of the layer; they must not move while this lives.
        see: called with site, weight's key, row and input [N, C] of every product.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        weights: Mapping[str, Tensor],
        see: Callable[[Site, str, int, Tensor], None],
    ) -> None:
        super().__init__()
        self._see = see
        self._known: dict[int, tuple[Site, str, int, torch.Size]] = {}
        for site, key in [(one, key) for one in sites for key in one.keys]:
            weight = weights[key]
            matrices = weight.unbind(0) if weight.ndim == 3 else (weight,)
            for row, matrix in enumerate(matrices):
                self._known[matrix.data_ptr()] = (site, key, row, matrix.shape)

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
                site, key, row, shape = found
                if args[1].shape != shape:
                    raise CalibrationError(
                        f"{site.name} is computed in pieces {list(args[1].shape)}, expected "
                        f"{list(shape)}"
                    )
                self._see(site, key, row, args[0])
        return func(*args, **(kwargs or {}))
