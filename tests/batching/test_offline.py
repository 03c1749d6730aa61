import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringexport.batching.jsonl import PromptLine, ResultFile, read_prompts
from ringexport.batching.offline import OfflineRun
from ringexport.batching.options import BatchingOptions
from ringexport.cli.main import run_cli
from ringexport.errors import ConfigError, OutputError
from ringexport.progress import NoProgress
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer
from tests.runners import FakeRunner

DEFAULTS = SamplingParams(max_new_tokens=6, ignore_eos=True)


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def results_in(path: Path) -> dict[Any, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{n}", "prompt": f"the rain {n}", "max_new_tokens": n} for n in range(count)]


def run(engine: Engine, source: Path, target: Path, **more: bool) -> OfflineRun:
    ids = [line.id for line in read_prompts(source, DEFAULTS)]
    options = BatchingOptions(max_batch=4, max_queue=3)
    with ResultFile(target, ids) as results:
        done = OfflineRun(engine, results, NoProgress(), options)
        done.run(read_prompts(source, DEFAULTS), **({"chat": False, "thinking": True} | more))
    return done


def test_lines_become_prompts(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl",
        [
            {
                "id": "a",
                "prompt": "x",
                "temperature": 1,
                "seed": 3,
                "stop": ["."],
                "logprobs": 1,
            },
            {"id": 7, "messages": [{"role": "user", "content": "hi"}], "thinking": False},
        ],
    )
    path.write_text("\n" + path.read_text() + "  \n")
    params = SamplingParams(
        max_new_tokens=6, ignore_eos=True, temperature=1, seed=3, stop=["."], logprobs=1
    )
    assert list(read_prompts(path, DEFAULTS)) == [
        PromptLine(id="a", prompt="x", params=params),
        PromptLine(
            id=7, prompt=[{"role": "user", "content": "hi"}], params=DEFAULTS, thinking=False
        ),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "not valid JSON"),
        ("[1]", "list, expected an object"),
        ('{"id": 1, "prompt": "a", "prompt": "b"}', "more than once"),
        ('{"id": 1, "prompt": "a", "top_q": 1}', "'top_q' is unknown; did you mean 'top_p'"),
        ('{"prompt": "a"}', "no id"),
        ('{"id": true, "prompt": "a"}', "no id"),
        ('{"id": 1}', "either a prompt or messages"),
        ('{"id": 1, "prompt": "a", "messages": []}', "either a prompt or messages"),
        ('{"id": 1, "prompt": ""}', "no text, or empty"),
        ('{"id": 1, "prompt": [1]}', "no text, or empty"),
        ('{"id": 1, "messages": []}', "messages are no list"),
        ('{"id": 1, "messages": [{"content": "a"}]}', "messages are no list"),
        ('{"id": 1, "messages": [{"role": "user"}]}', "content of message 0 is missing"),
        ('{"id": 1, "messages": [{"role": "robot", "content": "a"}]}', "role of message 0"),
        ('{"id": 1, "prompt": "a", "thinking": 1}', "thinking is 1"),
        ('{"id": 1, "prompt": "a", "temperature": -1}', "temperature is -1"),
        ('{"id": 1, "prompt": "a", "temperature": NaN}', "NaN"),
        ('{"id": 1, "prompt": "a", "max_new_tokens": "9"}', "max_new_tokens is '9'"),
        ('{"id": 0, "prompt": "a"}', "the id 0 is that of line 1 too"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 0, "prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="has a bad line: line 2: ") as caught:
        list(read_prompts(path, DEFAULTS))
    assert message in str(caught.value)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("x\n" * 1500)
    with pytest.raises(ConfigError, match=r"1,500 bad lines: line 1: .* and 1,495 more"):
        list(read_prompts(path, DEFAULTS))


@pytest.mark.parametrize("name", ["missing", "folder", "pipe"])
def test_input_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot read"):
        list(read_prompts(tmp_path / name, DEFAULTS))


@pytest.mark.parametrize("name", ["folder", "pipe", "missing/file"])
def test_output_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=name):
        ResultFile(tmp_path / name, [])


def test_a_full_disk_is_an_output_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    file = ResultFile.__new__(ResultFile)
    file._path, file._file = Path("/dev/full"), open("/dev/full", "ab", buffering=0)  # noqa: SIM115, PTH123
    with file, pytest.raises(OutputError, match="no space left"):
        file.write({"id": 1})


def test_results_equal_those_of_each_prompt_alone(engine: Engine, tmp_path: Path) -> None:
    values = prompts(20)
    values[3]["logprobs"] = 2
    values[5] |= {"temperature": 1.0, "seed": 5}
    done = run(engine, write_lines(tmp_path / "in", values), tmp_path / "out")
    found = results_in(tmp_path / "out")
    for value in values:
        given = {key: value[key] for key in value if key not in {"id", "prompt"}}
        expected = engine.generate(value["prompt"], SamplingParams(**{"ignore_eos": True, **given}))
        line = found[value["id"]]
        assert (line["text"], line["stop_reason"]) == (expected.text, expected.stop_reason)
        assert line["new_tokens"] == expected.new_tokens == value["max_new_tokens"]
    assert [len(one["top"]) for one in found["p3"]["logprobs"]] == [2] * 3
    assert (done.failed, done.new_tokens) == (0, sum(range(20)))


def test_messages_and_chat(engine: Engine, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    values = [
        {"id": 1, "messages": messages},
        {"id": 2, "messages": messages, "thinking": False},
        {"id": 3, "prompt": "hi"},
        {"id": 4, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    ]
    run(engine, write_lines(tmp_path / "in", values), tmp_path / "out", chat=True)
    found = results_in(tmp_path / "out")
    sizes = [
        len(engine.encode(engine.chat_prompt(messages, thinking=thinking)))
        for thinking in (True, False, True, True)
    ]
    assert [found[number]["prompt_tokens"] for number in (1, 2, 3, 4)] == sizes


def test_a_prompt_that_the_model_refuses_gets_a_line(engine: Engine, tmp_path: Path) -> None:
    values = [*prompts(5), {"id": "long", "prompt": "x " * 5000}]
    done = run(engine, write_lines(tmp_path / "in", values), tmp_path / "out")
    found = results_in(tmp_path / "out")
    assert len(found) == 6
    assert "the context of this model holds 4,096" in found["long"]["error"]
    assert done.failed == 1


@pytest.mark.parametrize("cut", [0, 1, 40, 200, 10_000])
def test_an_interrupted_run_goes_on(engine: Engine, tmp_path: Path, cut: int) -> None:
    source = write_lines(tmp_path / "in", prompts(12))
    run(engine, source, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "out").write_bytes(whole[:cut])
    run(engine, source, tmp_path / "out")
    assert results_in(tmp_path / "out") == results_in(tmp_path / "whole")
    kept = whole[:cut].rpartition(b"\n")[0]
    assert (tmp_path / "out").read_bytes().startswith(kept)


def test_a_result_that_lacks_only_its_end_is_written_again(engine: Engine, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", prompts(4))
    run(engine, source, tmp_path / "out")
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[:-1])
    run(engine, source, tmp_path / "out")
    assert len((tmp_path / "out").read_bytes().splitlines()) == 4
    assert sorted(results_in(tmp_path / "out")) == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "other"}\n',
        '{"id": "a"}\n',
        '{"id": "a", "prompt": "the input itself"}\n',
        '{"id": "a", "prompt": "the input itself"}',
        "x\n",
        "a note without a line's end",
        '{"id": [1]}\n',
        '{"id": true, "text": "b"}\n',
        "{}\n",
        "{}",
    ],
)
def test_results_of_something_else_are_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"line 1 of {path}"):
        ResultFile(path, ["a", 1])
    assert path.read_text() == text


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "out", []), pytest.raises(OutputError, match="another run"):
        ResultFile(tmp_path / "out", [])
    with ResultFile(tmp_path / "out", []):
        pass


