"""The page's modules in Node, without a browser: what they compute, and what they say when the server is away."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import am_memory_server
import pytest

NODE = shutil.which("node")
STATIC = Path(am_memory_server.__file__).parent / "static"
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node on this machine")
STATS = {
    "logical_tokens": 43,
    "kv_tokens": 43,
    "exact_tokens": 43,
    "kv_bytes": 9_017_753,
    "exact_kv_bytes": 8_912_896,
    "num_compactions": 0,
    "recalled_tokens": 0,
}


def run(module: str, code: str, *values: object) -> Any:
    """The value of an expression that uses the exports of a module as `page`, and the values as `given`."""
    script = f"""
        import * as page from {json.dumps((STATIC / module).as_uri())};
        const given = {json.dumps(values)};
        console.log(JSON.stringify(await (async () => {{ {code} }})()));
    """
    command = [str(NODE), "--input-type=module"]
    done = subprocess.run(command, input=script, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def test_the_gauge_of_a_first_answer_is_not_full() -> None:
    """The trigger was unknown during the first answer of a conversation, and 43 tokens were "100 % full"."""
    first = run("figures.js", "return page.gauge(given[0], 0, 4)", STATS)
    assert (first["left"], first["right"], {*first["widths"].values()}) == ("", "", {0})
    known = run("figures.js", "return page.gauge(given[0], 430, 4)", STATS)
    assert (known["left"], known["right"]) == ("10 % full", "compacts at 430")
    assert known["widths"]["exact"] == pytest.approx(100 * 39 / 430)
    assert known["spoken"] == "43 of 430 tokens, for 43 of conversation"


def test_the_cache_is_never_larger_than_itself() -> None:
    """Before the first compaction the page said "8.6 MiB held, 8.5 MiB uncompacted": one counts spare capacity."""
    exact = run("figures.js", "return page.bytes(given[0])", STATS)
    assert (exact["held"], exact["uncompacted"], exact["widths"]) == ("8.6 MiB", "8.6 MiB", [100, 100])
    compacted = {**STATS, "num_compactions": 1, "exact_kv_bytes": 18_035_506}
    assert run("figures.js", "return page.bytes(given[0])", compacted)["widths"] == [50, 100]


def test_a_lost_connection_is_told_in_words() -> None:
    """The page showed the browser's "Failed to fetch"."""
    code = """
        globalThis.fetch = async () => { throw new TypeError("Failed to fetch"); };
        return await new page.Api().model().catch((error) => error.message);
    """
    said = run("api.js", code)
    assert said == "The server does not answer. Check that it runs and that this machine reaches it, then try again."


def test_a_fork_asks_the_server_for_a_copy_of_the_memory() -> None:
    """The page forked its own messages only, and the fork's memory was empty."""
    code = """
        const asked = [];
        const answer = (status) => async (path, { method, body }) => {
            asked.push([method, path, body]);
            return new Response('{"error": {"message": "no"}}', { status });
        };
        const fork = (status) => { globalThis.fetch = answer(status); return new page.Api().fork("a b", "c"); };
        await fork(201);
        await fork(404);
        return [...asked, await fork(409).catch((error) => error.message)];
    """
    call = ["POST", "/v1/memory/sessions/a%20b/fork", '{"id":"c"}']
    assert run("api.js", code) == [call, call, "no"]


TREE = """
    const talk = page.fresh("a", { temperature: "0.5" });
    const ask = page.add(talk, null, { role: "user", content: "hello" });
    const first = page.add(talk, ask, { role: "assistant", content: "one" });
    const shown = () => page.path(talk).map(({ content }) => content);
"""


def test_an_answer_has_variants_and_an_edited_message_a_path_of_its_own() -> None:
    code = f"""{TREE}
        const more = page.add(talk, first, {{ role: "user", content: "more" }});
        const second = page.add(talk, ask, {{ role: "assistant", content: "two" }});
        const afterRetry = [shown(), page.variants(talk, second).map(({{ content }}) => content)];
        page.choose(talk, first);
        const chosen = shown();
        const edited = page.add(talk, null, {{ role: "user", content: "hi" }});
        const afterEdit = shown();
        page.remove(talk, edited);
        return [...afterRetry, chosen, afterEdit, shown()];
    """
    assert run("tree.js", code) == [
        ["hello", "two"],
        ["one", "two"],
        ["hello", "one", "more"],
        ["hi"],
        ["hello", "two"],
    ]


def test_a_fork_has_the_shown_messages_up_to_one_and_nothing_else() -> None:
    code = f"""{TREE}
        page.add(talk, first, {{ role: "user", content: "more" }});
        page.add(talk, ask, {{ role: "assistant", content: "two" }});
        talk.title = "Tea";
        const branch = page.forked(talk, first, "b");
        return [branch.id, branch.title, branch.messages.map(({{ content }}) => content), branch.temperature, shown()];
    """
    assert run("tree.js", code) == ["b", "Tea (fork)", ["hello", "one"], "0.5", ["hello", "two"]]


