import os
import time
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import pytest

from ringexport.errors import CheckpointError, ConfigError
from ringexport.runtime.chat import ChatTemplate, Message

TEMPLATE = (Path(__file__).parent.parent / "data" / "chat_template.jinja").read_text()
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nYo",
        "tool_calls": [{"name": "f", "arguments": {"a": [1, "é"]}}],
    },
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "user", "content": "More <b>&</b>"},
]


def render(source: str) -> str:
    return ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("tools", [None, [{"name": "f"}]], ids=["plain", "tools"])
def test_published_template_renders_as_in_plain_jinja(
    thinking: bool, tools: list[dict[str, str]] | None
) -> None:
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    plain.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    plain.filters["tojson"] = jinja2.utils.htmlsafe_json_dumps
    chat = [message for message in CHAT if "tool_calls" not in message] if tools else CHAT[:2]
    expected = plain.from_string(TEMPLATE).render(
        messages=chat, tools=tools, enable_thinking=thinking, add_generation_prompt=True
    )
    assert ChatTemplate(TEMPLATE).render(chat, thinking=thinking, tools=tools) == expected


def test_whole_chat() -> None:
    text = ChatTemplate(TEMPLATE).render(CHAT, thinking=False)
    assert text == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>Yo"
        '\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "é"]}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>\n<tool_response>\n1\n</tool_response>"
        "\n<tool_response>\n2\n</tool_response><|role_end|>"
        "<role>HUMAN</role>More <b>&</b><|role_end|><role>ASSISTANT</role>"
    )


def test_messages_are_texts_of_known_roles() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    call = {"name": "f", "arguments": {}}
    text = ChatTemplate(TEMPLATE).render(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        thinking=False,
    )
    assert text.startswith("<role>SYSTEM</role>Be brief.\n")
    assert "<role>HUMAN</role>One\nTwo<|role_end|><role>ASSISTANT</role>\n<tool_call>" in text


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user"}, "the content of message 1 is missing, expected a text"),
        ({"role": "user", "content": None}, "the content of message 1 is missing"),
        ({"role": "user", "content": 5}, "the content of message 1 is of type int"),
        ({"role": "tool", "content": {"a": 1}}, "the content of message 1 is of type dict"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 1 is missing"),
        ({"role": "user", "content": ["a"]}, "message 1 has a part that is no text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "message 1 has a part that is no text",
        ),
        ({"role": "robot", "content": "a"}, "the role of message 1 is 'robot', expected one of"),
        ({"content": "a"}, "message 1 has no role"),
    ],
    ids=str,
)
def test_what_a_template_would_pass_over_is_refused(message: Message, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        ChatTemplate(TEMPLATE).render([*HELLO, message])
    assert caught.value.hint


def test_thinking_opens_a_thought() -> None:
    assert ChatTemplate(TEMPLATE).render(HELLO).endswith("<role>ASSISTANT</role>\n<think>\n")


def test_functions_of_templates() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages | tojson }}{{ thinking_option }}",
        variables={"bos_token": "<s>"},
        now=lambda: datetime(2026, 11, 21, tzinfo=UTC),
    )
    assert template.render(HELLO) == '<s>2026[{"role": "user", "content": "Hello"}]on'


def test_language_features_still_work() -> None:
    assert render("{% for a, b in {'x': 1}.items() %}{{ a ~ b }}{{ loop.last }}{% endfor %}") == (
        "x1True"
    )
    assert render("{% macro m(x) %}<{{ caller() }}{{ x }}>{% endmacro %}"
                  "{% call m(2) %}in{% endcall %}") == "<in2>"  # fmt: skip
    assert render("{% set a, b = 1, [2] %}{{ a + b[0] * 3 }}") == "7"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
                  "{% endfor %}") == "01"  # fmt: skip
    assert render("{{ 'a-b'.split('-') | join('+') }}{{ 'x'.replace('x', 'y') }}") == "a+by"
    assert render("{{ messages | map(attribute='role') | list | length }}{{ 2 ** 3 }}") == "18"
    assert render("{% filter upper %}a{{ 'b' }}{% endfilter %}{{ 'x' * 3 }}") == "ABxxx"
    assert render("{% block a %}{{ 7 % 4 }}{% endblock %}{{ '-'.join(['a', 'b']) }}") == "3a-b"


