"""Numbers in the place of `tokens_per_batch: auto` and `epochs: auto`: for which rows, and what a run keeps of them."""

from contextlib import contextmanager, nullcontext

import pytest
from tiny import tiny_recipe

from finetune.commands._reader import Reader
from finetune.commands.data_check import data_check
from finetune.common.errors import RecipeError, TrainingError
from finetune.data.rows import read_splits
from finetune.data.sample import Message, Sample
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import Train
from finetune.training.automatic import AutoNumbers
from finetune.training.plan.apart import without_auto
from finetune.training.plan.cards import Card
from finetune.training.plan.plan import plan
from finetune.training.steps import more_steps, numbers, steps_of
from finetune.training.train import train

TUNE = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-3, "epochs": "auto"}


def chosen(
    rows: int, tokens: int, *epochs: int | str, most: int = 2048, **settings: object
) -> tuple[int, list[int], str]:
    """For so many rows of one length: tokens_per_batch, epochs of each stage, and the printed lines."""
    stages = [TUNE | {"name": f"stage{number}", "epochs": each} for number, each in enumerate(epochs)]
    written = Train.model_validate({"tokens_per_batch": "auto", "stages": stages, **settings})
    samples = [Sample((Message("assistant", ("a",)),), str(number)) for number in range(rows)]
    found = numbers(written, samples, [tokens] * rows, tokens, most)
    counts = steps_of(found.train, samples, [tokens] * rows)
    assert [count.epochs for count in counts] == [stage.epochs for stage in found.train.stages]
    return int(found.train.tokens_per_batch), [count.epochs for count in counts], "\n".join(found.reasons)


@pytest.mark.parametrize(
    ("rows", "tokens", "epochs", "result"),
    [
        (180, 64, ["auto"], (512, [5])),  # 8 rows a step: 23 steps
        (180, 64, ["auto", "auto"], (512, [3, 3])),
        (10_000, 64, ["auto", "auto"], (2048, [1, 1])),
        (12, 60, ["auto"], (64, [9])),
        (2, 64, ["auto", "auto"], (64, [25, 25])),
        (2, 64, ["auto"], (64, [30])),
        (40, 3000, ["auto"], (4096, [3])),
        (180, 64, [2], (128, [2])),  # 90 steps an epoch; 45 are too few for 100
        (180, 64, [2, 2], (256, [2, 2])),  # 90 steps each
        (180, 64, [20, "auto"], (512, [20, 3])),
        (180, 64, [1, "auto"], (128, [1, 1])),
        (3, 5, ["auto"], (16, [30])),
    ],
)
def test_numbers_fit_the_rows(rows, tokens, epochs, result):
    assert chosen(rows, tokens, *epochs)[:2] == result


def test_written_numbers_stay():
    assert chosen(180, 64, "auto", tokens_per_batch=1024)[:2] == (1024, [9])  # 12 steps an epoch
    assert chosen(180, 64, "auto", accumulate=4)[:2] == (128, [5])
    assert chosen(180, 64, 7, 9, tokens_per_batch=96) == (96, [7, 9], "")


def test_each_number_has_its_reason():
    assert chosen(180, 64, "auto")[2].splitlines() == [
        "tokens_per_batch: 512, so that an epoch of 180 rows has 23 steps",
        "epochs: 5 in stage stage0, so that its 180 rows give 115 steps",
    ]
    assert chosen(2, 64, "auto")[2].splitlines() == [
        "tokens_per_batch: 64, the least that holds the longest row (about 64 tokens): an epoch of 2 rows has 2 steps",
        "epochs: 30 in stage stage0, the most that auto takes: its 2 rows give 60 steps",
    ]
    assert "2048, the most that auto takes: an epoch of 10,000 rows" in chosen(10_000, 64, 1)[2]
    tokens, _, lines = chosen(10_000, 64, 1, most=256)
    assert tokens == 256 and "the most that the GPU has memory for" in lines
    assert chosen(10_000, 300, 1, most=256)[0] == 512


def test_advice_for_more_steps_leaves_room_for_the_longest_row():
    train = Train.model_validate({"tokens_per_batch": 4096, "stages": [TUNE | {"epochs": 1}]})
    samples = [Sample((Message("assistant", ("a",)),), str(number)) for number in range(8)]
    assert more_steps(train, samples, [100] * 8, longest=300).tokens_per_batch == 512


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("automatic")
    return load_recipe(tiny_recipe(folder, train__tokens_per_batch="auto", train__stages=[TUNE]))


def test_other_words_and_too_small_numbers_are_refused(recipe):
    for value in ("16.5", "automatic", "15"):
        with pytest.raises(RecipeError, match="at least 16 or auto"):
            recipe.with_(f"train.tokens_per_batch={value}")
    with pytest.raises(RecipeError, match="at least 1 or auto"):
        recipe.with_("train.stages.0.epochs=0")


