"""Everything that is observed of one layer, and the stats that come of it."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringexport.calibrate.clipping import ClipFinder, ClipMethod
from ringexport.calibrate.coverage import Candidates
from ringexport.calibrate.observers import NUM_BINS
from ringexport.calibrate.stream import Batch, LayerResult
from ringexport.calibrate.taps import InputTaps, Site, SiteObserver, layer_sites
from ringexport.checkpoint import RingConfig
from ringexport.errors import CalibrationError
from ringexport.model.layers import routed_experts
from ringexport.ops.quantization import NumberFormat
from ringexport.stats import CLIP_OBSERVERS, Quantity

__all__ = ["Entries", "LayerCollector", "SampleRows", "site_entries"]

Entries = dict[tuple[str, Quantity], npt.NDArray[np.float32]]

ROUTER = "mlp.gate"
_SAMPLED = ("attention.query_key_value", "attention.dense", ROUTER, "mlp.gate_proj")
"""Sites whose inputs are sampled; those of the others follow from these and the weights."""


class SampleRows:
    """The inputs of a few tokens, the same tokens at every site.

    Args:
        index: int64 [R], ascending, which of all tokens to keep.
    """

    def __init__(self, index: Tensor) -> None:
        self._index = index
        self._found: dict[str, list[Tensor]] = {}

    def observe(self, name: str, values: Tensor, first_token: int) -> None:
        """Keep what is wanted of `values` [N, C], tokens from `first_token` on."""
        inside = (self._index >= first_token) & (self._index < first_token + len(values))
        rows = (self._index[inside] - first_token).to(values.device)
        self._found.setdefault(name, []).append(values[rows].float().cpu())

    def entries(self, prefix: str) -> Entries:
        """Return INPUT_SAMPLES of every site that was observed."""
        return {
            (prefix + name, Quantity.INPUT_SAMPLES): torch.cat(parts).numpy()
            for name, parts in self._found.items()
        }


class LayerCollector:
    """Observes one layer while the reference model runs it batch by batch.

    Args:
        layer: index.
        weights: what `LayerStream.load` returned for it.
        config: of the model.
        min_expert_tokens: tokens that every expert should see.
        sample_index: int64 [R], tokens whose inputs are kept.

    Attributes:
        sites: what is observed.
        starved: experts that did not get enough tokens on their own.
    """

    def __init__(
        self,
        layer: int,
        weights: Mapping[str, Tensor],
        config: RingConfig,
        *,
        min_expert_tokens: int,
        sample_index: Tensor,
    ) -> None:
        self._prefix = f"model.layers.{layer}."
        self._weights = weights
        self.sites = layer_sites(self._prefix, weights)
        self._device = weights["input_layernorm.weight"].device
        self._observers = {site.name: self._observer(site) for site in self.sites}
        self._extra: dict[str, SiteObserver] = {}
        self._samples = SampleRows(sample_index)
        self._candidates: Candidates | None = None
        if config.is_moe_layer(layer):
            self._candidates = Candidates(config, min_expert_tokens)
        self._router_input: Tensor | None = None
        self._state_absmax: Tensor | None = None
        self._forced: Tensor | None = None
        self._num_tokens = 0
        self._first_token = 0
        self.starved = 0

    def watch(self, batch: Batch) -> InputTaps:
        """Return the context in which the layer has to run on `batch`."""
        self._first_token = batch.start
        return InputTaps(self.sites, self._weights, self._see)

    def finish(self, batch: Batch, result: LayerResult) -> None:
        """Take in what the layer returned for `batch`."""
        self._num_tokens += batch.stop - batch.start
        for observer in self._observers.values():
            observer.flush()
        for name, values in (("key_cache", result.key), ("value_cache", result.value)):
            if values is not None:
                self._see_extra(name, values.flatten(1))
        if result.recurrent_state is not None:
            found = result.recurrent_state.abs().amax((0, 2, 3))
            old = found if self._state_absmax is None else self._state_absmax
            self._state_absmax = torch.maximum(old, found)
        if self._candidates is not None and result.expert_ids is not None:
            if self._router_input is None:
                raise CalibrationError(f"{self._prefix}{ROUTER} was not observed")
            hidden = self._router_input.to(result.hidden.dtype)
            self._candidates.observe(hidden, self._weights, result.expert_ids, batch.start)
            self._router_input = None

    def force(self) -> None:
        """Show starved experts the tokens that came closest to choosing them."""
        forced = None if self._candidates is None else self._candidates.forced()
        if forced is None:
            return
        self._forced = forced.counts
        self.starved = int((forced.counts > 0).sum())
        sites = [site for site in self.sites if site.rows > 1]
        with InputTaps(sites, self._weights, self._see):
            ones = torch.ones_like(forced.expert_ids, dtype=torch.float32)
            routed_experts(forced.hidden, self._weights, forced.expert_ids, ones)
        for site in sites:
            self._observers[site.name].flush()

    def entries(self, clips: ClipFinder) -> Entries:
        """Return the stats of the layer.

        Args:
            clips: finds clip values.

        Raises:
            CalibrationError: a module that saw another number of tokens than it was given, or a
                NaN or infinity.
        """
        found = self._samples.entries(self._prefix)
        for site in self.sites:
            observer = self._observers[site.name]
            self._check_tokens(site, observer)
            found |= site_entries(self._prefix, site, observer, clips)
        attention = self._prefix + "attention"
        for name, observer in self._extra.items():
            site = Site(name=f"attention.{name}", key="", modules=((f"{attention}.{name}",),))
            found |= site_entries(self._prefix, site, observer, clips)
            quantity = Quantity.KEY_ABSMAX if name == "key_cache" else Quantity.VALUE_ABSMAX
            found[attention, quantity] = observer.histogram.absmax.cpu().numpy()
        if self._state_absmax is not None:
            found[attention, Quantity.STATE_ABSMAX] = self._state_absmax.float().cpu().numpy()
        if self._candidates is not None:
            tokens = self._candidates.tokens
            router = self._prefix + ROUTER
            forced = torch.zeros_like(tokens) if self._forced is None else self._forced
            found[router, Quantity.EXPERT_TOKENS] = tokens.float().numpy()
            found[router, Quantity.EXPERT_FORCED] = forced.float().numpy()
        return found

    def _observer(self, site: Site) -> SiteObserver:
        # SmoothQuant folds per channel: into norms, which all experts share, and up_proj rows.
        per_channel = site.rows == 1 or site.name.endswith("down_proj")
        return SiteObserver(site.rows, per_channel=per_channel, device=self._device)

    def _see(self, site: Site, row: int, values: Tensor) -> None:
        self._observers[site.name].add(row, values)
        if site.name in _SAMPLED:
            self._samples.observe(site.name, values, self._first_token)
        if site.name == ROUTER:
            self._router_input = values

    def _see_extra(self, name: str, values: Tensor) -> None:
        if name not in self._extra:
            self._extra[name] = SiteObserver(1, per_channel=True, device=self._device)
        self._extra[name].add(0, values)
        self._extra[name].flush()

    def _check_tokens(self, site: Site, observer: SiteObserver) -> None:
        """Compare what a site saw with what it must have seen: no product may be bypassed."""
        expected = torch.tensor([self._num_tokens])
        if site.rows > 1 and self._candidates is not None:
            expected = self._candidates.tokens
            expected = expected if self._forced is None else expected + self._forced
        wrong = (observer.tokens != expected).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise CalibrationError(
                f"{site.modules[row][0]} was observed with {int(observer.tokens[row])} tokens, "
                f"expected {int(expected[row])}; {len(wrong)} such modules in this layer",
                hint="this is a fault of ringexport: a part of the model bypassed calibration",
            )


def site_entries(prefix: str, site: Site, observer: SiteObserver, clips: ClipFinder) -> Entries:
    """Return what one site has seen, under the names of its modules.

    Experts without tokens get the largest values of the others, and INPUT_TOKENS 0.

    Args:
        prefix: "model.layers.{i}.", or "".
        site: what was observed.
        observer: flushed.
        clips: finds clip values.

    Raises:
        CalibrationError: a NaN or infinity was observed.
    """
    bank = observer.histogram
    if not bool(bank.absmax.isfinite().all()):
        raise CalibrationError(
            f"the input of {prefix}{site.name} holds a NaN or infinity",
            hint="check the checkpoint, or calibrate in float32",
        )
    seen = (observer.tokens > 0).to(bank.absmax.device)
    columns = []
    for name in CLIP_OBSERVERS:
        number_format, _, method = name.rpartition(":")
        codes = NumberFormat(number_format or NumberFormat.INT8)
        columns.append(clips.find(bank, ClipMethod(method), codes))
    arrays = {
        Quantity.INPUT_ABSMAX: bank.absmax[:, None],
        Quantity.INPUT_CLIPS: torch.stack(columns, dim=1),
    }
    if observer.channels is not None:
        arrays[Quantity.INPUT_CHANNEL_ABSMAX] = observer.channels.absmax
    filled = {name: _lend(array, seen).cpu().numpy() for name, array in arrays.items()}
    filled[Quantity.INPUT_TOKENS] = observer.tokens[:, None].float().numpy()
    found = {
        (module, quantity): array[row]
        for row, modules in enumerate(site.modules)
        for module in modules
        for quantity, array in filled.items()
    }
    total = bank.total()
    shares = total.counts[0].double() / max(int(total.counts.sum()), 1)
    top = np.ldexp(np.float32(1), total.exponent.cpu().numpy().astype(np.int32))
    for name in _histogram_names(prefix, site):
        found[name, Quantity.INPUT_HISTOGRAM] = shares.float().cpu().numpy().reshape(NUM_BINS)
        found[name, Quantity.INPUT_HISTOGRAM_TOP] = top.astype(np.float32)
    return found


def _histogram_names(prefix: str, site: Site) -> Iterator[str]:
    """Yield where the histogram goes: the module, or for experts the name without a number."""
    if site.rows == 1:
        yield from site.modules[0]
    else:
        yield prefix + site.name


def _lend(values: Tensor, seen: Tensor) -> Tensor:
    """Return values [R, C] whose rows that are not `seen` hold the maximum of the others."""
    if bool(seen.all()):
        return values
    return torch.where(seen[:, None], values, values.amax(0, keepdim=True))