def test_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "a"}\r\n\r\n{"id": 2, "prompt": "b"}\r\n')
    assert [line.id for line in read_prompts(source, DEFAULTS)] == [1, 2]


def test_an_id_that_utf8_cannot_hold(engine: Engine, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [{"id": "\ud800", "prompt": "a", "max_new_tokens": 1}])
    run(engine, source, tmp_path / "out")
    assert list(results_in(tmp_path / "out")) == ["\ud800"]
    with ResultFile(tmp_path / "out", ["\ud800"]) as results:
        assert results.finished == {"\ud800"}


def test_a_runner_of_few_rows_refuses_no_prompt(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    engine = Engine(FakeRunner(max_batch=2), tokenizer)
    source = write_lines(tmp_path / "in", prompts(60))
    options = BatchingOptions(max_batch=32, max_queue=8)
    with ResultFile(tmp_path / "out", [f"p{n}" for n in range(60)]) as results:
        done = OfflineRun(engine, results, NoProgress(), options)
        done.run(read_prompts(source, DEFAULTS), chat=False, thinking=True)
    assert done.failed == 0
    assert len(results_in(tmp_path / "out")) == 60


def test_a_hard_link_of_the_input_is_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in", prompts(1))
    (tmp_path / "out").hardlink_to(source)
    files = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert run_cli(["run", "no-bundle", *files]) == 2
    assert "the same file" in capsys.readouterr().err


def test_the_command(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in", prompts(6))
    target = tmp_path / "out"
    command = ["run", str(bundle_path), "--input", str(source), "--output", str(target)]
    assert run_cli([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["skipped"], summary["failed"]) == (6, 0, 0)
    before = target.read_bytes()
    assert run_cli(command) == 0
    shown = capsys.readouterr()
    assert "0 prompts, 6 had results before" in shown.err
    assert shown.out == ""
    assert target.read_bytes() == before
    write_lines(source, [*prompts(6), {"id": "long", "prompt": "x " * 5000}])
    for _ in range(2):  # the second run has nothing to do, but does not hide what failed
        assert run_cli([*command, "--json"]) == 3
        shown = capsys.readouterr()
        assert "1 of 7 prompts failed" in shown.err
        assert json.loads(shown.out)["failed"] == 1


@pytest.mark.parametrize(
    "more",
    [
        ["--input", "x"],
        ["--output", "x"],
        ["text", "--input", "x", "--output", "y"],
        ["--input", "x", "--output", "./x"],
    ],
)
def test_options_that_contradict_each_other(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["run", "no-bundle", *more]) == 2
    assert "--input" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on(
    bundle_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    values = [{"id": n, "prompt": f"the rain {n}", "max_new_tokens": 60} for n in range(300)]
    source, target = write_lines(tmp_path / "in", values), tmp_path / "out"
    arguments = ["run", str(bundle_path), "--input", str(source), "--output", str(target), "-q"]
    command = [sys.executable, "-m", "ringexport", *arguments]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"RINGEXPORT_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not (target.exists() and target.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {2: 130, 15: 143, 9: -9}[number], err
    assert "Traceback" not in err
    done = len(target.read_bytes().splitlines())
    assert 0 < done < 300
    assert run_cli(arguments) == 0
    assert len(results_in(target)) == 300
