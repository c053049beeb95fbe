"""Files of what is measured once for each model: shipped with the package, or kept in the user's folder for caches.

Does not know what is measured.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from am_memory.engines.base import ModelInfo
from am_memory.engines.model_files import cache_folder


def model_fingerprint(info: ModelInfo) -> str:
    """What a measurement depends on of a model: its weights, its tokenizer and its chat template."""
    return f"{info.fingerprint} {info.tokenizer_fingerprint} {info.template_fingerprint}"


class MeasuredFile(NamedTuple):
    """The content of a file: tensors by name, and notes."""

    tensors: dict[str, Tensor]
    notes: dict[str, str]


@dataclass(frozen=True)
class MeasuredFiles:
    """The files of one kind of measurement, one file for each model, by its `model_fingerprint`.

    Attributes:
        kind: their folder's name in the user's folder for caches.
        digest: of everything that the measurement depends on beside the model. A file with another one does not count.
        shipped: the folder of those that the package has; None: it has none.
    """

    kind: str
    digest: str
    shipped: Path | None = None

    def found(self, fingerprint: str) -> Iterator[MeasuredFile]:
        """What is known of a model, the shipped file first; damaged files are left out."""
        for folder in (self.shipped, self.kept):
            if folder is not None and (content := self._read(folder / _file_name(fingerprint), fingerprint)):
                yield content

    def keep(self, fingerprint: str, content: MeasuredFile) -> None:
        """Write to the user's folder for caches; without a folder that can be written to, do nothing."""
        if self.kept is None:
            return
        file = self.kept / _file_name(fingerprint)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            try:
                temporary.write_bytes(self.packed(fingerprint, content))
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            return

    def packed(self, fingerprint: str, content: MeasuredFile) -> bytes:
        """The bytes of a file."""
        notes: Mapping[str, str] = {**content.notes, "fingerprint": fingerprint, "trial": self.digest}
        return safetensors.torch.save(content.tensors, dict(notes))

    @property
    def kept(self) -> Path | None:
        """Where they are kept on this machine; None: the user has no home."""
        try:
            return cache_folder() / self.kind
        except RuntimeError:
            return None

    def _read(self, file: Path, fingerprint: str) -> MeasuredFile | None:
        try:
            with safe_open(file, framework="pt") as content:
                notes = content.metadata() or {}
                if (notes.get("fingerprint"), notes.get("trial")) != (fingerprint, self.digest):
                    return None
                names = content.keys()
                return MeasuredFile({name: content.get_tensor(name) for name in names}, notes)
        except (OSError, SafetensorError, ValueError):
            return None


def _file_name(fingerprint: str) -> str:
    return f"{sha256(fingerprint.encode()).hexdigest()[:16]}.safetensors"
