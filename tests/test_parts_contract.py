"""What the `__init__` of each folder of parts promises, over every file there is."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from tiny import tiny_llm, tiny_picture
from tiny_encoders import KINDS, tiny_encoder_of, tiny_medium

from finetune.data.sample import Medium, Row, Sample
from finetune.errors import DataError, ModelError
from finetune.fusion import Projected
from finetune.media import DECODERS
from finetune.parts import PartOptions, load_part, part_names

OPTIONS = {"encoders": {"name": "some/name"}}


def every(folder: str):
    return pytest.mark.parametrize("name", part_names(folder))


@pytest.mark.parametrize(
    "folder, name", [(f, n) for f in ("encoders", "projectors", "fusion", "tasks") for n in part_names(f)]
)
def test_options_are_strict_and_survive_json(folder, name):
    part = load_part(folder, name)
    assert issubclass(part.Options, PartOptions) and issubclass(part.Options, BaseModel)
    options = part.Options(**OPTIONS.get(folder, {}))
    assert part.Options(**json.loads(options.model_dump_json())) == options
    with pytest.raises(ValueError, match="extra"):
        part.Options(**OPTIONS.get(folder, {}), no_such_option=1)
    assert part.__doc__


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
    try:
        expected = part.length(rows, part.Options())
    except ModelError as error:
        assert name in str(error) and str(rows) in str(error)
    else:
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
    module.forget()


@every("tasks")
def test_a_task_reads_rows_and_scores_right_answers_best(name, tmp_path):
    task = load_part("tasks", name)
    options = task.Options()
    tiny_picture().save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    columns = {
        "image": "a.png",
        "audio": "a.png",
        "question": "What?",
        "answer": "red",
        "text": "red",
        "label": "red",
        "caption": "red",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}],
    }
    sample = task.sample(Row(tmp_path / "rows.csv", 2, columns, tmp_path), options)
    assert isinstance(sample, Sample)
    (kind,) = task.media(options)
    assert sample.media == (Medium(kind, tmp_path / "a.png"),) and sample.answer == "red"
    assert {medium.kind for medium in sample.media} <= set(task.media(options))
    assert sample.messages[-1].role == "assistant" and sample.where == "rows.csv:2" and sample.task == name
    targets = ["red", "blue", "red", "green"]
    right = task.score([task.read(f" {target}\n", options) for target in targets], targets, options)
    wrong = task.score(["no"] * 4, targets, options)
    assert right[task.PRIMARY] == 1.0 and wrong[task.PRIMARY] == 0.0 and right.keys() == wrong.keys()
    assert all(isinstance(value, float) and value >= 0 for value in (right | wrong).values())
    for metric in right:
        assert right[metric] == (0.0 if "error" in metric else 1.0), metric
    with pytest.raises(DataError, match=r"rows.csv:2"):
        task.sample(Row(tmp_path / "rows.csv", 2, {}, tmp_path), options)


@every("data.formats")
def test_a_format_detects_paths_without_opening_them(name):
    part = load_part("data.formats", name)
    suffixes = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", "")
    mine = [suffix for suffix in suffixes if part.detects(Path(f"/no/such/rows{suffix}"))]
    assert mine
    others = [load_part("data.formats", other) for other in part_names("data.formats") if other != name]
    assert not any(other.detects(Path(f"rows{suffix}")) for other in others for suffix in mine)


@every("encoders")
def test_an_encoder_has_what_the_rest_asks_of_it(name):
    part = load_part("encoders", name)
    assert part.MEDIUM in DECODERS and callable(part.build) and callable(part.restore)
    for kind in [kind for kind, (its, _) in KINDS.items() if its == name] or pytest.fail(
        f"tiny_encoders has no {name}"
    ):
        encoder = tiny_encoder_of(kind)
        prepared = encoder.prepare(tiny_medium(kind))
        assert prepared.values.dtype == torch.float32 and prepared.values.device.type == "cpu"
        features = encoder.encode(prepared.values[None])
        assert features.shape == (1, len(prepared.layout.marks), prepared.layout.rows, encoder.width)
        assert encoder.layout in (None, prepared.layout)
        assert len(encoder.fingerprint) == 64 and json.dumps(encoder.settings()) and json.dumps(encoder.sampling)
