"""Every recipe that ships runs from check to chat with nothing replaced but its weights and its rows: these are its
tiny offline twin.
"""

import csv
import json
from pathlib import Path

import pytest
import soundfile
from cli import in_this_process
from families import family_folder
from tiny import COLOURS, tiny_llm_folder, tiny_picture
from tiny_encoders import save_siglips_of_6x6, tiny_audio_folder, tiny_sound

import finetune
from finetune.commands.recipes import recipes_folder
from finetune.common.errors import RecipeError
from finetune.recipe.load import load_recipe

RECIPES = sorted(recipes_folder().glob("*.yaml"))
LLMS = {"mpt": "mpt"}  # recipe: family; the others are Llamas
BASES = {
    "smolvlm-8gb": "idefics3",  # which the first SmolVLM is
    "smolvlm-t4": "idefics3",
    "qwen-vl-12gb": "qwen2_5_vl",
    "qwen-vl-t4": "qwen2_5_vl",
    "gemma3-16gb": "gemma3",
    "qwen2-audio-16gb": "qwen2_audio",
    "qwen2-audio-t4": "qwen2_audio",
    "voxtral-16gb": "voxtral",
    "voxtral-t4": "voxtral",
}
every = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def write_video(path: Path, colour: tuple[int, int, int], frames: int = 5) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(tiny_picture(colour, (48, 48)))))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory) -> Path:
    """LLMs; encoders, of 6×6 patches where 2 and 3 must divide; rows with every column that the recipes read."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in {"llama", *LLMS.values()}:
        tiny_llm_folder(folder / family, family)
    for family in set(BASES.values()):
        family_folder(family, folder / family)
    save_siglips_of_6x6(folder)
    tiny_audio_folder(folder / "audio")
    for split in ("train", "test"):
        rows = []
        for number in range(8):
            word, (red, green, blue) = list(COLOURS.items())[number % len(COLOURS)]
            colour = (red, green, blue + number + 10 * (split == "test"))
            name = f"{split}{number}"
            tiny_picture(colour).save(folder / f"{name}.png")
            soundfile.write(folder / f"{name}.wav", tiny_sound(0.6, seed=number + 10 * (split == "test")), 16_000)
            write_video(folder / f"{name}.mp4", colour)
            media = {"image": f"{name}.png", "audio": f"{name}.wav", "video": f"{name}.mp4"}
            words = ("label", "name_en", "answer", "intent", "thing", "reply")
            words += ("shelf", "finding", "report", "caption", "match", "end")
            own = ("text", "history", "offer", "record", "beginning")  # sources of text alone must not repeat a row
            ranked = {"user": f"{split}{number // 4}", "clicked": str(number % 2)}
            said = dict.fromkeys(words, word) | dict.fromkeys(own, f"{word} {name}") | {"name_zh": f"not {word}"}
            rows.append(media | {"question": "What is this?"} | said | ranked)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def replaced(path: Path, parts: Path, work: Path) -> list[str]:
    """What `--set` gives a recipe instead of its weights and its rows. Every source has its own copy of the rows."""
    recipe = load_recipe(path)
    key, families = ("base", BASES) if recipe.model.base else ("llm", LLMS)
    weights = {key: f"model.{key}.name={parts / families.get(path.stem, 'llama')}"}
    weights |= {name: f"model.encoders.{name}.name={parts / name}" for name in recipe.model.encoders}
    changes = [*weights.values(), f"model.{key}.revision=null"]
    changes += [f"model.encoders.{name}.revision=null" for name in recipe.model.encoders]
    for number, source in enumerate(recipe.data):
        rows = work / f"{number}-{source.split}.csv"
        rows.write_text((parts / f"{source.split}.csv").read_text(encoding="utf-8"), encoding="utf-8")
        changes += [f"data.{number}.path={rows}", f"data.{number}.media_folder={parts}"]
    few = ["evaluate.limit=4", "evaluate.max_new_tokens=4", "merge.rows=2"]
    return [*changes, f"train.cache_folder={work / 'cache'}", *few]


def test_there_is_one_for_each_promised_machine_and_each_medium():
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "gpu-8gb", "gpu-16gb", "colab-t4"} <= names
    assert {"read-documents", "transcribe-speech", "speech-reply", "video-questions", "image-and-speech"} <= names
    assert {"cross-attention", "mpt", "preferences", "rewards", *BASES} <= names


@every
def test_names_of_the_hub_come_with_a_commit(path):
    recipe = load_recipe(path)
    parts = [recipe.model.language_model, *(encoder.options for encoder in recipe.model.encoders.values())]
    for part in parts:
        assert Path(part.name).is_absolute() or len(part.revision) == 40


@pytest.mark.slow
@every
def test_recipe_runs_the_whole_way(path, tiny_parts, tmp_path, monkeypatch):
    # `run` asks its question by the command line in a process of its own: test_whole_run does so, here it is called.
    monkeypatch.setattr("finetune.commands.run.subprocess.run", in_this_process)
    recipe = load_recipe(path)
    result = finetune.run(path, replaced(path, tiny_parts, tmp_path), tmp_path / "run")
    conditions = {"tuned", "base", "blank", "shuffled", "probe"}
    if len(recipe.model.encoders) > 1:
        conditions |= {f"blank_{name}" for name in recipe.model.encoders}
    scored = [set(values) for scores in result.evaluation.scores.values() for values in scores.values()]
    assert scored and all(one in (conditions, {"tuned", "base"}) for one in scored)  # text alone can't be blank
    assert (result.folder.merged / "model.safetensors").is_file() and result.report.path.stat().st_size > 10_000
    assert isinstance(result.answer, str)
    trained = json.loads(result.folder.metrics.read_text())["train"]["stages"]
    for stage in recipe.train.stages:
        wanted = {name.partition(".")[0] for name in stage.trains}
        assert {name.partition(".")[0] for name in trained[stage.name]["trained_weights"]} == wanted


def test_a_recipe_is_copied_once_into_a_folder_that_may_be_new(tmp_path):
    finetune.recipes("quickstart", tmp_path / "new")
    copied = tmp_path / "new" / "quickstart.yaml"
    assert copied.read_text(encoding="utf-8") == (recipes_folder() / "quickstart.yaml").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="exists already"):
        finetune.recipes("quickstart", tmp_path / "new")
    with pytest.raises(RecipeError, match="no recipe is called 'quick'"):
        finetune.recipes("quick", tmp_path)
    finetune.recipes("voxtral-16gb", tmp_path / "new")
    assert (tmp_path / "new" / "templates" / "voxtral.jinja").is_file()
