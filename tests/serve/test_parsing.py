"""Replies split into reasoning, content and calls, however their text is cut into pieces."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringexport.serve.parsing import Part, ReplyParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "</x>"]}}\n</tool_call>'
TEXTS = (
    "Hello.",
    "",
    "\n\n<think>\nHm.\n</think>\n\nHi",
    "a < b <think> no </think> <tool_",
    f"Look:\n\n{CALL}\n\n{CALL}",
    f"{CALL} and then text",
    "<tool_call>{not json}</tool_call> after",
    '<tool_call>{"name": "f", "arg',
    '<tool_call>{"name": "f"}',
    "trailing \n\n",
    "Hm </think>\n\n\n x",
)


def gather(parts: list[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return reasoning, content and calls without their ids."""
    calls = [(part.call.name, part.call.arguments) for part in parts if part.call]
    reasoning = "".join([part.reasoning for part in parts])
    return reasoning, "".join([part.content for part in parts]), calls


def split(text: str, *, thinking: bool = False, tools: bool = True) -> object:
    parser = ReplyParser(thinking=thinking, tools=tools)
    return gather(parser.feed(text) + parser.flush())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello.", ("", "Hello.", [])),
        ("\n<think>\nHm.\n</think>\n\nHi", ("Hm.", "Hi", [])),
        ("a <think> b", ("", "a <think> b", [])),
        ("<tool_call>{not json}</tool_call>", ("", "<tool_call>{not json}</tool_call>", [])),
        ('<tool_call>{"name": 1}</tool_call>', ("", '<tool_call>{"name": 1}</tool_call>', [])),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}', None),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}', None),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": -Infinity}"}</tool_call>', None),
        ('<tool_call>{"name": "f"}', ("", "", [("f", "{}")])),
        ('<tool_call>{"name": "f", "ar', ("", '<tool_call>{"name": "f", "ar', [])),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>\n', ("", "", [("f", "{}")])),
        ("ends \n", ("", "ends \n", [])),
    ],
)
def test_replies(text: str, expected: object) -> None:
    assert split(text) == (expected or ("", text, []))


def test_open_reasoning() -> None:
    assert split("Hm.\n</think>\n\nHi", thinking=True) == ("Hm.", "Hi", [])
    assert split("Hm.\n", thinking=True) == ("Hm.", "", [])


def test_calls_need_tools() -> None:
    assert split(CALL, tools=False) == ("", CALL, [])
    _, content, calls = split(f"x {CALL} y")  # type: ignore[misc]
    assert content == "x y"
    assert json.loads(calls[0][1]) == {"a": [1, "</x>"]}


@given(
    text=st.one_of(
        st.sampled_from(TEXTS),
        st.lists(
            st.sampled_from(
                ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "\n", " ", "x<"]
            )
        ).map("".join),
    ),
    cuts=st.lists(st.integers(0, 200)),
    thinking=st.booleans(),
    tools=st.booleans(),
)
def test_cuts_do_not_matter(text: str, cuts: list[int], thinking: bool, tools: bool) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parser = ReplyParser(thinking=thinking, tools=tools)
    parts: list[Part] = []
    for start, end in itertools.pairwise(places):
        parts += parser.feed(text[start:end])
    assert gather(parts + parser.flush()) == split(text, thinking=thinking, tools=tools)


@given(st.text())
def test_plain_text_is_not_touched(text: str) -> None:
    if "<think>" not in text and "<tool_call>" not in text:
        assert split(text, tools=False) == ("", text, [])
