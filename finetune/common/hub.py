"""Loading from the Hub or a folder, with errors that a user can act on."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic

from finetune.common.certificate import verify_if_certified
from finetune.common.errors import ArtifactError, FinetuneError, ModelError
from finetune.common.run_folder import folders_beside, nearest_folder, read_json

# What loading reads; none can hold code.
MODEL_FILES = ("*.safetensors", "*.finetune", "*.json", "*.txt", "*.jinja", "*.model")
PROBE_SECONDS = 3.0  # for the Hub's first answer, unless HF_HUB_ETAG_TIMEOUT is set
# Exceptions that libraries raise for settings of a wrong type, size or name, and for kernels that aren't installed.
BAD_SETTINGS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
)
CONNECT = "check the connection, set HF_ENDPOINT to a mirror (https://hf-mirror.com), or name a folder that holds it"
UNSET = "unset it to download, or name a folder that holds it"
OWN_CODE = (
    "comes with code of its own, which runs for an LLM alone, with `trust_remote_code` and a commit as `revision`; "
    "take a model whose class transformers has"
)
NO_PROCESSOR = (
    "it has no processor: copy processor_config.json or preprocessor_config.json from the model that it was made from"
)
REASONS = {
    403: "the token lacks the permission: create one that may write to this repository, and log in again",
    409: "somebody else changed it at the same time; try again",
    412: "somebody else changed it at the same time; try again",
    413: "the Hub doesn't take files of this size: see the limits of your account",
    429: "too many requests; wait some minutes",
    507: "your account has no space left on the Hub: delete what you don't need, or buy more",
}


def unreachable() -> str | None:
    """Why the Hub, or HF_ENDPOINT, can't be reached; None if it can, or if HF_HUB_OFFLINE is set. Takes at most
    PROBE_SECONDS, and asks once a minute.

    huggingface_hub asks five times for each file that isn't in its cache, which takes 24 s a file.
    """
    from huggingface_hub import constants

    return None if constants.is_offline_mode() else _unreachable(constants.ENDPOINT, int(monotonic() // 60))


@lru_cache(maxsize=1)
def _unreachable(endpoint: str, minute: int) -> str | None:
    from huggingface_hub import get_session

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PROBE_SECONDS)
    outcome: Queue[str | None] = Queue()

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=2 * seconds).status_code  # the wait below ends before it
            outcome.put(f"it answers {status}" if status in (502, 503, 504) else None)
        except Exception as error:  # of any library on the way: names, certificates, proxies
            outcome.put(_first_line(error))

    Thread(target=ask, daemon=True).start()  # since no time limit holds for the search for its address
    try:
        why = outcome.get(timeout=seconds)
    except Empty:
        why = f"no answer in {seconds:g} s; HF_HUB_ETAG_TIMEOUT sets how many"
    return why and f"{endpoint} can't be reached ({why})"


def _in_cache(name: str, cache_folder: Path | None = None) -> bool:
    """Whether there is anything of a model. huggingface_hub's loaders would send a request of their own."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (Path(cache_folder or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def _is_of_hub(name: str) -> bool:
    """Whether a model of the Hub may be called so; others are paths."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def loading(what: str, name: str) -> Iterator[bool]:
    """Turn what transformers and the Hub raise on a wrong name, revision, file or connection into one ModelError.

    Gives `local_files_only`: whether `name` is of the Hub and the Hub can't or mustn't be reached, so that only its
    cache is read.
    """
    from huggingface_hub import constants

    local, offline = Path(name).exists() or name.endswith(".gguf") or not _is_of_hub(name), constants.is_offline_mode()
    why = None if local else "HF_HUB_OFFLINE is set" if offline else unreachable()
    missing = f"{what} isn't in the cache, and {why}; {UNSET if offline else CONNECT}{meant_as_path(name)}"
    if why is not None and not _in_cache(name):
        raise ModelError(missing)
    try:
        yield why is not None
    except (*BAD_SETTINGS, OSError) as error:
        if why is not None and isinstance(error, OSError):
            raise ModelError(missing) from error
        raise ModelError(f"{what} can't be loaded: {_why(error)}{meant_as_path(name)}") from error


def meant_as_path(name: str) -> str:
    """What messages add about a name of the Hub that may be meant as a path, its first folder, or both of a
    like name, being here; else ''.
    """
    path = Path(name)
    if path.exists() or not is_repository(name):
        return ""
    near, beside = nearest_folder(path), folders_beside(path)
    if not path.parent.is_dir():
        folder = nearest_folder(path.parent)
        if folder is None or not (near := folder / path.name).is_dir():
            return ""
    there = f"; the nearest is {near}" if near else f"; {path.parent} has {', '.join(beside[:5])}" if beside else ""
    return f". As a path: there is no folder {name} here{there}"


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the errors that missing, unknown or odd keys of a settings file cause into one ArtifactError."""
    try:
        yield
    except (*BAD_SETTINGS, OSError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
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
def requesting(what: str, raises: type[FinetuneError] = ModelError, *, local_only: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error that says what to do: f"{what}: reason". Raises it at once if the
    Hub can't be reached; not if `local_only`, where nothing but the cache is read.
    """
    from huggingface_hub.errors import HTTPError

    why = unreachable()
    if why is not None and not local_only:
        raise raises(f"{what}: {why}; {CONNECT}")
    try:
        yield
    except FinetuneError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        because = f"it isn't in the cache, and {why}; {CONNECT}" if why is not None else reason(error)
        raise raises(f"{what}: {because}") from error


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
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private: check the name, or log in with `hf auth login`"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return "you aren't logged in to the Hub: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return " ".join(str(error).split())[:300]
    if status in (429, 503) and (seconds := getattr(response, "headers", {}).get("Retry-After", "")).isdigit():
        return f"the Hub answers {status}, and asks to come again after {seconds} s"
    if status in REASONS:
        return REASONS[status]
    if status is not None and status < 500:
        return f"the Hub answers {status}: {_first_line(error)}"
    return f"the Hub doesn't answer as it should ({_first_line(error)}); check the connection, and try again"


def _why(error: BaseException) -> str:
    """In a line, with what to do where transformers doesn't say it."""
    text = str(error)
    if "custom code" in text:
        return f"it {OWN_CODE}"
    if re.search("Can't load (the )?(image processor|feature extractor|video processor|processor)", text):
        return NO_PROCESSOR
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def is_repository(name: str) -> bool:
    """Whether a name could be a Hub id, user/name, rather than a path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII))


def fetched(name: str, revision: str | None = None, cache_folder: Path | None = None) -> Path:
    """The folder of a published model in the Hub's cache, downloaded if it isn't there; only the files that loading
    reads.

    Raises ModelError if it can't be downloaded, ArtifactError if a merged model isn't as certified.
    """
    from huggingface_hub import snapshot_download

    local_only = unreachable() is not None and _in_cache(name, cache_folder)
    with requesting(title(name, revision), local_only=local_only):
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_folder,
            allow_patterns=list(MODEL_FILES),
            local_files_only=local_only,
        )
    verify_if_certified(Path(folder))
    return Path(folder)


def title(name: str, revision: str | None) -> str:
    return f"{name} at {revision}" if revision else name
