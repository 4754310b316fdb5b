"""What an export goes to, and where it is written. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from finetune.common.errors import ArtifactError, option
from finetune.common.registry import load_part, parse_options
from finetune.common.run_folder import missing_run
from finetune.export._contract import ExportTarget, TargetOptions


def read_target(
    source: Path, to: str, out: Path | str | None, options: Sequence[str]
) -> tuple[ExportTarget, TargetOptions, Path]:
    """(the target, its options, the folder to write). Raises RecipeError for an unknown target or option, ArtifactError
    for a source that isn't there and for a folder that is.
    """
    target = cast(ExportTarget, load_part("export", to))
    target_options = parse_options(options, target.Options)
    if not source.exists():
        raise missing_run(source)
    folder = Path(out) if out is not None else _default_folder(source, to)
    if folder.exists():
        raise ArtifactError(
            f"{folder} exists already: remove it, or choose another folder with {option('--out', 'out=')}"
        )
    return target, target_options, folder


def _default_folder(source: Path, to: str) -> Path:
    if (source / "recipe.yaml").is_file():
        return source / "exports" / to
    whole = source.absolute()
    return whole.parent / f"{whole.name}-{to}"
