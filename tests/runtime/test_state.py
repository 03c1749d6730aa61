from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ringexport.errors import (
    BundleError,
    ContextLengthError,
    DigestError,
    OutputError,
    ShapeError,
    VersionError,
)
from ringexport.runtime.session import Engine
from ringexport.runtime.state import StateSnapshot, read_state_file, write_state_file
from tests.numerics import assert_same

SNAPSHOT = StateSnapshot(
    position=np.array([2, 0]), tensors={"recurrent_state.0": np.ones((2, 1, 2, 2), np.float32)}
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    write_state_file(path, SNAPSHOT, model_digest="aa", note="n")
    return path


def test_round_trip(file: Path) -> None:
    found = read_state_file(file, model_digest="aa")
    assert found.note == "n"
    assert_same(found.snapshot.position, SNAPSHOT.position)
    assert_same(found.snapshot.tensors["recurrent_state.0"], SNAPSHOT.tensors["recurrent_state.0"])


def test_another_model_is_refused(file: Path) -> None:
    with pytest.raises(DigestError, match="another model"):
        read_state_file(file, model_digest="bb")


def test_newer_format_is_refused(file: Path) -> None:
    metadata = {"format": "ringexport-state", "format_version": "2", "model_digest": "aa"}
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(VersionError, match="state format '2', this version reads 1"):
        read_state_file(file, model_digest="aa")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_files_are_refused(file: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(BundleError, match="no state file"):
        read_state_file(file, model_digest="aa")


def test_position_is_needed(file: Path) -> None:
    metadata = {"format": "ringexport-state", "format_version": "1", "model_digest": "aa"}
    save_file({"x": np.ones(2)}, file, metadata=metadata)
    with pytest.raises(BundleError, match="no usable position"):
        read_state_file(file, model_digest="aa")


def test_damage_is_found(file: Path) -> None:
    """A flipped bit in every byte: of the tensors, the position, the note, the header."""
    good = file.read_bytes()
    for cut in (0, 7, 60, len(good) - 1):
        file.write_bytes(good[:cut])
        with pytest.raises(BundleError):
            read_state_file(file, model_digest="aa")
    rng = np.random.default_rng(0)
    for place in range(len(good)):
        broken = bytearray(good)
        broken[place] ^= 1 << rng.integers(8)
        file.write_bytes(bytes(broken))
        with pytest.raises(BundleError):
            read_state_file(file, model_digest="aa")


def test_a_flipped_bit_is_named_as_damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"is damaged: its content does not match") as caught:
        read_state_file(file, model_digest="aa")
    assert "save the state anew" in str(caught.value.hint)


def test_files_of_before_the_checksum_are_read(file: Path) -> None:
    old = {"format": "ringexport-state", "format_version": "1", "model_digest": "aa", "note": "n"}
    save_file(load_file(file), file, metadata=old)
    found = read_state_file(file, model_digest="aa")
    assert found.note == "n"
    assert_same(found.snapshot.tensors["recurrent_state.0"], SNAPSHOT.tensors["recurrent_state.0"])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        read_state_file(tmp_path / "none", model_digest="aa")


def test_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(fd: int) -> None:
        del fd
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_state_file(file, SNAPSHOT, model_digest="aa")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_state_file(tmp_path / "none" / "x", SNAPSHOT, model_digest="aa")


def test_snapshots_that_do_not_fit_are_refused(engine: Engine) -> None:
    state = engine.runner.new_state(1)
    engine.runner.prefill([[1, 2, 3]], None, state)
    good = state.snapshot()
    name = "kv_cache.2.key"
    with pytest.raises(ShapeError, match="2 rows, the state 1"):
        state.restore(good.rows([0, 0]))
    with pytest.raises(ShapeError, match=r"kv_cache\.2\.key"):
        state.restore(
            StateSnapshot(
                position=good.position,
                tensors={key: value for key, value in good.tensors.items() if key != name},
            )
        )
    with pytest.raises(ShapeError, match=r"expected floating point \[1, 2, 3, 16\]"):
        state.restore(
            StateSnapshot(
                position=good.position,
                tensors=dict(good.tensors) | {name: good.tensors[name][:, :, :2]},
            )
        )
    for position in (-1, 4097):
        with pytest.raises(ContextLengthError, match=f"position {position}"):
            state.restore(StateSnapshot(position=np.array([position]), tensors=good.tensors))
    assert state.position.tolist() == [3]
