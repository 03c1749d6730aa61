"""The chat page, in a real browser where there is one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport.serve.page import page_response
from tests.serve.browser import Page, browsing, find_browser
from tests.serve.conftest import Script, Scripted, Serve, wait_until

NEEDS_BROWSER = pytest.mark.skipif(
    find_browser() is None, reason="no browser: install it with apt-get install chromium"
)
ANSWER = """Rings form where a moon comes too close to its planet.

Inside the **Roche limit** the tides pull it apart. For a fluid moon that is about

```python
def roche_limit(radius, planet, moon):
    return 2.44 * radius * (planet / moon) ** (1 / 3)
```

with the densities of both. Saturn's rings lie inside of it, so `moon` there can only be small."""
THOUGHT = "The question is about planetary rings. I should name the Roche limit and its formula."
LAST = "#messages > li:last-child"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    assert program is not None
    with browsing(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: Page, scripted: Scripted) -> Page:
    tab.messages.clear()
    tab.open("about:blank")
    tab.open(f"{scripted.url}/")
    tab.evaluate("sessionStorage.clear()")
    tab.open(f"{scripted.url}/?again")
    tab.wait("document.querySelector('#status').textContent === 'ready'")
    return tab


def say(page: Page, text: str) -> None:
    page.evaluate("document.querySelector('#input').focus()")
    page.type(text)
    page.press("Enter")


