from pathlib import Path

import pytest
from recipe_texts import change, mentions, refused

from finetune.recipe.load import load_recipe

LORA = "tune_encoders={image: {rank: 4}}"


def test_an_encoder_without_projector_is_refused(folder):
    text = change("    image:\n      kind: mlp\n      hidden: 64\n", "    {}\n").replace("projectors]", "adapter]")
    text = text.replace("[projectors, adapter]", "[adapter]")
    place = "x.yaml:8: model.encoders.image: "
    assert any(line.startswith(place) and "model.projectors.image" in line for line in refused(text).splitlines())


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["model.fusion=cross_attention"], "train.stages.0.trains", "'cross_attention'|'fusion'"),
        ([LORA], "train.cache", "tune_encoders|train.cache: false"),
        (["tune_encoders={audio: {rank: 4}}", "train.cache=false"], "tune_encoders.audio", "no encoder"),
        (["tune_encoders={image: {}}", "train.cache=false"], "tune_encoders.image", "last_layers|rank"),
        (
            ["tune_encoders={image: {rank: 4, last_layers: 1}}", "train.cache=false"],
            "tune_encoders.image",
            "either|last_layers|rank",
        ),
        ([LORA, "train.cache=false"], "tune_encoders.image", "no stage|'encoders.image'"),
        (["train.stages.1.trains=[encoders.image]"], "train.stages.1.trains.0", "'encoders.image'|tune_encoders"),
        (["train.stages.1.trains=[fusion]"], "train.stages.1.trains.0", "'fusion'|projectors, projectors.image"),
        (
            ["train.stages.0.learning_rates={adapter: 0.1}"],
            "train.stages.0.learning_rates.adapter",
            "doesn't train|projectors",
        ),
        (
            ["train.stages.0.learning_rates={projectors: 0}"],
            "train.stages.0.learning_rates.projectors",
            "0|number|above 0",
        ),
        (["train.stages.0.sources=[1]"], "train.stages.0.sources.0", "1|training sources|0"),
        (["data.0.name=Two words"], "data.0.name", "'Two words'"),
        (["media.max_seconds=0"], "media.max_seconds", "above 0"),
        (
            ["model.encoders.image={kind: whisper, name: some/whisper}"],
            "model.encoders.image",
            "'whisper'|'audio'|encoders.audio",
        ),
    ],
)
def test_what_cannot_work_together_is_refused_by_its_key(folder, overrides, key, words):
    lines = [line for line in refused(overrides=overrides).splitlines() if f" {key}: " in line]
    assert any(mentions(line.partition(f" {key}: ")[2], words) for line in lines), refused(overrides=overrides)


def test_an_adapter_that_is_null_cannot_be_trained(folder):
    message = refused(change("adapter:\n  rank: 16\n  alpha: 32\n", "adapter: null\n"))
    assert message.startswith("x.yaml:25: train.stages.1.trains.1: ")
    assert mentions(message, "'adapter'|adapter is null")


def test_without_an_evaluate_section_missing_rows_to_evaluate_are_reported_at_data(folder):
    text = change("evaluate:\n  split: test\n", "").replace("    hold_out: 0.1\n", "")
    message = refused(text)
    assert message.startswith("x.yaml:16: data: ")
    assert mentions(message, "evaluate|split: test|hold_out")


def test_the_same_rows_in_two_splits_are_refused_however_the_path_is_written(folder):
    (folder / "link.csv").symlink_to("data/products.csv")
    for path in ("data/products.csv", "./data/../data/products.csv", "link.csv", folder / "data/products.csv"):
        message = refused(change("train:\n", f"  - {{path: {path}, task: caption, split: test}}\ntrain:\n"))
        assert message.startswith("x.yaml:20: data.1.path: ")
        assert mentions(message, "data.0|split train|test")


def test_the_same_rows_with_another_share_held_out_are_refused(folder):
    message = refused(change("train:\n", "  - {path: data/products.csv, task: chat, hold_out: 0.2}\ntrain:\n"))
    assert message.startswith("x.yaml:20: data.1.path: ")
    assert mentions(message, "data.0|hold_out 0.1")
    text = change("train:\n", "  - {path: data/products.csv, task: chat, hold_out: 0.1}\ntrain:\n")
    Path("x.yaml").write_text(text)
    load_recipe("x.yaml")


def test_other_splits_of_a_dataset_are_other_rows(folder):
    other = "  - {path: me/mine, format: {kind: hub, split: %s}, task: caption, split: test}\ntrain:\n"
    text = change("path: data/products.csv", "path: me/mine\n    format: {kind: hub, split: train}")
    Path("x.yaml").write_text(text.replace("train:\n", other % "validation", 1))
    assert len(load_recipe("x.yaml").data) == 2
    assert mentions(refused(text.replace("train:\n", other % "train", 1)), "data.0|split train")
    message = refused(
        change("train:\n", "  - {path: data/products.csv, task: caption, format: table, split: test}\ntrain:\n")
    )
    assert mentions(message, "data.0|split train")


def test_a_test_source_is_enough_to_evaluate(folder):
    text = change("hold_out: 0.1", "weight: 2").replace(
        "train:\n", "  - {path: data/more.csv, task: caption, split: test}\ntrain:\n", 1
    )
    Path("x.yaml").write_text(text)
    assert [source.split for source in load_recipe("x.yaml").data] == ["train", "test"]


def test_remote_code_with_a_commit_is_accepted(folder):
    commit = "0123456789abcdef" * 2 + "01234567"
    load_recipe("x.yaml", ["model.llm.trust_remote_code=true", f"model.llm.revision={commit}"])
    assert "40 hex" in refused(overrides=["model.llm.trust_remote_code=true", "model.llm.revision=main"])


def test_a_task_whose_media_no_encoder_takes_is_refused(folder, odd_parts):
    message = refused(change("task: caption", "task: listen"))
    assert message.startswith("x.yaml:18: data.0.task: ")
    assert mentions(message, "'listen'|encoder|'audio'|image")