def test_a_run_keeps_the_numbers_that_it_began_with(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("finetune.training.steps.FEW_STEPS", 2)
    monkeypatch.setattr("finetune.training.steps.ALL_STEPS", 20)
    run = train(recipe, tmp_path / "run")
    begun = load_recipe(run.recipe).train
    assert (begun.tokens_per_batch, begun.stages[0].epochs) == (32, 2)
    printed = capsys.readouterr().err
    assert "an epoch of 12 rows has 12 steps\n" in printed
    assert "epochs: 2 in stage tune, so that its 12 rows give 24 steps\n" in printed
    assert run.read_metrics()["train"]["stages"]["tune"]["steps"] == 24
    monkeypatch.setattr("finetune.training.steps.ALL_STEPS", 40)  # as if the rule were another by now
    train(recipe, run, resume=True)
    assert load_recipe(run.recipe).train == begun and "epochs: " not in capsys.readouterr().err


def test_a_tokenizer_that_only_transformers_reads_gives_exact_lengths(recipe, monkeypatch):
    """As that of a GGUF file, and one that isn't there yet."""
    reader, samples = Reader(recipe), read_splits(recipe.data, recipe.seed).train
    exact = [len(reader.tokens(sample, sample.source).input_ids) for sample in samples]
    monkeypatch.setattr("finetune.training.automatic.estimate", lambda *_: None)
    choice = AutoNumbers(recipe)
    assert choice.lengths == exact and max(exact) <= choice.longest <= 1.2 * max(exact)


def test_the_longest_row_is_found_among_more_than_are_tokenized(recipe, tmp_path, monkeypatch):
    long = [f"{'word ' * (60 if number == 3 else 1)}{number}" for number in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["question,answer", *(f"{text},yes" for text in long)]))
    (tmp_path / "test.csv").write_text("question,answer\nnew,yes\n")
    task = {"kind": "answer", "media": []}
    data = [{"path": str(tmp_path / f"{name}.csv"), "task": task} for name in ("rows", "test")]
    words = load_recipe(tiny_recipe(tmp_path, train__stages=[TUNE], data=[data[0], data[1] | {"split": "test"}]))
    exact = AutoNumbers(words).longest
    monkeypatch.setattr("finetune.training.automatic.estimate", lambda *_: None)
    monkeypatch.setattr("finetune.training.plan.rows.READ", 2)
    monkeypatch.setattr("finetune.training.lengths.LONGEST", 1)
    assert AutoNumbers(words).longest == pytest.approx(exact, rel=0.1)


def test_what_a_teacher_reads_and_answers_fits_a_row(recipe):
    alone = AutoNumbers(recipe).longest
    distilling = TUNE | {"objective": {"kind": "distill", "max_new_tokens": 100}}
    taught = recipe.train.model_validate({"stages": [distilling]})
    assert AutoNumbers(recipe.model_copy(update={"train": taught})).longest >= alone + 100


def test_several_processes_share_a_step(recipe):
    alone, shared = (AutoNumbers(recipe, processes).choose().train for processes in (1, 4))
    assert (alone.stages[0].epochs, shared.stages[0].epochs) == (9, 30)
    assert shared.accumulate == alone.accumulate


def test_no_row_is_too_long_for_auto(recipe, tmp_path):
    found = data_check(recipe, workers=0, out=tmp_path / "auto").summary["findings"]
    fixed = data_check(recipe, ["train.tokens_per_batch=16"], workers=0, out=tmp_path / "fixed").summary["findings"]
    assert "long" not in found and fixed["long"] == 12


def test_a_plan_has_numbers_that_the_card_has_memory_for(recipe, monkeypatch):
    def largest(settled: Recipe, most: int, card: Card) -> int:
        assert (settled.train.tokens_per_batch, most, card.name) == (2048, 2048, "t4")
        return 32

    monkeypatch.setattr("finetune.training.steps.EPOCH_STEPS", 1)
    monkeypatch.setattr("finetune.training.plan.plan.largest_tokens_per_batch", largest)
    found = plan(recipe, "t4", advise=False)
    written = plan(recipe.with_("train.tokens_per_batch=32", "train.stages.0.epochs=9"), "t4", advise=False)
    assert found.tokens_per_batch == 32 and found.notes[1].startswith("epochs: 9 in stage tune")
    assert (found.needed, found.seconds) == (written.needed, written.seconds)


def test_a_run_on_a_gpu_takes_what_its_plan_has_memory_for(recipe, monkeypatch, capsys):
    @contextmanager
    def planned(file):
        assert load_recipe(file).train.tokens_per_batch == "auto"
        yield lambda seconds: {"tokens_per_batch": 64, "checkpoints": 3, "checkpoints_reason": "every third layer"}

    monkeypatch.setattr("finetune.training.steps.EPOCH_STEPS", 1)
    monkeypatch.setattr("finetune.training.plan.apart.planning", planned)
    settings = without_auto(recipe.with_("train.checkpoint_every_n_layers=auto"), gpu=True).train
    assert (settings.tokens_per_batch, settings.checkpoint_every_n_layers) == (64, 3)
    printed = capsys.readouterr().err
    assert "64, the most that the GPU has memory for" in printed and "every third layer" in printed
    assert without_auto(recipe, gpu=False).train.tokens_per_batch == 2048


def test_a_run_on_a_gpu_says_that_it_has_no_plan(recipe, monkeypatch, capsys):
    monkeypatch.setattr("finetune.training.plan.apart.planning", lambda file: nullcontext(lambda seconds: None))
    without_auto(recipe, gpu=True)
    assert "no plan of this GPU's memory" in capsys.readouterr().err


def test_a_taken_folder_is_refused_before_anything_is_planned(recipe, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    monkeypatch.setattr("finetune.training.train.without_auto", lambda *_: pytest.fail("planned"))
    with pytest.raises(TrainingError, match="there is a run here already"):
        train(recipe, tmp_path / "run")
