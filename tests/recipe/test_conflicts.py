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


def assert_conflicts(messages, overrides=(), text=None) -> None:
    """These and no others, each "key: message", whether the key is in the file or an option's."""
    lines = refused(text, overrides).splitlines()
    assert len(lines) == len(messages), lines
    assert all(line.endswith(f" {message}") for line, message in zip(lines, messages, strict=True)), lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.llm.trust_remote_code=true"],
            "model.llm.trust_remote_code: needs model.llm.revision to be a commit of 40 hex digits; it is null.",
        ),
        (
            ["model.projectors={image: mlp, audio: mlp}"],
            "model.projectors.audio: no encoder has this name. Add model.encoders.audio.",
        ),
        (
            ["model.projectors={imaeg: mlp}", "train.stages.0.trains=[adapter]", "train.stages.1.trains=[adapter]"],
            "model.projectors.imaeg: no encoder has this name. Did you mean 'image'?",
        ),
        (
            ["model.projectors={}", "train.stages.0.trains=[adapter]", "train.stages.1.trains=[adapter]"],
            "model.encoders.image: has no projector: add model.projectors.image.",
        ),
        (
            ["data.0.task=transcribe"],
            "data.0.task: 'transcribe' needs an encoder for 'audio'; encoders: image. If its rows hold image, write "
            "{kind: transcribe, media: [image]}.",
        ),
        (
            ["data.0.split=validation", "evaluate.split=validation"],
            "data: no source has split train: there is nothing to train on.",
        ),
        (
            ["data.0.hold_out=0"],
            "evaluate.split: no rows to evaluate on: add a source with split: test, or hold_out: 0.1 to one.",
        ),
        (
            ["train.validation={}"],
            "train.validation: no validation rows: add a source with split: validation, or hold_out_validation: 0.1 "
            "to one.",
        ),
        (
            ["data.0.hold_out_validation=0.1", "train.validation={metric: words.f1}"],
            "train.validation.metric: got 'words.f1'; its first part is one of caption.",
        ),
        (
            ["tune_encoders={image: {rank: 4}}", "train.stages.1.trains=[encoders.image]"],
            "train.cache: stores features of frozen encoders, but tune_encoders trains one: set train.cache: false.",
        ),
        (
            ["tune_encoders={audio: {rank: 4}}", "train.cache=false"],
            "tune_encoders.audio: no encoder has this name.",
        ),
        *(
            (
                [f"tune_encoders={{image: {tuning}}}", "train.cache=false"],
                "tune_encoders.image: write either last_layers, or rank for LoRA.",
            )
            for tuning in ("{}", "{rank: 4, last_layers: 1}")
        ),
        (
            ["tune_encoders={image: {last_layers: 1}}", "train.cache=false"],
            "tune_encoders.image: no stage trains it: add 'encoders.image' to the trains of one.",
        ),
        (
            ["train.stages.1.name=align"],
            "train.stages.1.name: 'align' is train.stages.0 already: give each its own name.",
        ),
        (
            ["train.stages.1.sources=[0, 3]"],
            "train.stages.1.sources.1: got 3; write numbers of training sources: 0.",
        ),
        (
            ["train.stages.1.trains=[projectors, projectors]"],
            "train.stages.1.trains.1: 'projectors' is written twice.",
        ),
        (
            ["train.stages.1.trains=[projectors, projectors.image]"],
            "train.stages.1.trains.1: 'projectors.image' is one of projectors, which is written too: keep one.",
        ),
        (
            ["train.stages.1.trains=[projector]"],
            "train.stages.1.trains.0: got 'projector'; write one of projectors, projectors.image, adapter. Did you "
            "mean 'projectors'?",
        ),
        (
            ["train.stages.1.trains=[qqq]"],
            "train.stages.1.trains.0: got 'qqq'; write one of projectors, projectors.image, adapter.",
        ),
        (
            ["train.stages.1.trains=[encoders]"],
            "train.stages.1.trains.0: got 'encoders'; write one of projectors, projectors.image, adapter. Encoders to "
            "train are listed in tune_encoders.",
        ),
        (
            ["train.stages.0.learning_rates={adapter: 0.1}"],
            "train.stages.0.learning_rates.adapter: this stage doesn't train it; it trains projectors.",
        ),
        (
            ["train.stages.1.learning_rates={projectors.image: -0.5}"],
            "train.stages.1.learning_rates.projectors.image: got -0.5; write a number above 0.",
        ),
        (
            ["model.fusion=cross_attention"],
            "train.stages.0.trains: the fusion 'cross_attention' starts closed, so nothing else gets a gradient: add "
            "'fusion'.",
        ),
    ],
)
def test_a_conflict_is_told_once_with_its_way_out(folder, overrides, message):
    assert_conflicts([message], overrides)


