"""The wheel carries the package, the recipes and the scripts that make their files, but not recipes/data."""

import shlex
import subprocess
from pathlib import Path

import pytest

from finetune.commands.recipes import commands_for_files, recipes_folder

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
MAXIMUM_BYTES = 3_000_000  # of all files, uncompressed


@pytest.fixture(scope="module")
def wheel() -> dict[str, Path]:
    """{path in the wheel: the file that goes there}, as hatchling selects them."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    files = builders.WheelBuilder(str(ROOT)).recurse_included_files()
    return {file.distribution_path: Path(file.path) for file in files}


def tracked(folder: str) -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", folder]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def test_the_wheel_carries_the_whole_package(wheel):
    assert {name for name in wheel if not name.startswith("finetune/_recipes/")} >= tracked("finetune")


def test_the_wheel_carries_recipes_and_scripts_but_no_data(wheel):
    expected = {path for path in tracked("recipes") if not path.startswith("recipes/data/")}
    carried = {name for name in wheel if name.startswith("finetune/_recipes/")}
    assert carried >= {path.replace("recipes/", "finetune/_recipes/", 1) for path in expected}
    assert not [name for name in carried if name.startswith("finetune/_recipes/data/")]


def test_the_wheel_is_small_and_holds_nothing_else(wheel):
    assert sum(path.stat().st_size for path in wheel.values()) < MAXIMUM_BYTES
    assert {name.partition("/")[0] for name in wheel} == {"finetune"}


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_recipe_comes_with_the_commands_that_make_its_files(name, wheel, tmp_path):
    commands = [shlex.split(line) for line in commands_for_files(name, tmp_path / "my recipes")]
    made = set()
    for _, script, *arguments in commands:
        assert f"finetune/_recipes/offline/{Path(script).name}" in wheel
        made.add(Path(arguments[arguments.index("--into") + 1]))
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    for line in text.splitlines():
        if "path: data/" in line:
            folder = line.partition("path: data/")[2].partition("/")[0]
            assert tmp_path / "my recipes" / "data" / folder in made
    assert ("../weights/" in text) == (tmp_path / "weights" in made)
