"""A repository on the Hub: whether it may be written, and the one commit that writes it."""

import json
import tempfile
from pathlib import Path

from finetune.common import hub
from finetune.common.errors import PublishError
from finetune.common.hub import MANIFEST


def full_name(repo: str) -> str:
    """user/name, the user being who is logged in. Raises PublishError where nobody is."""
    from huggingface_hub import HfApi

    with hub.asking(f"{repo}: can't be written", PublishError):
        user = HfApi().whoami()["name"]
    repo = repo if "/" in repo else f"{user}/{repo}"
    if not hub.is_repository(repo):
        raise PublishError(f"{repo!r} isn't a repository's name: write name, or user/name")
    return repo


def state_of(repo: str, *, recipe: str, kind: str, private: bool) -> tuple[str | None, list[str]]:
    """(the newest commit, None where there is no repository; its files). Raises PublishError where it holds other
    things than an earlier push of the same recipe and kind, or is public though it must be `private`.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub.asking(repo, PublishError):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return None, []
        if private and not info.private:
            raise PublishError(
                f"{repo}: is public, but --private is asked for: make it private on the Hub, or choose another name"
            )
        files = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
        if not files:
            return info.sha, []
        if MANIFEST not in files:
            raise PublishError(
                f"{repo}: is there already, and `finetune push` didn't write it ({', '.join(files[:3])}): choose "
                "another name, or delete it on the Hub"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(repo, MANIFEST, revision=info.sha, cache_dir=folder)
            try:
                found = json.loads(Path(path).read_text(encoding="utf-8"))
                there = (found["recipe"], found["kind"])
            except (ValueError, KeyError, TypeError):
                there = ("nothing that can be read", "damaged")
    if there != (recipe, kind):
        raise PublishError(
            f"{repo}: holds the {there[1]} model of recipe {there[0]!r}, not the {kind} one of {recipe!r}: choose "
            "another name, or delete it on the Hub"
        )
    return info.sha, files


def upload(folder: Path, repo: str, *, parent: str | None, there: list[str], private: bool, message: str) -> str:
    """Write the files of `folder`, and delete others that are `there`, in one commit on top of `parent`; returns it. A
    repository that isn't there is made. Raises PublishError; the repository is then as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    if parent is None:
        with hub.asking(f"{repo}: can't be made", PublishError):
            api.create_repo(repo, private=private)
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path) for name, path in names.items()
    ]
    operations += [CommitOperationDelete(name) for name in there if name not in names]
    # Not upload_folder: with hf_xet it makes several commits, and a reader could come in between.
    with hub.asking(f"{repo}: nothing was published, what was there is as it was; push again", PublishError):
        return api.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid


def address(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
