"""A real tritonserver serves the repository that ringexport writes."""

import json
import runpy
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ringexport import Engine, SamplingParams
from ringexport.bundle import EngineBundle
from ringexport.cli.main import run_cli
from tests.triton.client import Answer, Conversation, ask, failure
from tests.triton.server import ROOT, Server

pytestmark = pytest.mark.timeout(400)

PROMPTS = ("Once upon a time", "def read_file(path):\n", "The tables below show", "import os\n")
GREEDY = SamplingParams(max_new_tokens=16)


def turns(engine: Engine, texts: Sequence[str], params: SamplingParams = GREEDY) -> list[str]:
    """What a session answers to texts, one after the other."""
    session = engine.session()
    return [session.generate(text, params).text for text in texts]


def test_the_stream_is_what_run_writes(
    server: Server, nano: EngineBundle, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(nano.directory), PROMPTS[0], "--max-new-tokens", "16", "-q"]
    assert run_cli(["run", *arguments]) == 0
    expected = engine.generate(PROMPTS[0], GREEDY)
    assert capsys.readouterr().out.rstrip("\n") == expected.text.rstrip("\n")
    with Conversation(server.grpc, "nano") as conversation:
        conversation.send(text_input=PROMPTS[0], max_new_tokens=16, stream=True)
        seen = [(list(answer.pieces), final) for answer, final in conversation.read()]
        assert len(seen) > 2
        assert [final for _, final in seen] == [False] * (len(seen) - 1) + [True]
        assert "".join(seen[-1][0]) == expected.text
        assert conversation.nothing_more()
        answer = conversation.ask(text_input=PROMPTS[0], max_new_tokens=16, stream=True)
    assert answer.token_ids == list(expected.token_ids)
    assert answer.finish_reason == expected.stop_reason == "length"
    assert answer.prompt_tokens == expected.prompt_tokens
    assert answer.completion_tokens == 16


def test_without_stream_there_is_one_response(server: Server, engine: Engine) -> None:
    expected = engine.generate(PROMPTS[1], GREEDY)
    ids = engine.encode(PROMPTS[1])
    for prompt in ({"text_input": PROMPTS[1]}, {"input_ids": ids}):
        answer = ask(server.grpc, "nano", max_new_tokens=16, **prompt)
        assert answer.pieces == [expected.text]
        assert answer.token_ids == list(expected.token_ids)


def test_sampling_parameters_arrive(server: Server, engine: Engine) -> None:
    params = SamplingParams(
        max_new_tokens=40, temperature=0.8, top_k=50, top_p=0.9, seed=7, stop=(".", "(")
    )
    expected = engine.generate(PROMPTS[2], params)
    answer = ask(
        server.grpc,
        "nano",
        text_input=PROMPTS[2],
        max_new_tokens=40,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        seed=7,
        stop=[".", "("],
        stream=True,
    )
    assert answer.text == expected.text
    assert answer.finish_reason == expected.stop_reason


