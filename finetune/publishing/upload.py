"""A repository on the Hub: whether it may be written, and the one commit that writes it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.common import hub
from finetune.common.errors import PublishError, RecipeError, option
from finetune.recipe.yaml_reader import read_text, read_yaml

RECIPE = "recipe.yaml"
KINDS = {"multimodal.json": "adapter", "certificate.json": "merged"}  # a file that only one kind of model has


@dataclass(frozen=True)
class State:
    """`head`: the newest commit, None without a repository."""

    head: str | None
    files: Sequence[str] = ()


def full_name(repo: str) -> str:
    """user/name, where the user is whoever is logged in. Raises PublishError if nobody is."""
    from huggingface_hub import HfApi

    with hub.requesting(f"{repo}: can't be written", PublishError):
        user = HfApi().whoami()["name"]
    return checked(repo if "/" in repo else f"{user}/{repo}")


def checked(repo: str) -> str:
    """Raises PublishError for what can't be user/name on the Hub."""
    if not hub.is_repository(repo):
        raise PublishError(
            f"{repo!r} isn't the name of a repository: write name, or user/name, of Latin letters, digits, -, _, ."
        )
    return repo


def state_of(repo: str, *, recipe: str, kind: str, private: bool) -> State:
    """Raises PublishError if the repository holds anything but an earlier push of the same recipe and kind, or is
    public though it must be `private`.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub.requesting(repo, PublishError):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return State(None)
        if private and not info.private:
            raise PublishError(
                f"{repo}: is public, but {option('--private', 'private=True')} was given: make it private "
                "on the Hub, or choose another name"
            )
        files = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
        if not files:
            return State(info.sha)
        published_kind = next((kind for file, kind in KINDS.items() if file in files), None)
        if published_kind is None or RECIPE not in files:
            raise PublishError(
                f"{repo}: already exists, and `finetune push` didn't write it ({', '.join(files[:3])}): choose another "
                "name, or delete it on the Hub"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(repo, RECIPE, revision=info.sha, cache_dir=folder)
            published_recipe = _name_in(Path(path))
    if (published_recipe, published_kind) != (recipe, kind):
        raise PublishError(
            f"{repo}: holds the {published_kind} model of recipe {published_recipe!r}, not the {kind} one of "
            f"{recipe!r}: choose another name, or delete it on the Hub"
        )
    return State(info.sha, files)


def _name_in(recipe: Path) -> object:
    """The recipe's name; None if it can't be read."""
    try:
        content = read_yaml(read_text(recipe), recipe.name).value
    except RecipeError:
        return None
    return content.get("name") if isinstance(content, dict) else None


def upload(folder: Path, repo: str, before: State, *, private: bool, message: str) -> str:
    """Write the files of `folder` and delete all others, in one commit on top of `before`; returns the commit. A
    repository that doesn't exist is created. Raises PublishError: the repository is then as it was, or, if only the
    answer was lost, as it should be, and the error says which.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, head = HfApi(), before.head
    if head is None:
        with hub.requesting(f"{repo}: can't be created", PublishError):
            api.create_repo(repo, private=private)
            head = api.model_info(repo).sha
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path) for name, path in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in before.files if name not in files]
    # Not upload_folder: with hf_xet it makes several commits, and a reader could come in between.
    try:
        with hub.requesting("push again", PublishError):
            return api.create_commit(repo, operations, commit_message=message, parent_commit=before.head).oid
    except PublishError as error:
        raise PublishError(f"{repo}: {_outcome(repo, head)}; {error}") from error


def _outcome(repo: str, head: str | None) -> str:
    """What a commit that failed has left behind: the Hub may have carried it out before the connection broke."""
    from huggingface_hub import HfApi

    try:
        with hub.requesting(repo, PublishError):
            unchanged = HfApi().model_info(repo).sha == head
    except PublishError:
        return "whether anything was published isn't known"
    return "nothing was published and nothing changed" if unchanged else "all of it seems to be published, unchecked"


def address(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
