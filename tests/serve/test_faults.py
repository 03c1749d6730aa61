"""Whatever clients do: a clear error, nothing about the inside, and no harm to the others."""

import contextlib
import json
import logging
import socket
import string
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringexport.errors import QueueFullError, RingExportError
from ringexport.runtime.session import Engine
from tests.serve.conftest import NAME, ROOT, Script, Scripted, Serve, wait_until

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
COMPLETION = {"model": NAME, "prompt": "Hi"}


def post(server: Scripted, body: object, path: str = "chat/completions", **more: Any) -> Any:
    return server.http.post(f"{server.base_url}/{path}", json=body, timeout=20, **more)


def send(server: Scripted, data: bytes, headers: dict[str, str] | None = None) -> Any:
    headers = {"Content-Type": "application/json", **(headers or {})}
    url = f"{server.base_url}/chat/completions"
    return server.http.post(url, content=data, headers=headers)


def refused(answer: Any, status: int, *texts: str) -> dict[str, Any]:
    """Check the form of an error and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for text in texts:
        assert text in error["message"]
    assert "Traceback" not in answer.text
    assert "secret" not in answer.text
    assert str(ROOT) not in answer.text
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "function"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages"),
        ({"n": 2}, "n"),
        ({"n": 1.0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"top_k": 0.5}, "top_k"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "strict"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"chat_template_kwargs": {"enable_thinking": True, "thinking_option": "off"}}, "kwargs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"evil": 1}}, "chat_template_kwargs.evil"),
        ({"temprature": 1}, "temprature"),
        ({"\ud800": 1}, ""),
    ],
)
def test_wrong_fields(scripted: Scripted, change: dict[str, Any], param: str) -> None:
    error = refused(send(scripted, json.dumps(CHAT | change).encode()), 400)
    assert param in error["param"]
    assert scripted.batching.tickets == []


def test_a_misspelt_field_is_named(scripted: Scripted) -> None:
    refused(post(scripted, CHAT | {"temprature": 1}), 400, "did you mean 'temperature'?")


@pytest.mark.parametrize(
    "change",
    [{"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"prompt": ["a", "b"]}, {"prompt": [99999]}],
)
def test_wrong_completions(scripted: Scripted, change: dict[str, Any]) -> None:
    error = refused(post(scripted, COMPLETION | change, "completions"), 400)
    assert error["param"] in change


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "the request is a list"),
        (b'{"n": NaN}', "NaN"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "too long"),
        (b"null", "the request is null"),
    ],
)
def test_bad_json(scripted: Scripted, data: bytes, text: str) -> None:
    refused(send(scripted, data), 400, text)


def test_too_many_values(scripted: Scripted) -> None:
    """They would stop the event loop for a second, and every stream with it."""
    error = refused(send(scripted, b"[" + b"0," * 1_000_001 + b"0]"), 413, "1,000,000 commas")
    assert error["code"] == "request_too_large"
    refused(send(scripted, b"[" + b"0," * 1_000_000 + b"0]"), 400, "the request is a list")


def test_text_that_is_no_unicode(scripted: Scripted) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    refused(send(scripted, body), 400, "lone surrogate")


def test_other_types_of_body(scripted: Scripted) -> None:
    data = json.dumps(CHAT).encode()
    refused(send(scripted, data, {"Content-Type": "text/plain"}), 415, "application/json")
    refused(send(scripted, data, {"Content-Encoding": "gzip"}), 415, "compressed")


def test_wrong_places(scripted: Scripted) -> None:
    refused(scripted.http.get(f"{scripted.url}/v1/nothing"), 404)
    answer = scripted.http.get(f"{scripted.base_url}/chat/completions")
    assert refused(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    refused(scripted.http.post(scripted.url), 405)
    refused(post(scripted, CHAT | {"model": "gpt"}), 404, "there is no model 'gpt'")


def test_the_key(serve_script: Serve) -> None:
    server = serve_script(api_key="sesame-open")
    for header in ("", "Bearer", "Bearer sesame", "Bearer sesame-opens", "Basic sesame-open"):
        error = refused(post(server, CHAT, headers={"Authorization": header}), 401)
        assert error["code"] == "invalid_api_key"
    refused(server.http.get(f"{server.url}/metrics"), 401)
    refused(server.http.get(f"{server.url}/v1/nothing"), 401)
    for path in ("/health", "/"):
        assert server.http.get(f"{server.url}{path}").status_code == 200
    good = {"Authorization": "bearer sesame-open"}
    assert post(server, CHAT, headers=good).status_code == 200


def test_nobody_is_sent_elsewhere(scripted: Scripted) -> None:
    headers = {"Host": "evil.example"}
    refused(scripted.http.get(f"{scripted.base_url}/models/", headers=headers), 404)
    refused(scripted.http.post(f"{scripted.base_url}/chat/completions/", headers=headers), 404)


def test_names_of_other_machines(serve_script: Serve) -> None:
    """DNS rebinding: a page of evil.example makes its own name lead here."""
    server = serve_script(local_only=True)
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.x", "["):
        answer = server.http.get(f"{server.url}/v1/models", headers={"Host": host})
        assert refused(answer, 403)["code"] == "host_not_allowed"
    for host in ("localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:1", "[::1]:8000"):
        answer = server.http.get(f"{server.url}/v1/models", headers={"Host": host})
        assert answer.status_code == 200


def test_two_lengths(scripted: Scripted) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Length": "3"}
    url = f"{scripted.base_url}/chat/completions"
    answer = scripted.http.post(url, headers=headers, content=iter([json.dumps(CHAT).encode()]))
    assert refused(answer, 400, "two lengths")["code"] == "bad_http"


def test_large_headers(scripted: Scripted) -> None:
    answer = scripted.http.get(f"{scripted.url}/health", headers={"X-Large": "x" * 10_000})
    refused(answer, 431, "8,192 bytes")
    answer = scripted.http.get(f"{scripted.url}/health", headers={"X-Large": "x" * 100_000})
    refused(answer, 431 if answer.status_code == 431 else 400)


def test_large_bodies(serve_script: Serve) -> None:
    server = serve_script(max_body_bytes=10_000)
    for size in (10_001, 70_000, 1_000_000):
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            refused(send(server, b" " * size), 413, "10,000 bytes")
    refused(send(server, json.dumps(CHAT).encode() + b" " * 20_000), 413)

    def parts() -> Any:
        for _ in range(40):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    url = f"{server.base_url}/chat/completions"
    refused(server.http.post(url, content=parts(), headers=headers), 413)
    assert send(server, json.dumps(CHAT).encode() + b" " * 9_000).status_code == 200


def test_long_prompts(scripted: Scripted, serve_script: Serve) -> None:
    long = [{"role": "user", "content": "word " * 20_000}]
    error = refused(post(scripted, {"messages": long}), 400, "8,192")
    assert error["code"] == "context_length_exceeded"
    server = serve_script(max_prompt_tokens=20, max_new_tokens=10)
    refused(post(server, CHAT | {"messages": long}), 400, "allows 20")
    exact = server.http.post(f"{server.base_url}/completions", json={"prompt": [5] * 21})
    refused(exact, 400, "the prompt has 21 tokens, this server allows 20")
    refused(post(server, COMPLETION | {"max_tokens": 11}, "completions"), 400, "allows 10")
    post(server, COMPLETION, "completions")
    assert server.batching.params[0].max_new_tokens == 10


def test_prompts_that_are_far_too_long_are_not_read(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("ringexport.runtime.tokenizer.ModelTokenizer.encode", encode)
    text = "the cat " * 500_000
    chat = {"messages": [{"role": "user", "content": text}]}
    for path, body in (("completions", {"prompt": text}), ("chat/completions", chat)):
        answer = scripted.http.post(f"{scripted.base_url}/{path}", json=body)
        error = refused(answer, 400, "tokens or more, this server allows 8,192")
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi." + " " * 10_000}],
        [{"role": "user", "content": "a"}] * 100,
    ],
    ids=["trimmed", "joined"],
)
def test_messages_that_a_template_makes_short_are_answered(
    serve_script: Serve, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, str]]
) -> None:
    server = serve_script(max_prompt_tokens=20)
    monkeypatch.setattr("ringexport.runtime.session.Engine.chat_prompt", lambda *_, **__: "Hi.")
    answer = post(server, {"messages": messages})
    assert answer.status_code == 200, answer.text


def test_a_model_without_a_template(
    scripted: Scripted, nano: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano.tokenizer, "chat_template", None)
    refused(post(scripted, CHAT), 400, "has no chat template; continue texts with /v1/completions")
    assert post(scripted, COMPLETION, "completions").status_code == 200


def test_a_full_queue(scripted: Scripted) -> None:
    scripted.batching.refusal = QueueFullError("256 requests wait in /srv/secret")
    answer = post(scripted, CHAT)
    assert refused(answer, 429)["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails(scripted: Scripted, stream: bool) -> None:
    scripted.batching.script = Script("one two", error=RingExportError("/srv/secret is broken"))
    answer = post(scripted, CHAT | {"stream": stream})
    if not stream:
        refused(answer, 500, "the model failed")
        return
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_failed"
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text


def test_a_bug(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    scripted.batching.refusal = ZeroDivisionError("secret")
    with caplog.at_level(logging.CRITICAL, "uvicorn.error"):
        answer = post(scripted, CHAT)
    assert refused(answer, 500)["code"] == "bug"
    assert "secret" not in answer.text
    scripted.batching.refusal = None
    assert post(scripted, CHAT).status_code == 200


def test_an_engine_that_has_ended(serve_script: Serve) -> None:
    server = serve_script()
    assert server.http.get(f"{server.url}/health").status_code == 200
    server.batching.close()
    assert server.http.get(f"{server.url}/health").status_code == 503
    answer = post(server, CHAT)
    assert refused(answer, 503)["code"] == "shutting_down"
    assert "retry-after" in answer.headers
    assert server.http.get(f"{server.url}/health").status_code == 503


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [
    "model",
    "messages",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "user",
    "metadata",
    "store",
    "chat_template_kwargs",
    "reasoning_effort",
    "modalities",
    "functions",
    "prompt",
    "echo",
    "best_of",
    "suffix",
]
MESSAGE = ("role", "content", "name", "tool_calls", "reasoning_content", "refusal", "tool_call_id")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_types_in_every_field(scripted: Scripted, data: st.DataObject) -> None:
    path, body = data.draw(
        st.sampled_from([("chat/completions", dict(CHAT)), ("completions", dict(COMPLETION))])
    )
    for name in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        body[name] = data.draw(JSON)
    if path.startswith("chat") and data.draw(st.booleans()):
        keys = data.draw(st.lists(st.sampled_from(MESSAGE), max_size=4))
        body["messages"] = [
            {"role": "user", "content": "x", **{key: data.draw(JSON) for key in keys}}
        ]
    answer = scripted.http.post(
        f"{scripted.base_url}/{path}",
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        refused_form = answer.json()["error"]
        assert refused_form["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(scripted: Scripted, stream: bool) -> None:
    scripted.batching.script = Script("word " * 500, delay=0.02)
    with contextlib.suppress(httpx.ReadTimeout):
        scripted.http.post(
            f"{scripted.base_url}/chat/completions",
            json=CHAT | {"stream": stream},
            timeout=httpx.Timeout(20, read=0.5 if not stream else 0.001),
        )
    wait_until(lambda: bool(scripted.batching.tickets) and scripted.batching.tickets[0].done, 3)
    assert scripted.batching.results[0].stop_reason == "cancelled"


def open_socket(
    server: Scripted, body: dict[str, Any], receive_buffer: int | None = None
) -> socket.socket:
    """Send a request and leave its answer unread."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_slow_reader_is_cut_off_and_stalls_nobody(serve_script: Serve) -> None:
    server = serve_script(send_buffer=4096, max_pending_tokens=64, stall_seconds=20)
    server.batching.script = Script("\n".join(string.ascii_letters * 100), delay=1e-5)
    with open_socket(server, CHAT | {"stream": True}, receive_buffer=2048) as connection:
        wait_until(lambda: bool(server.batching.tickets))
        server.batching.script = Script("quick")
        started = time.monotonic()
        assert post(server, CHAT | {"stream": True}).text.endswith("data: [DONE]\n\n")
        assert time.monotonic() - started < 5
        wait_until(lambda: server.batching.tickets[0].done, 20)
        assert server.batching.tickets[0].result().stop_reason == "cancelled"
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 20):
                pass
    wait_until(
        lambda: "ringexport_http_requests_open 1.0" in server.http.get(f"{server.url}/metrics").text
    )


