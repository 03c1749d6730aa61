"""The whole way with ring-nano: HTTP, batching, ONNX Runtime; and the command itself."""

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from ringexport.batching import BatchingEngine, BatchingOptions
from ringexport.errors import ConfigError, RingExportError
from ringexport.runtime.runner import Logits
from ringexport.runtime.session import Engine
from ringexport.serve import ServeOptions, Server, bind, create_app
from tests.cli.conftest import Call, assert_refused, call
from tests.serve.conftest import NAME, ROOT, serving

__all__ = ["call"]

PROMPT = "def read_config(path):"
STORY = [{"role": "user", "content": "Tell me a story about a river."}]
POISON = 9


@pytest.fixture
def client(nano_url: str) -> Iterator[Any]:
    with OpenAI(base_url=f"{nano_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def run(call: Call, bundle: Path, *arguments: str) -> Any:
    called = call("run", bundle, *arguments, "--json", "-q")
    assert called.code == 0, called.err
    return called.json


def test_greedy_text_is_that_of_run(client: Any, call: Call, nano_bundle: Path) -> None:
    alone = run(call, nano_bundle, PROMPT, "--max-new-tokens", "40")
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.choices[0].text == alone["text"]
    assert answer.usage.prompt_tokens == alone["prompt_tokens"]
    assert answer.usage.completion_tokens == alone["new_tokens"]
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stream=True
    )
    assert "".join([chunk.choices[0].text for chunk in stream]) == alone["text"]


def test_chat_and_seed_are_those_of_run(client: Any, call: Call, nano_bundle: Path) -> None:
    options = ("--temperature", "0.8", "--top-p", "0.95", "--seed", "5", "--max-new-tokens", "30")
    question = STORY[0]["content"]
    alone = run(call, nano_bundle, question, "--chat", "--no-thinking", *options)
    answer = client.chat.completions.create(
        model=NAME,
        messages=STORY,
        temperature=0.8,
        top_p=0.95,
        seed=5,
        max_tokens=30,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert answer.choices[0].message.content == alone["text"]


def test_stop(client: Any, call: Call, nano_bundle: Path) -> None:
    text = run(call, nano_bundle, PROMPT, "--max-new-tokens", "40")["text"]
    stop = text[20:23]
    alone = run(call, nano_bundle, PROMPT, "--max-new-tokens", "40", "--stop", stop)
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == alone["text"] == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client: Any) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2
    )
    logs = answer.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == 5
    assert "".join(logs.tokens) == answer.choices[0].text
    for token, value, top in zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(value)
        assert max(top.values()) == pytest.approx(value)


