"""The web chat in headless Chromium: what people do in it, what a hostile answer cannot do, and what axe says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from puna.data import readers
from puna.generate.sampling import Sampling
from puna.serve.app import State
from puna.serve.guard import Rules, _sha256
from tests import helpers
from tests.serve.stand_in import Script, StandIn, serving, state_of, until

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = """\
<script>window.bad = 1</script> <img src=x onerror="window.bad = 2"> <svg onload="window.bad = 3">

[click](javascript:window.bad=4) ![picture](http://outside.example/x.png) [site](http://outside.example/)

<http://outside.example/auto> <iframe srcdoc="<script>parent.bad = 5</script>"></iframe>

| a | b |
|---|---|
| **bold** | `code <b>` |

```html
<script>window.bad = 6</script>
```
"""


def script(prompt: Sequence[int], sampling: Sampling, sample: int) -> Script:
    text = helpers.tokenizer().decode(prompt).rpartition("[INST] ")[2].removesuffix(" [/INST]")
    if text.startswith("<<SYS>>"):
        return Script([f"System: {text.splitlines()[1]}"])
    if text == "hostile":
        return Script([HOSTILE[i : i + 40] for i in range(0, len(HOSTILE), 40)])
    if text == "slowly":
        return Script(["word "] * 100, delay=0.05)
    if text == "fail":
        return Script(fails_after=2)
    return Script(["You ", "said *", text, "*, ", f"seed {sampling.seed % 1000}."])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def state() -> State:
    rewards = {"helpfulness": lambda dialogs: torch.tensor([0.75]), "safety": lambda dialogs: torch.tensor([0.5])}
    return state_of(StandIn(script, 2048), StandIn(lambda *_: Script(["I ", "am ", "alpaca."])), rewards=rewards)


@pytest.fixture(scope="module")
def url(state: State) -> Iterator[str]:
    with serving(state) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A fresh browser on the page; an error in its console, or a request to anywhere else, fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(10_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith((url, "blob:")) else wrong.append(request.url))
    page.goto(url)
    expect(page.locator(".empty")).to_be_visible()
    yield page
    context.close()
    assert not wrong


def ask(page: Page, text: str) -> None:
    expect(page.locator(".lane").first).to_be_visible()  # the page knows its models
    page.get_by_label("Your message", exact=True).last.fill(text)
    page.keyboard.press("Enter")


def settle(page: Page) -> None:
    """Until the last answer has ended, is drawn and scored."""
    expect(page.locator(".facts").last).to_contain_text("helpfulness")
    expect(page.locator(".tail").last).to_be_empty()


def answers(page: Page) -> Any:
    return page.locator("article.assistant .text")


def axe(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_send_and_stream(page: Page) -> None:
    ask(page, "hello")
    expect(answers(page)).to_contain_text("You said hello, seed")
    expect(page.locator("article.assistant em")).to_have_text("hello")
    expect(page.locator(".facts")).to_contain_text("tokens/s")
    expect(page.locator(".facts")).to_contain_text("helpfulness 0.75")
    expect(page.locator(".facts")).to_contain_text("safety 0.50")
    ask(page, "and then?")
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_label("Title")).to_have_value("hello")
    axe(page)


def test_shift_enter_starts_a_line(page: Page) -> None:
    page.locator("#question").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .text")).to_have_text("one\ntwo")
    expect(page.locator("#question")).to_have_value("")


def test_stop(page: Page, state: State) -> None:
    engine: Any = state.models["llama"].engine
    before = len(engine.cancelled)
    ask(page, "slowly")
    expect(answers(page)).to_contain_text("word word")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    until(lambda: len(engine.cancelled) == before + 1)
    ask(page, "slowly")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".facts").last).to_contain_text("stopped")


def test_regenerate_and_switch(page: Page) -> None:
    ask(page, "hello")
    settle(page)
    first = answers(page).inner_text()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".count")).to_have_text("2/2")
    settle(page)
    assert answers(page).inner_text() != first
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".count")).to_have_text("1/2")
    expect(answers(page)).to_have_text(first)


def test_edit_branches(page: Page) -> None:
    for number, text in enumerate(("one", "two"), start=1):
        ask(page, text)
        expect(page.locator(".facts")).to_have_count(number)
        settle(page)
    page.get_by_role("button", name="Edit").first.click()
    axe(page)
    page.get_by_label("Edit your message").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .text")).to_have_text(["other"])
    expect(answers(page)).to_contain_text("You said other")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator("article.user .text")).to_have_text(["one", "two"])
    expect(answers(page).last).to_contain_text("You said two")


def test_side_by_side(page: Page) -> None:
    ask(page, "hello")
    settle(page)
    page.get_by_role("button", name="Side by side").click()
    expect(page.locator(".lane")).to_have_count(2)
    expect(page.get_by_label("Model 2", exact=True)).to_have_value("alpaca")
    ask(page, "again")
    expect(page.locator(".lane").nth(0).locator("article.assistant .text").last).to_contain_text("You said again")
    expect(page.locator(".lane").nth(1).locator("article.assistant .text").last).to_contain_text("I am alpaca.")
    axe(page)
    page.get_by_role("button", name="Side by side").click()
    expect(page.locator(".lane")).to_have_count(1)


def test_a_refresh_keeps_the_conversation(page: Page) -> None:
    ask(page, "hello")
    settle(page)
    said = answers(page).inner_text()
    page.reload()
    expect(answers(page)).to_have_text(said)
    expect(page.locator(".facts")).to_contain_text("helpfulness 0.75")
    ask(page, "slowly")
    expect(answers(page).last).to_contain_text("word word")
    page.reload()
    expect(answers(page).last).to_contain_text("word word")


def test_settings_reach_the_model(page: Page, state: State) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Longest answer").fill("7")
    axe(page)
    ask(page, "hello")
    expect(answers(page)).to_contain_text("System: Be kind.")
    engine: Any = state.models["llama"].engine
    sampling = engine.asked[-1][1]
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.2, 0.9, 7)
    expect(page.locator(".facts")).to_contain_text("cut at the longest answer")


def test_an_error_is_said_and_leaves_no_turn(page: Page) -> None:
    ask(page, "fail")
    expect(page.locator(".error")).to_contain_text("the engine failed")
    ask(page, "hello")
    expect(answers(page).last).to_contain_text("You said hello")


def test_conversations_are_listed_renamed_and_deleted(page: Page) -> None:
    ask(page, "first")
    settle(page)
    page.get_by_role("button", name="New conversation").click()
    ask(page, "second")
    settle(page)
    titles = page.locator("#list .title")
    expect(titles).to_have_text(["second", "first"])
    titles.last.click()
    expect(page.locator("article.user .text")).to_have_text(["first"])
    page.get_by_label("Title").fill("renamed")
    page.get_by_label("Title").press("Tab")
    expect(page.get_by_role("button", name="renamed", exact=True)).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete second").click()
    expect(titles).to_have_text(["renamed"])


def test_an_export_is_read_as_dialogs(page: Page, tmp_path: Path) -> None:
    ask(page, "hello")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "hello.jsonl"
    [record] = readers.read(file, "dialogs", kind="dialogs").records
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
    assert record["messages"][1]["content"].startswith("You said *hello*")
    assert (record["model"], record["helpfulness"]) == ("llama", 0.75)


def test_copy(page: Page) -> None:
    ask(page, "hello")
    settle(page)
    page.locator("article.assistant").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").startswith("You said *hello*, seed")


def test_hostile_answers_and_names_are_inert(page: Page) -> None:
    """Nothing runs, nothing is fetched (the fixture watches), nothing can be clicked; the words stay readable."""
    ask(page, "hostile")
    expect(page.locator("article.assistant table strong")).to_have_text("bold")
    expect(page.locator("article.assistant pre")).to_contain_text("<script>window.bad = 6</script>")
    expect(answers(page)).to_contain_text("<script>window.bad = 1</script>")
    expect(answers(page)).to_contain_text("(http://outside.example/)")
    page.get_by_label("Title").fill("<img src=x onerror='window.bad = 7'>")
    page.get_by_label("Title").press("Tab")
    ask(page, "<img src=x onerror='window.bad = 8'>")
    expect(answers(page).last).to_contain_text("seed")
    page.reload()
    expect(page.locator("article.assistant table strong")).to_have_text("bold")
    assert page.locator("main :is(a, img, script, iframe, svg, object, embed)").count() == 0
    assert page.evaluate("window.bad") is None
    axe(page)


def test_the_policy_forbids_what_slips_through(browser: Browser, url: str) -> None:
    """Were there a hole in the drawing, the policy would still stop it: tried with the page's own hands."""
    page = browser.new_page()
    page.goto(url)
    tried = page.evaluate(
        """() => new Promise((resolve) => {
          const stopped = [];
          document.addEventListener("securitypolicyviolation", (e) => stopped.push(e.effectiveDirective));
          try { document.body.innerHTML += "<b>x</b>"; } catch { stopped.push("innerHTML"); }
          const image = new Image();
          image.src = "http://outside.example/x.png";
          fetch("http://outside.example/").catch(() => {});
          setTimeout(() => resolve(stopped), 300);
        })"""
    )
    assert {"innerHTML", "img-src", "connect-src"} <= set(tried)
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_and_a_narrow_screen(page: Page, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 375, "height": 700})
    page.reload()
    ask(page, "hostile")
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Side by side").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    axe(page)
    page.locator("#menu").click()
    page.locator("#theme").click()
    page.mouse.click(370, 300)
    expect(page.locator("#sidebar")).not_to_be_visible()
    other = {"light": "dark", "dark": "light"}[theme]
    assert page.evaluate("document.documentElement.dataset.theme") == other
    axe(page)
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == other


def test_a_key_is_asked_for(browser: Browser) -> None:
    rules = Rules(keys=frozenset({_sha256(b"secret")}))
    with serving(state_of(StandIn(script)), rules) as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert")).to_have_text("The server does not know this key.")
        axe(page)
        page.get_by_label("API key").fill("secret\u200b")
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert")).to_have_text("No key can hold the character U+200B: copy it anew.")
        page.get_by_label("API key").fill("")
        page.get_by_label("API key").press_sequentially("secret")
        page.keyboard.press("Enter")
        ask(page, "hello")
        expect(answers(page)).to_contain_text("You said hello")
        assert "secret" not in json.dumps(page.evaluate("({...localStorage})"))
        page.close()
