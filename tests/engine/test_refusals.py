"""What cannot run is refused in one sentence, before TensorRT sees it."""

from dataclasses import replace
from pathlib import Path

import pytest

from ringexport.engine.plugins import ABI_VERSION, PLUGIN_LIBRARY_FILE
from ringexport.engine.profile import DEFAULT_PROFILE
from ringexport.engine.table import EngineTable
from ringexport.engine.target import EngineTarget
from ringexport.errors import BackendUnavailableError, BundleError, ConfigError, VersionError
from ringexport.pipeline.inspect import describe
from ringexport.runtime.backends.trt import TrtLimits, check_engine, open_engine, why_not_here
from ringexport.version import __version__

TARGET = EngineTarget("tensorrt-rtx", (80, 89))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engine.plan").write_bytes(b"e" * 100)
    table = EngineTable(
        target=TARGET.name,
        versions={"tensorrt-rtx": "1.7"},
        profile="default",
        engine_bytes=100,
        counts={"RingExperts": 5},
    )
    table.write(tmp_path / "layers.json", ())
    facts = f"version={__version__};abi={ABI_VERSION};kernels=80+89;tensorrt_headers=10.14;"
    (tmp_path / PLUGIN_LIBRARY_FILE).write_text(f"@(#)ringplugins;{facts}")
    return tmp_path


def test_a_complete_engine_passes(folder: Path) -> None:
    assert check_engine(folder, TARGET, 89).version == __version__


@pytest.mark.parametrize(
    ("architecture", "here"), [(90, "a GPU of sm_90"), (None, "no NVIDIA GPU")]
)
def test_an_engine_for_another_gpu(folder: Path, architecture: int | None, here: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        check_engine(folder, TARGET, architecture)
    assert caught.value.message == (
        f"the engine is for tensorrt-rtx:sm_80+sm_89, and this machine has {here}"
    )


def test_a_truncated_engine(folder: Path) -> None:
    (folder / "engine.plan").write_bytes(b"e" * 60)
    with pytest.raises(BundleError, match=r"engine.plan has 60 bytes, expected 100"):
        check_engine(folder, TARGET, 80)


def test_an_engine_without_weights(folder: Path) -> None:
    path = folder / "layers.json"
    path.write_text(path.read_text().replace('"options": {}', '"options": {"strip_plan": true}'))
    with pytest.raises(BundleError, match=r"engine.plan was built without its weights"):
        check_engine(folder, TARGET, 80)


def test_a_missing_engine(folder: Path) -> None:
    (folder / "engine.plan").unlink()
    with pytest.raises(BundleError, match="has 0 bytes, expected 100"):
        check_engine(folder, TARGET, 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layers.json is not valid JSON: Expecting value at line 1, column 1"),
        ("[]", "layers.json holds a JSON list, expected an object"),
        ('{"target": 3}', "layers.json lacks versions, profile, engine_bytes, counts"),
        (None, "cannot read .*layers.json: No such file"),
    ],
)
def test_a_damaged_layer_table(folder: Path, text: str | None, message: str) -> None:
    path = folder / "layers.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(BundleError, match=message) as caught:
        check_engine(folder, TARGET, 80)
    assert caught.value.hint == "copy the bundle again, or build it again"
    assert "Error(" not in caught.value.message


def test_a_layer_table_with_a_wrong_type(folder: Path) -> None:
    path = folder / "layers.json"
    path.write_text(path.read_text().replace('"engine_bytes": 100', '"engine_bytes": "100"'))
    with pytest.raises(BundleError, match=r"has engine_bytes '100'"):
        check_engine(folder, TARGET, 80)


def test_inspect_a_truncated_engine(folder: Path) -> None:
    (folder / "engine.plan").write_bytes(b"")
    with pytest.raises(ConfigError, match="has 0 bytes, expected 100: it is truncated") as caught:
        describe(folder / "engine.plan")
    assert caught.value.hint


def test_plugins_of_another_version(folder: Path) -> None:
    path = folder / PLUGIN_LIBRARY_FILE
    path.write_text(path.read_text().replace(f"version={__version__}", "version=0.0.9"))
    said = rf"is of ringexport 0\.0\.9 with ABI {ABI_VERSION}, expected"
    with pytest.raises(VersionError, match=said):
        check_engine(folder, TARGET, 80)


@pytest.mark.parametrize("kernels", ["90a", "86", "none"])
def test_plugins_without_kernels_for_this_gpu(folder: Path, kernels: str) -> None:
    path = folder / PLUGIN_LIBRARY_FILE
    path.write_text(path.read_text().replace("kernels=80+89", f"kernels={kernels}"))
    with pytest.raises(
        BackendUnavailableError, match=rf"has no kernels for sm_80, only for: {kernels}"
    ):
        check_engine(folder, TARGET, 80)


@pytest.mark.parametrize("rows", [None, 0, -1])
def test_a_manifest_without_a_usable_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    monkeypatch.setattr("ringexport.runtime.backends.trt.device_architecture", lambda: 80)
    limits = DEFAULT_PROFILE.limits(8192) | {"context_length": 8192, "decode_rows": rows}
    given = {name: value for name, value in limits.items() if value is not None}
    with pytest.raises(BundleError, match="no usable limit decode_rows for tensorrt-rtx:sm_80"):
        open_engine(folder, TARGET.name, given, lambda: "digest")


def test_a_row_holds_what_the_model_and_both_profiles_can() -> None:
    limits = TrtLimits(
        context_length=8192,
        decode_rows=1,
        decode_cache_tokens=2048,
        prefill_rows=1,
        prefill_new_tokens=512,
        prefill_logits=1,
        prefill_cache_tokens=1024,
    )
    assert limits.row_tokens == 1024
    assert replace(limits, context_length=512).row_tokens == 512


def test_why_a_target_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringexport.runtime.backends.trt.device_architecture", lambda: 90)
    reason, hint = why_not_here("tensorrt-rtx:sm_89") or ("", "")
    assert reason == "this machine has a GPU of sm_90"
    assert hint
    reason, _ = why_not_here("tensorrt:sm_90") or ("", "")
    assert reason in {"", "tensorrt is not installed"}
    with pytest.raises(BundleError, match="names no architectures"):
        why_not_here("tensorrt:90")


def test_inspect_an_engine(folder: Path) -> None:
    found = describe(folder / "engine.plan")
    assert found.kind == "engine"
    assert found.facts["target"] == TARGET.name
    assert found.tables[0].rows == (("RingExperts", 5),)
