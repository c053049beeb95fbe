"""Options that several commands of `am-memory` have."""

from __future__ import annotations

from typing import Annotated

import typer

from am_memory.engines.names import DtypeName, EngineName
from am_memory.policy import MemoryPolicy

MODEL_HELP = 'A hub id, a folder, a .gguf file, or "demo" for the bundled model.'

Model = Annotated[str, typer.Option(help=MODEL_HELP)]
RunBy = Annotated[EngineName, typer.Option("--engine", help="What runs it; llama_cpp runs a .gguf file as it is.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda [default: the best there is]", show_default=False)]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        help="Of weights and cache; with llama_cpp of the cache alone [default: bfloat16 on CUDA, float32 on a CPU; "
        "float16 with llama_cpp]",
        show_default=False,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model's layers by torch.compile.")]
TrustMessages = Annotated[
    bool, typer.Option("--trust-messages", help="Read control tokens that messages spell (<|im_end|>) as such.")
]
WindowTokens = Annotated[
    int | None,
    typer.Option(help="Positions that are used [default: all that the model was trained on]", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model; read it first.")
]
TriggerTokens = Annotated[int, typer.Option(help="Size of the cache, in tokens, that fires a compaction.")]
KeepRatio = Annotated[float, typer.Option(help="Slots kept for each token that is compacted.")]
Pinned = Annotated[
    str, typer.Option(help="What stays exact for ever: system, first_message, sinks, or a number of tokens.")
]


POLICY_OPTIONS = ("trigger_tokens", "keep_ratio", "pinned")


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the user has given an option, and not left it at its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def policy_of(trigger_tokens: int, keep_ratio: float, pinned: str) -> MemoryPolicy:
    """The policy that these options come to.

    Raises:
        InvalidPolicy: one of them is out of its range.
    """
    num_pinned = int(pinned) if pinned.isdecimal() else pinned
    return MemoryPolicy(trigger_tokens=trigger_tokens, keep_ratio=keep_ratio, pinned=num_pinned)
