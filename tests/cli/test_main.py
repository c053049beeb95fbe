"""The command line: on the tiny model, and on the demo model where answers must be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import Result

from am_memory import Memory, MemoryPolicy, Session
from am_memory.cli.display import EventBars, describe_lookup
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.events import GateMissed, LittleKept, Span
from am_memory.storage.store import Store

CommandLine = Callable[..., Result]

CHAT = ("chat", "--trigger-tokens", "256", "--keep-ratio", "0.25", "--max-new-tokens", "8", "--temperature", "0")


def interrupted_once(function: Callable[..., object]) -> Callable[..., object]:
    """The same function, but its first call raises KeyboardInterrupt."""
    calls = []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


# Errors


@pytest.mark.usefixtures("tiny")
def test_a_policy_that_cannot_work_is_one_line_and_exit_status_1(run: CommandLine) -> None:
    result = run("chat", "--trigger-tokens", "5")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"InvalidPolicy: trigger_tokens 5 leaves nothing to compact: .*raise trigger_tokens.*\n", result.stderr
    )
    assert result.stdout == ""


@pytest.mark.usefixtures("tiny")
def test_a_number_out_of_range_is_one_line_and_exit_status_1(run: CommandLine) -> None:
    result = run("demo", "--keep-ratio", "2")
    assert result.exit_code == 1
    assert re.fullmatch(r"InvalidPolicy: keep_ratio 2.0: .*\n", result.stderr)


def test_an_unknown_model_is_one_line_and_exit_status_1(run: CommandLine) -> None:
    result = run("chat", "--model", "./nowhere.gguf")
    assert result.exit_code == 1
    assert re.fullmatch(r"ModelNotFound: .*nowhere\.gguf.*\n", result.stderr)


def test_inspecting_a_session_that_is_not_there_names_those_that_are(run: CommandLine) -> None:
    result = run("inspect", "alice")
    assert result.exit_code == 1
    assert re.fullmatch(r"SessionNotFound: no session 'alice' in .*; there are: none\n", result.stderr)


@pytest.mark.usefixtures("tiny")
def test_inspecting_a_session_that_was_cut_off_says_so(run: CommandLine, store: Store) -> None:
    run(*CHAT, "--session", "alice", typed="Hello.\n")
    (path,) = Path(store.url).glob("*")
    path.write_bytes(path.read_bytes()[:-100])
    result = run("inspect", "alice")
    assert result.exit_code == 1
    assert re.fullmatch(r"CorruptSession: .*cut off or altered; restore .*\n", result.stderr)


@pytest.mark.usefixtures("tiny")
def test_a_session_of_another_model_is_refused(run: CommandLine, store: Store) -> None:
    """`Memory.session` raises ModelMismatch, and the saved session stays."""
    run(*CHAT, typed="Hello.\n")
    saved = store.load("default")
    store.save("default", type(saved)(**{**vars(saved), "fingerprint": "another"}))
    result = run(*CHAT, typed="Hello.\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("ModelMismatch: session 'default' was saved with model another")


def test_a_default_that_depends_on_the_machine_is_shown(run: CommandLine) -> None:
    """Rich read "[default: ...]" in a help text as markup, and showed nothing."""
    assert "cuda if there is one" in run("serve", "--help").output
    assert "~/.local/share" in run("inspect", "--help").output


def test_no_command_shows_them_all(run: CommandLine) -> None:
    assert all(command in run().output for command in ("demo", "chat", "inspect"))


# Chat


@pytest.mark.usefixtures("tiny")
def test_a_chat_goes_on_after_a_restart(run: CommandLine, store: Store) -> None:
    run(*CHAT, typed="Hello, how are you?\n")
    num_tokens = len(store.load("default").tokens)
    result = run(*CHAT, typed="And now?\n/quit\n")
    assert "> Hello, how are you?" in result.output
    saved = store.load("default")
    assert len(saved.tokens) > num_tokens
    assert [message["role"] for message in saved.messages] == ["user", "assistant"] * 2


@pytest.mark.usefixtures("tiny")
def test_a_chat_compacts_by_itself_and_shows_it(run: CommandLine, store: Store) -> None:
    result = run(*CHAT, typed=f"{'Tell me more. ' * 40}\n")
    assert "compacted tokens" in result.output
    assert "0 compactions" in result.output
    assert re.search(r"/256 tokens in the cache, 5\d\d in all · .* · \d compactions", result.output)
    assert store.load("default").records


@pytest.mark.usefixtures("tiny")
def test_a_compaction_during_an_answer_is_marked_in_its_text(run: CommandLine) -> None:
    result = run(*CHAT[:-3], "100", "--temperature", "0", typed=f"{'Tell me. ' * 22}\n")
    assert re.search(r"⟨compacted \d+ tokens into \d+ slots⟩", result.output)


@pytest.mark.usefixtures("tiny")
def test_the_system_prompt_of_a_new_conversation_stays_exact(run: CommandLine, store: Store) -> None:
    run(*CHAT, "--system", "You are a pirate.", typed=f"{'Tell me more. ' * 40}\n")
    saved = store.load("default")
    assert saved.messages[0] == {"role": "system", "content": "You are a pirate."}
    assert saved.state.num_pinned_slots > len("You are a pirate.")


@pytest.mark.usefixtures("tiny")
def test_the_commands_of_a_chat_do_what_they_say(run: CommandLine, store: Store) -> None:
    typed = f"{'Hello. ' * 20}\n/compact\n/stats\n/fork branch\nOn the branch.\n/save\n/unknown\n/quit\n"
    result = run(*CHAT, typed=typed)
    assert result.exit_code == 0
    assert "compacted tokens" in result.output
    assert re.search(r"compactions +1", result.output)
    assert "now in branch" in result.output
    assert result.output.count("/compact, /stats, /mount TEXT, /unmount TEXT, /fork NAME, /save, /quit") == 2
    assert store.names() == ["branch", "default"]
    default, branch = store.load("default"), store.load("branch")
    assert branch.tokens[: len(default.tokens)] == default.tokens
    assert len(branch.messages) == len(default.messages) + 2


@pytest.mark.usefixtures("tiny")
def test_a_mistake_in_a_chat_does_not_end_it(run: CommandLine) -> None:
    result = run(*CHAT, typed="/compact\nHello.\n/fork default\n/stats\n")
    assert "CompactionFailed: nothing to compact" in result.output
    assert "InvalidInput: there is a session 'default' already" in result.output
    assert "tokens of the conversation" in result.output
    assert result.exit_code == 0


def test_control_c_while_reading_leaves_the_session_as_it_was(
    run: CommandLine, store: Store, tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "forward", interrupted_once(tiny.forward))
    result = run(*CHAT, typed="Lost.\nKept.\n")
    assert "(stopped)" in result.output
    assert result.exit_code == 0
    assert [message["content"] for message in store.load("default").messages if message["role"] == "user"] == ["Kept."]


@pytest.mark.usefixtures("tiny")
def test_control_c_before_the_answer_takes_the_question_back(
    run: CommandLine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many chat templates refuse a question that follows another one without an answer."""
    monkeypatch.setattr(Session, "generate", interrupted_once(Session.generate))
    run(*CHAT, typed="Lost.\nKept.\n")
    assert [message["content"] for message in store.load("default").messages if message["role"] == "user"] == ["Kept."]