def test_chats_go_through_the_template(server: Server, engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is a file?"}]
    expected = engine.chat(messages, GREEDY, thinking=False)
    answer = ask(
        server.grpc, "nano", messages=json.dumps(messages), thinking=False, max_new_tokens=16
    )
    assert answer.text == expected.text


def test_interleaved_sessions_do_not_leak(server: Server, engine: Engine) -> None:
    texts = {21: ["Once upon", " and then", " but"], 22: ["import os\n", "def main", "return"]}
    expected = {session: turns(engine, said) for session, said in texts.items()}
    answers: dict[int, list[str]] = {session: [] for session in texts}
    for turn in range(3):
        for session, said in texts.items():
            request = {"text_input": said[turn], "max_new_tokens": 16, "stream": True}
            flags = {"start": turn == 0, "end": turn == 2}
            answer = ask(server.grpc, "nano", session=session, **request, **flags)
            answers[session].append(answer.text)
    assert answers == expected
    assert "there is no session 21" in failure(server.grpc, "nano", session=21, text_input="x")


def test_sessions_at_the_same_time_do_not_leak(server: Server, engine: Engine) -> None:
    def talk(number: int) -> list[str]:
        said = [PROMPTS[number % 4], " and", " or"]
        with Conversation(server.grpc, "nano") as conversation:
            return [
                conversation.ask(
                    session=f"talk-{number}",
                    start=turn == 0,
                    end=turn == 2,
                    text_input=text,
                    max_new_tokens=16,
                    stream=True,
                ).text
                for turn, text in enumerate(said)
            ]

    expected = [turns(engine, [prompt, " and", " or"]) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(talk, range(8))) == expected * 2


def test_start_resets_a_session(server: Server, engine: Engine) -> None:
    first = ask(
        server.grpc, "nano", session=31, start=True, text_input=PROMPTS[0], max_new_tokens=8
    )
    again = ask(
        server.grpc, "nano", session=31, start=True, text_input=PROMPTS[1], max_new_tokens=16
    )
    assert again.text == turns(engine, [PROMPTS[1]])[0]
    assert again.prompt_tokens == len(engine.encode(PROMPTS[1]))
    more = ask(server.grpc, "nano", session=31, text_input=" and", max_new_tokens=2, end=True)
    assert more.prompt_tokens == again.prompt_tokens + 16 + len(engine.encode(" and"))
    assert first.completion_tokens > 0


def test_start_stops_the_running_request(server: Server, engine: Engine) -> None:
    with Conversation(server.grpc, "nano") as conversation:
        conversation.send(
            session=41,
            start=True,
            text_input="a",
            max_new_tokens=3000,
            ignore_eos=True,
            stream=True,
        )
        reading = conversation.read()
        next(reading)
        busy = failure(server.grpc, "nano", session=41, text_input="b")
        assert "still being answered" in busy
        answer = ask(
            server.grpc, "nano", session=41, start=True, text_input=PROMPTS[3], max_new_tokens=16
        )
        assert answer.text == turns(engine, [PROMPTS[3]])[0]
        with pytest.raises(InferenceServerException, match="cancelled"):
            list(reading)


def test_a_request_without_prompt_ends_a_session(server: Server) -> None:
    ask(server.grpc, "nano", session=51, start=True, text_input="a", max_new_tokens=1)
    assert ask(server.grpc, "nano", session=51, end=True).finish_reason == "session_end"
    assert "there is no session 51" in failure(server.grpc, "nano", session=51, text_input="b")


def test_an_idle_session_frees_its_slot(server: Server, engine: Engine) -> None:
    ask(server.grpc, "brief", session=1, start=True, text_input="a", max_new_tokens=2)
    refused = failure(server.grpc, "brief", session=2, start=True, text_input="b")
    assert "there are 1 sessions" in refused
    time.sleep(2.5)
    answer = ask(
        server.grpc, "brief", session=2, start=True, text_input=PROMPTS[0], max_new_tokens=16
    )
    assert answer.text == turns(engine, [PROMPTS[0]])[0]
    assert "idle for more than 2 seconds" in failure(
        server.grpc, "brief", session=1, text_input="c"
    )


# Triton 2.51 never unloads a model after it has refused a request itself, for example for a shape.
BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"text_input": "a", "temperature": -1.0}, "temperature is -1.0"),
    ({"text_input": "a", "max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"text_input": "a", "input_ids": [1]}, "expected one of them"),
    ({"input_ids": [10**9]}, "1000000000"),
    ({"text_input": ""}, "empty"),
    ({}, "no prompt"),
    ({"messages": "[{"}, "not JSON"),
    ({"messages": "[]"}, "at least one message"),
    ({"messages": "[1]"}, "message 0 has no role"),
    ({"text_input": "a", "stop": [""]}, "stop"),
    ({"text_input": "word " * 300_000}, "context"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS)
def test_a_bad_request_touches_no_other(
    server: Server, engine: Engine, request_: dict[str, Any], message: str
) -> None:
    with Conversation(server.grpc, "nano") as other:
        other.send(text_input=PROMPTS[0], max_new_tokens=16, stream=True)
        assert message in failure(server.grpc, "nano", **request_)
        *_, (answer, _) = other.read()
    assert answer.text == turns(engine, [PROMPTS[0]])[0]


def test_a_cancelled_request_stops(server: Server) -> None:
    wanted = 3000
    conversation = Conversation(server.grpc, "nano")
    conversation.send(
        session=61, start=True, text_input="a", max_new_tokens=wanted, ignore_eos=True, stream=True
    )
    next(conversation.read())
    conversation.close(cancel=True)
    deadline = time.monotonic() + 20
    busy = "still being answered"
    while busy and time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            answer = ask(
                server.grpc, "nano", session=61, text_input="b", max_new_tokens=1, end=True
            )
        except InferenceServerException as error:
            assert busy in str(error)  # noqa: PT017 - only this one may be tried again
        else:
            busy = ""
    assert not busy
    assert answer.prompt_tokens < wanted


def test_a_broken_connection_stops_its_request(server: Server) -> None:
    program = (
        "import os; from tests.triton.client import Conversation;"
        f"talk = Conversation({server.grpc!r}, 'brief');"
        "talk.send(text_input='a', max_new_tokens=3000, ignore_eos=True, stream=True);"
        "next(talk.read()); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    begun = time.monotonic()
    ask(server.grpc, "brief", text_input="b", max_new_tokens=1)  # max_batch is 1: it has to wait
    assert time.monotonic() - begun < 8


def test_a_long_session_comes_from_the_cache(server: Server, engine: Engine) -> None:
    ids = (engine.encode(Path(__file__).read_text()) * 2)[:900]
    first = ask(
        server.grpc,
        "nano",
        session=81,
        start=True,
        input_ids=ids,
        max_new_tokens=16,
        ignore_eos=True,
    )
    second = ask(server.grpc, "nano", session=81, end=True, text_input=" and", max_new_tokens=16)
    whole = [*ids, *first.token_ids, *engine.encode(" and")]
    assert second.prompt_tokens == len(whole)
    assert second.cached_tokens >= 512
    alone = ask(server.grpc, "brief", input_ids=whole, max_new_tokens=16)
    assert alone.cached_tokens == 0
    assert second.token_ids == alone.token_ids


def test_two_instances_keep_their_sessions(server: Server, engine: Engine) -> None:
    said = {number: [PROMPTS[number % 4], " and"] for number in range(1, 5)}
    answers: dict[int, list[Answer]] = {number: [] for number in said}
    for turn in range(2):
        for number, texts in said.items():
            flags = {"session": number, "start": turn == 0, "end": turn == 1}
            answers[number].append(
                ask(server.grpc, "pair", text_input=texts[turn], max_new_tokens=16, **flags)
            )
    for number, texts in said.items():
        assert [answer.text for answer in answers[number]] == turns(engine, texts)


def test_the_step_model_gets_the_shapes_of_the_graph(server: Server) -> None:
    inputs = {
        "tokens": np.zeros((1, 3), np.int64),
        "lengths": np.array([[3]], np.int32),
        "position": np.array([[0]], np.int32),
        "logits_index": np.array([[2]], np.int64),
    }
    tensors = []
    for name, array in inputs.items():
        tensors.append(grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer(
            "step_step", tensors, sequence_id=1, sequence_start=True, sequence_end=True
        )
        assert answer.as_numpy("logits").tolist() == [[[2, 1, 1, 2, 3]]]


def test_http_generate_answers(server: Server, engine: Engine) -> None:
    body = json.dumps({"text_input": PROMPTS[0], "max_new_tokens": 16}).encode()
    with urllib.request.urlopen(f"{server.http}/v2/models/nano/generate", body, 30) as response:
        value = json.load(response)
    assert value["text_output"] == turns(engine, [PROMPTS[0]])[0]
    assert value["finish_reason"] == "length"


def test_the_client_of_the_repository(
    server: Server, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    client = runpy.run_path(str(server.log.parent / "nano" / "client.py"))
    client["main"](["Once upon", " and then"], url=server.grpc, session=71)
    first, second = turns(engine, ["Once upon", " and then"], SamplingParams(max_new_tokens=128))
    assert capsys.readouterr().out == f"Once upon{first}\n and then{second}\n"
