"""The chat page in headless Chromium: compactions, the memory panel, reload, stop, several conversations."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from am_memory_server.access import ANONYMOUS
from am_memory_server.requests import text_of
from browsing import LONG, NEEDS_BROWSER, Page
from serving import until

from am_memory.conversations.chat_answer import ChatAnswer, Delta

pytestmark = NEEDS_BROWSER


def test_a_chat_goes_on_past_three_compactions_and_shows_them(page: Page) -> None:
    page.say("hello")
    sizes = [page.number("#logical")]
    while len(page.all("#log li")) < 3:
        page.say(LONG)
        sizes.append(page.number("#logical"))
    assert sizes == sorted({*sizes})
    assert page.number("#physical") <= 300 < page.number("#logical")
    kinds = [item.get_attribute("class") for item in page.all("#strip li")]
    assert kinds[0] == "pinned"
    assert kinds.count("compacted") >= 3
    assert kinds[-1] == "exact"
    cells = page.all("#heat rect")
    assert len(cells) == 3 * 2
    page.point_at(cells[3])
    assert re.fullmatch(r"layer 1, head 1: \d+ slots, 0\.\d MiB", page.text("#heat-left"))
    page.point_at(page.all("#strip li")[1])
    assert re.fullmatch(r"tokens 3 to \d+: compacted to [\d.]+ slots a head, .*", page.text("#strip-left"))
    assert page.text("#heat-left") == "layer 0"
    assert page.all(".mark")
    meter = page.browser.find_element("css selector", "#gauge")
    assert int(meter.get_attribute("aria-valuenow")) == page.number("#physical")


def test_the_page_itself_never_scrolls(page: Page) -> None:
    """Text for screen readers was once placed below the page, so that a long chat had an empty page under it."""
    for _ in range(3):
        page.say(LONG * 3 + "\n" * 20)
    size = page.browser.execute_script(
        "const { scrollHeight, clientHeight } = document.documentElement; return [scrollHeight, clientHeight]"
    )
    assert size[0] == size[1]
    assert page.browser.execute_script(
        "const box = document.querySelector('#scroll'); return box.scrollHeight > box.clientHeight"
    )


def test_history_and_memory_are_there_after_a_reload(page: Page) -> None:
    page.say(LONG * 4)
    said, logical = page.messages(), page.text("#logical")
    page.reload()
    until(lambda: page.text("#logical") == logical)
    assert page.messages() == said
    page.say("and now?")
    assert page.messages()[:2] == said


@pytest.fixture
def going_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """In the middle of a long answer the model waits for this event, so that a browser may take its time."""
    generate, event = ChatAnswer.generate, Event()

    def hesitant(answer: ChatAnswer) -> Iterator[Delta]:
        for number, delta in enumerate(generate(answer)):
            if number == 40:
                event.wait()
            yield delta

    monkeypatch.setattr(ChatAnswer, "generate", hesitant)
    yield event
    event.set()


def test_an_answer_can_be_stopped_and_the_chat_goes_on(page: Page, going_on: Event) -> None:
    """It failed on busy machines: the model had said thousands of tokens before the browser came to stop it, all of
    which the next turn had to read again.
    """
    page.set_longest_answer(16000)
    page.type("tell me everything")
    until(lambda: len(page.messages()) == 2 and page.messages()[1])
    page.click("#stop")
    until(lambda: not page.is_writing())
    assert page.text(".message .note") == "stopped"
    going_on.set()
    until(lambda: page.server.service.scheduler.num_active == 0)
    with page.server.http() as http:
        assert "am_memory_cancelled_total 1.0" in http.get("/metrics").text
    said = page.messages()
    page.set_longest_answer(5)
    page.say("hello again")
    assert page.messages()[:3] == [*said, "hello again"]
    assert len(page.messages()) == 4


def test_an_answer_without_a_word_says_so(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty answer disappeared, and the question looked unanswered."""

    def silent(answer: ChatAnswer) -> Iterator[Delta]:
        answer.finish_reason = "stop"
        yield Delta(finish_reason="stop")

    monkeypatch.setattr(ChatAnswer, "generate", silent)
    page.say("are you there?")
    assert page.text(".message.assistant .note") == "the model ended without a word"
    page.reload()
    assert page.text(".message.assistant .note") == "the model ended without a word"


def test_an_answer_that_was_cut_off_says_so(page: Page) -> None:
    page.say("hello")
    until(lambda: page.text(".message .note") == "cut off at the longest answer allowed")
    page.reload()
    assert page.text(".message .note") == "cut off at the longest answer allowed"


