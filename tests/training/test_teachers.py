"""A stage that another model teaches: its outputs are written down before the student is loaded."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from families import ZOO, family_folder
from families.recipes import base_recipe
from tiny import tiny_dataset, tiny_llm_folder, tiny_recipe, tiny_tokenizer, tiny_vision_folder
from torch.nn import functional
from transformers import AutoTokenizer

import finetune
from finetune.common.errors import ArtifactError, DataError, RecipeError, TrainingError
from finetune.data.rows import read_splits
from finetune.data.sample import Message
from finetune.model.adapter import load_trained
from finetune.model.assistant import FileView
from finetune.model.row_plan import by_segments
from finetune.model.tokenize import tokenize
from finetune.training import shared, teachers, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A run with a larger LLM of the same tokenizer, and pictures in other features."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llm_folder(folder / "llm", num_hidden_layers=3, intermediate_size=192)
    tiny_vision_folder(folder / "encoder", "clip")
    stage = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 2e-2, "epochs": 8}
    recipe = tiny_recipe(folder, train__stages=[stage])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "user"))
        return finetune.train(recipe, folder / "run").path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "finetune" / "teachers"


def student(folder: Path, taught_by: Path | str | None, epochs: int = 1, **options) -> finetune.Recipe:
    objective = {
        "kind": "distill",
        "teacher": taught_by and str(taught_by),
        "answers": "given",
        "max_new_tokens": 4,
    } | options
    stage = {"name": "learn", "trains": ["projectors", "adapter"], "learning_rate": 1e-2, "epochs": epochs}
    return finetune.load_recipe(tiny_recipe(folder, train__stages=[stage | {"objective": objective}]))


def log_of(run: finetune.RunFolder, stage: str = "learn") -> dict:
    return json.loads(run.metrics.read_text())["train"]["stages"][stage]


class Learned(Exception):
    """Ends a training before its first step."""


def first_batch(recipe: finetune.Recipe, folder: Path, monkeypatch) -> tuple:
    """(model in evaluation mode, stage, collator, rows) as training begins."""
    seen = []

    def stop(run_folder, training, validation):
        seen.append(training)
        raise Learned

    monkeypatch.setattr(train, "run_stage", stop)
    with pytest.raises(Learned):
        finetune.train(recipe, folder)
    training = seen[0]
    return training.model.eval(), training.stage, training.collator, training.rows


def written_out(model, features, sample, tokens, temperature) -> torch.Tensor:
    """Log-probabilities (K, V) before the learned tokens of one row, which is alone in its batch."""
    media = {"image": [features(medium) for medium in tokens.media]}
    with torch.no_grad():
        logits = model(torch.tensor([tokens.input_ids]), features=media).logits[0]
    learned = [place for place, label in enumerate(tokens.labels) if label != -100]
    log_probs = (logits[[place - 1 for place in learned]].float() / temperature).log_softmax(-1)
    known = len(tiny_tokenizer())  # the LLMs' tables are larger, by rows that stand for no token
    return torch.cat([log_probs[:, :known], log_probs[:, known:].logsumexp(-1, keepdim=True)], 1)


def test_the_loss_is_the_divergence_from_the_teacher_that_reads_the_media_itself(teacher, tmp_path, monkeypatch):
    recipe = student(tmp_path, teacher, top_k=10_000, temperature=1.7)
    model, stage, collator, rows = first_batch(recipe, tmp_path / "run", monkeypatch)
    assistant = finetune.load(teacher)
    view = FileView(assistant.encoders, assistant.limits)
    segments = assistant.model.composition.placement.segments_by(view.layout)
    samples = {sample.where: sample for sample in train_samples(recipe)}
    total, expected = 0.0, 0.0
    for row in rows:
        batch = collator([{"groups": row, "filler": False}])
        with by_segments(model.causal_lm):
            found = stage.objective.module.loss(model, model, batch, stage.objective.options)
        total += found.total.item()
        for number in (number for group in row for number in group):
            own = collator.samples[number]
            theirs = tokenize(samples[own.where], assistant.tokenizer, assistant.placeholders, segments)
            p = written_out(assistant.model, view.features, own, theirs, 1.7)
            q = written_out(model, collator.read, own, own, 1.7)
            expected += functional.kl_div(q, p, log_target=True, reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-3) and expected > 1


def train_samples(recipe: finetune.Recipe):
    return read_splits(recipe.data, recipe.seed, recipe.media.max_bytes, recipe.file).train


def test_a_teacher_of_the_same_weights_has_nothing_to_teach(teacher, tmp_path, monkeypatch):
    project = teacher.parent
    objective = {"kind": "distill", "teacher": str(teacher), "answers": "own", "top_k": 10_000}
    stage = {"name": "learn", "trains": ["projectors", "adapter"], "learning_rate": 1e-2, "objective": objective}
    recipe = finetune.load_recipe(project / "recipe.yaml").with_(**{"train.stages": [stage]})
    model, stage, collator, rows = first_batch(recipe, tmp_path / "run", monkeypatch)
    load_trained(model, teacher / "adapter")
    batch = collator([{"groups": rows[0], "filler": False}])
    with by_segments(model.causal_lm):
        found = stage.objective.module.loss(model, model, batch, stage.objective.options)
    assert found.total.item() == pytest.approx(0, abs=1e-4) and found.right == found.count == found.items > 0


def test_a_student_comes_nearer_and_is_never_loaded_beside_its_teacher(teacher, tmp_path, monkeypatch):
    loaded, alive = [], []
    load, compose = teachers.load_folder, train.load_composite

    def loads(folder):
        assistant = load(folder)
        loaded.append(weakref.ref(assistant.model))
        return assistant

    def composes(*arguments):
        gc.unfreeze()
        gc.collect()
        alive.extend(one() is not None for one in loaded)
        return compose(*arguments)

    monkeypatch.setattr(teachers, "load_folder", loads)
    monkeypatch.setattr(train, "load_composite", composes)
    run = finetune.train(student(tmp_path, teacher, epochs=12), tmp_path / "run")
    losses = log_of(run)["losses"]
    with monkeypatch.context() as patch:  # a run whose teacher is gone is read all the same
        patch.setattr("os.path.exists", lambda path, exists=os.path.exists: str(path) != str(teacher) and exists(path))
        finetune.load_recipe(run.recipe)
    assert alive == [False] and sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert log_of(run)["token_accuracy"][-1] > log_of(run)["token_accuracy"][0]


def test_in_a_sweep_too_the_llm_is_loaded_when_the_teacher_is_gone(teacher, tmp_path, monkeypatch):
    events = []
    ask, load = teachers.load_folder, shared.load_llm
    monkeypatch.setattr(teachers, "load_folder", lambda folder: events.append("teacher") or ask(folder))
    monkeypatch.setattr(shared, "load_llm", lambda components: events.append("student") or load(components))
    recipe = student(tmp_path, teacher).with_(**{"data.1.split": "validation", "evaluate.split": "validation"})
    recipe = recipe.with_(**{"train.validation": {"every_n_steps": 10}})
    key = "train.stages.0.learning_rate"
    finetune.sweep(recipe, [f"{key}=0.01,0.02"], run=tmp_path / "sweep")
    assert events == ["teacher", "student"]
    finetune.sweep(recipe, ["train.stages.0.objective.top_k=4,5"], run=tmp_path / "other")
    assert events[2:] == ["teacher", "student"] * 2


def test_its_outputs_are_computed_once(teacher, tmp_path, cache, monkeypatch):
    asked = []
    load = teachers.load_folder
    monkeypatch.setattr(teachers, "load_folder", lambda folder: asked.append(folder) or load(folder))
    own = {"answers": "own", "top_k": 8}
    first = finetune.train(student(tmp_path / "a", teacher, **own), tmp_path / "a" / "run")
    assert asked == [teacher / "adapter"] and len(list(cache.iterdir())) == 2
    answers = json.loads((first.data / "answers-learn.json").read_text())["answers"]
    assistant = finetune.load(teacher)
    question = train_samples(student(tmp_path / "a", teacher))[0].question
    assert answers[0] == assistant.answers([question], max_new_tokens=4)[0]
    shutil.copytree(tmp_path / "a" / "data", tmp_path / "b" / "data")
    again = finetune.train(student(tmp_path / "b", teacher, **own), tmp_path / "b" / "run")
    assert len(asked) == 1 and log_of(again)["losses"] == log_of(first)["losses"]
    finetune.train(student(tmp_path / "b", teacher, **own, temperature=1.0), tmp_path / "b" / "warmer")
    assert len(asked) == 2 and len(list(cache.iterdir())) == 3  # the same answers


def test_a_run_that_goes_on_learns_from_the_same_teacher(teacher, tmp_path, monkeypatch):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    recipe = student(tmp_path, copy, answers="own")
    with monkeypatch.context() as patch:
        first_batch(recipe, tmp_path / "run", patch)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(TrainingError, match="teacher has changed since this run began"):
        finetune.train(recipe, tmp_path / "run", resume=True)
    shutil.copy(teacher / "adapter" / "adapter_model.safetensors", weights)
    monkeypatch.setattr(teachers, "load_folder", None)  # it isn't asked again
    assert log_of(finetune.train(recipe, tmp_path / "run", resume=True))["steps"] > 0


def other_tokens(folder: Path) -> None:
    """Another vocabulary of as many tokens."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    first, second = [token for token in content["model"]["vocab"] if len(token) > 2][:2]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def test_a_teacher_of_another_vocabulary_teaches_by_its_answers(teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    other_tokens(copy / "adapter")
    with pytest.raises(RecipeError, match=r"objective\.by: .* vocabulary of \d+ tokens.*write by: answers"):
        finetune.train(student(tmp_path, copy), tmp_path / "run")
    run = finetune.train(student(tmp_path, copy, by="answers", answers="own"), tmp_path / "by-answers")
    answers = json.loads((run.data / "answers-learn.json").read_text())["answers"]
    assert len(answers) == 12 and log_of(run)["steps"] > 0


