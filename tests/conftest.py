"""Fixtures that every test may use: a tiny random model, a byte tokenizer, and the bundled demo model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub, and none may wait for one

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share their controller's folder
    _cache_folder = tempfile.TemporaryDirectory(prefix="am-memory-tests-", ignore_cleanup_errors=True)
    os.environ["AM_MEMORY_CACHE"] = _cache_folder.name  # no test reads or writes the user's folder for caches

import pytest
import torch

if not torch.cuda.is_available():  # before transformers imports Triton: the GPU's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from serving import NewServer, Server

    from am_memory.engines.llama_cpp import LlamaCppEngine
    from am_memory.engines.transformers import TransformersEngine
    from am_memory.events import Event

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IM_START_ID, IM_END_ID, PAD_ID = 256, 257, 258

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

torch.set_num_threads(1)  # tensors this small, and busy machines, only make several threads wait for each other


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("model"):
            item.add_marker(pytest.mark.xdist_group("demo"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, whose tests share fixtures, and one worker all tests of the demo model."""
    from xdist.scheduler import LoadGroupScheduling

    class ByGroupOrFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).split("::")[0]

    return ByGroupOrFile(config, log)


@pytest.fixture
def events() -> list[Event]:
    """For `on_event=events.append`."""
    return []


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> None:
    torch.manual_seed(0)


def random_llama() -> PreTrainedModel:
    """3 layers, 4 query and 2 KV heads of 16, the same weights each time; its attention is peaked enough to matter."""
    torch.manual_seed(20260216)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.15,
        bos_token_id=IM_START_ID,
        eos_token_id=IM_END_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval().requires_grad_(False)


def random_gemma() -> PreTrainedModel:
    """One full layer between two with a sliding window of 16 tokens, the same weights each time."""
    torch.manual_seed(20260216)
    config = Gemma3TextConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=IM_START_ID,
        eos_token_id=IM_END_ID,
        pad_token_id=PAD_ID,
    )
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def new_sliding_model() -> Callable[[], PreTrainedModel]:
    """Makes equal models whose layers differ in what they attend to."""
    return random_gemma


@pytest.fixture(scope="session")
def new_tiny_model() -> Callable[[], PreTrainedModel]:
    """Makes tiny models of the same weights, for tests that change theirs for good."""
    return random_llama


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """A random Llama, shared by the whole session: a test that changes it must restore it."""
    return random_llama()


@pytest.fixture(scope="session")
def stock_model() -> PreTrainedModel:
    """The tiny model as transformers runs it, with its own sdpa attention: what everything exact is compared with."""
    return random_llama()


@pytest.fixture(scope="session")
def engine(tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    """The tiny model behind our engine."""
    from am_memory.engines.transformers import TransformersEngine

    return TransformersEngine(tiny_model, byte_tokenizer)


def tokenizer_of_bytes() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte (id = byte), ChatML's two marks and a padding token: a character may span tokens."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (IM_START, IM_END, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=PAD,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """`tokenizer_of_bytes`, shared by the whole session."""
    return tokenizer_of_bytes()


@pytest.fixture(scope="session")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bundled demo model in float32 on the CPU; a test that uses it is marked `model`."""
    from am_memory.engines.transformers.loading import load_model

    return load_model("demo", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def demo_llama() -> LlamaCppEngine:
    """The bundled demo model behind llama.cpp, quantised as its file is; a test that uses it is marked `model`."""
    from am_memory.engines.llama_cpp import LlamaCppEngine

    return LlamaCppEngine.from_pretrained("demo")


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as a folder, for whatever loads it by name."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as a GGUF file."""
    from gguf_file import write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model, byte_tokenizer)


@pytest.fixture(scope="session")
def llama(tiny_gguf: Path) -> LlamaCppEngine:
    """The tiny model behind llama.cpp, with keys and values in float32."""
    from am_memory.engines.llama_cpp import LlamaCppEngine

    return LlamaCppEngine(tiny_gguf, kv_type="f32")


@pytest.fixture(scope="session")
def shared_llama(tiny_gguf: Path) -> LlamaCppEngine:
    """The same with cells that all heads share; flash attention would take keys and values as float16."""
    from am_memory.engines.llama_cpp import LlamaCppEngine

    return LlamaCppEngine(tiny_gguf, kv_type="f32", flash_attention=False, heads="shared")


@pytest.fixture
def measured_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which measurements of models are kept."""
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def pass_sizes(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of caches of each pass that reads a token of several."""
    sizes, read = list[int](), engine.forward_batch

    def noted(caches: Sequence[Any], *args: Any) -> Any:
        sizes.append(len(caches))
        return read(caches, *args)

    monkeypatch.setattr(engine, "forward_batch", noted)
    return sizes


@pytest.fixture
def looking_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message looks up the first 20 compacted tokens: the tiny model attends to nothing in particular."""
    from am_memory.events import MemoryConsulted, Span
    from am_memory.recall.paging import Page
    from am_memory.session.context import Context
    from am_memory.session.recalling import recall_pages

    def recall_first(context: Context) -> tuple[Span, ...]:
        context.read_all()
        if not context.cache.segments:
            return ()
        start = context.cache.segments[0].start
        page = Page(start, start + 20)
        recall_pages(context, [page], context.recall_tokens)
        spans = (Span(*page, 1.2345, context.engine.decode(context.tokens[page.start : page.end])),)
        context.notify(MemoryConsulted(context.name, len(context.tokens), spans, context.cache.kv_tokens))
        return spans

    monkeypatch.setattr("am_memory.session.generation.recall_for_answer", recall_first)


@pytest.fixture(scope="session")
def new_server(engine: TransformersEngine) -> NewServer:
    """Starts servers of the tiny model: `with new_server(store=..., api_keys=[...]) as server`."""
    from serving import servers_of

    return servers_of(engine)


@pytest.fixture(scope="session")
def server(new_server: NewServer) -> Iterator[Server]:
    """One server for all tests that leave it as it is; everybody may call it."""
    with new_server() as server:
        yield server
