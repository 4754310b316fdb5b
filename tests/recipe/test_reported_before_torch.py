"""A mistake in a recipe is reported by every verb that takes one, without importing what is slow to import."""

import json

import pytest
from light_process import light_process
from recipe_texts import GOOD, mentions

pytestmark = pytest.mark.slow

VALIDATED = GOOD.replace("    hold_out: 0.1\n", "    hold_out: 0.1\n    hold_out_validation: 0.1\n").replace(
    "  tokens_per_batch: 4096\n", "  tokens_per_batch: 4096\n  validation: {}\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with light_process(tmp_path_factory.mktemp("light")) as process:
        yield process.run


@pytest.mark.parametrize(
    "verb",
    ["check", "plan", "train", "run", "sweep --over seed=1,2", "data check", "data preview", "data label"],
)
def test_a_mistake_in_a_recipe_is_reported_by(verb, folder, run):
    text = GOOD.replace("quantize: nf4", "quantize: nf5")
    (folder / "x.yaml").write_text(text)
    words = verb.split()
    options = words[words.index("--over") :] if "--over" in words else []
    done = run(*words[: len(words) - len(options)], "x.yaml", *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("x.yaml:6: model.llm.quantize: ")
    assert mentions(done.stderr, "'nf5'|nf4, int8, none")
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--over", "adapter.rnk=4,8"], "--over adapter.rnk|'adapter.rank'"),
        (["--over", "adapter.rank=4,0", "--set", "seed=3"], "--over adapter.rank|0|from 1 to 1024"),
        (["--over", "adapter.rank"], "--over adapter.rank|key=value1,value2"),
        (["--over", "adapter.rank=2..4"], "--over adapter.rank=2..4|--trials"),
        (["--over", "adapter.rank=4..2", "--trials", "2"], "--over adapter.rank=4..2|low end"),
        (["--over", "adapter.rank=4,8", "--set", "sed=3"], "--set sed|'seed'"),
    ],
)
def test_a_wrong_choice_of_a_sweep_is_reported(options, words, folder, run):
    (folder / "x.yaml").write_text(VALIDATED)
    done = run("sweep", "x.yaml", *options)
    assert done.returncode == 2, done.stderr
    assert mentions(done.stderr, words), done.stderr
    assert done.stdout.split() == []
    assert not (folder / "runs").exists()


def test_a_sweep_without_validation_rows_is_reported(folder, run):
    done = run("sweep", "x.yaml", "--over", "adapter.rank=4,8")
    assert done.returncode == 2, done.stderr
    assert mentions(done.stderr, "x.yaml|train.validation")
    assert done.stdout.split() == []


@pytest.mark.parametrize("verb", ["check", "train", "run"])
def test_a_wrong_option_is_reported(verb, folder, run):
    done = run(verb, "x.yaml", "--set", "adapter.rank=0")
    assert done.returncode == 2, done.stderr
    assert mentions(done.stderr, "--set adapter.rank|0|from 1 to 1024")
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("chat runs/cals", "runs/cals: no such run or folder; there are: runs/calls"),
        ("predict runs/cals x.yaml", "runs/cals: no such run or folder; there are: runs/calls"),
        ("predict calls x.yaml", "calls: no such run or folder; there are: runs/calls"),
        ("predict some/where/else x.yaml", "no such run or folder"),
        ("evaluate x.yaml", "x.yaml: a file, where the folder of a run is needed; `finetune run x.yaml` makes one"),
        ("predict x.yaml x.yaml", "x.yaml: a file, where the folder of a run is needed; `finetune run x.yaml` makes"),
        ("chat other/begun", "`finetune train other/begun/recipe.yaml --run other/begun --resume` goes on"),
        ("evaluate runs/cals", "runs/cals: no such run or folder; there are: runs/calls"),
        ("merge runs/cals", "runs/cals: no such run or folder"),
        ("export runs/cals --to gguf", "runs/cals: no such run or folder"),
        ("export runs/calls --to guf", "'gguf'"),
        ("export runs/calls --to gguf", "runs/calls/exports/gguf exists already|--out"),
        ("run x.yaml --run runs/calls", "runs/calls: there is a run here already|--resume|--overwrite"),
        ("train x.yaml --run runs/calls", "runs/calls: there is a run here already|--resume|--overwrite"),
        ("run x.yaml --run runs/none --resume", "runs/none: nothing to resume"),
        ("predict runs/calls x.yaml", "trained for kind, place: name one with --task"),
        ("data label x.yaml --run runs/calls", "trained for kind, place: name one with --task"),
        ("chat runs/calls Hello --audio gone.wav", "--audio gone.wav: no such file"),
        ("chat runs/calls Hello --task kinds", "--task kinds: the model was trained for kind, place"),
    ],
)
def test_what_is_wrong_with_a_run_is_reported(command, words, folder, run):
    """A run of two tasks that was trained and exported, as far as its texts tell."""
    calls = folder / "runs" / "calls"
    (calls / "adapter").mkdir(parents=True)
    (calls / "exports" / "gguf").mkdir(parents=True)
    (calls / "recipe.yaml").write_text(GOOD)
    (folder / "other" / "begun").mkdir(parents=True)
    (folder / "other" / "begun" / "recipe.yaml").write_text(GOOD)
    bound = {"task": "classify", "head": "language"}
    manifest = {
        "format": 1,
        "model": {"llm": {"name": "org/llm"}},
        "bindings": {"kind": bound, "place": bound},
        "modules": {"llm_class": "Llm", "shapes": {}},
    }
    (calls / "adapter" / "multimodal.json").write_text(json.dumps(manifest))
    done = run(*command.split())
    assert done.returncode in (1, 2), done.stderr
    assert mentions(done.stderr, words) and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout.split() == []


def test_other_rows_that_can_not_be_scored_are_reported(folder, run):
    calls = folder / "runs" / "calls"
    (calls / "adapter").mkdir(parents=True)
    (calls / "recipe.yaml").write_text(GOOD.replace("data/products.csv", str(folder / "data" / "products.csv")))
    (folder / "new.csv").write_text("photo\n1.png\n")
    done = run("evaluate", "runs/calls", "--data", "new.csv")
    assert done.returncode == 2 and mentions(done.stderr, "new.csv:2: no column|--columns"), done.stderr
    assert done.stdout.split() == []
