"""The recipes of README and of the tutorials, and README's commands, over tiny parts and rows drawn here."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import yaml
from cli import cli, in_this_process
from documents import ROOT, fences_of, relative
from test_recipes import write_video
from tiny import COLOURS, tiny_llm_folder, tiny_picture
from tiny_encoders import save_siglips_of_6x6, tiny_audio_folder, tiny_sound

import finetune

PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs/tutorials").glob("*.md")) - {ROOT / "docs/tutorials/index.md"})]
PAGES = [page for page in PAGES if not page.name.endswith(".zh.md")]
every = pytest.mark.parametrize("page", PAGES, ids=relative)
FEW, MANY = 20, 200


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """An LLM, and encoders of 6×6 patches, where 2 and 3 must divide."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llm_folder(folder / "llm", max_position_embeddings=2048)
    save_siglips_of_6x6(folder)
    tiny_audio_folder(folder / "audio")
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """MANY pictures, recordings and clips, no two alike."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(MANY):
        red, green, blue = list(COLOURS.values())[number % len(COLOURS)]
        colour = (red, green, (blue + number) % 256)
        tiny_picture(colour).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", tiny_sound(0.6, seed=number), 16_000)
        write_video(folder / f"{number}.mp4", colour)
    return folder


def row(number: int, media: Path) -> dict[str, str]:
    """With the columns of every page."""
    word = list(COLOURS)[number % len(COLOURS)]
    names = {"image": f"{number}.png", "audio": f"{number}.wav", "video": f"{number}.mp4"}
    said = dict.fromkeys(("label", "answer", "caption", "finding", "report", "intent", "reply"), word)
    own = dict.fromkeys(("text", "record", "history", "offer"), f"{word} {number}")
    groups = {"user": f"u{number // 4}", "patient": str(number // 2), "speaker": str(number // 2)}
    numbers = {"clicked": str(number % 2), "stars": str(1 + number % 5)}
    files = {key: str(media / name) for key, name in names.items()}
    return files | {"question": "What is this?"} | said | own | groups | numbers


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        answer = {"shop": "red", "total": 12.5, "paid": True}
        path.write_text("".join(json.dumps({"image": row["image"], "json": answer}) + "\n" for row in rows))
    else:
        for row in rows:
            (path / row["label"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(row["image"], path / row["label"])


def written(page: Path, folder: Path, parts: Path, media: Path, count: int) -> Path:
    """The page's first recipe with tiny parts, and the rows that it reads, in `folder`."""
    recipe = yaml.safe_load(fences_of(page, "yaml")[0])
    recipe["model"]["llm"] |= {"name": str(parts / "llm")}
    for medium, encoder in recipe["model"]["encoders"].items():
        encoder["name"] = str(parts / medium)
    licences = recipe.setdefault("publish", {}).setdefault("licenses", {})
    licences |= {"llm": "mit"} | {f"encoders.{medium}": "mit" for medium in recipe["model"]["encoders"]}
    recipe["train"]["cache_folder"] = str(folder / "cache")
    rows = [row(number, media) for number in range(count)]
    for source in recipe["data"]:
        write_rows(folder / source["path"], rows)
        if source["path"].endswith((".csv", ".jsonl")):
            source["media_folder"] = str(media)
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@every
def test_few_rows_are_enough_for_its_recipe(page, parts, media, tmp_path):
    checked = finetune.check(written(page, tmp_path, parts, media, MANY))
    assert checked.warnings == () and checked.stages


@pytest.mark.slow
@every
def test_its_recipe_runs_the_whole_way(page, parts, media, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.commands.run.subprocess.run", in_this_process)
    few = ["evaluate.limit=4", "evaluate.max_new_tokens=4", "merge.rows=2"]
    path = written(page, tmp_path, parts, media, FEW)
    stages = range(len(finetune.load_recipe(path).train.stages))
    once = [f"train.stages.{number}.epochs=1" for number in stages]
    result = finetune.run(path, [*few, *once], tmp_path / "run")
    assert result.evaluation.scores and result.folder.certificate.is_file() and isinstance(result.answer, str)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(parts, media, tmp_path, monkeypatch):
    """All but `serve`, which doesn't end; `push` without an upload, and merged, since these parts aren't on the Hub."""
    monkeypatch.setattr("finetune.commands.run.subprocess.run", in_this_process)
    written(ROOT / "README.md", tmp_path, parts, media, FEW)
    shutil.copy(media / "0.png", tmp_path / "new.jpg")
    (tmp_path / "photos").mkdir()
    shutil.copy(media / "1.png", tmp_path / "photos")
    (block,) = (block for block in fences_of(ROOT / "README.md", "") if "finetune run products.yaml" in block)
    verbs = []
    for line in block.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "serve":
            continue
        words += ["--dry-run", "--merged"] if words[0] == "push" else []
        result = cli(*words, cwd=tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        verbs.append(words[0])
    assert verbs == ["data", "run", "chat", "predict", "export", "push"]
    with (tmp_path / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["photos/1.png"]
