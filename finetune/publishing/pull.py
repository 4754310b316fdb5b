"""Pull: a published model from the Hub into a folder, whole or not at all."""

from pathlib import Path

from finetune.common import hub
from finetune.common.errors import ArtifactError
from finetune.common.progress import quiet_libraries


def pull(repo: str, to: Path | str | None = None, *, revision: str | None = None) -> Path:
    """Download a model that `finetune push` published. `to`: a new folder; None: the last part of `repo`. `revision`:
    branch, tag or commit.

    Raises ModelError if it can't be downloaded, ArtifactError if a file doesn't have the Hub's hash, or a merged model
    not the certified ones; nothing is left behind then.
    """
    quiet_libraries()
    if not hub.is_repository(repo):
        raise ArtifactError(f"{repo!r} isn't the name of a repository: write user/name")
    return hub.pulled(repo, Path(to) if to is not None else Path(repo.partition("/")[2]), revision)