def test_a_template_that_ends_answers_otherwise_is_told(teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(copy / "adapter")
    assert "<|im_end|>' }}{% endgeneration" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>' }}{% endgen", "<|endoftext|>' }}{% endgen")
    tokenizer.save_pretrained(copy / "adapter")
    with pytest.raises(DataError, match=r"answers of 12 of 12 rows in other tokens.*(?s:.*)train.csv:2"):
        finetune.train(student(tmp_path, copy), tmp_path / "run")


def test_what_can_not_be_taught_is_told_before_anything_is_loaded(teacher, tmp_path, monkeypatch):
    tiny_dataset(tmp_path / "data")
    for name in (tmp_path / "none", "./none"):
        with pytest.raises(ArtifactError, match="none"):
            finetune.check(student(tmp_path, name))
    with pytest.raises(RecipeError, match="by: answers is for a teacher"):
        student(tmp_path, None, by="answers", answers="own")
    with pytest.raises(RecipeError, match="a teacher has no part in the rows' own answers"):
        student(tmp_path, teacher, by="answers")
    (tmp_path / "empty").mkdir()
    shutil.copy(teacher / "recipe.yaml", tmp_path / "empty")
    monkeypatch.setattr("finetune.training.prepare.splits_of_run", None)
    for call in (lambda recipe: finetune.check(recipe), lambda recipe: finetune.train(recipe, tmp_path / "run")):
        with pytest.raises(ArtifactError, match="adapter"):
            call(student(tmp_path, tmp_path / "empty"))
    blind = shutil.copytree(teacher / "adapter", tmp_path / "blind")
    manifest = json.loads((blind / "multimodal.json").read_text())
    manifest["model"] |= {"encoders": {}, "projectors": {}}
    (blind / "multimodal.json").write_text(json.dumps(manifest | {"placeholders": {}}))
    with pytest.raises(
        RecipeError, match=r"objective\.teacher: .*blind reads text only, but rows of data\.0 hold image"
    ):
        finetune.check(student(tmp_path, blind))


def test_a_plan_is_made_of_what_a_teacher_teaches(teacher, tmp_path):
    assert finetune.plan(student(tmp_path, teacher)).exit_status == 0


def test_rows_are_known_by_what_they_hold(tmp_path):
    recipe = finetune.load_recipe(tiny_recipe(tmp_path))
    one, other, *_ = train_samples(recipe)
    assert teachers.rows_digest([one]) != teachers.rows_digest([other])
    said = Message("user", (*one.question[0].content[:-1], "Otherwise?"))
    changed = type(one)((said, *one.messages[1:]), one.where)
    assert teachers.rows_digest([one]) != teachers.rows_digest([changed])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_base_teaches_a_base(family, tmp_path):
    """The base itself has nothing to teach a student over it that hasn't learned yet; one that was tuned has."""
    base = family_folder(family, tmp_path / "base")
    recipe = finetune.load_recipe(base_recipe(tmp_path / "project", ZOO[family], base, "image"))
    strong = {"train.stages.0.learning_rate": 5e-2, "train.stages.0.epochs": 6}
    taught_by = finetune.train(recipe.with_(**strong), tmp_path / "teacher").path
    first = []
    for number, teacher in enumerate((base, taught_by)):
        objective = {"kind": "distill", "teacher": str(teacher), "answers": "given", "temperature": 1.0}
        changes = {"train.stages.0.objective": objective, "train.stages.0.epochs": 1 + 11 * number}
        losses = log_of(finetune.train(recipe.with_(**changes), tmp_path / f"run{number}"), "tune")["losses"]
        first.append(losses[0])
    assert first[0] == pytest.approx(0, abs=1e-3) and first[1] > 0.1
    assert losses[-1] < 0.7 * losses[0]


def test_nothing_of_a_base_is_left_when_it_is_let_go(tmp_path, monkeypatch):
    base = family_folder("llava", tmp_path / "base")
    recipe = finetune.load_recipe(base_recipe(tmp_path / "project", ZOO["llava"], base, "image"))
    objective = {"kind": "distill", "teacher": str(base), "answers": "given"}
    loaded, left = [], []
    load, fresh = teachers.load_base, teachers.fresh_memory

    def note(settings):
        assistant = load(settings)
        loaded.append(weakref.ref(assistant.encoders["image"].existing.model))
        return assistant

    def memory():
        fresh()
        left.append(loaded[0]())

    monkeypatch.setattr(teachers, "load_base", note)
    monkeypatch.setattr(teachers, "fresh_memory", memory)
    finetune.train(
        recipe.with_(**{"train.stages.0.objective": objective, "train.stages.0.epochs": 1}), tmp_path / "run"
    )
    assert left == [None]
