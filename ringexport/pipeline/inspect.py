"""Say what a path is: checkpoint, bundle, safetensors file, ONNX graph or engine."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ringexport.bundle import MANIFEST_NAME, EngineBundle, QuantizationInfo, TargetInfo
from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.checkpoint.safetensors_file import SafetensorsFile
from ringexport.engine.table import ENGINE_SUFFIX, EngineTable, read_table
from ringexport.errors import BackendUnavailableError, ConfigError, GraphError
from ringexport.progress import Progress

__all__ = ["Description", "Table", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values under named columns.

    Attributes:
        title: what the rows are.
        columns: names, also the keys in JSON.
        rows: one value per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What was found at a path.

    Attributes:
        kind: "checkpoint", "bundle", "safetensors", "onnx" or "engine".
        path: as given.
        facts: name to value, most important first.
        tables: details.
    """

    kind: str
    path: str
    facts: dict[str, object]
    tables: tuple[Table, ...]

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; each row of a table becomes an object."""
        tables = {
            table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in self.tables
        }
        return {"kind": self.kind, "path": self.path, **self.facts, **tables}


def describe(path: Path, *, verify: bool = True, progress: Progress | None = None) -> Description:
    """Find out what `path` is and describe it.

    Args:
        path: a directory or a file.
        verify: compare the digests of a bundle.
        progress: told about the bytes that are verified.

    Raises:
        ConfigError: nothing that ringexport knows.
        RingExportError: it is damaged; the class depends on what it is.
    """
    if (path / MANIFEST_NAME).is_file():
        return _describe_bundle(path, verify=verify, progress=progress)
    if path.is_dir() and ((path / "config.json").exists() or any(path.glob("*.safetensors"))):
        return _describe_checkpoint(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _describe_safetensors(path)
    if path.is_file() and path.suffix == ".onnx":
        return _describe_onnx(path)
    if path.is_file() and path.suffix == ENGINE_SUFFIX:
        return _describe_engine(path)
    what = "does not exist" if not path.exists() else "is nothing that ringexport knows"
    raise ConfigError(
        f"{path} {what}",
        hint="give a checkpoint or bundle directory, a .safetensors, .onnx or .plan file",
    )


def _describe_checkpoint(path: Path) -> Description:
    with CheckpointWeights.open(path) as weights:
        config, summary = weights.config, weights.summary()
        layer_parameters = _parameters_per_layer(weights)
    facts = {
        **_config_facts(config),
        "parameters": summary.num_parameters,
        "tensors": summary.num_tensors,
        "bytes": summary.num_bytes,
        "stored dtypes": dict(summary.dtypes),
    }
    kinds = tuple(
        (str(kind), found.num_tensors, found.num_parameters, found.num_bytes)
        for kind, found in summary.kinds.items()
    )
    layers = tuple(
        (
            layer,
            kind,
            "experts" if config.is_moe_layer(layer) else "dense",
            layer_parameters.get(layer, 0),
        )
        for layer, kind in enumerate(config.layer_kinds)
    )
    return Description(
        kind="checkpoint",
        path=str(path),
        facts=facts,
        tables=(
            Table(title="kinds", columns=("kind", "tensors", "parameters", "bytes"), rows=kinds),
            Table(title="layers", columns=("layer", "attention", "mlp", "parameters"), rows=layers),
            Table(title="files", columns=("file", "bytes"), rows=tuple(summary.files.items())),
        ),
    )


def _config_facts(config: RingConfig) -> dict[str, object]:
    linear, softmax = len(config.linear_layers), len(config.softmax_layers)
    heads = f"{config.num_attention_heads} x {config.head_dim}"
    return {
        "layers": f"{config.num_hidden_layers}: {linear} linear, {softmax} softmax attention",
        "hidden size": config.hidden_size,
        "heads": f"{heads}, {config.num_key_value_heads} for keys and values in softmax layers",
        "experts": (
            f"{config.num_experts} in {config.n_group} groups, {config.num_experts_per_tok} per"
            f" token of {config.topk_group} groups, {config.num_shared_experts} shared"
        ),
        "vocabulary": config.vocab_size,
        "context tokens": config.context_length,
    }


def _parameters_per_layer(weights: CheckpointWeights) -> dict[int, int]:
    totals: dict[int, int] = {}
    for name in weights.names():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            info = weights.info(name)
            layer = int(parts[2])
            totals[layer] = totals.get(layer, 0) + info.nbytes // info.dtype.itemsize
    return totals


def _describe_bundle(path: Path, *, verify: bool, progress: Progress | None) -> Description:
    bundle = EngineBundle.open(path, verify=verify, progress=progress)
    manifest = bundle.manifest
    build, model = manifest.build, manifest.model
    facts: dict[str, object] = {
        "format version": manifest.format_version,
        "architecture": model.architecture,
        "parameters": model.num_parameters,
        "layers": model.num_layers,
        "vocabulary": model.vocab_size,
        "context tokens": model.context_length,
        "recipe": build.recipe,
        "compute dtype": build.compute_dtype,
        "decay index": build.decay_index,
        "bytes": bundle.nbytes,
        "built by": f"{manifest.tool.name} {manifest.tool.version}",
        "versions": dict(manifest.versions),
        "built from": manifest.source.path,
        "digest": bundle.digest,
        "verified": verify,
        **_quantization_facts(manifest.quantization),
    }
    targets = tuple(
        (
            name,
            target.directory,
            sum(entry.size for entry in manifest.files if entry.path in target.files.values()),
            target.limits.get("context_length"),
        )
        for name, target in bundle.targets.items()
    )
    files = tuple((entry.path, entry.size, entry.sha256) for entry in manifest.files)
    source = tuple((entry.path, entry.size, entry.sha256) for entry in manifest.source.files)
    decay = tuple(
        (int(layer), min(values), max(values)) for layer, values in manifest.decay.table.items()
    )
    digest_columns = ("file", "bytes", "sha256")
    return Description(
        kind="bundle",
        path=str(path),
        facts=facts,
        tables=(
            Table(
                title="targets",
                columns=("target", "directory", "bytes", "context tokens"),
                rows=targets,
            ),
            *_engine_tables(path, bundle.targets),
            *_scheme_tables(manifest.quantization),
            Table(
                title="log decay per token",
                columns=("layer", "fastest head", "slowest head"),
                rows=tuple(sorted(decay)),
            ),
            Table(title="files", columns=digest_columns, rows=files),
            Table(title="source", columns=digest_columns, rows=source),
        ),
    )


def _engine_tables(path: Path, targets: Mapping[str, TargetInfo]) -> tuple[Table, ...]:
    """Return the layers of every TensorRT engine of a bundle, counted by kind."""
    return tuple(
        _layer_table(read_table(path / target.files["layers"]), f"layers of {name}")
        for name, target in targets.items()
        if "layers" in target.files
    )


def _layer_table(found: EngineTable, title: str) -> Table:
    rows = tuple((kind, count) for kind, count in found.counts.items())
    return Table(title=title, columns=("layer", "count"), rows=rows)


def _describe_engine(path: Path) -> Description:
    found = read_table(path.with_name("layers.json"))
    size = path.stat().st_size
    if size != found.engine_bytes:
        raise ConfigError(
            f"the engine {path} has {size:,} bytes, expected {found.engine_bytes:,}:"
            " it is truncated",
            hint="copy the bundle again, or build it again",
        )
    facts: dict[str, object] = {
        "target": found.target,
        "bytes": size,
        "profile": found.profile,
        "versions": found.versions,
        "layers": sum(found.counts.values()),
    }
    tables = (_layer_table(found, "layers"),)
    return Description(kind="engine", path=str(path), facts=facts, tables=tables)


def _quantization_facts(found: QuantizationInfo | None) -> dict[str, object]:
    if found is None:
        return {}
    facts: dict[str, object] = {}
    if found.calibration is not None:
        facts["calibrated with"] = found.calibration.prompts
        facts["calibration tokens"] = found.calibration.num_tokens
        facts["calibration stats"] = found.calibration.stats_sha256
    facts["saturated elements"] = sum(found.saturated.values())
    if found.notes:
        facts["computed"] = "; ".join(found.notes)
    return facts


def _scheme_tables(found: QuantizationInfo | None) -> tuple[Table, ...]:
    if found is None:
        return ()
    rows = tuple(
        (row.kind, row.modules, row.parameters, row.weights or "-", row.activations or "-")
        for row in found.schemes
    )
    columns = ("kind", "modules", "parameters", "weights", "activations")
    return (Table(title="quantization", columns=columns, rows=rows),)


def _describe_safetensors(path: Path) -> Description:
    file = SafetensorsFile.open(path)
    tensors = list(file.tensors.values())
    file.close()
    rows = tuple(
        (info.name, info.dtype.name, " x ".join(map(str, info.shape)), info.nbytes)
        for info in tensors
    )
    facts: dict[str, object] = {
        "tensors": len(tensors),
        "parameters": sum(info.nbytes // info.dtype.itemsize for info in tensors),
        "bytes": file.size_bytes,
    }
    table = Table(title="tensors", columns=("tensor", "dtype", "shape", "bytes"), rows=rows)
    return Description(kind="safetensors", path=str(path), facts=facts, tables=(table,))


def _describe_onnx(path: Path) -> Description:
    try:
        module = importlib.import_module("ringexport.graph.summary")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"looking into an ONNX file needs the package {error.name}",
            hint="pip install 'ringexport[torch]'",
        ) from error
    try:
        summary = asdict(module.summarize_graph(path))
    except GraphError as error:  # here a file that was given, not a graph that was built
        raise ConfigError(error.message, hint="give a file that holds an ONNX graph") from error
    columns = ("name", "dtype", "shape")

    def tensors(title: str) -> Table:
        rows = tuple(
            (tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["shape"])))
            for tensor in summary[title]
        )
        return Table(title=title, columns=columns, rows=rows)

    operators = tuple(summary["operators"].items())
    return Description(
        kind="onnx",
        path=str(path),
        facts={
            "producer": summary["producer"],
            "IR version": summary["ir_version"],
            "opsets": summary["opsets"],
            "nodes": sum(summary["operators"].values()),
            "weights": summary["num_weights"],
        },
        tables=(
            Table(title="operators", columns=("operator", "nodes"), rows=operators),
            tensors("inputs"),
            tensors("outputs"),
        ),
    )
