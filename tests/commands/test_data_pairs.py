"""A trained run samples answers to its training rows; its task's score, or a person, makes pairs of them."""

import csv
import json

import pytest
import yaml
from cli import cli
from tiny import tiny_dataset, tiny_recipe
from trained_runs import copy_of

import finetune
from finetune.common.errors import DataError, RecipeError
from finetune.data.rows import read_splits
from finetune.model.assistant import Assistant

ROWS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on questions about pictures, half of its rows held out."""
    folder = tmp_path_factory.mktemp("pairs")
    data = tiny_dataset(folder / "data", train=2 * ROWS)
    with (data / "asked.jsonl").open("w") as file:
        for number in range(2 * ROWS):
            row = {"image": f"images/train{number}.png", "question": f"What is {number}?", "answer": f"a red {number}"}
            print(json.dumps(row), file=file)
    source = {"path": str(data / "asked.jsonl"), "task": "answer", "hold_out": 0.5}
    stage = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5e-3}
    recipe = tiny_recipe(folder, data=[source], train__stages=[stage])
    return finetune.train(recipe, folder / "run")


@pytest.fixture
def run(trained, tmp_path):
    return finetune.RunFolder(copy_of(trained.path, tmp_path / "run"))


def say(monkeypatch, answers_to):
    """Let the model give these answers to each question, in turns; the questions that it was asked."""
    asked = []

    def answers(self, conversations, *, temperature, **options):
        assert temperature == 0.7
        questions = [turns[0].content[1] for turns in conversations]
        asked.extend(questions)
        seen = {}
        texts = []
        for question in questions:
            number = seen[question] = seen.get(question, -1) + 1
            texts.append(answers_to(question)[number])
        return texts

    monkeypatch.setattr(Assistant, "answers", answers)
    return asked


OPTIONS = finetune.PairOptions(answers=3, temperature=0.7)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_and_the_worst_answer_make_a_pair_that_trains(run, tmp_path, monkeypatch):
    def answers_to(question):
        number = int("".join(filter(str.isdigit, question)))
        right = f"a red {number}"
        return ["no", right, "a blue one"] if number % 2 else ["no", "nothing", "no"]

    asked = say(monkeypatch, answers_to)
    result = finetune.data_pairs(run, out=tmp_path / "pairs.jsonl", options=OPTIONS)
    held_out = {row["where"] for row in json.loads((run.data / "held_out.json").read_text())["test"]}
    assert len(asked) == 3 * ROWS == 3 * result.rows and len(held_out) == ROWS
    rows = read(result.out)
    assert len(rows) == result.pairs and result.pairs + result.ties == ROWS and result.pairs > 0 < result.ties
    for row in rows:
        assert row["of"] not in held_out and row["rejected"] == "no" and row["chosen"].startswith("a red ")
    monkeypatch.undo()
    (source,) = yaml.safe_load(result.source)
    recipe = yaml.safe_load(run.recipe.read_text())
    recipe["data"][:0] = [source]
    recipe["train"]["stages"] = [recipe["train"]["stages"][0] | {"objective": "dpo", "sources": [0]}]
    (tmp_path / "prefer.yaml").write_text(yaml.safe_dump(recipe))
    loaded = finetune.load_recipe(tmp_path / "prefer.yaml")
    samples = [sample for sample in read_splits(loaded.data, loaded.seed).train if sample.rejected]
    assert {(sample.answer, sample.rejected) for sample in samples} == {(r["chosen"], r["rejected"]) for r in rows}
    preferred = finetune.train(tmp_path / "prefer.yaml", tmp_path / "preferred")
    assert "reward_margin" in json.loads(preferred.metrics.read_text())["train"]["stages"]["tune"]["figures"]


def test_sampled_answers_differ_and_a_seed_repeats_them(run, tmp_path):
    options = finetune.PairOptions(answers=4, temperature=5.0, max_new_tokens=6, limit=3, by="person")
    results = [finetune.data_pairs(run, out=tmp_path / f"{name}.jsonl", options=options) for name in ("one", "two")]
    one, two = (read(result.candidates) for result in results)
    assert one == two and len(one) == 3
    assert all(row["candidates"][0] != row["candidates"][1] for row in one)


def test_a_person_chooses_on_the_labelling_page(run, tmp_path, monkeypatch):
    say(monkeypatch, lambda question: ["first", "second", "first"])
    options = finetune.PairOptions(answers=3, temperature=0.7, by="person")
    out = tmp_path / "pairs.jsonl"
    result = finetune.data_pairs(run, out=out, options=options)
    assert (result.pairs, result.undecided) == (0, ROWS) and out.read_text() == ""
    command = next(line for line in str(result).splitlines() if line.startswith("to decide: "))
    done = cli(*command.removeprefix("to decide: finetune ").partition(" --page")[0].split())
    assert done.returncode == 0 and f"{ROWS} rows" in done.stdout, done.stderr
    with (tmp_path / "pairs.labels.csv").open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    assert "A: first\nB: second" in lines[0]["text"] and lines[0]["media"].endswith(".png")
    for line, label in zip(lines, ["A", "B", "", "B", "", ""], strict=True):
        line["label"] = label
    with (tmp_path / "pairs.labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    monkeypatch.setattr(Assistant, "answers", lambda *_, **__: pytest.fail("asked again"))
    result = finetune.data_pairs(run, out=out, options=options)
    assert (result.pairs, result.undecided) == (3, 3)
    assert [row["chosen"] for row in read(out)] == ["first", "second", "second"]


def test_other_rows_are_asked_too_and_mistakes_are_told(run, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"name a \.jsonl file"):
        finetune.data_pairs(run, out=tmp_path / "pairs.csv")
    say(monkeypatch, lambda question: ["no", "a red 99", "no"])
    others = tmp_path / "others.jsonl"
    tiny_dataset(tmp_path)
    others.write_text(json.dumps({"image": "images/train0.png", "question": "What is 99?", "answer": "a red 99"}))
    result = finetune.data_pairs(run, others, out=tmp_path / "pairs.jsonl", options=OPTIONS)
    assert (result.rows, result.pairs) == (1, 1)
    with pytest.raises(RecipeError, match=r"pairs\.jsonl exists already: remove it, or name another file"):
        finetune.data_pairs(run, others, out=tmp_path / "pairs.jsonl", options=OPTIONS)
    foreign = {"of": "gone.csv:2", "candidates": ["a", "b"], "run": str(run.path)}
    (tmp_path / "pairs.candidates.jsonl").write_text(json.dumps(foreign) + "\n")
    (tmp_path / "pairs.labels.csv").write_text("row,label\npairs.candidates.jsonl:1,C\n")
    options = finetune.PairOptions(by="person")
    with pytest.raises(DataError, match=r"the label of pairs\.candidates\.jsonl:1 is 'C'; write A or B"):
        finetune.data_pairs(run, others, out=tmp_path / "pairs.jsonl", options=options)
    (tmp_path / "pairs.labels.csv").write_text("row,label\npairs.candidates.jsonl:1,A\n")
    with pytest.raises(DataError, match=r"(?s)1 rows aren't among these.*gone.csv:2"):
        finetune.data_pairs(run, others, out=tmp_path / "pairs.jsonl", options=options)
    (tmp_path / "pairs.candidates.jsonl").write_text(json.dumps({**foreign, "run": "runs/other"}) + "\n")
    with pytest.raises(DataError, match=r"candidates\.jsonl:1: answers of the run runs/other"):
        finetune.data_pairs(run, others, out=tmp_path / "pairs.jsonl", options=options)


def test_the_command_line(run, tmp_path):
    done = cli("data", "pairs", str(run.path), "--by", "chance")
    assert done.returncode == 2 and "write score or person" in done.stderr
    done = cli("data", "pairs", str(run.path), "--encoding", "big5")
    assert done.returncode == 2 and "name them with --data" in done.stderr
