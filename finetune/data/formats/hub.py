"""A dataset of the Hugging Face Hub by its id; or a folder that `save_to_disk` wrote; or parquet or arrow files, one or
a folder of them.

Media columns aren't decoded by `datasets`: they arrive as they are stored. Numbers of a ClassLabel become its names;
messages and conversations are read as the formats messages and sharegpt do.
Code of a dataset's repository is never run.
"""

import dataclasses
import gc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.data.formats import _conversations
from finetune.errors import DataError
from finetune.parts import PartOptions

REMOTE = True
SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")
FILES = {".parquet": "parquet", ".arrow": "arrow"}
AT_ONCE = 16  # rows


class Options(PartOptions):
    config: str | None = Field(None, description="Name of the dataset's configuration; null: its default.")
    split: str | None = Field(
        None, description="The dataset's split, as it calls it; null: its only one, or of several train."
    )
    revision: str | None = Field(None, description="Commit (40 hex digits), branch or tag of the Hub repository.")
    streaming: bool = Field(False, description="Read rows as they come, without a copy of the dataset on disk.")


def detects(path: Path) -> bool:
    if path.is_dir():
        saved = any((path / name).is_file() for name in SAVED)
        return saved or any(next(path.glob(f"{sub}*{suffix}"), None) for sub in ("", "*/") for suffix in FILES)
    return path.suffix.lower() in FILES


def rows(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    read = _rows(path, options)
    try:
        yield from read
    finally:
        # Arrow's threads abort a process that ends while circles of references keep a scanner of files alive.
        read.close()
        gc.collect()


def _rows(path: Path, options: Options) -> Generator[tuple[int, dict[str, Any]], None, None]:
    from datasets.exceptions import DatasetsError

    try:
        dataset = _chosen(path, _loaded(path, options), options.split)
        features = dataset.features
        # As arrow holds it: nothing is decoded, and media in lists need no copy of the dataset.
        tables = dataset.with_format("arrow").iter(AT_ONCE)
        for number, row in enumerate((row for table in tables for row in table.to_pylist()), 1):
            plain = _plain(features, row, path) if features else row
            yield number, _conversations.read_turns(f"{path.name}:{number}", plain)
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if path.exists() else "; is the id right, and may this machine reach the Hub?"
        raise DataError(f"{path.as_posix()}: can't be read by datasets ({said[:300]}){hint}") from error


def _loaded(path: Path, options: Options) -> Any:
    from datasets import load_dataset, load_from_disk

    if any((path / name).is_file() for name in SAVED[:2]):
        return load_from_disk(str(path))
    local = path.exists()
    sliced = "[" in (options.split or "")
    how: dict[str, Any] = {"split": options.split, "streaming": options.streaming or (local and not sliced)}
    if path.suffix.lower() == ".parquet" or (path.is_dir() and next(path.rglob("*.parquet"), None)):
        from pyarrow.dataset import ParquetFragmentScanOptions

        # Else what was read stays in memory to the end of the file.
        how["fragment_scan_options"] = ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
    if path.is_file():
        kind = FILES.get(path.suffix.lower())
        if kind is None:
            raise DataError(f"{path}: neither parquet nor arrow, nor a folder")
        return load_dataset(kind, data_files=str(path), **how)
    return load_dataset(path.as_posix(), options.config, revision=options.revision, **how)


def _chosen(path: Path, dataset: Any, split: str | None) -> Any:
    """One split of what was loaded. Raises DataError."""
    if not isinstance(dataset, dict):
        if split and dataset.split and str(dataset.split) != split:
            raise DataError(f"{path.as_posix()}: holds the split {str(dataset.split)!r} alone, not {split!r}")
        return dataset
    wanted = split or (next(iter(dataset)) if len(dataset) == 1 else "train")
    if wanted not in dataset:
        raise DataError(f"{path.as_posix()}: no split {wanted!r}; `format.split` is one of {', '.join(dataset)}")
    return dataset[wanted]


def _plain(feature: Any, value: Any, source: Path) -> Any:
    """A value as rows hold it: names of labels, media by their bytes or where they are."""
    from datasets import ClassLabel

    if value is None:
        return None
    if isinstance(feature, dict):
        return {key: _plain(feature.get(key), inner, source) for key, inner in value.items()}
    if isinstance(value, list):
        inside = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_plain(inside, inner, source) for inner in value]
    if isinstance(feature, ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if dataclasses.is_dataclass(feature) and hasattr(feature, "decode") and isinstance(value, dict):
        return _medium(value, source)
    return value


def _medium(value: dict[str, Any], source: Path) -> Any:
    """Bytes, or where a file is: read here if it is in the dataset's own repository, a `Path` if `datasets` put it into
    its cache, a name for the row to judge otherwise.
    """
    name = value.get("path")
    if value.get("bytes") is not None or not isinstance(name, str):
        return value
    if name.rpartition("::")[2].startswith("hf://datasets/"):
        import fsspec

        with fsspec.open(name, "rb") as file:
            return {"bytes": file.read(), "path": name}
    from datasets import config
    from huggingface_hub import constants

    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    # Not resolved: the Hub's cache is links into itself.
    if any(Path(name).is_relative_to(cache) for cache in caches) and ".." not in Path(name).parts:
        return Path(name)
    return name
