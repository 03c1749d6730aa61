import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ringexport.bundle import FORMAT_VERSION, FileEntry, Manifest
from ringexport.errors import BundleError, VersionError
from tests.bundle.conftest import MakeBundle

SCHEMA_PATH = Path(__file__).parents[2] / "engines" / "manifest.schema.json"
SCHEMA = json.loads(SCHEMA_PATH.read_text())


def edited(manifest: Manifest, **changes: Any) -> str:
    value = json.loads(manifest.to_json())
    value.update(changes)
    return json.dumps(value)


def test_round_trip_is_exact(make_bundle: MakeBundle) -> None:
    manifest = make_bundle().manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_text_is_canonical(make_bundle: MakeBundle) -> None:
    text = make_bundle().manifest.to_json()
    value = json.loads(text)
    assert text.endswith("}\n")
    assert list(value) == sorted(value)
    assert "created" not in value


def test_equal_inputs_give_equal_bytes(make_bundle: MakeBundle) -> None:
    first, second = make_bundle("a"), make_bundle("b")
    assert first.path("model/config.json") != second.path("model/config.json")
    assert (first.directory / "manifest.json").read_bytes() == (
        second.directory / "manifest.json"
    ).read_bytes()
    assert first.digest == second.digest


def test_unknown_key_names_the_nearest(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match=r"unknown key 'tols'") as caught:
        Manifest.from_json(edited(manifest, tols={}))
    assert caught.value.hint == "did you mean 'tool'?"


def test_unknown_nested_key_names_the_place(manifest: Manifest) -> None:
    value = json.loads(manifest.to_json())
    value["build"]["recipie"] = "fp8"
    with pytest.raises(BundleError, match=r"manifest\.json\.build has an unknown key") as caught:
        Manifest.from_json(json.dumps(value))
    assert caught.value.hint == "did you mean 'recipe'?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "is no bundle manifest: its format is 'zip'"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"format_version": True}, "format_version True"),
        ({"format_version": 0}, "format_version 0"),
        ({"files": {}}, "files is a object, expected a list"),
        ({"versions": {"onnx": 1}}, "versions.onnx is a integer, expected string"),
        ({"tool": None}, "tool is a null, expected an object"),
        ({"files": [{"path": "a", "size": -1, "sha256": "0" * 64}]}, "negative size"),
        ({"files": [{"path": "a", "size": 1, "sha256": "zz"}]}, "no SHA-256"),
    ],
)
def test_wrong_values_are_refused(
    manifest: Manifest, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message.replace(".", r"\.")):
        Manifest.from_json(edited(manifest, **changes))


@pytest.mark.parametrize(
    "name",
    [
        f.name
        for f in dataclasses.fields(Manifest)
        if f.name not in {"created", "files", "quantization"}
    ],
)
def test_missing_keys_are_refused(manifest: Manifest, name: str) -> None:
    value = json.loads(manifest.to_json())
    del value[name]
    with pytest.raises(BundleError):
        Manifest.from_json(json.dumps(value))


def test_newer_format_asks_for_an_upgrade(manifest: Manifest) -> None:
    text = edited(manifest, format_version=FORMAT_VERSION + 1, something_new=1)
    with pytest.raises(VersionError, match="bundle format 2, this version reads up to 1") as caught:
        Manifest.from_json(text)
    assert "upgrade" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"format": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"format": "ringexport-bundle", "format_version": 1e999}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_texts_that_are_no_manifest(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        "./a",
        "a/.",
        "C:/windows",
        "a\\b",
        "a\nb",
        "",
        "a/",
    ],
)
def test_paths_that_leave_the_bundle_are_refused(manifest: Manifest, path: str) -> None:
    entry = {"path": path, "size": 0, "sha256": "0" * 64}
    text = edited(manifest, files=[entry], targets={})
    with pytest.raises(BundleError, match="not a plain path"):
        Manifest.from_json(text)


def test_a_path_listed_twice_is_refused(manifest: Manifest) -> None:
    entry = {"path": "a", "size": 0, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="lists a twice"):
        Manifest.from_json(edited(manifest, files=[entry, entry], targets={}))


def test_a_target_must_name_listed_files(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match=r"does not list among its files"):
        Manifest.from_json(edited(manifest, files=[]))


def test_schema_is_valid_and_accepts_a_bundle(make_bundle: MakeBundle) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(make_bundle().manifest.to_json()), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"format_version": 2},
        {"targets": {}},
        {"files": [{"path": "../a", "size": 0, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": 0, "sha256": "0"}]},
    ],
)
def test_schema_refuses(make_bundle: MakeBundle, change: dict[str, Any]) -> None:
    value = json.loads(make_bundle().manifest.to_json()) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, SCHEMA)


def test_schema_has_the_keys_of_the_code() -> None:
    """Every dataclass of the manifest and its schema have the same keys."""
    import ringexport.bundle.manifest as module

    classes = [
        item
        for item in vars(module).values()
        if dataclasses.is_dataclass(item) and isinstance(item, type)
    ]
    assert FileEntry in classes
    for cls in classes:
        schema = SCHEMA if cls is Manifest else SCHEMA["$defs"][cls.__name__]
        fields = dataclasses.fields(cls)
        assert set(schema["properties"]) == {field.name for field in fields}, cls
        optional = {field.name for field in fields if field.default is None}
        assert set(schema["required"]) == {field.name for field in fields} - optional, cls


def test_a_target_keeps_its_files_in_its_directory(make_bundle: MakeBundle) -> None:
    value = json.loads(make_bundle().manifest.to_json())
    value["targets"]["onnxruntime:cpu"]["directory"] = "elsewhere"
    with pytest.raises(BundleError, match="is not in its directory 'elsewhere'"):
        Manifest.from_json(json.dumps(value))