GROW = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
BIG = "{% set big = 'x' * 1000000 %}"
HALF = "{% set a = 'a' * 1900000 %}"
PATH = "{% set path = '0.' * 500000 ~ '0' %}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "macro": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(40) }}",
    "concat": GROW % ("'aa'", "ns.x ~ ns.x"),
    "add": GROW % ("'aa'", "ns.x + ns.x"),
    "list": GROW % ("[1]", "[ns.x, ns.x]"),
    "tuple": GROW % ("(1,)", "(ns.x, ns.x)"),
    "dict": GROW % ("1", "{1: ns.x, 2: ns.x}"),
    "namespace": GROW % ("1", "namespace(a=[ns.x, ns.x])"),
    "square": GROW % ("9", "ns.x * ns.x"),
    "repeat": "{{ 'x' * 10**9 }}",
    "repeat list": "{{ 10**9 * [1] }}",
    "power": "{{ 9**9**9 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format item": "{{ 'x'['format'](1) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "output": BIG + "{% for i in range(9999) %}{{ big }}{% endfor %}",
    "set block": BIG + "{% set y %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}",
    "template text": "{% for i in range(9999) %}{% for j in range(9) %}"
    + "x" * 10000
    + "{% endfor %}"
    "{% endfor %}",
    "replace": BIG + "{{ big | replace('x', big) }}",
    "replace method": BIG + "{{ big.replace('x', big) }}",
    "join": BIG + "{{ range(9999) | join(big) }}",
    "join method": BIG + "{{ big.join(['a'] * 9999) }}",
    "filter block": "{% filter replace('x', 'x' * 1000000) %}" + "x" * 10000 + "{% endfilter %}",
    "round": "{{ 1|round(1000000000,'floor') }}",
    "round in map": "{{ [1]|map('round',30000000,'ceil')|list }}",
    "round integer": "{{ 1|round(-(10**9)) }}",
    "rfind": HALF + "{{ (a ~ a).rfind('b' ~ a) }}",
    "rsplit": HALF + "{{ (a ~ a).rsplit('b' ~ a) }}",
    "strip": HALF + "{{ ('c' * 1900000).strip(a ~ 'c') }}",
    "trim": HALF + "{{ ('c' * 1900000) | trim(a ~ 'c') }}",
    "dotted attribute": PATH + "{{ (['x'] * 9999) | map(attribute=path) | list }}",
    "replace in map": HALF + "{{ (['x'] * 9999) | map('replace', 'x', a) | list }}",
    "concat of many": HALF + "{{ " + " ~ ".join(["a"] * 6000) + " }}",
    "compare of many": HALF + "{{ " + " + ".join(["('b' in a)"] * 5000) + " }}",
    "hexadecimal": "{{ 0x" + "f" * 90000 + " ** 64 }}",
    "int in map": "{{ ['f' * 3000000] | map('int', 0, 16) | list }}",
    "autoescape": "{% autoescape 9**9**9 %}{% endautoescape %}",
    "many slices": HALF + "{% for i in range(9999) %}{% set b = a[1:] %}{% endfor %}",
    "json depth": "{% set ns = namespace(x=[1] * 90000) %}{% for i in range(18) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
    "tuple keys": "{{ {(1, 2): 3} }}",
    "tuple keys of dict": "{{ dict([((1, 2), 3)]) }}",
    "tuple keys of unique": "{{ [(1, 2)] | unique | list }}",
    "items as a set": "{{ {1: 2}.items() - [(1, 2)] }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ 'x'.expandtabs(10**9) }}",
    "indent": "{{ 'x' | indent(10**9) }}",
    "wordwrap": "{{ 'x' | wordwrap(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice filter": "{{ [1] | slice(10**9, 0) | list }}",
    "many statements": "{% set a = 1 %}" * 5000,
    "many expressions": "{{ 1 }}" * 14000,
    "json indent": "{{ messages | tojson(indent=10**9) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from": "{% from 'os' import path %}",
    "extends": "{% extends '/etc/passwd' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['x'] }}",
    "self": "{{ self.__init__.__globals__ }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "append": "{{ messages.append(1) }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "syntax": "{% for %}",
    "unclosed": "{{ 1",
    "long source": "x" * 100_001,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_template_is_refused_quickly(source: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        render(source)
    assert time.process_time() - start < 8
    assert caught.value.exit_code == 3


def test_template_can_refuse_messages() -> None:
    with pytest.raises(CheckpointError, match="no tools here") as caught:
        render("{{ raise_exception('no tools here') }}")
    assert caught.value.hint is not None


def test_round_and_unique_still_work() -> None:
    assert render("{{ 2.567|round(2) }} {{ 2.5|round(0, 'floor')|int }}") == "2.57 2"
    assert render("{{ 2.11|round(1, 'ceil') }} {{ 25|round(-1, 'ceil') }}") == "2.2 30.0"
    assert render("{{ ['a', 'B', 'b'] | unique | join }}{{ 'a--'.rstrip('-') }}") == "aBa"
    assert render("{{ messages | groupby('role') | map(attribute='grouper') | list }}") == (
        "['user']"
    )
    assert render("{{ messages[-1:][0].content[:-1] }}{{ 'a/b/c'.rsplit('/', 1)[1] }}") == "Hellc"


def test_time_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringexport.runtime.chat_budget.MAX_SECONDS", -1.0)
    with pytest.raises(CheckpointError, match="runs longer than"):
        render("{{ 1 }}")


def test_messages_are_not_changed_and_budget_is_per_rendering() -> None:
    template = ChatTemplate("{% for i in range(9999) %}{{ i }}{% endfor %}")
    assert len({template.render(HELLO) for _ in range(5)}) == 1
    assert HELLO == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("messages", [[], [{"content": "x"}], [{"role": 3}]], ids=str)
def test_bad_messages_are_refused(messages: list[Message]) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate(TEMPLATE).render(messages)


def test_template_is_found(tmp_path: Path) -> None:
    named = {"chat_template": [{"name": "default", "template": "D"}, {"name": "x"}]}
    assert ChatTemplate.find(tmp_path, {}) is None
    found = ChatTemplate.find(tmp_path, named)
    assert found is not None
    assert found.render(HELLO) == "D"
    (tmp_path / "chat_template.jinja").write_text("{{ pad_token }}{{ eos_token }}")
    config = {"pad_token": "P", "eos_token": {"content": "E"}}
    found = ChatTemplate.find(tmp_path, named | config)
    assert found is not None
    assert found.render(HELLO) == "PE"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate.find(tmp_path, {})


@pytest.mark.parametrize("name", [["default"], {"a": 1}, None])
def test_unhashable_template_names_are_refused(tmp_path: Path, name: object) -> None:
    config = {"chat_template": [{"name": name, "template": "D"}]}
    with pytest.raises(CheckpointError, match="expected objects with a name and a template"):
        ChatTemplate.find(tmp_path, config)


def test_template_files_elsewhere_and_pipes_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("secret")
    path = inside / "chat_template.jinja"
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        ChatTemplate.find(inside, {})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        ChatTemplate.find(inside, {})


def test_special_tokens_of_a_config_are_short_texts(tmp_path: Path) -> None:
    config = {"chat_template": "{{ a_token }}", "a_token": [["x"] * 9]}
    found = ChatTemplate.find(tmp_path, config)
    assert found is not None
    assert found.render(HELLO) == ""
    with pytest.raises(CheckpointError, match=r"a_token .* 20,000 characters"):
        ChatTemplate.find(tmp_path, config | {"a_token": "x" * 20_000})
