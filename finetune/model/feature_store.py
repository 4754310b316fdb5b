"""Features of frozen encoders, computed once and kept on disk, for all epochs, stages, seeds and runs. A folder per
fingerprint of an encoder holds safetensors files, whose tensors are named by the keys of the media.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.common.errors import ArtifactError
from finetune.common.progress import console
from finetune.data.sample import Layout

SHARD_BYTES = 256 * 2**20


class FeatureStore:
    """Features on disk, each (S, L, W), in the dtype that the encoder gave: read back, equal to the bit. The marks of
    their segments, or all of their layout where that is more, and the checksums of all features stand in the files'
    metadata. A file that isn't as it was written is removed, and named: its features are computed anew.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint[:32]
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._read: set[Path] = set()
        self._marks: dict[str, list[str] | dict[str, Any]] = {}
        self._sums: dict[str, int] = {}  # of what hasn't been read yet
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    keys = dict.fromkeys(file.keys(), path)
                marks, sums = (json.loads(metadata.get(name, "{}")) for name in ("marks", "crc32"))
            except (SafetensorError, ValueError) as error:
                self._remove(path, str(error))
                continue
            self._read.add(path)
            self._files.update(keys)
            self._marks.update(marks)
            self._sums.update(sums)

    def _remove(self, path: Path, reason: str) -> None:
        """Raises ArtifactError where it can't be removed."""
        console.print(f"{path} isn't as it was written ({reason}): its features are computed anew")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(f"{path} is damaged, and can't be removed ({error}): remove it") from None
        self._handles.pop(path, None)
        self._read.discard(path)
        self._files = {key: file for key, file in self._files.items() if file != path}

    def check(self, keys: Iterable[str]) -> None:
        """Read what will be needed once, and remove files that hold anything else than was written."""
        for key in dict.fromkeys(keys):
            if key in self._files and not self._is_whole(key, self._open(key).get_tensor(key)):
                self._remove(self._files[key], f"the checksum of {key}")

    def _is_whole(self, key: str, features: Tensor) -> bool:
        """Looked at once in a process."""
        expected = self._sums.pop(key, None)
        return expected is None or checksum(features) == expected

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self._files]

    def read(self, key: str) -> Tensor:
        """Raises ArtifactError where they aren't as they were written."""
        features: Tensor = self._open(key).get_tensor(key)
        if not self._is_whole(key, features):
            raise ArtifactError(f"{self._files[key]} isn't as it was written: remove it, it is computed anew")
        return features

    def layout(self, key: str) -> Layout:
        segments, rows, _ = self._open(key).get_slice(key).get_shape()
        kept = self._marks.get(key, [""] * segments)
        return Layout(rows, tuple(kept)) if isinstance(kept, list) else _layout(kept)

    def _open(self, key: str) -> Any:
        path = self._files[key]
        if path not in self._handles:
            self._handles[path] = safe_open(path, "pt")
        return self._handles[path]

    def fill(self, computed: Iterable[tuple[str, Tensor, Layout]], done: Callable[[], None]) -> None:
        """Keep (key, features (S, L, W), layout) as they come, in files of about 256 MB, each whole or absent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, Tensor] = {}
        marks: dict[str, list[str] | dict[str, Any]] = {}

        def write() -> None:
            if not shard:
                return
            name = hashlib.sha256("".join(shard).encode()).hexdigest()[:24]
            sums = {key: checksum(tensor) for key, tensor in shard.items()}
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            save_file(shard, temporary, metadata={"marks": json.dumps(marks), "crc32": json.dumps(sums)})
            temporary.replace(self.folder / f"{name}.safetensors")
            shard.clear()
            marks.clear()

        try:
            for key, features, layout in computed:
                shard[key] = features.detach().cpu().contiguous()
                if layout.end or layout.grid:
                    marks[key] = asdict(layout)
                elif any(layout.marks):
                    marks[key] = list(layout.marks)
                done()
                if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                    write()
        finally:
            write()  # interrupted: what is computed is kept
        self.refresh()


def _layout(kept: dict[str, Any]) -> Layout:
    grid = kept["grid"]
    return Layout(kept["rows"], tuple(kept["marks"]), kept["end"], grid and tuple(grid), kept["grid_seconds"])


def checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)