def test_conversations_are_kept_apart_forked_and_deleted(page: Page) -> None:
    page.say("the first conversation")
    first = page.messages()
    page.click("#new")
    until(lambda: not page.messages())
    page.say("the second one")
    assert len(page.all("#conversations li")) == 2
    page.all("#conversations .open")[1].click()
    until(lambda: page.messages() == first)
    page.browser.execute_script("document.querySelectorAll('.message.assistant .tools button')[2].click()")
    until(lambda: len(page.all("#conversations li")) == 3)
    assert page.messages() == first
    page.browser.execute_script("window.confirm = () => true")
    page.all("#conversations .remove")[0].click()
    until(lambda: len(page.all("#conversations li")) == 2)


def test_what_the_model_says_is_never_markup(page: Page) -> None:
    script = """
        const done = arguments[arguments.length - 1];
        import('/static/markdown.js').then(({ render }) => {
            const box = document.createElement('div');
            box.append(render(arguments[0]));
            done([box.innerHTML, [...box.querySelectorAll('*')].map(node => node.tagName).join(' ')]);
        });
    """
    text = (
        "<img src=x onerror=alert(1)> **bold** `<b>`\n\n[bad](javascript:alert(1)) [good](https://example.org)\n\n"
        "# Title\n\n- one\n  - two\n\n1. first\n\n```js\n<script>\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> said"
    )
    html, tags = page.browser.execute_async_script(script, text)
    assert "&lt;img" in html
    assert "javascript:" not in "".join(part for part in html.split('"') if part.startswith("javascript"))
    assert {"STRONG", "H1", "UL", "OL", "PRE", "TABLE", "BLOCKQUOTE", "A"} <= {*tags.split()}
    assert not {"IMG", "SCRIPT", "B"} & {*tags.split()}
    assert tags.split().count("A") == 1


@pytest.mark.usefixtures("looking_back")
def test_an_answer_shows_what_was_looked_up_for_it(page: Page) -> None:
    """Also after a reload. The texts are data: markup in them is shown as it was written."""
    page.say("<b>bold</b> <img src=x onerror=alert(1)> " + LONG * 5)
    assert page.text(".looked-up summary") == "looked up: 1 place"
    (found,) = page.all(".looked-up li")
    assert not found.is_displayed()
    page.click(".looked-up summary")
    assert found.is_displayed()
    assert "<b>bold</b>" in found.text
    assert not page.all(".looked-up b, .looked-up img")
    page.reload()
    assert page.text(".looked-up summary") == "looked up: 1 place"


@pytest.mark.usefixtures("looking_back")
def test_the_memory_panel_draws_exact_pages_within_their_segment(page: Page) -> None:
    page.say(LONG * 5)
    (mark,) = page.all("#strip .page")
    segment = mark.find_element("xpath", "..")
    assert segment.get_attribute("class") == "compacted"
    outer, inner = page.browser.execute_script(
        "return [arguments[0], arguments[1]].map(node => node.getBoundingClientRect())", segment, mark
    )
    assert outer["left"] <= inner["left"] < inner["right"] <= outer["right"]
    page.point_at(segment)
    assert "; exact for now: 3 to 23" in page.text("#strip-left")
    assert page.browser.execute_script("return document.querySelector('#gauge .recalled').style.width") == "6.66667%"


def test_the_memory_panel_names_mounted_texts_and_counts_refined_segments(page: Page) -> None:
    """The names are data: markup in them is shown as it was written."""

    def is_shown(line: str) -> bool:
        return bool(page.all(line)[0].is_displayed())

    page.say(LONG * 5)
    assert not is_shown("#mounted")
    assert not is_shown("#refined")
    memory, (branch,) = page.server.service.memory, page.server.service.threads.all_branches()
    text = memory.compact_text("The ferry leaves at noon. " * 4, text_of(ANONYMOUS, "<b>handbook</b>"))
    branch.session.mount(text.name)
    refined, segments = branch.session.refine(), branch.session.segments
    page.reload()
    until(lambda: is_shown("#mounted"))
    slots = int(text.num_slots + 0.5)  # as JavaScript rounds
    assert page.text("#mounted") == f"Mounted beside the conversation: <b>handbook</b> ({slots} slots)"
    shown = f"{len(refined)} of {len(segments)} segments refined since they were compacted"
    assert page.text("#refined") == shown
    assert sum(", refined" in part.get_attribute("title") for part in page.all("#strip .compacted")) == len(refined)
    page.click("#new")
    until(lambda: not is_shown("#mounted"))


