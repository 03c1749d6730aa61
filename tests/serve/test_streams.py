"""How streams are written: straight to the connection, or by a task that waits for the reader."""

import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ringexport.batching import PieceEvent
from ringexport.serve.protocol import _ChunkWriter
from ringexport.serve.replies import ChatReply, CompletionReply
from tests.serve.conftest import NAME, Script, Scripted

Serve = Callable[..., Scripted]
COMPLETION = {"model": NAME, "prompt": "Hi", "stream": True}
TEXT = "".join(f'{number}. \u65e5\u672c \\ "quoted"\n' for number in range(400))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was written straight to connections."""
    sizes: list[int] = []
    plain = _ChunkWriter.write

    def write(self: _ChunkWriter, data: bytes) -> None:
        sizes.append(len(data))
        plain(self, data)

    monkeypatch.setattr(_ChunkWriter, "write", write)
    return sizes


def ask(server: Scripted, version: str, *, receive_buffer: int | None = None) -> socket.socket:
    """Send a request for a stream and leave its answer unread."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    data = json.dumps(COMPLETION).encode()
    head = (
        f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    connection.settimeout(20)
    return connection


def read(connection: socket.socket, pauses: int = 0) -> bytes:
    """Read to the end, with pauses in between."""
    data = b""
    while part := connection.recv(1 << 12 if pauses else 1 << 20):
        data += part
        if pauses:
            pauses -= 1
            time.sleep(0.05)
    return data


def unchunked(body: bytes) -> bytes:
    """Take the chunks of HTTP/1.1 apart; each has to be as long as it says."""
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        parts.append(body[:count])
        assert body[count : count + 2] == b"\r\n"
        body = body[count + 2 :]
        if count == 0:
            assert not body
            return b"".join(parts)


def text_of(events: bytes) -> str:
    *lines, done, end = events.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(line[6:]) for line in lines]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_pieces_are_written_straight_to_the_connection(
    scripted: Scripted, direct: list[int]
) -> None:
    scripted.batching.script = Script(TEXT[:2000], delay=0.001)
    with ask(scripted, "1.1") as connection:
        head, _, body = read(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert text_of(unchunked(body)) == TEXT[:2000]
    assert len(direct) > 10


def test_a_client_without_chunks_gets_none(scripted: Scripted, direct: list[int]) -> None:
    scripted.batching.script = Script(TEXT[:2000], delay=0.001)
    with ask(scripted, "1.0") as connection:
        head, _, body = read(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert text_of(body) == TEXT[:2000]
    assert not direct


def test_a_reader_that_pauses_gets_everything_in_order(
    serve_script: Serve, direct: list[int]
) -> None:
    server = serve_script(send_buffer=4096, max_pending_tokens=10**6)
    server.batching.script = Script(TEXT * 4, delay=1e-4)
    with ask(server, "1.1", receive_buffer=2048) as connection:
        time.sleep(0.5)
        body = read(connection, pauses=20).partition(b"\r\n\r\n")[2]
    assert text_of(unchunked(body)) == TEXT * 4
    assert direct


def test_a_bug_while_writing_ends_one_stream(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, calls = CompletionReply.chunks, [0]

    def broken(self: CompletionReply, events: Sequence[PieceEvent]) -> list[bytes]:
        calls[0] += 1
        if calls[0] == 4:
            msg = "a bug"
            raise RuntimeError(msg)
        return plain(self, events)

    monkeypatch.setattr(CompletionReply, "chunks", broken)
    scripted.batching.script = Script(TEXT, delay=0.002)
    with caplog.at_level(logging.CRITICAL), ask(scripted, "1.1") as connection:
        data = read(connection)
    assert b"[DONE]" not in data
    assert not data.endswith(b"0\r\n\r\n")
    scripted.batching.script = Script("fine")
    with ask(scripted, "1.1") as connection:
        assert text_of(unchunked(read(connection).partition(b"\r\n\r\n")[2])) == "fine"
    assert scripted.batching.results[0].stop_reason == "cancelled"


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("model", ["m\u00f6del", "the text"])
def test_chunks_that_are_put_together_equal_encoded_ones(
    scripted: Scripted, include_usage: bool, model: str
) -> None:
    tokenizer = scripted.batching.engine.tokenizer
    text = 'a "b" \\ \u65e5\n\x00\ud83d'
    event = PieceEvent(text=text, token_ids=(1,))
    completion = CompletionReply(tokenizer, model, include_usage=include_usage)
    chat = ChatReply(
        tokenizer,
        model,
        thinking=False,
        tools=False,
        stream=True,
        include_usage=include_usage,
    )
    found: list[dict[str, Any]] = [
        json.loads(chunk) for chunk in (*completion.chunks([event]), *chat.chunks([event]))
    ]
    assert found[0]["choices"] == [
        {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
    ]
    assert found[1]["choices"] == [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    for chunk, kind in zip(found, ("text_completion", "chat.completion.chunk"), strict=True):
        assert (chunk["object"], chunk["model"]) == (kind, model)
        assert ("usage" in chunk) == include_usage