@pytest.mark.usefixtures("tiny")
def test_control_c_ends_the_answer_and_keeps_what_was_said(
    run: CommandLine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Session.generate

    def stopped(self: Session, *args: object) -> object:
        for number, piece in enumerate(generate(self, *args)):  # type: ignore[arg-type]
            if number == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Session, "generate", stopped)
    result = run(*CHAT, typed="Hello.\nGo on.\n")
    assert result.output.count("(stopped)") == 2
    assert [message["role"] for message in store.load("default").messages] == ["user", "assistant"] * 2


@pytest.mark.usefixtures("tiny")
def test_without_a_terminal_the_output_is_plain_lines(run: CommandLine) -> None:
    result = run(*CHAT, typed=f"{'Tell me more. ' * 40}\n/stats\n")
    assert "\x1b" not in result.output
    assert "> Tell me more." in result.output


@pytest.mark.usefixtures("tiny", "looking_back")
def test_a_chat_shows_what_was_looked_up_before_the_answer(run: CommandLine, store: Store) -> None:
    result = run(*CHAT, typed=f"{'Tell me more. ' * 40}\nAnd?\n/stats\n")
    assert result.output.count("  looked up: “") == 2
    assert re.search(r"compacted, but exact now +20 tokens", result.output)
    (page,) = store.load("default").recalled
    row = rf"{page.start}-{page.end} +│ +recalled, exact for now +│ +100 %"
    assert re.search(row, run("inspect", "default").output)