def screenshots(tmp_path: Path) -> Path:
    """Where pictures go: a folder of the caller's choice, else one that pytest removes."""
    chosen = os.environ.get("RINGEXPORT_TEST_SCREENSHOTS")
    path = Path(chosen) if chosen else tmp_path
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_the_page_is_one_file_that_loads_nothing_else(scripted: Scripted) -> None:
    answer = scripted.http.get(scripted.url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    text = answer.text
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)|@import|url\(|https?://(?!www.w3.org)", text)
    assert "innerHTML" not in text
    assert len(page_response().body) < 40_000


def test_every_field_has_a_name(scripted: Scripted) -> None:
    text = scripted.http.get(scripted.url).text
    for name in re.findall(r"<(?:input|textarea)[^>]* id=\"(\w+)\"", text):
        inside = re.search(rf"<label[^>]*>(?:(?!</label>).)*id=\"{name}\"", text, re.DOTALL)
        assert inside or f'for="{name}"' in text, name


@NEEDS_BROWSER
def test_an_answer_streams(page: Page, scripted: Scripted, tmp_path: Path) -> None:
    scripted.batching.script = Script(f"{THOUGHT}\n</think>\n\n{ANSWER}", delay=0.004)
    folder = screenshots(tmp_path)
    page.screenshot(folder / "empty.png")
    say(page, "Why does Saturn have rings?")
    page.wait(f"document.querySelector('{LAST} pre') !== null")
    assert page.evaluate("document.querySelector('#send').textContent") == "Stop"
    assert page.evaluate(f"document.querySelector('{LAST}').getAttribute('aria-busy')") == "true"
    picture = page.screenshot(folder / "streaming.png")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    page.wait("document.querySelector('#send').textContent === 'Send'")
    text = page.evaluate(f"document.querySelector('{LAST} > .text').textContent")
    assert "def roche_limit" in text
    assert "```" not in text
    assert text.endswith("can only be small.")
    assert page.evaluate(f"document.querySelector('{LAST} details').open") is False
    page.click(f"{LAST} summary")
    assert page.evaluate(f"document.querySelector('{LAST} details .text').textContent") == THOUGHT
    assert "tokens/s" in page.evaluate(f"document.querySelector('{LAST} .foot').textContent")
    page.screenshot(folder / "done.png")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.screenshot(folder / "dark.png")
    say(page, "And Jupiter?")
    wait_until(lambda: len(scripted.batching.prompts) == 2)
    assert "<role>HUMAN</role>And Jupiter?" in scripted.batching.prompts[1]
    assert "can only be small.<|role_end|>" in scripted.batching.prompts[1]
    assert THOUGHT not in scripted.batching.prompts[1]
    page.press("Escape")
    page.wait("document.querySelector('#send').textContent === 'Send'")
    assert page.messages == []


@NEEDS_BROWSER
def test_stop_keeps_what_was_said(page: Page, scripted: Scripted) -> None:
    scripted.batching.script = Script("word " * 2000, delay=0.005)
    page.click("#thinking")
    say(page, "Go on")
    page.wait(f"document.querySelector('{LAST} > .text').textContent.length > 20")
    page.click("#send")
    page.wait("document.querySelector('#send').textContent === 'Send'")
    assert "stopped" in page.evaluate(f"document.querySelector('{LAST} .foot').textContent")
    wait_until(lambda: scripted.batching.tickets[0].done)
    assert scripted.batching.results[0].stop_reason == "cancelled"
    assert "detailed thinking off" in scripted.batching.prompts[0]


@NEEDS_BROWSER
def test_drawing_a_long_answer_leaves_time_for_the_rest(page: Page, scripted: Scripted) -> None:
    scripted.batching.script = Script("</think>" + "word " * 400, delay=0.005)
    page.evaluate(
        "window.spent = 0; window.plain = render; window.render = (target, text) => {"
        " const began = performance.now(); while (performance.now() - began < 100);"
        " plain(target, text); spent += performance.now() - began; }; 0"
    )
    page.evaluate("window.began = performance.now()")
    say(page, "Go on")
    page.wait(f"document.querySelector('{LAST} > .text').textContent.length > 20")
    page.wait("document.querySelector('#send').textContent === 'Send'")
    assert page.evaluate("spent / (performance.now() - began)") < 0.5
    text = page.evaluate(f"document.querySelector('{LAST} > .text').textContent")
    assert text == "word " * 400


@NEEDS_BROWSER
def test_shift_enter_makes_a_line_and_html_stays_text(page: Page, scripted: Scripted) -> None:
    scripted.batching.script = Script("</think><img src=x onerror=alert(1)> **bold**")
    page.evaluate("document.querySelector('#input').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two <b>")
    page.press("Enter")
    page.wait("document.querySelector('#send').textContent === 'Send' && !running")
    assert "<role>HUMAN</role>one\ntwo <b><|role_end|>" in scripted.batching.prompts[0]
    text = page.evaluate(f"document.querySelector('{LAST} > .text').textContent")
    assert text == "<img src=x onerror=alert(1)> bold"
    assert page.evaluate(f"document.querySelectorAll('{LAST} img').length") == 0


@NEEDS_BROWSER
def test_headings_and_lists(page: Page, scripted: Scripted) -> None:
    text = "# A **bold** heading\n\n- one\n  * two `- three`\n\nhalf - full, 2 * 3 #4\n"
    scripted.batching.script = Script(f"</think>{text}```\n# code\n- code\n```")
    say(page, "Show me")
    page.wait("document.querySelector('#send').textContent === 'Send' && !running")
    body = f"document.querySelector('{LAST} > .text')"
    assert page.evaluate(f"{body}.querySelector('strong').textContent") == "A bold heading"
    assert page.evaluate(f"{body}.querySelectorAll('strong').length") == 1
    shown = page.evaluate(f"{body}.textContent")
    assert (
        shown == "A bold heading\n\n• one\n  • two - three\n\nhalf - full, 2 * 3 #4# code\n- code"
    )


@NEEDS_BROWSER
def test_an_answer_without_text_says_so(page: Page, scripted: Scripted) -> None:
    scripted.batching.script = Script("</think>")
    say(page, "Say nothing")
    page.wait(f"document.querySelector('{LAST} .foot')?.textContent === 'no answer · 1 token'")


@NEEDS_BROWSER
def test_the_key_and_errors(tab: Page, serve_script: Serve) -> None:
    server = serve_script(api_key="sesame")
    tab.open(f"{server.url}/")
    tab.wait("!document.querySelector('#panel').hidden")
    tab.wait("document.querySelector('#status').textContent.includes('API key')")
    tab.evaluate("document.querySelector('#key').focus()")
    tab.type("sesame")
    tab.press("Enter")
    tab.wait("document.querySelector('#status').textContent === 'ready'")
    assert tab.evaluate("document.querySelector('#panel').hidden")
    server.batching.refusal = RuntimeError("a bug with a secret")
    say(tab, "Hello?")
    tab.wait("document.querySelector('.problem') !== null")
    problem = tab.evaluate("document.querySelector('.problem').textContent")
    assert problem == "the server failed on this request"
    assert tab.evaluate("document.querySelector('#input').value") == "Hello?"
