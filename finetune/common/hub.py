"""Loading from the Hub or a folder, with errors that a user can act on."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.common.certificate import verify_if_certified
from finetune.common.errors import ArtifactError, FinetuneError, ModelError
from finetune.common.run_folder import read_json

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")  # what loading reads; none can hold code
REASONS = {
    403: "the token lacks the permission: create one that may write to this repository, and log in again",
    409: "somebody else changed it at the same time; try again",
    412: "somebody else changed it at the same time; try again",
    413: "the Hub doesn't take files of this size: see the limits of your account",
    429: "too many requests; wait some minutes",
    507: "your account has no space left on the Hub: delete what you don't need, or buy more",
}


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise on a wrong name, revision, file or connection into one ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{what} can't be loaded: {_first_line(error)}") from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the errors that missing, unknown or odd keys of a settings file cause into one ArtifactError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{file} is damaged, or of another version: {what}; pull the model again, or write it again"
        ) from error


def verify_weights(folder: Path) -> None:
    """Check that the weights of a merged model exist, each file as long as its header says. Raises ArtifactError."""
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
def requesting(what: str, raises: type[FinetuneError] = ModelError) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error that says what to do: f"{what}: reason"."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except FinetuneError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise raises(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why a request to the Hub failed, and what to do next."""
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading FILE to the Hub."
        return reason(error.__cause__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on this disk; free some, or set HF_HOME to a disk that has some"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it isn't in the cache: unset it, or name a folder"
    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access one by one: request it on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision: write a branch, a tag or a commit that it has"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private: check the name, or log in with `hf auth login`"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return "you aren't logged in to the Hub: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return " ".join(str(error).split())[:300]
    if status in REASONS:
        return REASONS[status]
    if status is not None and status < 500:
        return f"the Hub answers {status}: {_first_line(error)}"
    return f"the Hub doesn't answer as it should ({_first_line(error)}); check the connection, and try again"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def is_repository(name: str) -> bool:
    """Whether a name could be a Hub id, user/name, rather than a path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def fetched(name: str, revision: str | None = None, cache_folder: Path | None = None) -> Path:
    """The folder of a published model in the Hub's cache, downloaded if it isn't there; only the files that loading
    reads.

    Raises ModelError if it can't be downloaded, ArtifactError if a merged model isn't as certified.
    """
    from huggingface_hub import snapshot_download

    with requesting(title(name, revision)):
        folder = snapshot_download(name, revision=revision, cache_dir=cache_folder, allow_patterns=list(MODEL_FILES))
    verify_if_certified(Path(folder))
    return Path(folder)


def title(name: str, revision: str | None) -> str:
    return f"{name} at {revision}" if revision else name
