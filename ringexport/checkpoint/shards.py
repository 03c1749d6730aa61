"""Find the weight files of a checkpoint folder and check that they and the index agree."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ringexport.checkpoint.fields import show
from ringexport.checkpoint.safetensors_file import SafetensorsFile
from ringexport.errors import CheckpointError, MissingTensorError, UnknownTensorError
from ringexport.files import file_exists, resolve_inside
from ringexport.strict_json import read_object

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "checkpoint_file",
    "count_tensors",
    "first_names",
    "open_shards",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_INDEX_LIMIT_BYTES = 200_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_shards(directory: Path) -> list[SafetensorsFile]:
    """Open the weight files of `directory`, sorted by name; no data is read.

    Raises:
        CheckpointError: no weights, pickle only, an index that leaves the folder or disagrees with
            its files, or a damaged file.
    """
    single, index = (file_exists(directory / name) for name in (SINGLE_NAME, INDEX_NAME))
    if not single and not index:
        raise _no_weights(directory)
    if not index:
        return [SafetensorsFile.open(checkpoint_file(directory, SINGLE_NAME))]
    weight_map = _read_index(checkpoint_file(directory, INDEX_NAME))
    names = sorted(set(weight_map.values()))
    if single and SINGLE_NAME not in names:
        raise CheckpointError(
            f"{directory} holds both {SINGLE_NAME} and an {INDEX_NAME} of other files",
            hint="remove the one that does not belong to this checkpoint",
        )
    shards = [SafetensorsFile.open(checkpoint_file(directory, name)) for name in names]
    _check_index(directory / INDEX_NAME, weight_map, dict(zip(names, shards, strict=True)))
    return shards


def checkpoint_file(directory: Path, name: str) -> Path:
    """Return the path of a file of a checkpoint; see `ringexport.files.resolve_inside`."""
    return resolve_inside(directory, name, error=CheckpointError)


def first_names(names: Collection[str]) -> str:
    """Return up to three of `names` in their order, and how many more there are."""
    shown = [show(name) for _, name in zip(range(3), names, strict=False)]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def count_tensors(names: Collection[str]) -> str:
    """Return "1 tensor" or "N tensors"."""
    return f"{len(names)} tensor" + ("" if len(names) == 1 else "s")


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(entry.name for entry in directory.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    stray = [name for name in names if name.endswith(".safetensors")]
    if pickled:
        return CheckpointError(
            f"{directory} holds only pickled weights: {first_names(pickled)}",
            hint="loading a pickle runs whatever code it contains; convert it to safetensors",
        )
    if stray:
        return CheckpointError(
            f"{directory} holds {first_names(stray)} but no {INDEX_NAME}",
            hint="download the index too; it says which file holds which tensor",
        )
    return CheckpointError(
        f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}",
        hint="give the folder that the checkpoint was downloaded to",
    )


def _read_index(path: Path) -> dict[str, str]:
    index = read_object(path, limit_bytes=_INDEX_LIMIT_BYTES, error=CheckpointError)
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map is {show(weight_map)}, expected an object of tensor and file names"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {show(name)} is in {show(file)}, expected a .safetensors file",
                hint="only safetensors weights are read",
            )
    return weight_map


def _check_index(
    path: Path, weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile]
) -> None:
    """Check that the index lists exactly the tensors of each shard."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in seen:
                raise CheckpointError(
                    f"tensor {show(name)} is in both {seen[name]} and {file} of {path.parent}",
                    hint="download the checkpoint again",
                )
            seen[name] = file
    absent = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if absent:
        raise MissingTensorError(
            f"{count_tensors(absent)} listed in {path} and not in the file named there: "
            f"{first_names(absent)} "
            f"(expected in {weight_map[absent[0]]})",
            hint="index and weights are of different downloads; download both again",
        )
    unlisted = [name for name in seen if name not in weight_map]
    if unlisted:
        raise UnknownTensorError(
            f"{path} does not list {count_tensors(unlisted)} that its files hold: "
            f"{first_names(unlisted)} (in {seen[unlisted[0]]})",
            hint="index and weights are of different downloads; download both again",
        )
