"""Loading from the Hub or a folder, with errors that a user can act on.

What `finetune push` publishes carries manifest.json: {"format", "recipe", "kind": "adapter" or "merged", "files":
{name: {"sha256", "bytes"}}}, of every file but itself. Whoever downloads it can tell whether it came whole.
"""

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finetune.common.certificate import file_hash
from finetune.common.errors import ArtifactError, FinetuneError, ModelError
from finetune.common.run_folder import read_json, whole_folder

MANIFEST = "manifest.json"
READ = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")  # what loading reads: nothing that can hold code
PULLED = (*READ, "*.md", "*.yaml", "*.png", "*.webp")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise on a wrong name, revision, file or connection into one ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        raise ModelError(f"{what} can't be loaded: {reason}") from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a settings file with missing, unknown or odd keys makes of its reader into one ArtifactError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{file} is damaged, or of another version: {what}; pull the model again, or write it anew"
        ) from error


def verify_weights(folder: Path) -> None:
    """That the weights of a merged model are there, each file as long as its header says. Raises ArtifactError."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    with reading(index):
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for path in sorted(folder / name for name in names):
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: pull the model again, or merge again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ArtifactError(f"{path} is damaged: {error}; pull the model again, or merge again") from error


@contextmanager
def asking(what: str, raises: type[FinetuneError] = ModelError) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error that says what to do: f"{what}: reason"."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except FinetuneError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise raises(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why the Hub didn't do what it was asked, and what to do next."""
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading FILE to the Hub."
        return reason(error.__cause__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on this disk; make room, or set HF_HOME to a disk that has some"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it isn't in the cache: unset it, or name a folder"
    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access one by one: ask for it on its page, then log in by `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision: write a branch, a tag or a commit that it has"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub doesn't know who asks: log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private: look at the name, or log in by `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return " ".join(str(error).split())[:300]
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token: log in by `hf auth login`, or set HF_TOKEN"
    said = {
        403: "the token has no right to do that: make one that may write to this repository, and log in again",
        409: "it was changed by somebody else at the same time; try again",
        412: "it was changed by somebody else at the same time; try again",
        413: "the Hub takes no files of this size: see the limits of your account",
        429: "the Hub asks to be asked less often; wait some minutes",
        507: "your account has no space left on the Hub: delete what you don't need, or ask for more",
    }
    if status in said:
        return said[status]
    if status is not None and status < 500:
        return f"the Hub answers {status}: {_first_line(error)}"
    return f"the Hub doesn't answer as it should ({_first_line(error)}); look at the connection, and try again"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def is_repository(name: str) -> bool:
    """Whether a name could be a Hub id, user/name, rather than a path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def fetched(name: str, revision: str | None = None, cache_folder: Path | None = None) -> Path:
    """The folder of a published model, downloaded where it isn't in the cache; only what loading reads, and whole.

    Raises ModelError where it can't be had, ArtifactError where a file isn't what was published.
    """
    from huggingface_hub import snapshot_download

    with asking(f"{name}{f' at {revision}' if revision else ''}"):
        folder = snapshot_download(name, revision=revision, cache_dir=cache_folder, allow_patterns=list(READ))
    verify_manifest(Path(folder), READ)
    return Path(folder)


def pulled(name: str, to: Path, revision: str | None = None) -> Path:
    """Download a published model into the folder `to`, which mustn't exist: whole, or not at all. Raises ModelError,
    ArtifactError.
    """
    from huggingface_hub import snapshot_download

    if to.exists():
        raise ArtifactError(f"{to}: is there already; choose another folder with --to")
    with whole_folder(to) as partial:
        with asking(f"{name}{f' at {revision}' if revision else ''}"):
            snapshot_download(name, revision=revision, local_dir=partial, allow_patterns=list(PULLED))
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the downloader's own notes
        if not any((partial / file).is_file() for file in ("multimodal.json", "config.json")):
            raise ArtifactError(f"{name}: holds neither an adapter nor a model that is read here; nothing was kept")
        verify_manifest(partial, PULLED)
    return to


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none: it wasn't published by `finetune push`. Raises ArtifactError."""
    if not (folder / MANIFEST).is_file():
        return None
    content = read_json(folder / MANIFEST)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it lists no files; pull the model again")
    for name, told in files.items():
        if not isinstance(told, dict) or not isinstance(told.get("sha256"), str):
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it has no sha256 of {name}; pull the model again")
    return content


def verify_manifest(folder: Path, patterns: Sequence[str]) -> None:
    """That the files of these patterns that the manifest lists are there, as they were published. Raises ArtifactError
    with the first that isn't.
    """
    for name, told in ((read_manifest(folder) or {}).get("files", {})).items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing, but was published: pull the model again")
        if (found := file_hash(folder / name)) != told["sha256"]:
            raise ArtifactError(
                f"{folder / name} isn't what was published: sha256 {found[:12]}..., not {told['sha256'][:12]}...; "
                "pull the model again, or delete it from the cache"
            )
