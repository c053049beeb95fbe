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
    command = [str(NODE), "--input-type=module", "--eval", script]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


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