def test_the_keyboard_is_enough(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    box = page.browser.switch_to.active_element
    assert box.get_attribute("id") == "input"
    box.send_keys("one line", Keys.SHIFT, Keys.ENTER, Keys.NULL, "and another", Keys.ENTER)
    until(lambda: len(page.messages()) == 2 and not page.is_writing())
    assert page.messages()[0] == "one line\nand another"
    unnamed = page.browser.execute_script(
        "return [...document.querySelectorAll('button')].filter(b => !b.textContent.trim() && !b.ariaLabel).length"
    )
    assert unnamed == 0


def test_a_small_screen_has_the_memory_in_a_drawer(page: Page) -> None:
    size = {"width": 390, "height": 780, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.say("hello from a phone")
        width = page.browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390
        page.click("#toggle-memory")
        until(lambda: page.browser.find_element("css selector", "#close-memory").is_displayed())
        page.click("#close-memory")
        until(lambda: not page.browser.find_element("css selector", "#memory").is_displayed())
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_edited_message_and_a_second_answer_are_variants(page: Page) -> None:
    """Also after a reload: the old ones stay, and can be shown again."""
    page.say("hello")
    first = page.messages()
    page.click(".message.user .tools button:nth-child(2)")
    box = page.browser.find_element("css selector", ".edit textarea")
    box.clear()
    box.send_keys("good morning")
    page.click(".edit .primary")
    until(lambda: page.messages()[:1] == ["good morning"] and len(page.messages()) == 2 and not page.is_writing())
    assert page.text(".message.user .place") == "2 of 2"
    page.browser.execute_script("document.querySelectorAll('.message.assistant .tools button')[1].click()")
    until(lambda: page.text(".message.assistant .place") == "2 of 2" and not page.is_writing())
    page.reload()
    until(lambda: len(page.messages()) == 2)
    page.browser.execute_script("document.querySelector('[aria-label=\"Show the variant before\"]').click()")
    until(lambda: page.messages() == first)


def test_a_cut_answer_is_continued_in_its_place(page: Page) -> None:
    page.set_longest_answer(5)
    page.say("hello")
    (before,) = page.messages()[1:]
    page.browser.execute_script("document.querySelectorAll('.message.assistant .tools button')[3].click()")
    until(lambda: not page.is_writing() and len(page.messages()[1]) > len(before))
    assert page.messages()[1].startswith(before)
    assert len(page.messages()) == 2


def test_reasoning_is_folded_above_the_answer(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = itertools.chain(b"<think><b>greet</b></think>Hi!", itertools.repeat(257))
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))
    page.set_longest_answer(99)
    page.say("hello")
    assert page.messages()[1] == "Hi!"
    assert page.text(".thinking summary") == "Reasoning"
    assert page.text(".thoughts") == "<b>greet</b>"
    assert not page.browser.find_element("css selector", ".thoughts").is_displayed()


def test_titles_drafts_and_the_search(page: Page) -> None:
    page.say("hello")
    title = page.browser.find_element("css selector", "#title")
    title.clear()
    title.send_keys("Tea\n")
    until(lambda: page.text("#conversations .open") == "Tea")
    page.browser.find_element("css selector", "#input").send_keys("not sent")
    page.click("#new")
    until(lambda: not page.messages())
    page.say("something else")
    page.browser.find_element("css selector", "#search").send_keys("TEA")
    until(lambda: len(page.all("#conversations li")) == 1)
    page.click("#conversations .open")
    until(lambda: page.messages()[:1] == ["hello"])
    assert page.browser.find_element("css selector", "#input").get_attribute("value") == "not sent"


def test_a_text_file_is_attached(page: Page, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("<b>the ferry leaves at noon</b>")
    page.browser.find_element("css selector", "#files").send_keys(str(tmp_path / "note.txt"))
    until(lambda: page.text("#attached li") == "note.txt×")
    page.say("when?")
    assert page.text(".file pre") == "<b>the ferry leaves at noon</b>"
    (branch,) = page.server.service.threads.all_branches()
    assert "note.txt:\n```\n<b>the ferry" in branch.session.engine.decode(branch.session.tokens)


def test_a_fork_has_the_memory_of_its_original(page: Page) -> None:
    """It was empty until the next answer, and the log had a 404."""
    page.say(LONG * 4)
    logical = page.text("#logical")
    page.browser.execute_script("document.querySelectorAll('.message.assistant .tools button')[2].click()")
    until(lambda: len(page.all("#conversations li")) == 2)
    until(lambda: page.text("#logical") == logical)
    with page.server.http() as http:
        assert len(http.get("/v1/memory/sessions").json()["data"]) == 2


def test_an_answer_after_a_compaction_stays_in_view(page: Page) -> None:
    """The line about the compaction was inserted before the end was measured, and the answer stayed below the fold."""
    page.say("hello" + "\n" * 60)
    while not page.all(".mark"):
        page.say(LONG * 2 + "\n" * 10)
    left = page.browser.execute_script(
        "const box = document.querySelector('#scroll'); return box.scrollHeight - box.scrollTop - box.clientHeight"
    )
    assert left < 5


def test_a_server_that_is_gone_is_told_in_words(page: Page) -> None:
    page.browser.execute_script("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
    page.type("hello")
    until(lambda: page.all(".failure"))
    assert page.text(".failure").startswith("The server does not answer.")
    assert page.messages() == ["hello"]


def test_code_has_colours_formulas_are_set_and_tasks_have_boxes(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries obey the page's policy, which allows no inline script, and make no markup of what the model says."""
    said = (
        "It costs $5, not $6. `$x$` is code.\n\n```html\n<img src=x onerror=alert(1)>\n```\n\n"
        "$$\\frac{1}{2} \\href{javascript:alert(1)}{x}$$\n\nand \\(e^x\\)\n\n- [x] done\n- [ ] open\n"
    )
    tokens = itertools.chain(said.encode(), itertools.repeat(257))
    monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))
    page.set_longest_answer(999)
    page.say("hello")
    until(lambda: page.all(".katex") and page.all(".hljs-tag"))
    assert len(page.all(".katex")) == 2
    assert len(page.all(".formula[data-display=true]")) == 1
    assert not page.all(".message img, .message a[href^=javascript], .message script")
    assert page.text(".message.assistant code.formula, .message.assistant p code") == "$x$"
    assert [box.is_selected() for box in page.all(".task input")] == [True, False]
    assert page.text(".code code") == "<img src=x onerror=alert(1)>"


def test_a_segment_is_read_and_made_exact(page: Page) -> None:
    """Its text is data: markup in it is shown as it was written."""
    page.say("<b>bold</b> <img src=x onerror=alert(1)> " + LONG)
    page.click("#compact")
    until(lambda: page.all("#strip .compacted"))
    page.click("#strip .compacted .choose")
    until(lambda: "<b>bold</b>" in page.text("#part-text") and "…" not in page.text("#part-text"))
    assert not page.all("#part b, #part img")
    page.point_at(page.all("#part-recall")[0])  # what hovers over the strip makes room first
    page.click("#part-recall")
    until(lambda: "are exact for the next answer" in page.text("#part-said"))
    assert page.all("#strip .page")
    page.click("#part-close")
    page.all("#strip .exact .choose")[0].click()
    assert not page.all("#part-recall")[0].is_displayed()
    page.click("#new")
    until(lambda: not page.all("#part")[0].is_displayed())


def test_the_whole_conversation_is_searched(page: Page) -> None:
    """The messages by their words, the compacted part by what the question is about."""
    page.say("the FERRY leaves at noon. " + LONG * 5)
    page.say("hello")
    page.browser.find_element("css selector", "#look-query").send_keys("ferry\n")
    until(lambda: "the memory found" in page.text("#look-said"))
    assert page.text("#look-said").startswith("1 of the messages has these words")
    *spans, message = page.all("#look-found li")
    assert spans
    assert "from-memory" in spans[0].get_attribute("class")
    spans[0].find_element("css selector", "button").click()
    until(lambda: "are exact for the next answer" in page.text("#look-said"))
    message.find_element("css selector", "button").click()
    assert page.browser.switch_to.active_element.get_attribute("class") == "message user"


def test_an_answer_says_how_far_its_compaction_is(page: Page) -> None:
    page.browser.execute_script("""
        window.seen = new Set();
        new MutationObserver(() => document.querySelectorAll('.waiting').forEach(node => window.seen.add(node.textContent)))
            .observe(document.body, { childList: true, subtree: true });
    """)
    page.say(LONG * 5)
    seen = page.browser.execute_script("return [...window.seen]")
    assert any(re.fullmatch(r"compacting 3–\d+: fitting its heads, \d+ %", text) for text in seen), seen


def test_an_import_that_finds_no_room_imports_nothing(page: Page, tmp_path: Path) -> None:
    """The first conversations of the file stayed, and the list did not show them until the next visit."""
    message = {"id": 0, "parent": None, "role": "user", "content": "hello"}
    file = {"kind": "am-memory conversations", "version": 1, "conversations": [{"messages": [message]}] * 3}
    (tmp_path / "file.json").write_text(json.dumps(file))
    page.browser.execute_script("""
        const { put } = IDBObjectStore.prototype;
        let number = 0;
        IDBObjectStore.prototype.put = function (...given) {
            number += 1;
            if (number === 3) this.transaction.abort(); else put.apply(this, given);
        };
    """)
    page.browser.find_element("css selector", "#import-file").send_keys(str(tmp_path / "file.json"))
    until(lambda: page.all(".failure"))
    assert page.text(".failure").startswith("Nothing was imported.")
    page.reload()
    assert not page.all("#conversations li")