def test_a_reader_that_takes_nothing_does_not_keep_the_server_alive(
    serve_script: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve_script(send_buffer=4096, max_pending_tokens=10**6, drain_seconds=0.0)
    server.batching.script = Script("\n".join(string.ascii_letters * 100))
    with open_socket(server, CHAT | {"stream": True}, receive_buffer=2048):
        wait_until(lambda: bool(server.batching.results))
        started = time.monotonic()
        server.stop()
    assert time.monotonic() - started < 8
    assert "Traceback" not in caplog.text


def test_heads_that_never_end(serve_script: Serve) -> None:
    server = serve_script(body_seconds=0.4)
    host, _, port = server.url.removeprefix("http://").partition(":")
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    for before, data in ((b"", b""), (b"", whole[:30]), (whole, whole[:30])):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(before)
            received = b"" if before else b'"ok"}'
            while not received.endswith(b'"ok"}'):
                received += connection.recv(4096)
            connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass


def test_a_body_that_never_ends(serve_script: Serve) -> None:
    server = serve_script(body_seconds=0.3)
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_what_is_no_http(scripted: Scripted) -> None:
    host, _, port = scripted.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"application/json" in answer


def test_the_log_has_no_key_and_no_line_of_the_client(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ringexport.serve.access"):
        scripted.http.get(
            f"{scripted.url}/a%0Aforged%1b[31m", headers={"Authorization": "Bearer hidden"}
        )
        wait_until(lambda: bool(caplog.records))
    lines = [record.getMessage() for record in caplog.records]
    assert any("GET /a\\nforged\\x1b[31m 404" in line for line in lines)
    assert not any("hidden" in line or "\n" in line for line in lines)
