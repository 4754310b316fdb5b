"""A dataset of the Hugging Face Hub by its id; or a folder that `save_to_disk` wrote; or parquet or arrow files, one or
a folder of them.

Media columns aren't decoded by `datasets`: they arrive as they are stored. Numbers of a ClassLabel become its names;
messages and conversations are read as the formats messages and sharegpt do.
Code of a dataset's repository is never run.
"""

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import Columns, NumberedRows, _conversations

REMOTE = True
SAVED = ("dataset_dict.json", "state.json")
FILES = {".parquet": "parquet", ".arrow": "arrow"}
BATCH = 16  # rows read at once
BUFFER = 2**20  # bytes read of a column at once


class Options(PartOptions):
    config: str | None = Field(None, description="Configuration of the dataset; null: its default.")
    split: str | None = Field(
        None, description="Split of the dataset; null: its only one, or `train` if it has several."
    )
    revision: str | None = Field(None, description="Commit (40 hex digits), branch or tag of the Hub repository.")
    streaming: bool = Field(
        False, description="Download rows while they are read, without a copy of the dataset on disk."
    )


def detects(path: Path) -> bool:
    if path.is_dir():
        saved = any((path / name).is_file() for name in SAVED)
        return saved or any(next(path.glob(f"{sub}*{suffix}"), None) for sub in ("", "*/") for suffix in FILES)
    return path.suffix.lower() in FILES


def rows(path: Path, options: Options) -> NumberedRows:
    from datasets.exceptions import DatasetsError

    try:
        files = _parquet_files(path, options)
        features, stored = _of_files(files) if files else _of_datasets(path, options)
        for number, row in enumerate(stored, 1):
            plain = _plain(features, row, path) if features else row
            yield number, _conversations.read_turns(f"{path.name}:{number}", plain)
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if path.exists() else "; is the id right, and may this machine reach the Hub?"
        raise DataError(f"{path.as_posix()}: can't be read by datasets ({reason[:300]}){hint}") from error


def _parquet_files(path: Path, options: Options) -> list[str]:
    """The local parquet files of one split, as `datasets` assigns them; [] if `datasets` must read them itself."""
    from datasets import load_dataset_builder

    if "[" in (options.split or "") or any((path / name).is_file() for name in SAVED):
        return []
    if path.is_file():
        alone = path.suffix.lower() == ".parquet" and options.split in (None, "train")
        return [str(path)] if alone else []
    if not path.is_dir() or next(path.rglob("*.parquet"), None) is None:
        return []
    splits = load_dataset_builder(str(path), options.config).config.data_files or {}
    files = _chosen(path, {str(split): list(files) for split, files in splits.items()}, options.split)
    return files if all(file.endswith(".parquet") for file in files) else []


def _of_files(files: list[str]) -> tuple[Any, Iterator[Columns]]:
    """(features, rows as stored). Not through a `datasets` stream: its scanner keeps what it has read until the end of
    the file, and its threads may abort a process that ends earlier.
    """
    from datasets import Features
    from pyarrow.parquet import ParquetFile, read_schema

    def stored() -> Iterator[Columns]:
        for name in files:
            with ParquetFile(name, pre_buffer=False, buffer_size=BUFFER) as file:
                for batch in file.iter_batches(BATCH, use_threads=False):
                    yield from batch.to_pylist()

    return Features.from_arrow_schema(read_schema(files[0])), stored()


def _of_datasets(path: Path, options: Options) -> tuple[Any, Iterator[Columns]]:
    dataset = _chosen(path, _loaded(path, options), options.split)

    def stored() -> Iterator[Columns]:
        # As arrow stores it: nothing is decoded, and media in lists need no copy of the dataset.
        for table in dataset.with_format("arrow").iter(BATCH):
            yield from table.to_pylist()
        gc.collect()  # reference cycles keep a stream's scanner, whose threads abort a process that ends

    return dataset.features, stored()


def _loaded(path: Path, options: Options) -> Any:
    from datasets import load_dataset, load_from_disk

    if any((path / name).is_file() for name in SAVED):
        return load_from_disk(str(path))
    sliced = "[" in (options.split or "")
    arguments = {"split": options.split, "streaming": options.streaming or (path.exists() and not sliced)}
    if path.is_file():
        kind = FILES.get(path.suffix.lower())
        if kind is None:
            raise DataError(f"{path}: neither a folder nor a parquet or arrow file")
        return load_dataset(kind, data_files=str(path), **arguments)
    if not path.exists():
        _refuse_unreachable(path.as_posix(), options.revision)
    return load_dataset(path.as_posix(), options.config, revision=options.revision, **arguments)


def _refuse_unreachable(name: str, revision: str | None) -> None:
    """Raise DataError if the Hub can't be reached and nothing of the dataset is in its cache: `datasets` would go on
    asking. What it asks for first is the card.
    """
    from huggingface_hub import try_to_load_from_cache

    from finetune.common.hub import CONNECT, unreachable

    why = unreachable()
    if why is not None and try_to_load_from_cache(name, "README.md", repo_type="dataset", revision=revision) is None:
        raise DataError(f"{name}: it isn't in the cache, and {why}; {CONNECT}")


def _chosen(path: Path, dataset: Any, split: str | None) -> Any:
    """One split of what was loaded. Raises DataError."""
    if not isinstance(dataset, dict):
        if split and "[" not in split and dataset.split and str(dataset.split) != split:
            raise DataError(f"{path.as_posix()}: holds only the split {str(dataset.split)!r}, not {split!r}")
        return dataset
    wanted = split or (next(iter(dataset)) if len(dataset) == 1 else "train")
    if wanted not in dataset:
        raise DataError(f"{path.as_posix()}: no split {wanted!r}; `format.split` is one of {', '.join(dataset)}")
    return dataset[wanted]


def _plain(feature: Any, value: Any, source: Path) -> Any:
    """A value of a row: labels by their names, media by their bytes or paths."""
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


def _medium(value: Columns, source: Path) -> Any:
    """A medium: its bytes if it is in the dataset's own repository, a `Path` if `datasets` put it into its cache, else
    its name, which the row checks.
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
    # Not resolved, since the Hub's cache consists of links into itself.
    if any(Path(name).is_relative_to(cache) for cache in caches) and ".." not in Path(name).parts:
        return Path(name)
    return name
