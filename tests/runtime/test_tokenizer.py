import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ringexport.errors import CheckpointError, ConfigError
from ringexport.runtime.tokenizer import ModelTokenizer, byte_symbols

VOCAB = 384


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    for path in tiny_checkpoint.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(tokenizer: ModelTokenizer) -> None:
    for text in ("the rain and the sea", "日本語 🦜 e\u0301\n\t ", "<role>HUMAN</role>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_long_text_stops_no_other_thread(tokenizer: ModelTokenizer) -> None:
    ended, turns = threading.Event(), []

    def count() -> None:
        while not ended.wait(0.001):
            turns.append(time.perf_counter())

    thread = threading.Thread(target=count)
    thread.start()
    start = time.perf_counter()
    ids = tokenizer.encode("the rain and the sea " * 50_000)
    stop = time.perf_counter()
    ended.set()
    thread.join()
    assert len(ids) > 50_000
    within = [turn for turn in turns if start < turn < start + 0.8 * (stop - start)]
    assert len(within) > 5


@given(text=st.text(max_size=200))
def test_least_tokens_is_no_more_than_there_are(text: str, tokenizer: ModelTokenizer) -> None:
    assert 0 <= tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_least_tokens_grows_with_the_text(tokenizer: ModelTokenizer, folder: Path) -> None:
    longest = max(map(len, Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()))
    assert tokenizer.least_tokens("x" * (100 * longest)) == 100


def without_newlines(file: dict[str, Any]) -> None:
    """Take the byte of a line break out of the vocabulary."""
    vocabulary = file["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("\u010a")
    file["model"]["merges"] = [
        pair for pair in file["model"]["merges"] if "\u010a" not in str(pair)
    ]


def before_bytes(**entry: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [entry, {"type": "ByteLevel"} | BYTE_LEVEL]}


BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
NEWLINES = {"String": "\n"}


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.update(
            normalizer={"type": "Strip", "strip_left": True, "strip_right": True}
        ),
        lambda file: file["added_tokens"][0].update(rstrip=True),
        lambda file: file.update(pre_tokenizer=before_bytes(type="WhitespaceSplit")),
        lambda file: file.update(
            pre_tokenizer=before_bytes(
                type="Split", pattern=NEWLINES, behavior="Removed", invert=False
            )
        ),
        lambda file: file.update(pre_tokenizer=None),
        without_newlines,
    ],
    ids=["normalizer", "added token", "spaces", "split", "none", "vocabulary"],
)
def test_least_tokens_is_0_where_characters_may_be_dropped(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = folder / "tokenizer.json"
    file = json.loads(path.read_text())
    file["normalizer"] = None
    change(file)
    path.write_text(json.dumps(file))
    tokenizer = ModelTokenizer.open(folder, vocab_size=VOCAB)
    text = file["added_tokens"][0]["content"] + "\n" * 1000
    assert len(tokenizer.encode(text)) < 100
    assert tokenizer.least_tokens(text) == 0


def test_a_split_in_front_of_bytes_keeps_everything(folder: Path) -> None:
    split = before_bytes(type="Split", pattern=NEWLINES, behavior="Isolated", invert=False)
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = ModelTokenizer.open(folder, vocab_size=VOCAB)
    assert 0 < tokenizer.least_tokens("\n" * 1000) <= len(tokenizer.encode("\n" * 1000))


def test_stop_ids_are_those_of_all_files(tokenizer: ModelTokenizer, folder: Path) -> None:
    assert sorted(tokenizer.stop_ids) == [289, 292]
    (folder / "generation_config.json").unlink()
    assert ModelTokenizer.open(folder, vocab_size=VOCAB).stop_ids == {289, 292}


def test_special_tokens_are_left_out_on_request(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode("a<|role_end|>b<think>c")
    assert tokenizer.decode(ids) == "ab<think>c"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|role_end|>b<think>c"


def test_characters_are_never_split(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode("é🦜")
    decoder = tokenizer.decoder()
    assert [decoder.feed(token) for token in ids] == ["", "é", "", "", "", "🦜"]
    assert decoder.flush() == ""


def test_broken_utf8_becomes_the_replacement_character(tokenizer: ModelTokenizer) -> None:
    decoder = tokenizer.decoder()
    first = tokenizer.encode("🦜")[:2]
    assert [decoder.feed(token) for token in first] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert tokenizer.decode([*first, *tokenizer.encode("a")]) == "\ufffda"


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40), st.booleans())
def test_pieces_equal_the_library(
    tokenizer: ModelTokenizer, tiny_checkpoint: Path, ids: list[int], skip: bool
) -> None:
    library = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    found = tokenizer.decode(ids, skip_special_tokens=skip)
    assert found == library.decode(ids, skip_special_tokens=skip)


def test_byte_symbols_are_a_bijection() -> None:
    assert len(set(byte_symbols())) == 256


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.decode([VOCAB - 1]) == ""


def test_lone_surrogate_is_refused(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(ConfigError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_vocabulary_larger_than_the_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'</think>' the id 296, the model has only 290"):
        ModelTokenizer.open(folder, vocab_size=290)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"eos_token_id": 384}, "384 .* out of range"),
        ("config.json", {"eos_token_id": -1}, "-1 .* out of range"),
        ("config.json", {"eos_token_id": "x"}, "'x', expected an id"),
        ("config.json", {"eos_token_id": True}, "True, expected an id"),
        ("config.json", {"eos_token_id": 65}, "65 .* ordinary token"),
        ("config.json", {"eos_token_id": 380}, "380 .* no token"),
        ("generation_config.json", {"eos_token_id": [289, 12]}, "12 .* ordinary token"),
        ("config.json", {"pad_token_id": 291}, "pad_token_id 291"),
        ("tokenizer_config.json", {"eos_token": "<none>"}, "'<none>' as its eos_token"),
        ("tokenizer_config.json", {"bos_token": 7}, "7 as its bos_token"),
        ("tokenizer_config.json", {"chat_template": 3}, "no text"),
        ("tokenizer.json", {"decoder": {"type": "WordPiece"}}, "no|not .*byte-level"),
        ("tokenizer.json", {"decoder": None}, "not describe a byte-level"),
        ("tokenizer.json", {"model": {"type": "Nope"}}, "no usable tokenizer"),
    ],
)
def test_disagreeing_files_are_refused(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelTokenizer.open(folder, vocab_size=VOCAB)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_refused(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        ModelTokenizer.open(folder, vocab_size=VOCAB)


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no file 'tokenizer\.json'"):
        ModelTokenizer.open(folder, vocab_size=VOCAB)


def test_damaged_tokenizers_never_escape_as_other_errors(folder: Path) -> None:
    rng = np.random.default_rng(0)
    good = (folder / "tokenizer.json").read_bytes()
    for _ in range(60):
        broken = bytearray(good)
        for place in rng.integers(0, len(good), 3):
            broken[place] = rng.integers(32, 127)
        (folder / "tokenizer.json").write_bytes(bytes(broken))
        try:
            ModelTokenizer.open(folder, vocab_size=VOCAB)
        except CheckpointError:
            continue


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_links_out_of_the_folder_and_pipes_are_refused(folder: Path, file: str) -> None:
    inside = folder / "inside"
    inside.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, inside)
    (inside / file).unlink()
    (inside / file).symlink_to(folder / file)
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        ModelTokenizer.open(inside, vocab_size=VOCAB)
    (inside / file).unlink()
    os.mkfifo(inside / file)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        ModelTokenizer.open(inside, vocab_size=VOCAB)


def test_the_hugging_face_cache_may_link_to_its_blobs(folder: Path) -> None:
    for root, fine in (("models--a--b", True), ("elsewhere", False)):
        blobs = folder / root / "blobs"
        snapshot = folder / root / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path in folder.glob("*.json"):
            shutil.copy(path, blobs)
            (snapshot / path.name).symlink_to(blobs / path.name)
        if fine:
            ModelTokenizer.open(snapshot, vocab_size=VOCAB)
        else:
            with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
                ModelTokenizer.open(snapshot, vocab_size=VOCAB)


def test_renumbered_added_tokens_are_refused(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    last = data["added_tokens"][-1]
    stored = last["id"]
    last["id"] = stored + 7
    edit(folder / "tokenizer.json", added_tokens=data["added_tokens"])
    with pytest.raises(CheckpointError, match=f"'{last['content']}' the id {stored + 7}") as caught:
        ModelTokenizer.open(folder, vocab_size=VOCAB)
    assert f"gives it {stored}" in caught.value.message
