"""A trained base with a bound on its pictures, by every command that takes a run."""

import csv
import json
from fnmatch import fnmatch

import pytest
from cli import cli
from families import ZOO, family_folder
from families.recipes import base_recipe
from huggingface_hub import ModelCard
from loopback import asked_of, hub_on_loopback
from trained_runs import copy_of

import finetune
from finetune.common.errors import PublishError, RecipeError
from finetune.common.hub import MODEL_FILES
from finetune.data.sample import Medium
from finetune.model.assistant import FileView
from finetune.model.composition import HEADS_FILE
from finetune.publishing.checks import SUFFIXES
from finetune.training.sweep import SharedParts
from finetune.training.sweep_choices import read_choice

BOUND = 1024
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    project = tmp_path_factory.mktemp("base")
    path = base_recipe(project, ZOO["qwen2_5_vl"], family_folder("qwen2_5_vl", project / "published"), "image")
    content = json.loads(path.read_text())
    content["media"] = {"shrink_to_pixels": BOUND}
    content["publish"] = {
        "licenses": {"base": "mit", "data": "mit"},
        "hub_names": {"base": "org/base"},
        "languages": ["en"],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_base_is_no_llm_where_its_licence_is_named(run, tmp_path):
    copy = copy_of(run, tmp_path)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("    base: mit", "    llm: mit"))
    with pytest.raises(PublishError, match="publish names 'llm', but this model has base, data"):
        finetune.push(copy, "me/model", dry_run=True)


@pytest.fixture(scope="module")
def run(recipe):
    trained = finetune.train(recipe, recipe.parent / "run").path
    finetune.evaluate(trained)
    finetune.merge(trained)
    return trained


def picture_of(run):
    return run.parent / "data" / "test0.png"  # 80 by 48


@pytest.mark.parametrize("part", ["adapter", "merged"])
def test_each_command_answers_as_the_loaded_model_within_the_bound(part, run, tmp_path):
    model = finetune.load(run / part)
    assert model.limits.shrink_to_pixels == BOUND
    layout = FileView(model.encoders, model.limits).layout(Medium("image", picture_of(run)))
    # 41 by 24 pixels in place of 80 by 48, which the processor rounds to its 16.
    assert layout.grid == (1, 2 * round(24 / 16), 2 * round(41 / 16)) and layout.rows < 60 / 4
    expected = model.answer(QUESTION, image=picture_of(run), max_new_tokens=4)
    out = tmp_path / "answers.csv"
    done = cli("predict", run / part, run.parent / "data" / "test.csv", "--out", out, "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    with out.open(encoding="utf-8-sig", newline="") as file:
        assert next(csv.DictReader(file))["answer"] == expected
    assert finetune.chat(run / part, QUESTION, image=picture_of(run), max_new_tokens=4) == expected


def test_it_is_published_and_comes_back(run, tmp_path, monkeypatch):
    expected = finetune.load(run / "adapter").answer(QUESTION, image=picture_of(run), max_new_tokens=4)
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "cache"):
        hub.add("org/base", run.parent / "published")
        for repo, options in {"me/adapter": [], "me/merged": ["--merged"]}.items():
            done = cli("push", run, "--repo", repo, *options)
            assert done.returncode == 0, done.stderr
            pulled = finetune.pull(repo, tmp_path / repo)
            card = ModelCard.load(pulled.path / "README.md")
            assert card.data.base_model == ["org/base"] and card.data.license == "mit"
            assert card.text.count("- base model: ") == 2 and "LLM" not in card.text
            if "--merged" in options:
                assert "LLM" not in (pulled.path / "certificate.json").read_text()
            model = finetune.load(pulled.path)
            assert model.limits.shrink_to_pixels == BOUND
            assert model.answer(QUESTION, image=picture_of(run), max_new_tokens=4) == expected


def test_its_answers_make_pairs(run, tmp_path):
    options = finetune.PairOptions(answers=3, temperature=3.0, max_new_tokens=4, limit=2, by="person")
    result = finetune.data_pairs(run, out=tmp_path / "pairs.jsonl", options=options)
    rows = [json.loads(line) for line in result.candidates.read_text().splitlines()]
    assert len(rows) == 2 and all(len(set(row["candidates"])) > 1 for row in rows)


def test_files_of_merged_heads_are_published_and_loaded():
    assert HEADS_FILE.endswith(SUFFIXES) and any(fnmatch(HEADS_FILE, pattern) for pattern in MODEL_FILES)


def test_a_sweep_over_what_trains_takes_lists_and_shares_no_weights_that_change(recipe):
    choice = read_choice("train.stages.0.trains=[adapter],[adapter, projectors]", ranges=False)
    assert choice.values == ("[adapter]", "[adapter, projectors]")
    parts = SharedParts()
    for trains in choice.values:
        trial = finetune.load_recipe(recipe, [f"{choice.key}={trains}", "train.cache=false"])
        assert (parts.of(trial) is None) == ("projectors" in trains)
    with pytest.raises(RecipeError, match=r"train\.cache: false"):
        finetune.load_recipe(recipe, [f"{choice.key}={trains}"])