def test_what_a_stage_may_train_follows_from_the_recipe(folder):
    overrides = ["train.cache=false", "model.fusion=cross_attention", "train.stages.0.trains=[fusion]"]
    overrides += ["tune_encoders={image: {rank: 4}}", "data.0.task=classify"]
    stage = "train.stages.1.trains=[encoders, adapter, fusion, projectors.image, heads]"
    recipe = load_recipe("x.yaml", [*overrides, "data.0.head=label", stage])
    assert len(recipe.train.stages[1].trains) == 5
    names = "projectors, projectors.image, fusion, adapter, heads, encoders, encoders.image"
    assert names in refused(overrides=[*overrides, "data.0.head=label", "train.stages.1.trains=[qqq, encoders, heads]"])


def test_a_null_adapter_is_no_choice(folder):
    names = "write one of projectors, projectors.image."
    assert names in refused(overrides=["adapter=null", "train.stages.1.trains=[qqq]"])


def test_the_metric_of_validation_is_a_tasks_or_the_mean(folder):
    for metric in ("caption.bleu", "mean"):
        load_recipe("x.yaml", ["data.0.hold_out_validation=0.1", f"train.validation={{metric: {metric}}}"])


def test_rates_of_a_group_and_of_one_of_it_are_taken(folder):
    rates = "train.stages.1.learning_rates={projectors.image: 1e-3, adapter: 1e-4}"
    recipe = load_recipe("x.yaml", [rates, "train.stages.0.learning_rates={projectors: 1e-3}"])
    assert recipe.train.stages[1].learning_rates == {"projectors.image": 1e-3, "adapter": 1e-4}


SOURCE = "  - {path: data/more.csv, task: %s%s}\ntrain:\n"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "classify\n    name: mood",
            "classify, name: tone",
            "data.0.name: data.1 has the same task 'classify' and is called 'tone': use one name.",
        ),
        (
            "classify",
            "classify, head: label",
            "data.1.head: data.0 has the same task with another head ('language'): make both equal.",
        ),
        (
            "caption",
            "caption, head: label",
            "data.1.head: 'label' can't answer the task 'caption': write language.",
        ),
    ],
)
def test_sources_of_one_task_agree(folder, first, second, message):
    text = change("task: caption", f"task: {first}").replace("train:\n", SOURCE % (second, ""), 1)
    assert_conflicts([message], text=text)


def test_a_head_with_weights_needs_rows_and_a_stage_that_trains_it(folder):
    head = ["data.0.task=classify", "data.0.head=label"]
    assert_conflicts(["data.0.head: 'label' has weights that no stage trains: add 'heads' to one."], head)
    load_recipe("x.yaml", [*head, "train.stages.1.trains=[heads]"])
    text = change("train:\n", SOURCE % ("classify, head: label", ", split: test"))
    expected = "data.1.head: no training rows have this task: there is nothing to learn its answers from."
    assert_conflicts([expected], text=text)


def test_test_rows_with_another_option_of_the_task_are_told_which(folder):
    data = "[{path: data/products.csv, task: {kind: rank, k: 2}, head: score}, "
    data += "{path: data/products.csv, task: rank, head: score, split: test}]"
    message = refused((folder / "x.yaml").read_text(), [f"data={data}", "train.stages.1.trains=[heads]"])
    assert "data.0 has the task with other options (k: 2 there, 10 here): make them equal." in message


def test_pairs_are_of_a_group(folder):
    head = "data.0.head={kind: score, loss: pairwise}"
    message = "data.0.head: pairwise compares rows of a group, and 'score' has none: use the task 'rank'."
    assert_conflicts([message], ["data.0.task=score", head])
    load_recipe("x.yaml", ["data.0.task=rank", head, "train.stages.1.trains=[heads]"])


def test_held_out_shares_of_the_same_rows_agree(folder):
    text = change("train:\n", "  - {path: data/products.csv, task: chat, hold_out: 0.2, group: shop}\ntrain:\n")
    held_out = "data.1.path: also data.0, with hold_out 0.1: make both equal, or held-out rows leak."
    grouped = "data.1.path: also data.0, with group None: make both equal, or held-out rows leak."
    assert_conflicts([held_out, grouped], text=text)
    text = change("train:\n", "  - {path: data/products.csv, task: chat, split: test}\ntrain:\n")
    expected = "data.1.path: also data.0, with split train; the same rows can't be in test too."
    assert_conflicts([expected], text=text)


def test_a_stage_that_distills_names_the_texts_and_trains_no_heads(folder):
    distills = ["train.stages.1.objective=distill", "data.0.task=classify"]
    texts = "data.0.task.transcript: stage 'tune' distills: name the column of the captions or transcripts."
    assert_conflicts([texts], distills)
    load_recipe("x.yaml", [*distills, "data.0.task.transcript=caption"])
    heads = ["data.0.head=label", "train.stages.1.trains=[adapter, heads]", "data.0.task.transcript=caption"]
    language = (
        "data.0.head: stage 'tune' has the objective 'distill', which needs the head 'language': write its sources."
    )
    trains = "train.stages.1.trains: the objective 'distill' is for the LLM alone: heads learn nothing."
    assert_conflicts([language, trains], [*distills, *heads])
