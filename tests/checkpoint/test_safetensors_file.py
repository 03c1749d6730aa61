"""The reader of single safetensors files: right values, and every kind of damage refused."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ringexport.checkpoint.safetensors_file import SafetensorsFile
from ringexport.errors import CheckpointError
from tests.checkpoint.damage import write_file
from tests.numerics import assert_same


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> Any:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return str(caught.value)


def test_reads_what_the_library_writes(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {
        "bf16": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "f16": rng.standard_normal((7,)).astype(np.float16),
        "f32": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile.open(path)
    assert file.tensors.keys() == tensors.keys()
    assert file.size_bytes == path.stat().st_size
    for name, tensor in tensors.items():
        assert_same(file.read(name), tensor)
        info = file.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == tensor.tobytes()


def test_data_may_begin_at_an_odd_byte(tmp_path: Path) -> None:
    header = json.dumps({"x": entry(0, 8)}).encode()
    header += b" " * (1 - len(header) % 2)  # 8 + odd
    data = np.array([1.5, -2.0], np.float32)
    path = write_file(tmp_path / "odd.safetensors", header, data.tobytes())
    np.testing.assert_array_equal(SafetensorsFile.open(path).read("x"), data)


def test_views_are_read_only_and_outlive_close_and_release(tmp_path: Path) -> None:
    data = np.arange(5000, dtype=np.float32)
    path = tmp_path / "weights.safetensors"
    save_file({"x": data, "y": data + 1}, path)
    file = SafetensorsFile.open(path)
    file.release("x")  # nothing is mapped yet
    view = file.read("x")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    file.release("x")
    np.testing.assert_array_equal(view, data)
    file.close()
    np.testing.assert_array_equal(view, data)
    with pytest.raises(CheckpointError, match="was closed"):
        file.read("y")


@pytest.mark.parametrize("size", [0, 9, 40_000])
def test_a_file_that_shrinks_or_grows_while_in_use_is_an_error_not_a_crash(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": np.zeros(5000, np.float32)}, path)
    file = SafetensorsFile.open(path)
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        file.read("x")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot map"):
        file.read("x")


def test_opening_never_reads_the_data(tmp_path: Path) -> None:
    size = 1 << 40  # a sparse terabyte
    header = json.dumps({"x": entry(0, size)}).encode()
    path = write_file(tmp_path / "sparse.safetensors", header)
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    assert SafetensorsFile.open(path).tensors["x"].nbytes == size
    path.unlink()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "has 0 bytes, too few"),
        (b"\0" * 7, "has 7 bytes, too few"),
        (struct.pack("<Q", 0), "a header of 0 bytes"),
        (struct.pack("<Q", 3) + b"{}", "announces a header of 3 bytes, expected from 2 to 2"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "announces a header of 18,446,744"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (struct.pack("<Q", 2) + b"[]", "holds a JSON list, expected an object"),
        (struct.pack("<Q", 2) + b"{]", "is not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "is not UTF-8 text"),
        (struct.pack("<Q", 3) + b"{}\0", "is not valid JSON"),
        (struct.pack("<Q", 50_000) + b"[" * 50_000, "is nested too deeply"),
        (struct.pack("<Q", 2) + b"{}" + b"\0", "is oversized: 11 bytes, expected 10"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_files_without_a_header(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    assert words in refusal(path)


def test_headers_beyond_the_limit_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    assert "a header of 100,000,001 bytes, expected from 2 to 100,000,000" in refusal(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": 1}, "tensor 'x' is described by 1, expected an object of dtype, shape"),
        ({"x": {"dtype": "F32"}}, "expected an object of dtype, shape and data_offsets"),
        ({"x": entry(0, 16) | {"more": 1}}, "expected an object of dtype, shape"),
        ({"__metadata__": {"format": 1}}, "expected an object of strings"),
        ({"__metadata__": "pt"}, "__metadata__ is 'pt'"),
        ({"x": entry(0, 16, [-4])}, "has shape [-4]"),
        ({"x": entry(0, 16, [4.0])}, "has shape [4.0]"),
        ({"x": entry(0, 16, [True] * 2)}, "has shape [True, True]"),
        ({"x": entry(0, 16, [1] * 9)}, "expected at most 8 integers"),
        ({"x": entry(0, 16, [1 << 63, 1 << 63])}, "has shape [9223372036854775808"),
        ({"x": entry(0, 16) | {"shape": 4}}, "has shape 4"),
        ({"x": entry(0, 16) | {"data_offsets": [0]}}, "has data_offsets [0]"),
        ({"x": entry(0, 16) | {"data_offsets": [16, 0]}}, "has data_offsets [16, 0]"),
        ({"x": entry(0, 16) | {"data_offsets": [-4, 12]}}, "has data_offsets [-4, 12]"),
        ({"x": entry(0, 16) | {"data_offsets": "0,16"}}, "has data_offsets '0,16'"),
        ({"x": entry(0, 16, [5])}, "tensor 'x' has 16 bytes, expected 20 for F32 [5]"),
        ({"x": entry(0, 16, [4], "BF16")}, "has 16 bytes, expected 8 for BF16 [4]"),
        ({"x": entry(0, 16, [16], "F8_E5M2")}, "dtype 'F8_E5M2', expected BF16, F16, F32"),
        ({"x": entry(0, 16, [2], "I16")}, "dtype 'I16'"),
        ({"x": entry(0, 16, [2], ["F32"])}, "dtype ['F32']"),
        ({"x": entry(0, 8)}, "is oversized"),
        ({"x": entry(0, 20)}, "is truncated"),
        ({"x": entry(0, 1 << 60)}, "is truncated"),
        ({"x": entry(4, 16)}, "tensor 'x' at byte 84 leaves a hole after the header"),
        ({"x": entry(0, 8), "y": entry(12, 16)}, "leaves a hole after tensor 'x'"),
        ({"x": entry(0, 12), "y": entry(8, 16)}, "overlaps tensor 'x', which ends at"),
        ({"x": entry(0, 16), "y": entry(0, 16)}, "overlaps"),
    ],
    ids=lambda value: repr(value)[:48],
)
def test_headers_that_do_not_describe_16_bytes(
    tmp_path: Path, header: dict[str, Any], words: str
) -> None:
    path = write_file(tmp_path / "bad.safetensors", header, b"\0" * 16)
    # The offset in the message depends on the length of the header.
    assert words.replace("byte 84", f"byte {path.stat().st_size - 12}") in refusal(path)


def test_duplicate_keys(tmp_path: Path) -> None:
    text = json.dumps({"x": entry(0, 16)})[1:-1]
    path = write_file(tmp_path / "bad.safetensors", f"{{{text},{text}}}".encode(), b"\0" * 16)
    assert "holds the key 'x' more than once" in refusal(path)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    assert "is not a regular file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "absent.safetensors")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is not a regular file" in refusal(pipe)