@pytest.mark.usefixtures("tiny", "looking_back")
def test_what_an_answer_looks_up_itself_is_marked_in_its_text_once(
    run: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = Span(30, 80, 1.0, "the second place")
    monkeypatch.setattr("am_memory.session.generation.recall_while_writing", lambda context: (span,))
    monkeypatch.setattr("am_memory.session.generation.WRITING_TOKENS", 2)
    result = run(*CHAT, typed=f"{'Tell me more. ' * 40}\n")
    assert result.output.count("  looked up: “") == 1
    assert result.output.count("⟨looked up: “the second place”⟩") == 1


@pytest.mark.usefixtures("tiny")
def test_a_chat_without_recall_looks_nothing_up(run: CommandLine, store: Store) -> None:
    run(*CHAT, "--recall-tokens", "0", "--originals", "drop", typed=f"{'Tell me more. ' * 40}\n")
    saved = store.load("default")
    assert (saved.policy["recall_tokens"], saved.policy["originals"]) == (0, "drop")
    assert saved.originals == ()


@pytest.mark.usefixtures("tiny")
def test_a_place_for_originals_that_does_not_exist_is_one_line(run: CommandLine) -> None:
    result = run("chat", "--originals", "cloud")
    assert result.exit_code == 1
    assert re.fullmatch(r"InvalidPolicy: originals 'cloud': .*\n", result.stderr)


def test_looked_up_texts_are_shown_on_one_line_and_never_as_markup() -> None:
    """A text of the conversation may hold rich's markup and a terminal's escape sequences."""
    spans = [Span(4, 54, 1.0, "[bold]one[/]\n\x1b[2Jtwo"), Span(80, 130, 0.9, "long " * 40)]
    console = Console(file=StringIO(), width=200)
    console.print(describe_lookup(spans), soft_wrap=True)
    shown = console.file.getvalue()
    assert shown.startswith("  looked up: “[bold]one[/] [2Jtwo” · “long long")
    assert shown.count("\n") == 1
    assert len(shown) < 120


# Inspect


@pytest.mark.usefixtures("tiny")
def test_inspect_shows_the_segments_and_the_slots_of_every_head(run: CommandLine, store: Store) -> None:
    run(*CHAT, "--session", "alice", typed=f"{'Tell me more. ' * 40}\n")
    assert run("inspect").output == "alice\n"
    result = run("inspect", "alice")
    state = store.load("alice").state
    assert result.exit_code == 0
    assert all(f"{segment.start:,}-{segment.end:,}" in result.output for segment in state.segments)
    assert re.search(r"\d\.\d% +│ +some details +│", result.output)
    assert re.search(r"compacted tokens\s+are saved", result.output)
    assert "MiB of cache, model LlamaForCausalLM\n" in result.output
    for layer in state.layers:
        slots = [
            end - begin - state.num_pinned_slots
            for begin, end in zip(layer.slots.cu_slots, layer.slots.cu_slots[1:], strict=False)
        ]
        assert re.search(r" +".join(map(str, slots)), result.output)


def test_a_gguf_file_is_run_by_llama_cpp(run: CommandLine, tiny_gguf: Path) -> None:
    """A chat continues after a restart, and can be inspected."""
    chat = (*CHAT, "--engine", "llama_cpp", "--model", str(tiny_gguf))
    assert "compacted tokens" in run(*chat, typed="Tell me of owls. " * 20 + "\n").output
    assert "> Tell me of owls." in run(*chat, typed="/quit\n").output
    shown = run("inspect", "default").output
    assert re.search(r"4-\d+ +│ \d+\.\d slots per head", shown)


@pytest.mark.usefixtures("tiny")
def test_inspect_shows_a_session_that_was_never_compacted(run: CommandLine) -> None:
    run(*CHAT, typed="Hello.\n")
    result = run("inspect", "default")
    assert result.exit_code == 0
    assert "0 compactions" in result.output


# Demo


@pytest.mark.usefixtures("tiny")
def test_the_demo_runs_on_any_model(run: CommandLine) -> None:
    result = run("demo", "--model", "folder/tiny", "--letters", "3", "--trigger-tokens", "1024")
    assert result.exit_code == 0
    assert "tiny reads 3 letters" in result.output
    assert "compacted tokens" in result.output
    assert "everything kept" in result.output


@pytest.mark.model
def test_the_demo_recalls_more_than_a_cache_of_the_same_size(run: CommandLine) -> None:
    result = run("demo", "--letters", "6", "--trigger-tokens", "384")
    assert result.exit_code == 0
    assert re.search(r"In \d+% of the cache's bytes, the memory knows \d+ of 12 ships", result.output)
    assert "am-memory compare --text FILE" in result.output
    found = re.search(r"letters 1-\d.*?(\d+) of \d+.*?(\d+) of \d+.*?(\d+) of \d+", result.output)
    assert found is not None
    memory, truncated, everything = map(int, found.groups())
    assert truncated < memory <= everything + 2


def test_a_long_past_of_which_little_is_kept_is_a_warning() -> None:
    console = Console(file=StringIO(), width=200)
    EventBars(console)(LittleKept("alice", 49.6, 1200))
    assert "50 slots per head stand for 1,200 compacted tokens, less than 5 %" in console.file.getvalue()


def test_a_missed_gate_is_a_warning() -> None:
    console = Console(file=StringIO(), width=200)
    EventBars(console)(GateMissed("alice", 4, 1239, 0.52, 0.3))
    assert "tokens 4-1,239: the held-out error 0.52 is above max_error 0.3" in console.file.getvalue()


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_loading_options_reach_the_model(run: CommandLine, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def from_pretrained(*_: object, **given: object) -> Memory:
        names = ("engine", "device", "dtype", "compile", "window_tokens", "trust_remote_code")
        names += ("originals_bytes", "originals_disk_bytes")
        raise InvalidInput(" ".join(f"{name}={given[name]}" for name in names))

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    monkeypatch.setenv("COLUMNS", "200")
    before = "engine=transformers device=None dtype=None compile=False window_tokens=None trust_remote_code=False"
    assert before in run(command).output
    options = ("--window-tokens", "4096", "--trust-remote-code")
    assert "window_tokens=4096 trust_remote_code=True" in run(command, *options).output
    options = ("--originals-mib", "3", "--originals-disk-mib", "0")
    assert "originals_bytes=3145728 originals_disk_bytes=0" in run(command, *options).output
    options = ("--engine", "llama_cpp", "--device", "cpu", "--dtype", "bfloat16", "--compile")
    assert "engine=llama_cpp device=cpu dtype=bfloat16 compile=True" in run(command, *options).output
    assert "'int4' is not one of" in run(command, "--dtype", "int4").output


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize("pinned", ["sinks", "first_message", "70"])
def test_the_pinned_tokens_can_be_chosen(
    run: CommandLine, monkeypatch: pytest.MonkeyPatch, command: str, pinned: str
) -> None:
    def from_pretrained(*_: object, policy: MemoryPolicy, **__: object) -> Memory:
        raise InvalidInput(f"pinned={policy.pinned!r}")

    monkeypatch.setattr(Memory, "from_pretrained", from_pretrained)
    assert f"pinned={70 if pinned == '70' else repr(pinned)}" in run(command, "--pinned", pinned).output
    assert "pinned" in run(command, "--pinned", "everything").output
    assert run(command, "--pinned", "everything").exit_code == 1


# Compact texts


@pytest.mark.usefixtures("tiny")
def test_a_file_becomes_a_text_that_chats_can_mount(run: CommandLine, tmp_path: Path, store: Store) -> None:
    file = tmp_path / "handbook.txt"
    file.write_text("The ferry leaves at noon, and the key is under the third stone from the left. ")
    assert "'handbook': 80 tokens in 8 slots" in run("text", "compact", str(file)).output
    assert "The ferry leaves" in run("text", "list").output
    typed = "Hello.\n/mount handbook\n/stats\n/mount manual\n/unmount handbook\n/mount handbook\n"
    result = run(*CHAT, typed=typed)
    assert result.output.count("'handbook': 80 tokens in 8 slots") == 3
    assert "TextNotFound: no compact text 'manual'" in result.output
    assert "mounted at token" in run("inspect", "default").output
    assert "deleted handbook" in run("text", "delete", "handbook").output
    assert run("text", "delete", "handbook").exit_code == 1
    assert "no compact texts" in run("text", "list").output


@pytest.mark.usefixtures("tiny")
def test_a_file_that_is_no_text_is_refused_and_one_with_escapes_is_shown_plainly(
    run: CommandLine, tmp_path: Path, store: Store
) -> None:
    file = tmp_path / "[bold]odd.txt"
    file.write_bytes(b"caf\xe9")
    result = run("text", "compact", str(file))
    assert result.exit_code == 1
    assert "give a text file in UTF-8" in result.output
    file.write_bytes(b"\x1b[2JThe ferry\nleaves at noon.")
    run("text", "compact", str(file), "--name", "[bold]o\x1b[1mdd")
    shown = run("text", "list").output
    assert "\x1b" not in shown
    assert "[bold]o [1mdd" in shown
    assert "[2JThe ferry leaves" in shown
