"""Pull: a published model from the Hub into a folder, whole or not at all."""

import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from finetune.common import display, hub
from finetune.common.certificate import verify_if_certified
from finetune.common.errors import ArtifactError, option
from finetune.common.progress import quiet_libraries
from finetune.common.run_folder import whole_folder

PULLED_FILES = (*hub.MODEL_FILES, "*.md", "*.yaml", "*.png", "*.webp")


@dataclass(frozen=True, repr=False)
class Pulled:
    """`path`: the folder, for which the whole stands as a path too; `commit`: of the repository."""

    path: Path
    repo: str
    commit: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Pulled: {self.repo} (commit {self.commit}) in {self.path}, its files as on the Hub"

    def _repr_html_(self) -> str:
        files = {file.name: file for file in sorted(self.path.glob("*")) if file.is_file()}
        return display.line(repr(self)) + display.files(files)


def pull(repo: str, to: Path | str | None = None, *, revision: str | None = None) -> Pulled:
    """Download a model that `finetune push` published. `to`: a new folder; None: the last part of `repo`. `revision`:
    branch, tag or commit.

    Raises ModelError if it can't be downloaded, ArtifactError if a file doesn't have the Hub's hash, or a merged model
    not the certified ones; nothing is left behind then.
    """
    from huggingface_hub import HfApi, snapshot_download

    quiet_libraries()
    if not hub.is_repository(repo):
        raise ArtifactError(f"{repo!r} isn't the name of a repository: write user/name")
    to = Path(to) if to is not None else Path(repo.partition("/")[2])
    if to.exists():
        raise ArtifactError(f"{to}: already exists; choose another folder with {option('--to', 'to=')}")
    with whole_folder(to) as partial:
        with hub.requesting(hub.title(repo, revision)):
            commit = str(HfApi().model_info(repo, revision=revision).sha)
            snapshot_download(repo, revision=commit, local_dir=partial, allow_patterns=list(PULLED_FILES))
            hashes = HfApi().verify_repo_checksums(repo, revision=commit, local_dir=partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the downloader's own notes
        if not any((partial / file).is_file() for file in ("multimodal.json", "config.json")):
            raise ArtifactError(f"{repo}: holds neither an adapter nor a merged model; nothing was downloaded")
        damaged = [mismatch["path"] for mismatch in hashes.mismatches]
        missing = [path for path in hashes.missing_paths if any(fnmatch(path, pattern) for pattern in PULLED_FILES)]
        if damaged or missing:
            raise ArtifactError(f"{repo}: {[*damaged, *missing][0]} isn't the file on the Hub; pull the model again")
        verify_if_certified(partial)
    return Pulled(to, repo, commit)
