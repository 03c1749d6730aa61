import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringexport.bundle import BundleWriter, EngineBundle
from ringexport.bundle.consistency import _context_length, _log_decay
from ringexport.errors import BundleError, DigestError, RingExportError
from ringexport.ops.decay import DecayIndex, log_decay
from tests.bundle.conftest import MakeBundle
from tests.bundle.samples import FILES, sample_manifest

WEIGHTS = "targets/onnxruntime-cpu/weights.bin"


def test_open_gives_paths_and_facts(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    assert bundle.path(WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert bundle.nbytes == sum(map(len, FILES.values()))
    assert set(bundle.targets) == {"onnxruntime:cpu"}
    assert bundle.source_path == (bundle.directory.parent / "checkpoint").resolve()


def test_a_moved_bundle_opens(make_bundle: MakeBundle, tmp_path: Path) -> None:
    shutil.move(make_bundle().directory, tmp_path / "elsewhere")
    EngineBundle.open(tmp_path / "elsewhere")


def test_unlisted_paths_are_not_handed_out(make_bundle: MakeBundle) -> None:
    with pytest.raises(BundleError, match="has no file"):
        make_bundle().path("../checkpoint/config.json")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        EngineBundle.open(tmp_path / "nowhere")


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(BundleError, match="is a file, a bundle is a directory"):
        EngineBundle.open(tmp_path / "x")


def test_a_path_with_a_null_byte() -> None:
    with pytest.raises(BundleError):
        EngineBundle.open("a\0b")


def test_a_checkpoint_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a ringexport bundle") as caught:
        EngineBundle.open(tmp_path)
    assert "ringexport build" in str(caught.value.hint)


def test_changed_byte(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    path = bundle.path(WEIGHTS)
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestError, match="was changed after the build") as caught:
        EngineBundle.open(bundle.directory)
    assert caught.value.hint
    EngineBundle.open(bundle.directory, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_half_copied_file(make_bundle: MakeBundle, verify: bool) -> None:
    bundle = make_bundle()
    path = bundle.path(WEIGHTS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DigestError, match="has 100 bytes, the manifest says 4,096"):
        EngineBundle.open(bundle.directory, verify=verify)


def test_missing_file(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    bundle.path(WEIGHTS).unlink()
    with pytest.raises(DigestError, match=r"lacks .*weights\.bin: it was not copied completely"):
        EngineBundle.open(bundle.directory)


def test_file_replaced_by_directory(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    bundle.path(WEIGHTS).unlink()
    bundle.path(WEIGHTS).mkdir()
    with pytest.raises(BundleError, match="is not a file inside the bundle"):
        EngineBundle.open(bundle.directory)


def test_link_that_leaves_the_bundle(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle()
    secret = tmp_path / "secret"
    secret.write_bytes(FILES[WEIGHTS])
    bundle.path(WEIGHTS).unlink()
    bundle.path(WEIGHTS).symlink_to(secret)
    with pytest.raises(BundleError, match="is not a file inside the bundle"):
        EngineBundle.open(bundle.directory)


def test_link_loop(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    bundle.path(WEIGHTS).unlink()
    bundle.path(WEIGHTS).symlink_to(bundle.path(WEIGHTS))
    with pytest.raises(BundleError):
        EngineBundle.open(bundle.directory)


def test_extra_file(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.directory / "model" / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"does not list: model/notes\.txt"):
        EngineBundle.open(bundle.directory)


def test_hidden_extra_file_is_ignored(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.directory / ".DS_Store").write_text("x")
    EngineBundle.open(bundle.directory)


def edited(bundle: EngineBundle, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest of a bundle and nothing else."""
    path = bundle.directory / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return bundle.directory


LIES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("context length is 4096", lambda m: m["model"].update(context_length=4096)),
    (
        "context length of onnxruntime:cpu is 65",
        lambda m: m["targets"]["onnxruntime:cpu"]["limits"].update(context_length=65),
    ),
    ("number of layers is 3", lambda m: m["model"].update(num_layers=3)),
    ("vocabulary size is 6", lambda m: m["model"].update(vocab_size=6)),
    ("decay index of the table is hf", lambda m: m["decay"].update(form="hf")),
    (
        "not that of the decay index hf",
        lambda m: (m["decay"].update(form="hf"), m["build"].update(decay_index="hf")),
    ),
    (
        "not that of the decay index x",
        lambda m: (m["decay"].update(form="x"), m["build"].update(decay_index="x")),
    ),
    ("not that of the decay", lambda m: m["decay"]["table"].update({"0": [-0.07, -0.004]})),
    ("not that of the decay", lambda m: m["decay"]["table"].update({"0": [-0.0625]})),
    ("decay table .* has the layers 1", lambda m: m["decay"].update(table={"1": [-1, -1]})),
    ("names no target", lambda m: m.update(targets={})),
    ("has no model/config", lambda m: m["files"].pop(0)),
]


@pytest.mark.parametrize(("message", "change"), LIES, ids=[lie[0] for lie in LIES])
def test_a_manifest_that_lies(
    make_bundle: MakeBundle, message: str, change: Callable[[dict[str, Any]], object]
) -> None:
    directory = edited(make_bundle(), change)
    if message.startswith("has no model"):
        (directory / "model" / "config.json").unlink()
    with pytest.raises(BundleError, match=message) as caught:
        EngineBundle.open(directory)
    assert caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 16, 20, 32])
@pytest.mark.parametrize("form", list(DecayIndex))
def test_the_decay_is_the_one_that_graphs_are_built_with(heads: int, form: DecayIndex) -> None:
    for layer in range(5):
        expected = log_decay(heads, layer, 5, form)
        np.testing.assert_allclose(_log_decay(heads, layer, 5, form), expected, rtol=1e-6)


def test_context_lengths_with_yarn() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    config = {"max_position_embeddings": 16, "rope_scaling": yarn}
    assert _context_length(config) == 64
    assert _context_length({"rope_scaling": {"factor": float("nan")}}) is None
    assert _context_length({}) is None


def test_the_digest_does_not_depend_on_the_place(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    directory = edited(bundle, lambda m: m["source"].update(path="/elsewhere/checkpoint"))
    assert EngineBundle.open(directory).digest == bundle.digest
    directory = edited(bundle, lambda m: m["tool"].update(version="9"))
    assert EngineBundle.open(directory).digest != bundle.digest


def test_binary_manifest(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.directory / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="is not UTF-8") as caught:
        EngineBundle.open(bundle.directory)
    assert caught.value.hint


def test_damaged_manifest_has_a_hint(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.directory / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="is not valid JSON") as caught:
        EngineBundle.open(bundle.directory)
    assert caught.value.hint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "bundle"
    with BundleWriter(path) as writer:
        for file, content in FILES.items():
            writer.path(file).write_bytes(content)
        writer.commit(sample_manifest())
    return path


def open_error(root: Path) -> RingExportError | None:
    try:
        EngineBundle.open(root)
    except RingExportError as error:
        return error
    return None


def check_damage(path: Path, original: bytes, damaged: bytes) -> None:
    """A damaged bundle is refused, unless only facts or white space of the manifest changed."""
    is_manifest = path.name == "manifest.json"
    path.write_bytes(damaged)
    error = open_error(path.parent if is_manifest else path.parents[2])
    path.write_bytes(original)
    if error is None:
        same = damaged == original
        assert same or (is_manifest and json.loads(damaged)["format"] == "ringexport-bundle")
        return
    assert error.exit_code == 3
    assert "\n" not in error.message
    assert error.hint


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fuzz_flipped_bytes_of_the_manifest(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "manifest.json"
    original = path.read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    check_damage(path, original, bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fuzz_cut_and_doubled_manifest(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "manifest.json"
    original = path.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    stop = data.draw(st.integers(0, len(original)))
    check_damage(path, original, original[:start] + original[stop:])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fuzz_damaged_weights(pristine: Path, data: st.DataObject) -> None:
    path = pristine / WEIGHTS
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        damaged = bytearray(original)
        damaged[place] ^= data.draw(st.integers(1, 255))
        check_damage(path, original, bytes(damaged))
    else:
        check_damage(path, original, original[:place])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzz_replaced_values(pristine: Path, data: st.DataObject) -> None:
    """Valid JSON of the right outline with one value replaced by anything."""
    path = pristine / "manifest.json"
    original = path.read_bytes()
    value = json.loads(original)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            node[key] = data.draw(JSON_VALUES)
            break
        node = inner
    check_damage(path, original, json.dumps(value).encode())
