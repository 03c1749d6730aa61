"""Calibrate: run prompts through the reference model layer by layer and keep what is observed."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ringexport.calibrate.clipping import ClipFinder
from ringexport.calibrate.collect import Entries, LayerCollector, SampleRows, site_entries
from ringexport.calibrate.coverage import check_blind, check_complete
from ringexport.calibrate.prompts import PromptSet, Sample, tokenize
from ringexport.calibrate.stream import Batch, LayerStream, batches_of
from ringexport.calibrate.taps import Site, SiteObserver
from ringexport.calibrate.workdir import WorkStore
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.checkpoint.digest import checkpoint_digest, weight_bytes
from ringexport.errors import BackendUnavailableError, ConfigError
from ringexport.ops.decay import DecayIndex
from ringexport.progress import NoProgress, Progress
from ringexport.stats import CalibrationStats, Quantity

__all__ = ["CalibrationSettings", "calibrate"]

_METHOD_VERSION = 1  # raise it when the same inputs give other numbers
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEVICE_ACTIVATION_BYTES = 8 << 30
_SAMPLE_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How to calibrate. All of it is part of the stats' identity.

    Attributes:
        num_samples: prompts at most.
        max_tokens: of each prompt; the rest is cut.
        batch_tokens: samples x longest sample that run at once.
        min_expert_tokens: tokens that every expert should see; more are shown to those that saw
            fewer, within the router's groups. 0 shows none.
        max_blind_share: of all experts may see no token even so; they borrow from their layer.
        percentile: percent of an input's elements, for the percentile observer.
        sample_tokens: tokens whose inputs are kept in the stats.
        decay_index: which of the contested layer indices the decay uses.
        dtype: "float32", "bfloat16", or "auto": float32 on the CPU, bfloat16 elsewhere.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: a value out of range.
    """

    num_samples: int = 256
    max_tokens: int = 512
    batch_tokens: int = 8192
    min_expert_tokens: int = 64
    max_blind_share: float = 0.01
    percentile: float = 99.99
    sample_tokens: int = 64
    decay_index: DecayIndex = DecayIndex.SERVING
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        lows = {"num_samples": 1, "max_tokens": 1, "batch_tokens": 1}
        lows |= {"min_expert_tokens": 0, "sample_tokens": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if not low <= value <= 1 << 24:
                raise ConfigError(f"{name} is {value}, expected {low} to {1 << 24}")
        if not 0 <= self.max_blind_share <= 1:
            raise ConfigError(f"max_blind_share is {self.max_blind_share}, expected 0 to 1")
        if not 0 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}, expected over 0 to 100")
        if self.dtype not in {"auto", *_DTYPES}:
            raise ConfigError(f"dtype is {self.dtype!r}, expected auto, {', '.join(_DTYPES)}")

    def resolved_dtype(self) -> str:
        """Return "float32" or "bfloat16"."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    def to_json(self) -> str:
        """Return what the stats file says of the settings; equal if the numbers must be."""
        values = asdict(self) | {"dtype": self.resolved_dtype(), "method": _METHOD_VERSION}
        values |= {"device": self.device.partition(":")[0], "percentile": float(self.percentile)}
        values["max_blind_share"] = float(self.max_blind_share)
        return json.dumps(values, sort_keys=True)


def calibrate(
    weights: CheckpointWeights,
    prompts: PromptSet,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress | None = None,
    workdir: Path | None = None,
    model_digest: str | None = None,
) -> CalibrationStats:
    """Observe the inputs of every module that could be quantized.

    The same arguments give the same stats, byte for byte, on the same machine, also when a run
    was interrupted and continued.

    Args:
        weights: an open checkpoint; its folder holds tokenizer.json.
        prompts: texts.
        settings: how to calibrate.
        progress: told about tokens x layers, and about starved experts.
        workdir: where a run keeps what it finished, so that the next one with the same inputs
            continues; what is kept is removed at the end. None: nothing is kept.
        model_digest: what `checkpoint_digest` gives, if it is known.

    Raises:
        CalibrationError: prompts without tokens, NaN or infinity, a module that was not observed,
            or too many experts without tokens.
        CheckpointError: weights or tokenizer that cannot be used.
        OutputError: the work directory cannot be written.
        BackendUnavailableError: no such device here.
    """
    settings = settings or CalibrationSettings()
    progress = progress or NoProgress()
    device = _open_device(settings.device)
    config = weights.config
    samples = tokenize(
        prompts,
        weights.path / "tokenizer.json",
        num_samples=settings.num_samples,
        max_tokens=min(settings.max_tokens, config.context_length),
        vocab_size=config.vocab_size,
    )
    if model_digest is None:
        progress.start("digest the checkpoint", weight_bytes(weights), "bytes")
        model_digest = checkpoint_digest(weights, advance=progress.advance)
        progress.finish()
    identity = CalibrationStats(
        model_digest=model_digest,
        calibration_set=f"{prompts.name}:{_samples_digest(samples)}",
        num_samples=len(samples),
        num_tokens=sum(len(sample.ids) for sample in samples),
        entries={},
        settings=settings.to_json(),
    )
    run = _Run(weights, samples, settings, identity, device)
    with _work_store(workdir, identity.digest) as store:
        entries = run.layers(store, progress)
        stats = run.stats(entries)
        if store is not None:
            store.discard()
    return stats


class _Run:
    """One calibration: the stream of layers and the activations of all samples."""

    def __init__(
        self,
        weights: CheckpointWeights,
        samples: tuple[Sample, ...],
        settings: CalibrationSettings,
        identity: CalibrationStats,
        device: torch.device,
    ) -> None:
        self._config: RingConfig = weights.config
        self._samples, self._settings, self._identity = samples, settings, identity
        lengths = [len(sample.ids) for sample in samples]
        self._batches = tuple(batches_of(lengths, settings.batch_tokens))
        self._sample_index = _sample_index(sum(lengths), settings.sample_tokens)
        dtype = _DTYPES[settings.resolved_dtype()]
        self._stream = LayerStream(
            weights, decay_index=settings.decay_index, dtype=dtype, device=device
        )
        shape = (sum(lengths), self._config.hidden_size)
        on_device = 2 * shape[0] * shape[1] * dtype.itemsize <= _DEVICE_ACTIVATION_BYTES
        self._hidden = torch.empty(shape, dtype=dtype, device=device if on_device else "cpu")
        self._device = device
        self._clips = ClipFinder(percentile=settings.percentile, device=device)

    @torch.inference_mode()
    def layers(self, store: WorkStore | None, progress: Progress) -> Entries:
        """Run every layer that is not finished yet and return the stats of all."""
        count = self._config.num_hidden_layers
        finished = 0 if store is None else store.finished_layers()
        entries: Entries = {}
        if store is not None and finished:
            for layer in range(finished):
                entries |= store.load_stats(layer).entries
            self._hidden.copy_(store.load_hidden(finished - 1))
            progress.note(f"continuing after layer {finished - 1} of {count}")
        else:
            self._embed()
        self._stream.forget_embedding()
        work = (count - finished) * self._identity.num_tokens
        progress.start("calibrate", work, "tokens x layers")
        starved = 0
        for layer in range(finished, count):
            collector = self._run_layer(layer, progress)
            starved += collector.starved
            found = collector.entries(self._clips)
            del collector  # and with it the weights, before the next layer's are read
            entries |= found
            self._check_blind(entries)
            if store is not None:
                store.save(layer, self._with(found), self._hidden.cpu().contiguous())
        progress.finish()
        if starved:
            progress.note(
                f"experts that fewer than {self._settings.min_expert_tokens} tokens chose:"
                f" {starved}; they were shown others of their open groups"
            )
        return entries

    @torch.inference_mode()
    def stats(self, entries: Entries) -> CalibrationStats:
        """Add the output projection, check that no module is missing, and return the stats."""
        site = Site(name="lm_head", keys=(), modules=(("lm_head",),))
        observer = SiteObserver(site)
        rows = SampleRows(self._sample_index)
        for batch in self._batches:
            hidden = self._stream.final_norm(self._take(batch))
            observer.add(0, hidden)
            observer.flush()
            rows.observe(site.name, hidden, batch.start)
        entries = entries | rows.entries("")
        entries |= site_entries("", observer, self._clips)
        observed = {name for name, quantity in entries if quantity is Quantity.INPUT_CLIPS}
        caches = ("attention.key_cache", "attention.value_cache")
        check_complete((name for name in observed if not name.endswith(caches)), self._config)
        return self._with(entries)

    def _run_layer(self, layer: int, progress: Progress) -> LayerCollector:
        weights = self._stream.load(layer)
        collector = LayerCollector(
            layer,
            weights,
            self._config,
            min_expert_tokens=self._settings.min_expert_tokens,
            sample_index=self._sample_index,
        )
        for batch in self._batches:
            hidden = self._take(batch)
            with collector.watch(batch):
                result = self._stream.run(layer, weights, hidden, batch)
            collector.finish(batch, result)
            self._hidden[batch.start : batch.stop] = result.hidden
            progress.advance(batch.stop - batch.start)
        collector.force()
        return collector

    def _take(self, batch: Batch) -> Tensor:
        return self._hidden[batch.start : batch.stop].to(self._device)

    def _embed(self) -> None:
        ids = torch.tensor([token for sample in self._samples for token in sample.ids])
        for batch in self._batches:
            part = slice(batch.start, batch.stop)
            self._hidden[part] = self._stream.embed(ids[part])

    def _check_blind(self, entries: Entries) -> None:
        blind: list[str] = []
        for (module, quantity), tokens in entries.items():
            if quantity is not Quantity.EXPERT_TOKENS:
                continue
            seen = tokens + entries[module, Quantity.EXPERT_FORCED]
            experts = module.removesuffix("gate") + "experts."
            blind += [f"{experts}{expert}" for expert in np.flatnonzero(seen == 0)]
        total = len(self._config.moe_layers) * self._config.num_experts
        check_blind(blind, total, self._settings.max_blind_share)

    def _with(self, entries: Entries) -> CalibrationStats:
        same = self._identity
        return CalibrationStats(
            model_digest=same.model_digest,
            calibration_set=same.calibration_set,
            num_samples=same.num_samples,
            num_tokens=same.num_tokens,
            entries=entries,
            settings=same.settings,
        )


@contextmanager
def _work_store(parent: Path | None, key: str) -> Iterator[WorkStore | None]:
    if parent is None:
        yield None
        return
    store = WorkStore(parent, key)
    try:
        yield store
    finally:
        store.close()


def _open_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as failure:
        raise ConfigError(f"device is {name!r:.40}, expected cpu, cuda or cuda:N") from failure
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device is {name!r:.40}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"there is no device {name}: torch sees {torch.cuda.device_count()} GPUs",
            hint="calibrate on the CPU, or install torch for CUDA",
        )
    return device


def _samples_digest(samples: tuple[Sample, ...]) -> str:
    """Return SHA-256 over the token ids, which is all that calibration sees of the prompts."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.asarray([len(sample.ids), *sample.ids], "<i8").tobytes())
    return digest.hexdigest()


def _sample_index(num_tokens: int, wanted: int) -> Tensor:
    """Return int64 [R] ascending: the tokens whose inputs are kept, spread over all of them."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    chosen = rng.choice(num_tokens, size=min(wanted, num_tokens), replace=False)
    return torch.from_numpy(np.sort(chosen).astype(np.int64))
