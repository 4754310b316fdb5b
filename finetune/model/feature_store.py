"""Features of frozen encoders, computed once and kept on disk, for all epochs, stages, seeds and runs. A folder per
fingerprint of an encoder holds safetensors files, whose tensors are named by the keys of the media.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.common.errors import ArtifactError
from finetune.data.sample import Layout

SHARD_BYTES = 256 * 2**20


class FeatureStore:
    """Features on disk, each (S, L, W), in the dtype that the encoder gave: read back, equal to the bit. The marks of
    their segments, or all of their layout where that is more, stand in the files' metadata.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint[:32]
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._marks: dict[str, list[str] | dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
                    marks = json.loads((file.metadata() or {}).get("marks", "{}"))
                    self._marks.update(marks)
            except SafetensorError as error:
                raise ArtifactError(f"{path} is damaged ({error}); delete it, it will be computed anew") from None

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self._files]

    def read(self, key: str) -> Tensor:
        features: Tensor = self._open(key).get_tensor(key)
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
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            save_file(shard, temporary, metadata={"marks": json.dumps(marks)})
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
