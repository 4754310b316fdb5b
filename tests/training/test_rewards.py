"""Stages that learn from rewards, from rows of a file to the run folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import ZOO, family_folder
from families.recipes import base_recipe
from safetensors.torch import load_file
from tiny import FUSIONS, tiny_recipe

import finetune
from finetune.common.errors import ArtifactError, DataError, RecipeError, TrainingError
from finetune.data.sample import Row
from finetune.model.bindings import TaskBinding
from finetune.recipe.parts import HeadPart, TaskPart
from finetune.recipe.schema import Limits, Stage
from finetune.training import rollouts as rollouts_module
from finetune.training.rollouts import Rollouts, answers_in, task_reward
from finetune.training.trainer import StageTrainer

STAGE = {"name": "reward", "trains": ["projectors", "adapter"], "learning_rate": 2e-2, "epochs": 2}
GRPO = {"kind": "grpo", "answers": 4, "max_new_tokens": 6}


def rewarded(folder: Path, objective=None, stage=None, **changes) -> Path:
    """A question about each picture."""
    path = tiny_recipe(folder)
    for split in ("train", "test"):
        with (folder / "data" / f"{split}.jsonl").open("w") as file:
            for number in range(8):
                row = {"image": f"images/{split}{number}.png", "question": f"What is {number}?", "answer": "a square"}
                file.write(json.dumps(row) + "\n")
    data = [
        {"path": str(folder / "data" / f"{split}.jsonl"), "task": "answer", "split": split}
        for split in ("train", "test")
    ]
    own = STAGE | {"objective": GRPO | (objective or {})} | (stage or {})
    return (
        tiny_recipe(folder, **({"data": data, "train__stages": [own], "train__tokens_per_batch": 256} | changes))
        or path
    )


def stage_of(run, name="reward"):
    return json.loads(run.metrics.read_text())["train"]["stages"][name]


def weights_in(run):
    return load_file(run.adapter / "adapter_model.safetensors") | load_file(run.adapter / "projectors.safetensors")


def shortness(sample, answer):
    return -float(len(answer))


def early_letters(sample, answer):
    """Between 0 and 1: how many characters come before n in the alphabet."""
    return sum(letter < "n" for letter in answer.lower()) / max(len(answer), 1)


def test_rewarded_answers_become_more_likely(tmp_path):
    objective = {"answers": 16, "max_new_tokens": 2}
    stage = {"trains": ["adapter"], "epochs": 10, "learning_rate": 5e-2, "scheduler": "constant"}
    recipe = rewarded(tmp_path, objective, stage)
    run = finetune.train(recipe, tmp_path / "run", reward=early_letters)
    figures = stage_of(run)["figures"]
    reward = figures["reward"]
    assert sum(reward[-4:]) / 4 > sum(reward[:4]) / 4 + 0.2
    assert figures["reward_deviation"][0] > 0 and 1 <= figures["answer_tokens"][0] <= 2
    assert stage_of(run)["samples"] == 80


def interrupted(recipe, folder, monkeypatch, at, **options):
    step, calls = StageTrainer.training_step, []

    def cut(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            raise OSError("power cut")
        return step(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(StageTrainer, "training_step", cut)
        finetune.train(recipe, folder, **options)


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Between two steps on the same answers, of weights with dropout, and with the divergence from the beginning."""
    objective = {"iterations": 2, "beta": 0.1}
    few = {"train__save_every_n_steps": 3, "train__tokens_per_batch": 128, "train__accumulate": 3}
    recipe = rewarded(tmp_path, objective, **few)  # 8 rows in steps of 3
    whole = finetune.train(recipe, tmp_path / "whole", reward=shortness)
    interrupted(recipe, tmp_path / "run", monkeypatch, 11, reward=shortness)
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "reward").glob("checkpoint-*")] == [
        "checkpoint-3"
    ]
    resumed = finetune.train(recipe, tmp_path / "run", resume=True, reward=shortness)
    expected, found = weights_in(whole), weights_in(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert stage_of(resumed)["figures"] == stage_of(whole)["figures"]
    kl = stage_of(whole)["figures"]["kl"]
    assert kl[0] == pytest.approx(0, abs=1e-3) and kl[-1] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04.", "is damaged"),
        (b"{}", r"rows\[\]: Input should be a valid list"),
        (b'{"rows": [[{"number": 1, "answers": [{"tokens": "a", "reward": 1}]}]]}', r"rows\[0, 0, 'answers', 0, 'tok"),
        (b'{"rows": [[{"number": 8, "answers": []}]]}', "answers to row 8 of 8"),
        (b'{"rows": [[{"number": 1, "answers": []}]]}', "to row 1 aren't 2 whole ones"),
        (
            b'{"rows": [[{"number": 1, "answers": [{"tokens": [1], "reward": NaN}, {"tokens": [1], "reward": 0}]}]]}',
            "aren't",
        ),
        (
            b'{"rows": [[{"number": 1, "answers": [{"tokens": [], "reward": 1}, {"tokens": [1], "reward": 0}]}]]}',
            "aren't",
        ),
    ],
)
def test_damaged_answers_of_a_checkpoint_are_refused(content, message, tmp_path):
    (tmp_path / "answers.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        answers_in(tmp_path / "answers.json", 8, 2)


def test_weights_are_as_they_were_after_a_look_at_the_beginning(tmp_path, monkeypatch):
    """With beta so small that the divergence is lost in rounding, the stage is the one without it."""
    without = finetune.train(rewarded(tmp_path, stage={"epochs": 1}), tmp_path / "without", reward=shortness)
    almost = finetune.train(rewarded(tmp_path, {"beta": 1e-30}, {"epochs": 1}), tmp_path / "almost", reward=shortness)
    expected, found = weights_in(without), weights_in(almost)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def sample_of(task, columns):
    row = Row(Path("rows.jsonl"), 1, columns, Path("."))
    return replace(task.sample(row), task="here")


@pytest.mark.parametrize(
    "task, columns, answer, name, expected",
    [
        ("answer", {"question": "What?", "answer": "a red square"}, "a square", "good", 0.8),
        ("answer", {"question": "What?", "answer": "a red square"}, "a square", "exact_match", 0.0),
        ("extract", {"json": '{"total": 3, "name": "Li"}'}, '{"total": 3, "name": "Wu"}', "good", 0.5),
        ("extract", {"json": '{"total": 3, "name": "Li"}'}, '{"total": 3', "json_valid", 0.0),
        ("transcribe", {"text": "abcde"}, "abcxy", "good", 0.6),
        ("ground", {"phrase": "the cat", "boxes": [0, 0, 400, 500]}, "[0, 0, 400, 250]", "iou", 0.5),
        ("classify", {"label": "red"}, "blue", "good", 0.0),
        ("classify", {"label": "red"}, "red", "good", 1.0),
    ],
)
def test_the_task_s_own_measure_is_the_reward(task, columns, answer, name, expected):
    part = TaskPart.of(task, media=(), **({"units": "thousandths"} if task == "ground" else {}))
    binding = TaskBinding(task=part, head=HeadPart.of("language"))
    reward = task_reward({"here": binding}, name)
    assert reward(sample_of(part, columns), answer) == pytest.approx(expected)


def without_llm(folder, path):
    recipe = finetune.load_recipe(path)
    (folder / "llm" / "model.safetensors").unlink()
    return recipe


@pytest.mark.parametrize("name, known", [("loudness", "good or exact_match"), ("iou", "good or exact_match")])
def test_a_reward_that_the_task_does_not_measure_is_refused(name, known, tmp_path):
    recipe = without_llm(tmp_path, rewarded(tmp_path, {"reward": name}))
    expected = rf"data.0: stage 'reward' learns from rewards, and the task 'answer' measures no '{name}'; .*{known}"
    for begin in (finetune.check, lambda recipe: finetune.train(recipe, tmp_path / "run")):
        with pytest.raises(DataError, match=expected):
            begin(recipe)


def test_questions_whose_answers_fit_no_row_are_refused(tmp_path):
    recipe = without_llm(tmp_path, rewarded(tmp_path, {"answers": 16, "max_new_tokens": 32}))
    with pytest.raises(DataError, match=r"(?s)8 of 8 .*train.jsonl:1: the question and 16 answers of up to 32 have 53"):
        finetune.train(recipe, tmp_path / "run")


def test_what_cannot_be_rewarded_is_refused_by_the_recipe_alone(tmp_path):
    with pytest.raises(RecipeError, match="the objective 'grpo' changes what the LLM writes: add 'adapter'"):
        finetune.load_recipe(rewarded(tmp_path, stage={"trains": ["projectors"]}))
    labels = [f"data.{number}.{key}" for number in (0, 1) for key in ("task=classify", "head.kind=language")]
    labels += [f"data.{number}.head.answers=labels" for number in (0, 1)]
    with pytest.raises(RecipeError, match=r"data.0.head.answers: stage 'reward' .* needs written answers"):
        finetune.load_recipe(rewarded(tmp_path), labels)
    heads = [f"data.{number}.{key}" for number in (0, 1) for key in ("task=classify", "head=label")]
    with pytest.raises(RecipeError, match="has the objective 'grpo', which needs the head 'language'"):
        finetune.load_recipe(rewarded(tmp_path), heads)
    with pytest.raises(RecipeError, match="reward: no stage of the recipe samples answers"):
        finetune.train(tiny_recipe(tmp_path / "other"), tmp_path / "run", reward=shortness)


def test_a_reward_must_be_a_finite_number(tmp_path):
    with pytest.raises(TrainingError, match=r"train.jsonl:\d: the reward of '.*' is nan; return a finite number"):
        finetune.train(rewarded(tmp_path), tmp_path / "run", reward=lambda sample, answer: float("nan"))


def test_the_stage_is_planned(tmp_path):
    """With the answers as long as they may be: more of them take more memory."""
    activations = []
    for answers in (2, 8):
        plan = finetune.plan(rewarded(tmp_path, {"answers": answers, "beta": 0.1, "iterations": 2}))
        phases = {phase.name: phase for phase in plan.phases}
        activations.append(phases["train reward"].parts["activations"])
    assert 0 < activations[0] < activations[1]


def test_media_stand_beside_each_answer_where_a_fusion_finds_them_by_sample(tmp_path):
    fusion = {"kind": "cross_attention", **FUSIONS["cross_attention"]}
    stage = {"trains": ["projectors", "fusion", "adapter"], "epochs": 1}
    settings = {"model__fusion": fusion, "adapter": {"rank": 2}, "train__tokens_per_batch": 512}
    recipe = rewarded(tmp_path, {"beta": 0.1}, stage, **settings)
    figures = stage_of(finetune.train(recipe, tmp_path / "run", reward=shortness))["figures"]
    assert figures["kl"][0] == pytest.approx(0, abs=1e-6) and figures["no_signal"][0] < 1
    with pytest.raises(DataError, match=r"each of the 4 answers needs its question beside it, \d+ tokens: raise"):
        finetune.train(rewarded(tmp_path, stage=stage, **settings | {"train__tokens_per_batch": 64}), tmp_path / "two")


def test_the_weights_that_a_stage_began_with_are_seen_through_autocast(tmp_path):
    """Autocast keeps parameters in half precision, whatever their data is by then."""
    layer, given = torch.nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    rollouts = rollouts_over([layer.weight])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        at_first = layer(given)
    with torch.no_grad():
        layer.weight.add_(1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        now = layer(given)
        with rollouts._initial_weights():
            assert torch.equal(layer(given), at_first)
        assert torch.equal(layer(given), now) and not torch.equal(now, at_first)


def rollouts_over(parameters):
    stage = Stage(name="reward", trains=["adapter"], learning_rate=1e-3, objective=GRPO | {"beta": 0.1})
    rollouts = Rollouts(stage, [], None, sampler=None, decode=None, reward=None, seed=0)
    rollouts.begin(parameters)
    return rollouts


def test_sampled_answers_of_a_base_go_on_where_its_positions_end(tmp_path, monkeypatch):
    """Qwen2.5-VL: by its own rule for the whole conversation."""
    family = ZOO["qwen2_5_vl"]
    path = base_recipe(tmp_path, family, family_folder("qwen2_5_vl", tmp_path / "published"), "image")
    recipe = json.loads(path.read_text())
    recipe["train"]["stages"][0] |= {"epochs": 1, "objective": {"kind": "grpo", "answers": 2, "max_new_tokens": 3}}
    path.write_text(json.dumps(recipe))
    rows, original = [], rollouts_module._answered

    def answered(*arguments):
        rows.append(original(*arguments))
        return rows[-1]

    monkeypatch.setattr(rollouts_module, "_answered", answered)
    run = finetune.train(path, tmp_path / "run", reward=lambda sample, answer: float(len(answer)))
    existing = finetune.load(run.adapter).encoders["image"].existing
    model = existing.model.base_model
    row = rows[0]
    ids = torch.tensor([row.input_ids])
    layout = finetune.load(run.adapter).encoders["image"].layout_at(row.media[0], Limits())
    expected, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == existing.token_id("image")).long(),
        image_grid_thw=torch.tensor([layout.grid]),
        attention_mask=torch.ones_like(ids),
    )
    assert row.positions == expected[:, 0].tolist()
