"""Bundles with TensorRT engines that are made up, as the engine builder lays them out."""

import dataclasses
from pathlib import Path

from ringexport.bundle import BundleWriter, EngineBundle, Manifest, TargetInfo, TargetIO
from tests.bundle.samples import sample_files, sample_manifest

__all__ = ["bundle_with"]

IO = TargetIO(
    linear_layers=(0,),
    softmax_layers=(1,),
    shapes={
        "past_state": ("B", 2, 4, 4),
        "past_key": ("B", 1, "S", 4),
        "past_value": ("B", 1, "S", 4),
        "logits": ("B", "L", 5),
    },
)
LIMITS = {
    "context_length": 64,
    "decode_rows": 16,
    "decode_cache_tokens": 64,
    "prefill_rows": 8,
    "prefill_cache_tokens": 64,
}


def bundle_with(
    path: Path, *targets: str, role: str = "engine", dtype: str = "fp16+fp32"
) -> EngineBundle:
    """A bundle with engines for targets, beside its usual one."""
    manifest = sample_manifest()
    added = {}
    files = sample_files()
    for target in targets:
        directory = f"targets/{target.replace(':', '-')}"
        plugin, engine = f"{directory}/libringplugins.so", f"{directory}/model.engine"
        files |= {plugin: b"plugin", engine: target.encode()}
        roles = {role: engine, "plugins": plugin}
        added[target] = TargetInfo(directory=directory, files=roles, io=IO, limits=LIMITS)
    build = dataclasses.replace(manifest.build, compute_dtype=dtype)
    manifest = dataclasses.replace(manifest, build=build, targets=manifest.targets | added)
    return write(path, manifest, files)


def write(path: Path, manifest: Manifest, files: dict[str, bytes]) -> EngineBundle:
    manifest = dataclasses.replace(
        manifest,
        build=dataclasses.replace(manifest.build, targets=tuple(sorted(manifest.targets))),
        versions=manifest.versions | {"tensorrt": "10.14.1"},
    )
    with BundleWriter(path) as writer:
        for name, content in files.items():
            writer.path(name).write_bytes(content)
        writer.commit(manifest)
    return EngineBundle.open(path)
