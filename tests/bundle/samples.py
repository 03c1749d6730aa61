"""A manifest and files that fit each other."""

from ringexport.bundle import (
    DecayTable,
    FileEntry,
    Manifest,
    ModelInfo,
    ResolvedBuild,
    SourceInfo,
    TargetInfo,
    TargetIO,
    ToolInfo,
)

__all__ = ["FILES", "sample_files", "sample_manifest"]

CONFIG = b"""{"max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
 "vocab_size": 5, "rope_scaling": null}
"""
FILES = {
    "model/config.json": CONFIG,
    "targets/onnxruntime-cpu/model.onnx": b"graph" * 20,
    "targets/onnxruntime-cpu/weights.bin": bytes(range(256)) * 16,
}


def sample_files(extra: bytes = b"") -> dict[str, bytes]:
    """Return the files with `extra` at the end of those that may hold anything."""
    return {
        name: content if name.endswith(".json") else content + extra
        for name, content in FILES.items()
    }


def sample_manifest() -> Manifest:
    """Return a complete manifest without its file list."""
    directory = "targets/onnxruntime-cpu"
    return Manifest(
        tool=ToolInfo(name="ringexport", version="0.0"),
        versions={"onnx": "1.0"},
        source=SourceInfo(
            path="../checkpoint",
            files=(FileEntry(path="config.json", size=3, sha256="ab" * 32),),
        ),
        model=ModelInfo(
            architecture="BailingMoeLinearV2ForCausalLM",
            config_sha256="ab" * 32,
            num_parameters=10,
            num_layers=2,
            vocab_size=5,
            context_length=64,
        ),
        build=ResolvedBuild(
            recipe="fp32",
            compute_dtype="fp32",
            decay_index="serving",
            targets=("onnxruntime:cpu",),
        ),
        decay=DecayTable(form="serving", table={"0": (-0.0625 * 1.00001, -0.00390625 * 1.00001)}),
        targets={
            "onnxruntime:cpu": TargetInfo(
                directory=directory,
                files={
                    "graph": f"{directory}/model.onnx",
                    "weights": f"{directory}/weights.bin",
                },
                io=TargetIO(
                    linear_layers=(0,),
                    softmax_layers=(1,),
                    shapes={"past_state": ("B", 2, 4, 4), "past_key": ("B", 1, "S", 4)},
                ),
                limits={"context_length": 64},
            )
        },
    )
