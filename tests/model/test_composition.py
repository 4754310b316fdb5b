"""What a model is made of survives JSON: in the config of a merged folder, and in the manifest of an adapter folder."""

import json

import pytest
import torch
from saved_adapter import saved_adapter
from tiny import FUSIONS, PLACEHOLDER, part, tiny_llm
from tiny_encoders import KINDS, tiny_encoder_of, tiny_medium

from finetune.common.registry import load_part, part_names
from finetune.data.sample import Layout
from finetune.model.bindings import TaskBinding
from finetune.model.compose import compose
from finetune.model.composite import MultimodalConfig, MultimodalModel
from finetune.model.composition import Composition, Placement, SavedEncoder, SavedProjector
from finetune.model.heads import HeadSettings
from finetune.model.manifest import MANIFEST, AdapterManifest
from finetune.recipe.schema import Limits

SETTINGS = {
    "label": HeadSettings(labels=("a", "b"), several=True, weights=(0.5, 2.0)),
    "score": HeadSettings(mean=0.25, deviation=3.0),
    "language": HeadSettings(),
}
ANSWERS = [(task, head) for task in part_names("tasks") for head in load_part("tasks", task).HEADS]
BINDINGS = {
    f"{task}-{head}": TaskBinding(task=part("tasks", task), head=part("heads", head), settings=SETTINGS[head])
    for task, head in ANSWERS
}
LABELS = {"image": "siglip", "audio": "wav2vec2", "video": "siglip_frames"}


@pytest.mark.parametrize("name", BINDINGS)
def test_a_task_binding_survives_json(name):
    binding = BINDINGS[name]
    written = json.loads(binding.model_dump_json())
    assert TaskBinding.model_validate(written) == binding
    assert written["task"]["kind"] == binding.task.kind and written["head"]["kind"] == binding.head.kind


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_composition_with_every_part_survives_the_config_s_json(fusion):
    encoders = {
        label: SavedEncoder(kind=KINDS[label][0], settings=tiny_encoder_of(label).settings()) for label in KINDS
    }
    projectors = {name: SavedProjector(part=part("projectors", name), width_in=7) for name in part_names("projectors")}
    composition = Composition(
        encoders=encoders,
        projectors=projectors,
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholders={name: number for number, name in enumerate(projectors, 100)},
        bindings=BINDINGS,
        media=Limits(max_pixels=5, max_seconds=0.5),
    )
    assert {encoder.kind for encoder in composition.encoders.values()} == {*part_names("encoders")}
    config = MultimodalConfig(text_config=tiny_llm().config, parts=composition.model_dump(mode="json"))
    again = MultimodalConfig.from_dict(json.loads(config.to_json_string()))
    assert Composition.model_validate(again.parts) == composition


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_saved_model_has_the_composition_that_it_was_composed_of(fusion, tmp_path):
    encoders = {medium: tiny_encoder_of(label) for medium, label in LABELS.items()}
    projectors = {"image": part("projectors", "mlp", hidden=8), "audio": part("projectors", "stack", factor=3)}
    projectors["video"] = part("projectors", "resampler", queries=3, width=16, heads=2)
    options = FUSIONS[fusion] | ({"strength": {"video": 0.5}} if fusion == "cross_attention" else {})
    placeholder_ids = {medium: PLACEHOLDER + number for number, medium in enumerate(LABELS)}
    model = compose(
        tiny_llm(),
        encoders=encoders,
        projectors=projectors,
        fusion=part("fusion", fusion, **options),
        placeholder_ids=placeholder_ids,
        bindings=BINDINGS,
    )
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert again.composition == model.composition and again.bindings == BINDINGS
    assert {name: saved.part for name, saved in again.composition.projectors.items()} == projectors
    assert {name: saved.width_in for name, saved in again.composition.projectors.items()} == {
        name: encoder.width for name, encoder in encoders.items()
    }
    assert again.composition.fusion == part("fusion", fusion, **options)
    assert again.composition.placeholders == placeholder_ids
    assert again.fusion.strength == model.fusion.strength
    for medium, label in LABELS.items():
        layout = encoders[medium].prepare(tiny_medium(label)).layout
        planned = Placement(projectors, part("fusion", fusion, **options)).segments(medium, layout)
        assert again.composition.placement.segments(medium, layout) == planned
        rows = torch.zeros(1, layout.rows, encoders[medium].width)
        _, (length,) = again.project(medium, [rows])
        assert planned[0].tokens == again.composition.fusion.placeholders(length)


def test_segments_have_the_marks_of_their_layout_and_equal_counts():
    placement = Placement({"video": part("projectors", "stack", factor=4)}, part("fusion", "prefix"))
    assert placement.segments("video", Layout(9, ("0.0s ", "0.5s "))) == [("0.0s ", 3), ("0.5s ", 3)]
    one_each = Placement(placement.projectors, part("fusion", "cross_attention"))
    assert one_each.segments("video", Layout(9, ("0.0s ", "0.5s "))) == [("0.0s ", 1), ("0.5s ", 1)]


def test_a_manifest_survives_json(tmp_path):
    folder = saved_adapter(tmp_path)
    manifest = AdapterManifest.read(folder)
    written = json.loads((folder / MANIFEST).read_text())
    written["model"]["base"] = written["media"]["shrink_to_pixels"] = None  # keys that came later
    assert manifest.model_dump(mode="json") == written
    assert manifest.bindings["classify"].settings.labels == ("blue", "green", "red", "yellow")
