"""Everything that is observed of one layer, and the stats that come of it."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringexport.calibrate.clipping import ClipFinder, ClipMethod
from ringexport.calibrate.coverage import Candidates
from ringexport.calibrate.observers import RangeBank
from ringexport.calibrate.smoothing import layer_strengths
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
_LARGEST = float(np.finfo(np.float32).max)
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

    def inputs(self) -> dict[str, Tensor]:
        """Return what was kept, fp32 [R, C] by site name, on the CPU."""
        return {name: torch.cat(parts) for name, parts in self._found.items()}

    def entries(self, prefix: str) -> Entries:
        """Return INPUT_SAMPLES of every site that was observed."""
        return {
            (prefix + name, Quantity.INPUT_SAMPLES): values.numpy()
            for name, values in self.inputs().items()
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
        self._observers = {
            site.name: SiteObserver(site, count=site.name != ROUTER) for site in self.sites
        }
        self._extra: dict[str, SiteObserver] = {}
        self._last_input: dict[str, Tensor] = {}
        self._shared_tokens: Counter[str] = Counter()
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
        self._last_input.clear()
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
            found |= site_entries(self._prefix, observer, clips)
        found |= self._strengths()
        attention = self._prefix + "attention"
        for name, observer in self._extra.items():
            found |= site_entries(self._prefix, observer, clips)
            quantity = Quantity.KEY_ABSMAX if name == "key_cache" else Quantity.VALUE_ABSMAX
            cache = f"{attention}.{name}"
            found[attention, quantity] = found[cache, Quantity.INPUT_ABSMAX]
        if self._state_absmax is not None:
            found[attention, Quantity.STATE_ABSMAX] = self._state_absmax.float().cpu().numpy()
        if self._candidates is not None:
            tokens = self._candidates.tokens
            router = self._prefix + ROUTER
            forced = torch.zeros_like(tokens) if self._forced is None else self._forced
            found[router, Quantity.EXPERT_TOKENS] = tokens.float().numpy()
            found[router, Quantity.EXPERT_FORCED] = forced.float().numpy()
        return found

    def _strengths(self) -> Entries:
        """Search SmoothQuant's strengths on the sampled tokens, if there are any."""
        inputs = self._samples.inputs()
        banks = {name: observer.bank for name, observer in self._observers.items()}
        absmax = {name: bank.channel_absmax for name, bank in banks.items() if bank is not None}
        if not sum(len(values) for values in inputs.values()):
            return {}
        device = next(iter(absmax.values())).device
        samples = {name: values.to(device) for name, values in inputs.items()}
        return layer_strengths(self._prefix, self._weights, samples, absmax)

    def _see(self, site: Site, key: str, row: int, values: Tensor) -> None:
        if key != site.keys[0]:  # the same tensor again, for another weight
            if self._last_input.get(site.name) is values:
                self._shared_tokens[key] += len(values)
            return
        self._observers[site.name].add(row, values)
        if len(site.keys) > 1:
            self._last_input[site.name] = values
        if site.name in _SAMPLED:
            self._samples.observe(site.name, values, self._first_token)
        if site.name == ROUTER:
            self._router_input = values

    def _see_extra(self, name: str, values: Tensor) -> None:
        if name not in self._extra:
            modules = ((f"{self._prefix}attention.{name}",),)
            site = Site(name=f"attention.{name}", keys=(), modules=modules)
            self._extra[name] = SiteObserver(site)
        self._extra[name].add(0, values)
        self._extra[name].flush()

    def _check_tokens(self, site: Site, observer: SiteObserver) -> None:
        """Compare what a site saw with what it must have seen: no product may be bypassed."""
        expected = [self._num_tokens] * site.rows
        if site.rows > 1 and self._candidates is not None:
            counts = self._candidates.tokens
            expected = (counts if self._forced is None else counts + self._forced).tolist()
        names = [modules[0] for modules in site.modules]
        pairs = list(zip(names, observer.tokens, expected, strict=True))
        for name, key in zip(site.modules[0][1:], site.keys[1:], strict=False):
            pairs.append((name, self._shared_tokens[key], self._num_tokens))
        wrong = [pair for pair in pairs if pair[1] != pair[2]]
        if wrong:
            name, found, wanted = wrong[0]
            raise CalibrationError(
                f"{name} was observed with {found} tokens, expected {wanted}; {len(wrong)} such "
                f"modules read {self._prefix}{site.name}'s input",
                hint="this is a fault of ringexport: a part of the model bypassed calibration",
            )