def test_a_request_has_the_conversations_own_settings_and_its_attached_texts() -> None:
    code = f"""{TREE}
        talk.system = "be brief";
        ask.files = [{{ name: "a.md", text: "```\\ncode\\n```" }}];
        return [page.requestBody(talk, [ask]), page.requestBody(talk, [ask, first])];
    """
    asked, goes_on = run("tree.js", code)
    content = "a.md:\n````\n```\ncode\n```\n````\n\nhello"
    assert asked["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    assert (asked["temperature"], asked["metadata"]) == (0.5, {"conversation_id": "a"})
    assert "max_tokens" not in asked
    assert "continue_final_message" not in asked
    assert goes_on["continue_final_message"] is True
    assert goes_on["messages"][-1] == {"role": "assistant", "content": "one"}


MESSAGE = {"id": 0, "parent": None, "role": "user", "content": "Hello, Ada."}
TALK = {"id": "a", "title": "Tea", "messages": [MESSAGE], "leaf": 0, "updated": 5, "extra": "<b>"}


def test_an_exported_file_comes_back_under_new_ids() -> None:
    code = "return page.imported(page.exported([given[0], given[0]]), () => 'new')"
    found = run("archive.js", code, TALK)
    known = {"id": "new", "title": "Tea", "system": "", "temperature": "", "maxTokens": "", "updated": 5}
    assert found == [{**known, "messages": [MESSAGE], "next": 1, "leaf": 0}] * 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no JSON", "not a file of exported"),
        ("[]", "not a file of exported"),
        ({"messages": [{**MESSAGE, "role": "system"}]}, "without an id, a role or a text"),
        ({"messages": [{**MESSAGE, "content": 5}]}, "without an id, a role or a text"),
        ({"messages": [{**MESSAGE, "id": 2**53}]}, "without an id, a role or a text"),
        ({"messages": [{**MESSAGE, "id": -1}]}, "without an id, a role or a text"),
        ({"messages": [MESSAGE, MESSAGE]}, "do not belong together"),
        ({"messages": [{**MESSAGE, "parent": 0}]}, "do not belong together"),
        ({"messages": [{**MESSAGE, "parent": 7}]}, "do not belong together"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(text: Any, problem: str) -> None:
    if not isinstance(text, str):
        text = json.dumps({"kind": "am-memory conversations", "conversations": [text]})
    code = "try { return page.imported(given[0], () => 'new') } catch (error) { return error.message }"
    assert problem in run("archive.js", code, text)


def test_values_of_other_types_in_a_file_are_left_out() -> None:
    given = json.dumps({"kind": "am-memory conversations", "conversations": [None, {"title": {"toString": 1}}]})
    found = run("archive.js", "return page.imported(given[0], () => 'new').map(({ title }) => title)", given)
    assert found == ["", ""]


def test_a_search_finds_all_words_in_titles_and_messages() -> None:
    code = "return given.slice(1).map((words) => page.matches(given[0], words))"
    words = ["", " ", "ada", "TEA hello", "ada coffee", "."]
    assert run("archive.js", code, TALK, *words) == [True, True, True, True, False, True]


def test_the_memory_is_told_in_words() -> None:
    segments = [
        {"kind": "pinned", "start": 0, "end": 4, "slots": 4},
        {"kind": "compacted", "start": 4, "end": 304, "slots": 30},
        {"kind": "exact", "start": 304, "end": 400, "slots": 96},
    ]
    code = "return page.inWords(given[0])"
    memory = {"stats": {"logical_tokens": 400}, "segments": segments, "recalled": [{"start": 10, "end": 30}]}
    exact, compact, lost = run("figures.js", code, memory)
    assert exact == "Exact: the first 4 tokens and the last 96."
    assert compact.startswith("Compact: 300 tokens between them, in 30 slots a head (10 %).")
    assert lost.startswith("Probably lost: exact words, numbers and names")
    assert lost.endswith("20 tokens of it are exact for now, because an answer looked for them.")
    young = {**memory, "segments": segments[2:]}
    assert run("figures.js", code, young) == ["All 400 tokens are exact: nothing has been compacted."]


def test_only_text_files_are_attached() -> None:
    code = """
        const read = (parts, name) => page.textOf(new File(parts, name)).catch((error) => error.message);
        const large = "a".repeat(2 ** 20 + 1);
        return [await read(["hé"], "a"), await read([new Uint8Array([255])], "b"), await read([large], "c")];
    """
    text, binary, large = run("composer.js", code)
    assert text == {"name": "a", "text": "hé"}
    assert binary == "b is not a text file: this model reads text only."
    assert large == "c is larger than 1 MiB: attach a part of it."


HOSTILE = {
    "open brackets": "[" * 200_000,
    "open brackets of formulas": "\\[" * 100_000 + "\\(" * 100_000,
    "a long run of backticks": "`" * 3000 + " a" * 3000,
    "runs of backticks": " ".join("`" * length for length in range(1, 400)),
    "marks of every kind": "**__~~*_ " * 20_000,
    "a heading of spaces": "# " + " " * 100_000 + "x",
    "a rule of a table with spaces": "a|b\n" + " " * 100_000 + "x\n- " + " " * 100_000 + "x",
    "spaces without an end": "a" + " " * 200_000 + "b",
    "dollars": "$a" * 100_000 + "$$" * 50_001,
    "quotes in quotes": "> " * 50_000,
    "lists in lists": "\n".join(" " * depth + "- a" for depth in range(300)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_markdown_takes_no_more_than_its_length(name: str) -> None:
    """A model that repeated one bracket blocked the page: the time grew with the square of the text, or its cube."""
    code = """
        const node = () => ({ dataset: {}, append() {}, addEventListener() {} });
        globalThis.document = { createDocumentFragment: node, createElement: node };
        page.render(given[0]);
        return "ended";
    """
    assert run("markdown.js", code, HOSTILE[name]) == "ended"
