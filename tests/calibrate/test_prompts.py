"""Prompt files read strictly, and the same choice of samples every time."""

import json
from pathlib import Path

import pytest

from ringexport.calibrate.prompts import PromptSet, load_prompts, shipped_prompts, tokenize
from ringexport.errors import CalibrationError, CheckpointError

GOOD = '{"id": "1", "text": "one", "source": "s"}'


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def prompts_of(*texts: str) -> PromptSet:
    return PromptSet(name="test", texts=texts, sources=("",) * len(texts))


def test_a_file_of_the_user(tmp_path: Path) -> None:
    text = GOOD + '\n\n{"text": "zwölf\\nlines"}\r\n{"id": "2", "text": " x "}'
    prompts = load_prompts(write(tmp_path, text))
    assert prompts.texts == ("one", "zwölf\nlines", " x ")
    assert prompts.sources == ("s", "", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 holds a JSON list, expected an object"),
        ('"text"', "line 2 holds a JSON str, expected an object"),
        ('{"id": "2"}', "line 2 lacks the key 'text'"),
        ('{"txt": "a"}', "line 2: unknown key 'txt'\nhint: did you mean 'text'?"),
        ('{"text": 3}', "line 2: text is 3, expected a string"),
        ('{"text": "a", "id": 2}', "line 2: id is 2, expected a string"),
        ('{"text": "  \\n"}', "line 2: text is blank"),
        ('{"text": "a", "id": "1"}', "line 2: the id '1' is that of line 1"),
        ("[" * 10_000, "line 2 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_prompts(write(tmp_path, GOOD + "\n" + line + "\n"))
    assert message in str(caught.value)
    assert "mine.jsonl" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b'\xff\xfe{"text": "a"}'])
def test_files_that_hold_no_prompts(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"holds no prompts|is not valid JSON"):
        load_prompts(write(tmp_path, data))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read .*none\.jsonl: No such file"):
        load_prompts(str(tmp_path / "none.jsonl"))


def test_shipped_sets_say_where_they_are_from() -> None:
    names = shipped_prompts()
    assert {"chat", "code", "english"} <= set(names)
    for name in names:
        prompts = load_prompts(name)
        assert len(prompts.texts) >= 64, name
        assert all(prompts.sources), name


def test_sets_are_taken_in_turns() -> None:
    english, code = load_prompts("english"), load_prompts("code")
    both = load_prompts("english+code")
    assert both.name == "english+code"
    assert both.texts[:4] == (english.texts[0], code.texts[0], english.texts[1], code.texts[1])
    assert sorted(both.texts) == sorted((*english.texts, *code.texts))
    assert load_prompts("all").name == "+".join(shipped_prompts())


@pytest.mark.parametrize("name", ["engish", "english+engish"])
def test_unknown_sets_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_prompts(name)
    assert "there is no prompt set 'engish'" in str(caught.value)
    assert "did you mean 'english'?" in str(caught.value)


def test_digest_is_that_of_the_texts() -> None:
    assert prompts_of("a", "bc").digest != prompts_of("ab", "c").digest
    renamed = PromptSet(name="other", texts=("a", "bc"), sources=("x", "y"))
    assert prompts_of("a", "bc").digest == renamed.digest


def test_tokens_are_cut_and_empty_texts_passed_over(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    texts = prompts_of("", "a b c b c", "the end")
    samples = tokenize(texts, path, num_samples=2, max_tokens=3, vocab_size=384)
    assert [len(sample.ids) for sample in samples] == [3, 3]
    one = tokenize(texts, path, num_samples=1, max_tokens=100, vocab_size=384)
    assert [len(sample.ids) for sample in one] == [5]


def test_special_tokens_of_chat_texts_are_one_token(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    texts = prompts_of("<role>HUMAN</role>x<|role_end|>")
    (sample,) = tokenize(texts, path, num_samples=1, max_tokens=100, vocab_size=384)
    known = json.loads(path.read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in known}
    assert sample.ids[0] == ids["<role>"]
    assert sample.ids[-1] == ids["<|role_end|>"]


def test_prompts_without_tokens_are_an_error(tiny_checkpoint: Path) -> None:
    with pytest.raises(CalibrationError, match="hold no tokens"):
        tokenize(
            prompts_of(""),
            tiny_checkpoint / "tokenizer.json",
            num_samples=1,
            max_tokens=1,
            vocab_size=384,
        )


def test_tokenizers_that_do_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    texts = prompts_of("zebra")
    with pytest.raises(CheckpointError, match=r"gives the token \d+, expected less than"):
        tokenize(
            texts,
            tiny_checkpoint / "tokenizer.json",
            num_samples=1,
            max_tokens=9,
            vocab_size=50,
        )
    with pytest.raises(CheckpointError, match=r"there is no .*tokenizer\.json"):
        tokenize(texts, tmp_path / "tokenizer.json", num_samples=1, max_tokens=9, vocab_size=50)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no usable tokenizer"):
        tokenize(texts, tmp_path / "tokenizer.json", num_samples=1, max_tokens=9, vocab_size=50)