def site_entries(prefix: str, observer: SiteObserver, clips: ClipFinder) -> Entries:
    """Return what one site has seen, under the names of its modules.

    Experts without tokens get the largest values of the others, and INPUT_TOKENS 0.

    Args:
        prefix: "model.layers.{i}.", or "".
        observer: flushed, with at least one token.
        clips: finds clip values.

    Raises:
        CalibrationError: nothing, or a NaN or infinity, was observed.
    """
    site, bank = observer.site, observer.bank
    if bank is None or not bool(bank.absmax.isfinite().all()):
        what = "was never computed" if bank is None else "holds a NaN or infinity"
        raise CalibrationError(
            f"the input of {prefix}{site.name} {what}",
            hint="check the checkpoint, or calibrate in float32",
        )
    arrays = {Quantity.INPUT_ABSMAX: bank.absmax[:, None]}
    if _per_channel(site):
        arrays[Quantity.INPUT_CHANNEL_ABSMAX] = bank.channel_absmax
    if observer.count:
        arrays[Quantity.INPUT_CLIPS] = _all_clips(bank, clips)
    seen = torch.tensor([tokens > 0 for tokens in observer.tokens], device=bank.counts.device)
    filled = {name: _lend(array, seen).cpu().numpy() for name, array in arrays.items()}
    filled[Quantity.INPUT_TOKENS] = np.array(observer.tokens, np.float32)[:, None]
    found = {
        (module, quantity): array[row]
        for row, modules in enumerate(site.modules)
        for module in modules
        for quantity, array in filled.items()
    }
    if observer.count:
        found |= _histogram_entries(prefix, site, bank.total())
    return found


def _per_channel(site: Site) -> bool:
    """Say whether SmoothQuant needs the channels: of norms, all experts share them."""
    return site.rows == 1 or site.name.endswith("down_proj")


def _all_clips(bank: RangeBank, clips: ClipFinder) -> Tensor:
    """Return what every observer of `CLIP_OBSERVERS` would clip at, fp32 [rows, observers]."""
    columns = []
    for name in CLIP_OBSERVERS:
        codes, _, method = name.rpartition(":")
        number_format = NumberFormat(codes) if codes else NumberFormat.INT8
        columns.append(clips.find(bank, ClipMethod(method), number_format))
    return torch.stack(columns, dim=1)


def _histogram_entries(prefix: str, site: Site, total: RangeBank) -> Entries:
    """Return the histogram of all rows; that of experts is under their name without a number."""
    shares = total.counts[0].double() / max(int(total.counts.sum()), 1)
    top = np.ldexp(1.0, int(total.exponent))
    arrays = {
        Quantity.INPUT_HISTOGRAM: shares.float().cpu().numpy(),
        Quantity.INPUT_HISTOGRAM_TOP: np.array([min(top, _LARGEST)], np.float32),
    }
    names = site.modules[0] if site.rows == 1 else (prefix + site.name,)
    return {(name, quantity): array for name in names for quantity, array in arrays.items()}


def _lend(values: Tensor, seen: Tensor) -> Tensor:
    """Return values [R, C] whose rows that are not `seen` hold the maximum of the others."""
    if bool(seen.all()):
        return values
    return torch.where(seen[:, None], values, values.amax(0, keepdim=True))
