"""The engine bundle: a directory with everything a runner needs, its index and its digests.

engines/README.md describes the format, engines/manifest.schema.json its manifest.
"""

from ringexport.bundle.files import clean_stale_builds, find_stale_builds
from ringexport.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    CalibrationInfo,
    DecayTable,
    FileEntry,
    Manifest,
    ModelInfo,
    QuantizationInfo,
    ResolvedBuild,
    SchemeInfo,
    SourceInfo,
    TargetInfo,
    TargetIO,
    ToolInfo,
)
from ringexport.bundle.reader import EngineBundle
from ringexport.bundle.writer import BundleWriter

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "BundleWriter",
    "CalibrationInfo",
    "DecayTable",
    "EngineBundle",
    "FileEntry",
    "Manifest",
    "ModelInfo",
    "QuantizationInfo",
    "ResolvedBuild",
    "SchemeInfo",
    "SourceInfo",
    "TargetIO",
    "TargetInfo",
    "ToolInfo",
    "clean_stale_builds",
    "find_stale_builds",
]
