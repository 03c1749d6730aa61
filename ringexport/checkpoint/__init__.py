"""Published checkpoints: the config, the table of tensor names, and lazy, checked weights."""

from ringexport.checkpoint.config import LayerKind, RingConfig
from ringexport.checkpoint.names import TensorKind, TensorSpec, expected_tensors
from ringexport.checkpoint.rope import YarnConfig
from ringexport.checkpoint.safetensors_file import TensorInfo
from ringexport.checkpoint.weights import CheckpointSummary, CheckpointWeights, KindSummary

__all__ = [
    "CheckpointSummary",
    "CheckpointWeights",
    "KindSummary",
    "LayerKind",
    "RingConfig",
    "TensorInfo",
    "TensorKind",
    "TensorSpec",
    "YarnConfig",
    "expected_tensors",
]
