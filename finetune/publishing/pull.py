"""Pull: a published model from the Hub into a folder, whole or not at all."""

from pathlib import Path

from finetune.common import hub
from finetune.common.errors import ArtifactError
from finetune.common.progress import quiet_libraries


def pull(repo: str, to: Path | str | None = None, *, revision: str | None = None) -> Path:
    """Download a model that `finetune push` published. `to`: a folder that isn't there yet; None: named as the last
    part of `repo`. `revision`: branch, tag or commit.

    Raises ModelError for what the Hub doesn't give, ArtifactError for a file that isn't what was published; then
    nothing is left behind.
    """
    quiet_libraries()
    if not hub.is_repository(repo):
        raise ArtifactError(f"{repo!r} isn't a repository's name: write user/name")
    return hub.pulled(repo, Path(to) if to is not None else Path(repo.partition("/")[2]), revision)
