"""Checkpoint folders: what they give when they are good, and what is said when they are not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ringexport.checkpoint import CheckpointWeights, TensorKind
from ringexport.errors import (
    CheckpointError,
    ConfigError,
    MissingTensorError,
    RingExportError,
    ShapeError,
    UnknownTensorError,
)
from tests.checkpoint.damage import INDEX, SHARD_1, SHARD_2, edit_header, edit_json
from tests.checkpoints import make_checkpoint, tensor_shapes, tiny_config
from tests.numerics import assert_same

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def refusal(path: Path, error: type[RingExportError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        CheckpointWeights.open(path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return str(caught.value)


def test_reads_the_tensors_that_were_written(tiny_checkpoint: Path) -> None:
    expected = load_file(tiny_checkpoint / SHARD_1) | load_file(tiny_checkpoint / SHARD_2)
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        assert set(weights.names()) == set(tensor_shapes(tiny_config()))
        for name in weights.names():
            assert_same(weights.read(name), expected[name])
            assert_same(weights.read_f32(name), expected[name].astype(np.float32))
            assert weights.info(name).shape == expected[name].shape
        rows = weights.read_rows("lm_head.weight", 10, 13)
        assert_same(rows, expected["lm_head.weight"][10:13])
        assert weights.read_rows("lm_head.weight", 384, 384).shape == (0, 64)
        weights.check_finite()
    with pytest.raises(CheckpointError, match="was closed"):
        weights.read(EXPERT)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_stored_dtype_and_any_number_of_files(
    tmp_path: Path, stored: str, dtype: Any, shards: int
) -> None:
    path = make_checkpoint(tmp_path, shards=shards, torch_dtype=stored)
    with CheckpointWeights.open(path) as weights:
        assert weights.read(EXPERT).dtype == dtype
        values = weights.read_f32(EXPERT)
        assert values.dtype == np.float32
        assert values.flags.writeable
        names = [file.name for file in weights.files()]
        assert names[0] == "config.json"
        assert (INDEX in names) == (shards > 1)
        assert len(names) == 1 + (shards if shards == 1 else shards + 1)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 8},
        {"tie_word_embeddings": True},
        {"moe_router_enable_expert_bias": False},
        {"first_k_dense_replace": 0},
    ],
    ids=repr,
)
def test_variants_of_the_layout(tmp_path: Path, overrides: dict[str, Any]) -> None:
    with CheckpointWeights.open(make_checkpoint(tmp_path, **overrides)) as weights:
        assert weights.summary().num_parameters == weights.config.num_parameters


def test_summary_adds_up(tiny_checkpoint: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        summary = weights.summary()
    assert summary.num_tensors == 315
    assert summary.dtypes == {"bfloat16": 310, "float32": 5}
    assert list(summary.kinds) == list(TensorKind)
    experts = summary.kinds[TensorKind.ROUTED_EXPERTS]
    assert (experts.num_tensors, experts.num_parameters) == (240, 240 * 16 * 64)
    assert summary.num_bytes == sum(kind.num_bytes for kind in summary.kinds.values())
    assert summary.num_bytes == 2 * summary.num_parameters + 2 * 5 * 16
    sizes = {name: (tiny_checkpoint / name).stat().st_size for name in (SHARD_1, SHARD_2)}
    assert summary.files == sizes


def test_rope_scaling_override(tiny_checkpoint: Path) -> None:
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    with CheckpointWeights.open(tiny_checkpoint, rope_scaling=scaling) as weights:
        assert weights.config.context_length == 8192


def test_requests_for_what_is_not_there(tiny_checkpoint: Path) -> None:
    with CheckpointWeights.open(tiny_checkpoint) as weights:
        for request in (weights.info, weights.read, weights.read_f32, weights.release):
            with pytest.raises(MissingTensorError, match=r"has no tensor 'model\.nothing'"):
                request("model.nothing")
        for start, stop in ((-1, 2), (3, 2), (0, 385)):
            with pytest.raises(ShapeError, match=r"lm_head\.weight has 384 rows"):
                weights.read_rows("lm_head.weight", start, stop)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_nan_and_infinity_are_found_when_data_is_read(
    tmp_path: Path, value: float, stored: str
) -> None:
    path = make_checkpoint(tmp_path, torch_dtype=stored)
    with CheckpointWeights.open(path) as weights:
        info = weights.info(EXPERT)
        weights.check_finite()
    assert info.shape == (16, 64)
    raw = bytearray(info.file.read_bytes())
    for row, column in ((2, 5), (9, 1)):
        start = info.offset + info.dtype.itemsize * (64 * row + column)
        raw[start : start + info.dtype.itemsize] = np.array(value, info.dtype).tobytes()
    info.file.write_bytes(raw)
    with CheckpointWeights.open(path) as weights:
        assert weights.read(EXPERT).shape == (16, 64)  # raw access stays possible
        weights.check_finite(["model.norm.weight"])
        for request in (lambda: weights.read_f32(EXPERT), weights.check_finite):
            with pytest.raises(CheckpointError) as caught:
                request()
            assert f"tensor {EXPERT} holds {value} at [2, 5]" in str(caught.value)
            assert info.file.name in str(caught.value)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


def in_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda path: edit_json(path / name, edit)


def in_map(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return in_json(INDEX, lambda index: edit(index["weight_map"]))


def only_files(*names: str) -> Callable[[Path], None]:
    def replace_weights(path: Path) -> None:
        for name in (INDEX, SHARD_1, SHARD_2):
            (path / name).unlink()
        for name in names:
            (path / name).write_bytes(b"")

    return replace_weights


def repeat_shard(path: Path) -> None:
    shutil.copy(path / SHARD_1, path / SHARD_2)


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    """Rename a tensor in its file and in the index, so that only the config contradicts."""

    def rename(path: Path) -> None:
        shard = []

        def in_index(index: dict[str, Any]) -> None:
            shard.append(index["weight_map"].pop(old))
            index["weight_map"][new] = shard[0]

        edit_json(path / INDEX, in_index)
        edit_header(path / shard[0], lambda header: header.update({new: header.pop(old)}))

    return rename


def reshape_tensor(name: str, shape: list[int]) -> Callable[[Path], None]:
    return lambda path: edit_header(path / SHARD_1, lambda h: h[name].update(shape=shape))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (remove("config.json"), CheckpointError, "has no file 'config.json'"),
        (truncate("config.json", 100), ConfigError, "is not valid JSON"),
        (remove(SHARD_2), CheckpointError, f"has no file '{SHARD_2}'"),
        (remove(INDEX), CheckpointError, f"but no {INDEX}"),
        (truncate(INDEX, 1000), CheckpointError, "is not valid JSON"),
        (truncate(SHARD_2, 300_000), CheckpointError, "is truncated: 300,000 bytes"),
        (truncate(SHARD_2, 600_000), CheckpointError, "is oversized: 600,000 bytes"),
        (truncate(SHARD_2, 0), CheckpointError, "has 0 bytes, too few"),
        (only_files(), CheckpointError, "holds neither model.safetensors nor"),
        (
            only_files("pytorch_model.bin"),
            CheckpointError,
            "holds only pickled weights: 'pytorch_model.bin'",
        ),
        (only_files("a.pt", "b.pt", "c.pth", "d.ckpt"), CheckpointError, "'c.pth' and 1 more"),
        (only_files("model.safetensors"), CheckpointError, "has 0 bytes, too few"),
        (
            lambda path: (path / "model.safetensors").touch(),
            CheckpointError,
            "holds both model.safetensors and an",
        ),
        (in_json(INDEX, lambda i: i.pop("weight_map")), CheckpointError, "weight_map is None"),
        (in_json(INDEX, lambda i: i.update(weight_map={})), CheckpointError, "weight_map is {}"),
        (in_json(INDEX, lambda i: i.update(weight_map=[])), CheckpointError, "weight_map is []"),
        (in_map(lambda m: m.update({EXPERT: 3})), CheckpointError, "is in 3, expected a"),
        (
            in_map(lambda m: m.update({EXPERT: "w.bin"})),
            CheckpointError,
            "is in 'w.bin', expected a .safetensors file",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "../../w.safetensors"})),
            CheckpointError,
            "names the file '../../w.safetensors', expected a plain file name",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "/etc/w.safetensors"})),
            CheckpointError,
            "names the file '/etc/w.safetensors'",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "sub\\w.safetensors"})),
            CheckpointError,
            "expected a plain file name",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "x\0.safetensors"})),
            CheckpointError,
            "expected a plain file name",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "\ud800.safetensors"})),
            CheckpointError,
            "has no file '\\ud800.safetensors'",
        ),
        (
            in_map(lambda m: m.update({EXPERT: "x" * 5000 + ".safetensors"})),
            CheckpointError,
            "has no file 'xxx",
        ),
        (
            in_map(lambda m: m.update({EXPERT: SHARD_2})),
            MissingTensorError,
            "1 tensor listed in ",
        ),
        (
            in_map(lambda m: m.update({"model.extra": SHARD_2})),
            MissingTensorError,
            f"'model.extra' (expected in {SHARD_2})",
        ),
        (in_map(lambda m: m.pop(EXPERT)), UnknownTensorError, f"'{EXPERT}' (in {SHARD_1})"),
        (repeat_shard, CheckpointError, f"is in both {SHARD_1} and {SHARD_2}"),
        (
            rename_tensor(EXPERT, "model.layers.1.mlp.experts.3.upp_proj.weight"),
            UnknownTensorError,
            "holds 1 tensor that its config does not explain: 'model.layers.1.mlp.experts.3.upp",
        ),
        (
            rename_tensor(EXPERT, "model.layers.6.enorm.weight"),
            UnknownTensorError,
            "multi-token-prediction (MTP) layers",
        ),
        (
            rename_tensor(EXPERT, "model.mtp.layers.0.enorm.weight"),
            UnknownTensorError,
            "multi-token-prediction (MTP) layers",
        ),
        (
            rename_tensor(EXPERT, EXPERT.replace("weight", "weight_scale_inv")),
            UnknownTensorError,
            "this checkpoint is quantized",
        ),
        (
            rename_tensor(EXPERT, "model.layers.1.mlp.switch_mlp.up_proj.weight"),
            UnknownTensorError,
            "mlx export",
        ),
        (
            in_json("config.json", lambda c: c.update(num_hidden_layers=7)),
            MissingTensorError,
            "lacks 59 of 374 tensors: 'model.layers.6.input_layernorm.weight'",
        ),
        (
            in_json("config.json", lambda c: c.update(num_hidden_layers=3)),
            UnknownTensorError,
            "or num_hidden_layers is wrong",
        ),
        (
            in_json("config.json", lambda c: c.update(layer_group_size=2)),
            UnknownTensorError,
            "config.json and weights are of different models",
        ),
        (
            reshape_tensor(EXPERT, [64, 16]),
            CheckpointError,
            f"tensor {EXPERT} has shape [64, 16], expected [16, 64]",
        ),
        (
            in_json("config.json", lambda c: c.update(intermediate_size=80)),
            CheckpointError,
            "[96, 64], expected [80, 64]; 2 tensors more of the wrong shape",
        ),
    ],
)
def test_damaged_folders(
    checkpoint: Path,
    damage: Callable[[Path], None],
    error: type[RingExportError],
    words: str,
) -> None:
    damage(checkpoint)
    message = refusal(checkpoint, error)
    assert words in message
    message.encode()  # printable anywhere


def test_paths_that_are_no_checkpoint_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "inclusionAI" / "Ring-mini-linear-2.0")
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "is not a folder" in refusal(file)
    assert "cannot read" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD_1])
def test_a_pipe_or_folder_in_place_of_a_file_does_not_hang(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert "is not a regular file" in refusal(checkpoint, RingExportError)
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    assert "is not a regular file" in refusal(checkpoint, RingExportError)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD_1])
def test_links_out_of_the_folder_are_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    moved = (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(moved)
    assert f"{name} is a link to {moved}, outside the checkpoint's folder" in refusal(checkpoint)


def test_dangling_and_looping_links(checkpoint: Path) -> None:
    (checkpoint / SHARD_1).unlink()
    for target in ("nowhere", SHARD_1):
        (checkpoint / SHARD_1).unlink(missing_ok=True)
        (checkpoint / SHARD_1).symlink_to(target)
        assert f"has no file '{SHARD_1}'" in refusal(checkpoint)


def test_links_inside_the_folder_and_to_the_folder_are_fine(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / SHARD_1).rename(checkpoint / "blob")
    (checkpoint / SHARD_1).symlink_to("blob")
    (tmp_path / "link").symlink_to(checkpoint)
    CheckpointWeights.open(tmp_path / "link").close()


def test_the_layout_of_the_hugging_face_cache_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc123"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(checkpoint.iterdir()):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    with CheckpointWeights.open(snapshot) as weights:
        assert [file.parent for file in weights.files()] == [snapshot] * 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(checkpoint: Path) -> None:
    (checkpoint / SHARD_1).chmod(0)
    assert "Permission denied" in refusal(checkpoint)
