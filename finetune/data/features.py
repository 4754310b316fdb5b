"""What a frozen encoder says of a medium never changes: computed once, kept on disk, shared by epochs, stages, seeds
and runs. A folder per encoder fingerprint; in it, safetensors files whose names are hashes of media.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.sample import Medium
from finetune.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 256 * 2**20


def default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune" / "features"


def media_key(medium: Medium) -> str:
    """sha256 of the file: renamed or copied media keep their features, changed ones don't."""
    seen = medium.path.stat()
    return _file_hash(medium.path, seen.st_size, seen.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FeatureStore:
    """Features on disk, each (L, W), in the dtype that the encoder gave: read back, equal to the bit."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint[:32]
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        from safetensors import SafetensorError, safe_open

        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise ArtifactError(f"{path} is damaged ({error}); delete it, it will be computed anew") from None

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self._files]

    def read(self, key: str) -> "Tensor":
        from safetensors import safe_open

        path = self._files[key]
        if path not in self._handles:
            self._handles[path] = safe_open(path, "pt")
        return self._handles[path].get_tensor(key)

    def fill(self, keys: Sequence[str], compute: Callable[[str], "Tensor"], done: Callable[[], None]) -> None:
        """Compute what is missing, in files of about 256 MB, each written whole or not at all."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, Tensor] = {}

        def write() -> None:
            if not shard:
                return
            name = hashlib.sha256("".join(shard).encode()).hexdigest()[:24]
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            save_file(shard, temporary)
            temporary.replace(self.folder / f"{name}.safetensors")
            shard.clear()

        try:
            for key in keys:
                shard[key] = compute(key).detach().cpu().contiguous()
                done()
                if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                    write()
        finally:
            write()  # interrupted: what is computed is kept
        self.refresh()