def test_a_second_turn_uses_the_first(client: Any) -> None:
    long = [{"role": "user", "content": "One line about rivers. " * 60}]
    ask = {"model": NAME, "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(messages=long, **ask)
    again = client.chat.completions.create(messages=long, **ask)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 100
    assert again.choices[0].message == first.choices[0].message


def test_metrics_are_the_sums_of_the_answers(nano: Engine) -> None:
    with (
        BatchingEngine(nano, BatchingOptions(max_batch=2)) as batching,
        serving(nano, batching) as running,
        OpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client,
    ):
        usages: list[Any] = []

        def ask(text: str, size: int) -> None:
            answer = client.completions.create(model=NAME, prompt=text, max_tokens=size)
            usages.append(answer.usage)

        for size in (1, 5, 9):
            ask("The rain in Spain stays mainly in the plain. " * 60, size)
        threads = [threading.Thread(target=ask, args=(f"{n}", 20)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=NAME, prompt="a", n=2)
        text = running.http.get(f"{running.url}/metrics").text
    found = dict(re.findall(r"^ringexport_(\S+) (\S+)$", text, re.MULTILINE))
    assert len(usages) == 9
    cached = [one.prompt_tokens_details.cached_tokens for one in usages]
    for name, expected in {
        "prompt_tokens_total": sum(one.prompt_tokens for one in usages),
        "generated_tokens_total": sum(one.completion_tokens for one in usages),
        "cached_tokens_total": sum(cached),
        "cache_hits_total": sum(map(bool, cached)),
        "cache_misses_total": 9 - sum(map(bool, cached)),
        "submitted_total": 9,
        "finished_total": 9,
        "time_to_first_token_seconds_count": 9,
        "waiting": 0,
        'http_requests_total{path="/v1/completions",status="200"}': 9,
        'http_requests_total{path="/v1/completions",status="400"}': 1,
    }.items():
        assert float(found[name]) == expected, name
    assert sum(cached) > 0


def test_many_at_once_say_what_each_says_alone(nano_url: str) -> None:
    asyncio.run(_ask_many(nano_url))


async def _ask_many(nano_url: str) -> None:
    prompts = [f"{PROMPT}  # {index}" for index in range(12)]

    async with AsyncOpenAI(
        base_url=f"{nano_url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:

        async def ask(prompt: str) -> str:
            stream = await client.completions.create(
                model=NAME, prompt=prompt, max_tokens=20, temperature=0.7, seed=3, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*map(ask, prompts))
        assert [await ask(prompt) for prompt in prompts] == together


def test_an_exception_of_the_runner_fails_one_request(
    nano: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner refuses a prompt with a certain token; others, at the same time, go on."""
    original = type(nano.runner).prefill

    def prefill(self: Any, tokens: Any, lengths: Any, state: Any, **more: Any) -> Logits:
        if POISON in {int(token) for row in tokens for token in row}:
            raise RingExportError("the runner found poison in /srv/secret")
        return original(self, tokens, lengths, state, **more)

    monkeypatch.setattr(type(nano.runner), "prefill", prefill)
    with (
        BatchingEngine(nano, BatchingOptions(max_batch=4)) as batching,
        serving(nano, batching) as running,
        OpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client,
    ):
        texts: list[str] = []

        def ask() -> None:
            answer = client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=60, temperature=0
            )
            texts.append(answer.choices[0].text)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=NAME, prompt=[1, POISON, 2], max_tokens=5)
            assert "secret" not in str(caught.value)
        for thread in threads:
            thread.join(30)
        ask()
    assert len(texts) == 4
    assert len(set(texts)) == 1


def start_command(
    bundle: Path, *arguments: str, open_files: tuple[int, int] | None = None
) -> tuple["subprocess.Popen[str]", str]:
    """Start `ringexport serve` and return it with its URL; with soft and hard limits of files."""
    limit: list[str] = []
    if open_files is not None:
        limits = "ulimit -Sn {}; ulimit -Hn {}; ".format(*open_files)
        limit = ["sh", "-c", limits + 'exec "$@"', "sh"]
    command = [sys.executable, "-m", "ringexport", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*limit, *command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RINGEXPORT_THREADS": "1",
            "RINGEXPORT_API_KEY": "sesame",
        },
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:\d+)\n", line)
    assert found, (line, process.stderr and process.stderr.read())
    return process, found[2]


@pytest.mark.parametrize(("drain", "tokens"), [("90", 120), ("0", 400)])
def test_terminated_under_load(nano_bundle: Path, drain: str, tokens: int) -> None:
    process, url = start_command(nano_bundle, "--drain", drain)
    headers = {"Authorization": "Bearer sesame"}
    ends: list[str] = []
    begun = threading.Semaphore(0)
    body = {
        "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True
    }  # fmt: skip

    def ask() -> None:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
        ) as answer:
            lines = []
            for line in answer.iter_lines():
                if line:
                    if not lines:  # once for each stream: all of them have begun
                        begun.release()
                    lines.append(line)
            ends.append(lines[-1])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=30)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert len(ends) == len(threads)
    if drain == "90":
        assert set(ends) == {"data: [DONE]"}
    else:
        assert all('"code":"shutting_down"' in line for line in ends)
    assert "Traceback" not in err
    assert "POST /v1/completions 200" in err
    assert "sesame" not in err


def test_a_second_signal_does_not_wait(nano_bundle: Path) -> None:
    process, url = start_command(nano_bundle, "--drain", "60", "-q")
    body = {"prompt": PROMPT, "max_tokens": 8000, "stream": True, "ignore_eos": True}
    headers = {"Authorization": "Bearer sesame"}
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "shutting_down" in [line for line in lines if line][-1]
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of files to set there")
def test_more_connections_than_files(nano_bundle: Path) -> None:
    process, url = start_command(nano_bundle, open_files=(64, 96))
    address = (url.removeprefix("http://").partition(":")[0], int(url.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(address, timeout=5))
        time.sleep(0.5)
        late = stack.enter_context(socket.create_connection(address, timeout=5))
        answer = late.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"too_many_files" in answer
        time.sleep(2)
    end = time.monotonic() + 10
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                break
        assert time.monotonic() < end
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.count("too many open files") == 1
    assert "Traceback" not in said
    assert len(said) < 2000


def test_what_the_command_refuses(call: Call, nano_bundle: Path) -> None:
    assert_refused(call("serve", nano_bundle / "no", "--port", "0"), 3, "no")
    refused = call("serve", nano_bundle, "--api-key", "two words")
    assert_refused(refused, 3, "API key")
    assert "two words" not in refused.err
    assert_refused(call("serve", nano_bundle, "--api-key", ""), 3, "API key")
    refused = call("serve", nano_bundle, "--model-name", "")
    assert_refused(refused, 3, "the model's name is", "hint: give another --model-name")
    assert_refused(call("serve", nano_bundle, "--host", "256.0.0.1"), 3, "256.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(call("serve", nano_bundle, "--port", port), 3, "already in use")
    assert_refused(call("serve", nano_bundle, "--drain", "nan"), 3, "drain_seconds")


def test_a_port_that_another_server_took_meanwhile(nano: Engine) -> None:
    """Two sockets can have an address, but only one of them can listen there."""
    options = ServeOptions()
    with bind("127.0.0.1", 0) as mine, BatchingEngine(nano) as batching:
        port = mine.getsockname()[1]
        with bind("127.0.0.1", port) as other:
            other.listen()
            server = Server(create_app(nano, batching, options), batching, options)
            with pytest.raises(ConfigError, match="address already in use"):
                server.run(sockets=[mine])


@pytest.mark.parametrize("place", ["main", "thread"])
def test_garbage_of_before_is_not_looked_through_while_it_serves(nano: Engine, place: str) -> None:
    options = ServeOptions()
    frozen: list[int] = []
    with bind("127.0.0.1", 0) as mine, BatchingEngine(nano) as batching:
        app = create_app(nano, batching, options)
        server = Server(
            app, batching, options, on_start=lambda: frozen.append(gc.get_freeze_count())
        )
        server.should_exit = True
        if place == "main":
            server.run(sockets=[mine])
        else:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [mine]})
            thread.start()
            thread.join()
    assert [count > 1000 for count in frozen] == [place == "main"]
    assert gc.get_freeze_count() == 0


def test_the_command_needs_its_packages(
    call: Call, nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert_refused(call("serve", nano_bundle), 4, "starlette", "ringexport[serve]")
