"""Options that several commands share. Loads no model and no torch: `am-memory COMMAND --help` reads this file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from am_memory.engines.names import DtypeName, EngineName
from am_memory.errors import InvalidInput
from am_memory.events import Listener, ignore
from am_memory.formatting import MEBIBYTE

if TYPE_CHECKING:
    from am_memory.memory import Memory
    from am_memory.policy import MemoryPolicy

MODEL_HELP = 'A hub id, a folder, a .gguf file, or "demo" for the bundled model.'
STORE_HELP = "Where sessions are saved: a folder or any fsspec URL."

RefineName = Literal["off", "idle"]

StoreURL = Annotated[str | None, typer.Option(help=STORE_HELP, show_default="~/.local/share/am_memory/sessions")]


@dataclass(frozen=True)
class Loading:
    """Options of every command that loads a model and gives it a memory."""

    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo"
    engine: Annotated[
        EngineName, typer.Option(help="Engine that runs the model; llama_cpp runs a .gguf file as it is.")
    ] = "transformers"
    trigger_tokens: Annotated[int, typer.Option(help="Compact when the cache reaches this size, in tokens.")] = 2048
    keep_ratio: Annotated[float, typer.Option(help="Slots kept for each compacted token.")] = 0.1
    pinned: Annotated[
        str, typer.Option(help="Never compacted: system, first_message, sinks, or a number of tokens.")
    ] = "system"
    originals: Annotated[
        str, typer.Option(help="Where exact entries of compacted tokens are kept for recall: auto, host, disk or drop.")
    ] = "auto"
    recall_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most compacted tokens that are exact again at one time, because a message looks for them; 0: none.",
            show_default="an eighth of the trigger",
        ),
    ] = None
    refine: Annotated[
        RefineName,
        typer.Option(help="idle: compact segments get better slots while nobody waits; off: they stay as they are."),
    ] = "off"
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")] = None
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="dtype of weights and cache; with llama_cpp, of the cache only.",
            show_default="bfloat16 on CUDA, float32 on a CPU, float16 with llama_cpp",
        ),
    ] = None
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model's layers with torch.compile.")] = False
    trust_messages: Annotated[
        bool, typer.Option("--trust-messages", help="Read control tokens in messages (<|im_end|>) as control tokens.")
    ] = False
    originals_mib: Annotated[
        int | None,
        typer.Option(
            help="Host memory for exact entries of compacted tokens, in MiB, all sessions together.",
            show_default="an eighth of the machine's memory",
        ),
    ] = None
    originals_disk_mib: Annotated[
        int | None,
        typer.Option(
            help="Room for those in the folder for temporary files, in MiB; the rest is dropped.",
            show_default="a quarter of what is free there",
        ),
    ] = None
    window_tokens: Annotated[
        int | None,
        typer.Option(help="Context window, in tokens.", show_default="the one the model was trained on"),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model; read it first.")
    ] = False

    @property
    def policy(self) -> MemoryPolicy:
        """The policy of these options.

        Raises:
            InvalidPolicy: an option is out of its range.
        """
        from am_memory.policy import MemoryPolicy

        pinned: Any = int(self.pinned) if self.pinned.isdecimal() else self.pinned
        originals: Any = self.originals
        return MemoryPolicy(
            trigger_tokens=self.trigger_tokens,
            keep_ratio=self.keep_ratio,
            pinned=pinned,
            originals=originals,
            recall_tokens=self.recall_tokens,
            refine=self.refine,
        )

    def load(self, *, store: str | None = None, on_event: Listener = ignore) -> Memory:
        """Load the model, and give it a memory."""
        from am_memory.memory import Memory

        return Memory.from_pretrained(
            self.model,
            engine=self.engine,
            policy=self.policy,
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
            store=store,
            on_event=on_event,
            trust_messages=self.trust_messages,
            originals_bytes=in_bytes(self.originals_mib),
            originals_disk_bytes=in_bytes(self.originals_disk_mib),
            window_tokens=self.window_tokens,
            trust_remote_code=self.trust_remote_code,
        )


def in_bytes(num_mebibytes: int | None) -> int | None:
    """A size in MiB as bytes; None stays None."""
    return None if num_mebibytes is None else num_mebibytes * MEBIBYTE


POLICY_OPTIONS = ("trigger_tokens", "keep_ratio", "pinned", "originals", "recall_tokens", "refine")

Command = Callable[..., None]


def with_options(*groups: Any) -> Callable[[Command], Command]:
    """Give a command one option for each field of its first parameters, which are dataclasses.

    Args:
        groups: one instance for each of these parameters; its values are the defaults.
    """

    def decorate(command: Command) -> Command:
        own = [*signature(command, eval_str=True).parameters.values()][len(groups) :]
        spread = [parameter for group in groups for parameter in parameters_of(group)]
        parameters = [*spread, *(parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own)]

        @wraps(command)
        def run(**values: Any) -> None:
            filled = [replace(group, **{f.name: values.pop(f.name) for f in fields(group)}) for group in groups]
            command(*filled, **values)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def parameters_of(group: Any) -> Iterator[Parameter]:
    """A parameter for each field of a dataclass's instance, with its value as the default."""
    hints = get_type_hints(type(group), include_extras=True)
    for field in fields(group):
        name, default = field.name, getattr(group, field.name)
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the user has given an option, rather than left it at its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def text_of(path: Path) -> str:
    """The text of a file; raises InvalidInput if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read ({error}): give a text file in UTF-8") from error


def default_store() -> str:
    """The folder of saved sessions where no --store is given."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(home) / "am_memory" / "sessions")
