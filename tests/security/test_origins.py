"""A saved session goes on only with what it was saved with: the model, the tokenizer, and the template of its messages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from am_memory import Memory, MemoryPolicy
from am_memory.conversations.threads import Threads
from am_memory.engines.base import ModelInfo
from am_memory.engines.fingerprints import model_fingerprint, of_template, of_tokenizer, template_fingerprint
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import ModelMismatch
from am_memory.events import Event, OriginUnknown
from am_memory.storage import session_file

POLICY = MemoryPolicy(trigger_tokens=500)
SAY = [{"role": "user", "content": "Hello."}]

Change = Callable[[PreTrainedTokenizerBase], object]


def changed(tokenizer: PreTrainedTokenizerBase, change: Change) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    return made if isinstance(made := change(other), PreTrainedTokenizerBase) else other


def rewritten(change: Callable[[dict[str, object]], object]) -> Change:
    """Another tokenizer, from what the first would be saved as."""

    def apply(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        written = json.loads(tokenizer.backend_tokenizer.to_str())
        change(written)
        names = ("bos_token", "eos_token", "pad_token", "chat_template")
        options = {name: getattr(tokenizer, name) for name in names}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), **options)

    return apply


def swap_two_letters(written: dict[str, object]) -> None:
    vocabulary = written["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def with_a_merge(written: dict[str, object]) -> None:
    model = written["model"]
    model["vocab"]["qz"], model["merges"] = 259, [["q", "z"]]


def in_lower_case(written: dict[str, object]) -> None:
    written["normalizer"] = {"type": "Lowercase"}


def another_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = "<|im_end|>"


def one_token_more(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|owl|>", special=True)]})


TOKENIZERS = [
    rewritten(swap_two_letters),
    rewritten(with_a_merge),
    rewritten(in_lower_case),
    another_first_token,
    one_token_more,
]


@pytest.mark.parametrize("change", TOKENIZERS)
def test_another_tokenizer_is_told_from_the_first(byte_tokenizer: PreTrainedTokenizerBase, change: Change) -> None:
    assert of_tokenizer(changed(byte_tokenizer, change)) != of_tokenizer(byte_tokenizer)


@pytest.mark.parametrize("change", [
    lambda tokenizer: tokenizer("text", truncation=True, max_length=3),
    lambda tokenizer: tokenizer(["a", "bcd"], padding=True),
    lambda tokenizer: setattr(tokenizer, "model_max_length", 9),
    lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
    lambda tokenizer: setattr(tokenizer, "pad_token", "<|im_end|>"),
    lambda tokenizer: setattr(tokenizer, "chat_template", "another"),
    rewritten(lambda written: None),
])  # fmt: skip
def test_what_changes_no_token_is_the_same_tokenizer(byte_tokenizer: PreTrainedTokenizerBase, change: Change) -> None:
    assert of_tokenizer(changed(byte_tokenizer, change)) == of_tokenizer(byte_tokenizer)


def test_merges_are_the_same_however_they_are_written() -> None:
    from am_memory.engines.fingerprints import _merges_and_scores

    class Written:
        is_fast = True

        def __init__(self, merges: list[object]) -> None:
            self.merges, self.backend_tokenizer = merges, self

        def to_str(self) -> str:
            return json.dumps({"model": {"vocab": {}, "merges": self.merges}})

    assert _merges_and_scores(Written(["a b", "c d"])) == _merges_and_scores(Written([["a", "b"], ["c", "d"]]))
    assert _merges_and_scores(Written(["a b", "c d"])) != _merges_and_scores(Written(["c d", "a b"]))


def test_a_template_is_its_text_and_what_it_writes_of_its_own_accord(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    ends = {"bos": "<s>", "eos": "</s>"}
    prints = [
        of_template(byte_tokenizer),
        template_fingerprint("{{ messages }}", ends),
        template_fingerprint("{{ messages }} ", ends),
        template_fingerprint("{{ messages }}", {**ends, "eos": "<end>"}),
        template_fingerprint({"default": "{{ messages }}", "tool_use": "{{ tools }}"}, ends),
        template_fingerprint(None, ends),
    ]
    assert len({*prints}) == len(prints)
    assert prints[-1] == ""


def test_the_models_own_fingerprint_is_what_it_was(engine: TransformersEngine, tiny_model: PreTrainedModel) -> None:
    """Calibration files go by it."""
    assert engine.info.fingerprint == model_fingerprint(tiny_model)


# Sessions


@pytest.fixture
def with_tokenizer(tiny_model: PreTrainedModel, tmp_path: Path) -> Callable[..., Memory]:
    def make(tokenizer: PreTrainedTokenizerBase, on_event: Callable[[Event], None] = lambda event: None) -> Memory:
        engine = TransformersEngine(tiny_model, tokenizer)
        return Memory(engine, POLICY, store=tmp_path, on_event=on_event)

    return make


@pytest.mark.parametrize("change", TOKENIZERS)
def test_a_session_of_another_tokenizer_is_refused_by_name(
    with_tokenizer: Callable[..., Memory], byte_tokenizer: PreTrainedTokenizerBase, change: Change
) -> None:
    """It was loaded, and read nonsense."""
    session = with_tokenizer(byte_tokenizer).session("alice")
    session.append("Hello.")
    session.save()
    with pytest.raises(ModelMismatch, match=r"'alice' was saved with tokenizer \w+, .* load the tokenizer that it was"):
        with_tokenizer(changed(byte_tokenizer, change)).session("alice")
    assert with_tokenizer(byte_tokenizer).session("alice").tokens == session.tokens


def test_a_session_with_messages_of_another_template_is_refused_by_name(
    with_tokenizer: Callable[..., Memory], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Two formats were mixed."""
    memory = with_tokenizer(byte_tokenizer)
    for name, content in (("text", "Hello."), ("chat", SAY)):
        session = memory.session(name)
        session.append(content)
        session.save()
    other = changed(byte_tokenizer, lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"))
    with pytest.raises(ModelMismatch, match=r"'chat' was saved with chat template \w+, .* load the chat template"):
        with_tokenizer(other).session("chat")
    assert with_tokenizer(other).session("text").tokens == memory.session("text").tokens


def test_all_that_differs_is_named(
    with_tokenizer: Callable[..., Memory], byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = with_tokenizer(byte_tokenizer)
    memory.session("chat").append(SAY)
    memory.session("chat").save()
    other = with_tokenizer(byte_tokenizer)
    info = replace(other.engine.info, fingerprint="m", tokenizer_fingerprint="t", template_fingerprint="c")
    monkeypatch.setattr(other.engine, "info", info)
    with pytest.raises(ModelMismatch, match=r"has model m and tokenizer t and chat template c: load the model and the"):
        other.session("chat")


def test_a_conversation_of_another_template_is_read_again(
    with_tokenizer: Callable[..., Memory], byte_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    turn = Threads(with_tokenizer(byte_tokenizer)).turn(SAY)
    turn.keep({"role": "assistant", "content": "".join(piece.text for piece in turn.session.generate(4))})
    template = byte_tokenizer.chat_template.replace("assistant", "model")
    other = changed(byte_tokenizer, lambda tokenizer: setattr(tokenizer, "chat_template", template))
    turn = Threads(with_tokenizer(other)).turn(SAY)
    assert turn.num_cached_tokens == 0
    assert "was saved with chat template" in caplog.text


@pytest.mark.parametrize("content", ["Hello.", SAY])
def test_a_session_that_does_not_say_what_it_was_saved_with_goes_on_with_a_warning(
    with_tokenizer: Callable[..., Memory],
    byte_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: object,
) -> None:
    """Saved before this was written down, or with an engine that does not know."""
    events: list[Event] = []
    memory = with_tokenizer(byte_tokenizer)
    with monkeypatch.context() as patch:
        info = replace(memory.engine.info, tokenizer_fingerprint="", template_fingerprint="")
        patch.setattr(memory.engine, "info", info)
        memory.session("alice").append(content)
        memory.session("alice").save()
        assert Memory(memory.engine, POLICY, store=memory.store, on_event=events.append).session("alice").tokens
        assert events == []
    resumed = with_tokenizer(byte_tokenizer, events.append).session("alice")
    parts = ("tokenizer",) if content == "Hello." else ("tokenizer", "chat template")
    assert events == [OriginUnknown("alice", parts)]
    assert f"does not record which {' and '.join(parts)} it was saved with" in caplog.text
    resumed.save()
    with_tokenizer(byte_tokenizer, events.append).session("alice")
    assert len(events) == 1


def test_a_file_without_these_fields_can_be_read(
    with_tokenizer: Callable[..., Memory], engine: TransformersEngine
) -> None:
    fields = session_file.SessionFields.model_fields
    assert not fields["tokenizer_fingerprint"].is_required()
    assert not fields["template_fingerprint"].is_required()


# llama.cpp


def test_llama_cpp_tells_its_vocabularies_and_templates_apart(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, llama: LlamaCppEngine
) -> None:
    from gguf_file import write_gguf

    def info(change: Change, name: str) -> ModelInfo:
        path = write_gguf(tmp_path / f"{name}.gguf", tiny_model, changed(byte_tokenizer, change))
        return LlamaCppEngine(path, kv_type="f32").info

    same = info(lambda tokenizer: None, "same")
    assert same.tokenizer_fingerprint == llama.info.tokenizer_fingerprint != ""
    assert same.template_fingerprint == llama.info.template_fingerprint != ""
    template = info(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"), "template")
    assert template.tokenizer_fingerprint == same.tokenizer_fingerprint
    assert template.template_fingerprint != same.template_fingerprint
    swapped = info(rewritten(swap_two_letters), "swapped")
    assert swapped.tokenizer_fingerprint != same.tokenizer_fingerprint
