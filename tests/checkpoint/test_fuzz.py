"""Random damage: whatever a checkpoint folder holds, only our own errors come out, and soon."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringexport.checkpoint import CheckpointWeights
from ringexport.errors import RingExportError
from tests.checkpoint.damage import INDEX, SHARD_1, SHARD_2
from tests.checkpoints import tiny_config

BUDGET = settings(
    max_examples=60,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = ("config.json", INDEX, SHARD_1, SHARD_2)
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.integers(0, 20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([[], {}, [[]], {"a": 1}, ["x"], "../x.safetensors", "\ud800", SHARD_1, 1e999]),
)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("fuzz") / "checkpoint"))


def open_all(folder: Path) -> RingExportError | None:
    """Open, and read everything of what opens; return the error if there is one."""
    try:
        with CheckpointWeights.open(folder) as weights:
            weights.check_finite()
            weights.summary()
            weights.config.inv_freq()
    except RingExportError as error:
        return error
    return None


def open_with(folder: Path, name: str, content: bytes) -> None:
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        error = open_all(folder)
    finally:
        (folder / name).write_bytes(original)
    if error is not None:
        assert error.message
        assert "\n" not in error.message
        assert len(str(error)) < 2000
        str(error).encode()


@BUDGET
@given(
    name=st.sampled_from(FILES),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8),
    header_only=st.booleans(),
)
def test_flipped_bytes(
    folder: Path, name: str, flips: list[tuple[float, int]], header_only: bool
) -> None:
    raw = bytearray((folder / name).read_bytes())
    reach = min(len(raw), 600) if header_only else len(raw)
    for where, mask in flips:
        raw[int(where * (reach - 1))] ^= mask
    open_with(folder, name, bytes(raw))


@BUDGET
@given(name=st.sampled_from(FILES), share=st.floats(0, 1.1), tail=st.binary(max_size=16))
def test_truncation_and_trailing_bytes(folder: Path, name: str, share: float, tail: bytes) -> None:
    raw = (folder / name).read_bytes()
    open_with(folder, name, raw[: int(share * len(raw))] + tail)


@BUDGET
@given(edits=st.dictionaries(st.sampled_from(sorted(tiny_config())), ODD_VALUES, min_size=1))
def test_edited_config(folder: Path, edits: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | edits
    open_with(folder, "config.json", json.dumps(config).encode())


@BUDGET
@given(
    scaling=st.dictionaries(
        st.sampled_from(["factor", "original_max_position_embeddings", "beta_fast", "mscale"]),
        ODD_VALUES,
    )
)
def test_edited_rope_scaling(folder: Path, scaling: dict[str, Any]) -> None:
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096} | scaling
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": yarn}
    open_with(folder, "config.json", json.dumps(config).encode())


@BUDGET
@given(data=st.data())
def test_edited_index_and_header(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([INDEX, SHARD_1]))
    raw = (folder / name).read_bytes()
    length = int.from_bytes(raw[:8], "little") if name == SHARD_1 else 0
    value = json.loads(raw[8 : 8 + length] if length else raw)
    level: Any = value
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [key for key, item in level.items() if isinstance(item, dict)]
        level = level[data.draw(st.sampled_from(inner))] if inner else level
    key = data.draw(st.sampled_from(sorted(level)) | st.text(max_size=8))
    if data.draw(st.booleans()):
        level.pop(key, None)
    else:
        level[key] = data.draw(ODD_VALUES | st.lists(st.integers(-4, 1 << 65), max_size=3))
    text = json.dumps(value).encode()
    content = len(text).to_bytes(8, "little") + text + raw[8 + length :] if length else text
    open_with(folder, name, content)
