"""What the `__init__` of each folder of parts promises, over every file there is."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from tiny import tiny_llm, tiny_picture
from tiny_encoders import KINDS, tiny_encoder_of, tiny_medium
from tiny_formats import EXAMPLES
from typing_extensions import get_protocol_members

from finetune.common.errors import DataError, ModelError
from finetune.common.registry import PartOptions, load_part, part_names
from finetune.data.media import DECODERS
from finetune.data.questions import question_of
from finetune.data.sample import Answer, Medium, Row, Sample
from finetune.data.tasks import TaskContract, TaskOptions
from finetune.model.encoders import Encoder, EncoderContract
from finetune.model.fusion import Fusion, FusionContract, Projected
from finetune.model.heads import HeadContract, TrainedHeadContract
from finetune.model.projectors import ProjectorContract
from finetune.recipe.parts import TaskPart
from finetune.training.objectives import ObjectiveContract

# What the right answers of the rows below reach, where it isn't 1.
BEST = {"vqa_accuracy": (2 / 3 + 1) / 2}
OPTIONS = {"encoders": {"name": "some/name"}}
CONTRACTS = {
    "encoders": EncoderContract,
    "projectors": ProjectorContract,
    "fusion": FusionContract,
    "tasks": TaskContract,
    "objectives": ObjectiveContract,
}
# Numbers of rows that a projector refuses. All others take any.
REFUSED = {"pixel_shuffle": {1, 7, 17, 25}}  # no square grids of an even side


def every(folder: str):
    return pytest.mark.parametrize("name", part_names(folder))


@pytest.mark.parametrize(
    "folder, name",
    [
        (f, n)
        for f in ("encoders", "projectors", "fusion", "heads", "tasks", "formats", "objectives")
        for n in part_names(f)
    ],
)
def test_options_are_strict_and_survive_json(folder, name):
    part = load_part(folder, name)
    assert issubclass(part.Options, PartOptions) and issubclass(part.Options, BaseModel)
    options = part.Options(**OPTIONS.get(folder, {}))
    assert part.Options(**json.loads(options.model_dump_json())) == options
    with pytest.raises(ValueError, match="extra"):
        part.Options(**OPTIONS.get(folder, {}), no_such_option=1)
    assert part.__doc__


@pytest.mark.parametrize("folder, name", [(f, n) for f in (*CONTRACTS, "heads") for n in part_names(f)])
def test_a_part_defines_what_its_folder_asks_for(folder, name):
    part = load_part(folder, name)
    contract = CONTRACTS.get(folder) or (TrainedHeadContract if part.TRAINED else HeadContract)
    assert len(get_protocol_members(contract)) >= 3
    for member in get_protocol_members(contract):
        value = getattr(part, member)
        if function := getattr(contract, member, None):
            assert [*inspect.signature(value).parameters] == [*inspect.signature(function).parameters][1:], member


@every("projectors")
def test_a_projector_gives_as_many_rows_as_it_says(name):
    part = load_part("projectors", name)
    module = part.build(12, 20, part.Options())
    for rows in (4, 16, 36):
        assert module(torch.randn(3, rows, 12)).shape == (3, part.length(rows, part.Options()), 20)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())


@every("projectors")
def test_a_medium_is_projected_the_same_beside_any_other(name):
    part = load_part("projectors", name)
    module, features = part.build(12, 20, part.Options()), torch.randn(3, 16, 12)
    alone = torch.cat([module(features[number : number + 1]) for number in range(3)])
    torch.testing.assert_close(module(features), alone, atol=1e-6, rtol=0)


@every("projectors")
@pytest.mark.parametrize("rows", [1, 7, 17, 25])
def test_rows_that_a_projector_cannot_take_are_refused_before_it_runs(name, rows):
    part = load_part("projectors", name)
    if rows in REFUSED.get(name, ()):
        with pytest.raises(ModelError, match=f"{name}.*{rows} rows"):
            part.length(rows, part.Options())
        return
    expected = part.length(rows, part.Options())
    assert part.build(12, 20, part.Options())(torch.randn(1, rows, 12)).shape[1] == expected


@every("fusion")
def test_a_fusion_takes_the_placeholders_that_it_asks_for(name):
    part, config = load_part("fusion", name), tiny_llm().config
    count = part.placeholders(3, part.Options())
    mask = torch.zeros(1, count + 2, dtype=torch.bool)
    mask[0, 1 : count + 1] = True
    embeddings, width = torch.randn(1, count + 2, config.hidden_size), config.hidden_size
    module = part.build(config, ("image",), part.Options())
    media = {"image": Projected(mask, torch.randn(3, width), [3])}
    fused = module(embeddings, media, torch.zeros(1, count + 2, dtype=torch.long))
    assert fused.shape == embeddings.shape
    assert torch.equal(fused[~mask], embeddings[~mask])
    assert bool(list(module.parameters())) == part.TRAINED
    assert module.strength is None or module.strength == {"image": 1.0}
    assert get_protocol_members(Fusion) <= {*dir(module)}
    module.forget()


TASK_ROWS: dict[str, tuple[dict, list[dict]]] = {  # options, and what the columns of two rows hold besides the media
    "answer": ({}, [{"question": "What?", "answer": "a red ball"}, {"question": "哪里？", "answer": "桌子上"}]),
    "caption": ({}, [{"caption": "a red ball on grass"}, {"caption": ["一只猫坐在桌子上", "桌上有一只猫"]}]),
    "chat": ({}, [{"answer": "a red ball"}, {"answer": "桌子上"}]),
    "classify": ({}, [{"label": "red"}, {"label": "红"}]),
    "extract": ({}, [{"json": '{"total": 3.5, "items": ["a", "b"]}'}, {"json": '{"total": null, "名称": "猫"}'}]),
    "ground": (
        {},
        [{"phrase": "ball", "boxes": "[2, 4, 9, 12]"}, {"phrase": "猫", "boxes": [[1, 1, 3, 4], [2, 5, 9, 9]]}],
    ),
    "rank": ({}, [{"group": "u", "history": "h", "item": "猫", "relevance": r} for r in ("1", "0")]),
    "score": ({}, [{"score": "4.5"}, {"score": 2}]),
    "transcribe": ({}, [{"text": "red balls, please"}, {"text": "一只猫。"}]),
    "vqa": (
        {},
        [{"question": "What?", "answers": "red; red; blue"}, {"question": "几只？", "answers": ["两只", "两只"]}],
    ),
}


def task_samples(name: str, folder: Path) -> tuple:
    """(task, options, a sample of each row, the rows)."""
    task = load_part("tasks", name)
    options, columns = task.Options(**TASK_ROWS[name][0]), TASK_ROWS[name][1]
    tiny_picture().save(folder / "a.png")
    rows = []
    for number, row in enumerate(columns, 2):
        content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": row.get("answer", "")}]
        media = dict.fromkeys(options.media, "a.png")
        rows.append(Row(folder / "rows.csv", number, {**media, "messages": turns, **row}, folder))
    return task, options, [task.sample(row, options) for row in rows], rows


def measured(task, options, samples, answers) -> list[dict]:
    """As evaluation does it, with what JSON makes of predictions and targets."""
    read = lambda answer: json.loads(json.dumps(task.read(Answer(answer), options), allow_nan=False))  # noqa: E731
    targets = [read(s.answer) if s.target is None else json.loads(json.dumps(s.target)) for s in samples]
    return [task.measure(read(answer), target, options) for answer, target in zip(answers, targets, strict=True)]


@every("tasks")
def test_a_task_asks_the_same_of_a_row_without_its_answer(name, tmp_path):
    task, options, samples, rows = task_samples(name, tmp_path)
    for sample, row in zip(samples, rows, strict=True):
        answered = task.stand_in(row, options)
        if name == "chat":
            unanswered = Row(row.path, row.number, {"messages": row.columns["messages"][:-1]}, tmp_path)
        else:
            columns = {key: value for key, value in row.columns.items() if key not in answered}
            unanswered = Row(row.path, row.number, columns, tmp_path)
        asked = question_of(unanswered, TaskPart(name, options))
        assert asked.question == sample.question and asked.media == sample.media


@every("tasks")
def test_a_task_reads_rows(name, tmp_path):
    task, options, samples, rows = task_samples(name, tmp_path)
    for sample, row in zip(samples, rows, strict=True):
        assert isinstance(sample, Sample) and sample.answer
        assert sample.media == tuple(Medium(kind, tmp_path / "a.png") for kind in options.media)
        assert sample.messages[-1].role == "assistant" and sample.where == row.where and sample.task == name
    assert issubclass(task.Options, TaskOptions)
    assert task.HEADS and {*task.HEADS} <= {*part_names("heads")}
    with pytest.raises(DataError, match=r"rows.csv:2"):
        task.sample(Row(tmp_path / "rows.csv", 2, {}, tmp_path), options)


@every("tasks")
def test_right_answers_score_best_and_garbage_worst(name, tmp_path):
    task, options, samples, _ = task_samples(name, tmp_path)
    right = task.score(measured(task, options, samples, [f" {sample.answer}\n" for sample in samples]), options)
    assert right[task.PRIMARY] == pytest.approx(0.0 if "error" in task.PRIMARY else BEST.get(task.PRIMARY, 1.0))
    for answers in (["", ""], ["zzz", "{[((,;"], ["[1, 2", '{"a": NaN}'], [samples[1].answer, samples[0].answer]):
        rows = measured(task, options, samples, answers)
        wrong = task.score(rows, options)
        assert wrong.keys() == right.keys()
        for metric in right:
            sign = -1 if "error" in metric else 1
            assert math.isfinite(wrong[metric]) and isinstance(wrong[metric], float)
            assert sign * wrong[metric] <= sign * right[metric], metric
        assert (right[task.PRIMARY] > wrong[task.PRIMARY]) != ("error" in task.PRIMARY)
        assert all(isinstance(row["good"], float) for row in rows)


@every("tasks")
def test_scores_of_a_single_row_and_of_the_same_twice(name, tmp_path):
    task, options, samples, _ = task_samples(name, tmp_path)
    for rows in (measured(task, options, samples[:1], [samples[0].answer]), measured(task, options, samples[:1], [""])):
        for drawn in (rows, rows * 3):
            scores = task.score(drawn, options)
            assert task.PRIMARY in scores and all(math.isfinite(value) for value in scores.values())
            json.dumps(getattr(task, "tables", lambda *_: {})(drawn, options), allow_nan=False)


@every("tasks")
def test_answers_of_heads_are_read(name, tmp_path):
    task, options, samples, _ = task_samples(name, tmp_path)
    target = task.read(Answer(samples[0].answer), options) if samples[0].target is None else samples[0].target
    answers = {"score": Answer("0.7", number=0.7), "label": Answer("b", probabilities={"a": 0.2, "b": 0.8})}
    for head in {*task.HEADS} - {"language"}:
        row = task.measure(json.loads(json.dumps(task.read(answers[head], options))), target, options)
        assert math.isfinite(row["good"]) and task.score([row], options)


@every("formats")
def test_a_format_has_an_example_and_recognises_nothing_that_isnt_there(name, tmp_path):
    part = load_part("formats", name)
    assert name in {kind for kind, _ in EXAMPLES.values()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("red")
    assert not part.detects(tmp_path / "empty") and not part.detects(tmp_path / "notes.txt")


@every("encoders")
def test_an_encoder_has_what_the_rest_asks_of_it(name):
    part = load_part("encoders", name)
    assert part.MEDIUM in DECODERS and callable(part.build) and callable(part.restore)
    for kind in [kind for kind, (its, _) in KINDS.items() if its == name] or pytest.fail(
        f"tiny_encoders has no {name}"
    ):
        encoder = tiny_encoder_of(kind)
        assert isinstance(encoder, Encoder) and type(encoder).__module__ == part.__name__
        prepared = encoder.prepare(tiny_medium(kind))
        assert prepared.values.dtype == torch.float32 and prepared.values.device.type == "cpu"
        features = encoder.encode(prepared.values[None])
        assert features.shape == (1, len(prepared.layout.marks), prepared.layout.rows, encoder.width)
        assert encoder.layout in (None, prepared.layout)
        assert len(encoder.fingerprint) == 64 and json.dumps(encoder.settings()) and json.dumps(encoder.sampling)
