"""The card says what the run's files say, and nothing of the machine that it was written on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from certificate_files import certificate_content
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from trained_runs import change_json, copy_of, predictions_of, write_predictions

from finetune.common.certificate import Certificate
from finetune.evaluation.report.content import read_content
from finetune.model.bindings import TaskBinding
from finetune.model.heads import HeadSettings
from finetune.publishing import card
from finetune.publishing.parts import Base, Publication
from finetune.publishing.staging import cleaned, public_names
from finetune.recipe.load import Recipe
from finetune.recipe.parts import HeadPart, TaskPart

OPTIONS = {"languages": ["zh"], "datasets": ["org/rows"], "limits": "Drawn pictures only.", "licenses": {}}


def binding_of(task="classify", head="language", **settings) -> TaskBinding:
    return TaskBinding(task=TaskPart.of(task), head=HeadPart.of(head), settings=HeadSettings(**settings))


@pytest.fixture
def written(finished_run, tmp_path):
    """written(...) -> (folder of the card, run)."""
    finished = finished_run("plain")
    project = finished.parent
    bases = [
        Base("llm", str(project / "llm"), "org/llm", "c" * 40, "apache-2.0"),
        Base("encoders.image", str(project / "encoder"), "org/encoder", None, "mit"),
    ]

    def write(binding=None, merged=False, change=None, **options):
        run = copy_of(finished, tmp_path / str(len(list(tmp_path.iterdir()))), "checkpoints")
        predictions = predictions_of(run)
        predictions[0] |= change or {}
        write_predictions(run, predictions)
        change_json(
            run / "metrics.json",
            energy_joules={"train_cpu": 15432.1},
            peak_memory_bytes={"train_cpu": 1395864371},
        )
        content = read_content(run)
        recipe = content.recipe.model_dump(mode="json")
        recipe["publish"] |= OPTIONS | options
        recipe = Recipe.without_files(cleaned(recipe, public_names(bases)))
        bindings = {"classify": binding} if binding else content.bindings
        content = replace(
            content, recipe=recipe, bindings=bindings, certificate=content.certificate if merged else None
        )
        folder = run.parent / "card"
        folder.mkdir()
        card.write_card(folder, Publication("me/emoji", merged, recipe, content, bases, {"test.csv": "ofl-1.1"}))
        return folder, run

    return write


def test_its_metadata_are_the_runs(written):
    folder, run = written()
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == ["org/llm", "org/encoder"] and data.base_model_relation == "adapter"
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["zh"], ["org/rows"])
    assert (data.library_name, data.pipeline_tag) == ("finetune", "image-text-to-text")
    scores = json.loads((run / "metrics.json").read_text())["scores"]["classify"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        metric: values["tuned"] for metric, values in scores.items()
    }


def test_its_tables_have_the_scores_under_every_condition(written):
    folder, run = written()
    text = (folder / "README.md").read_text()
    for values in json.loads((run / "metrics.json").read_text())["scores"]["classify"].values():
        for condition, value in values.items():
            assert value is None or f"{value:.3f}" in text, condition
    torch = json.loads((run / "versions.json").read_text())["torch"]
    for part in ("Drawn pictures only.", "test.csv: ofl-1.1", "GiB", "Wh", f"torch {torch}", "align", "0.005", "blank"):
        assert part in text, part
    assert str(run.parent) not in text and str(Path(*run.parts[:3])) not in text and "nan" not in text.lower().split()


def test_samples_are_right_and_wrong_ones_with_their_pictures(written):
    from PIL import Image

    folder, _ = written(samples=4)
    text = (folder / "README.md").read_text()
    named = re.findall(r"!\[image\]\((samples/[^)]+)\)", text)
    assert len(named) == 4 and text.count("✓") == 2 and text.count("✗") == 2
    for name in named:
        with Image.open(folder / name) as picture:
            assert max(picture.size) <= 240
    folder, _ = written(samples=0)
    assert "## Predictions" not in (folder / "README.md").read_text() and not (folder / "samples").exists()


def test_what_rows_hold_cannot_become_markup(written):
    evil = {"question": "a | b\n# c <script>alert(1)</script> `x`", "good": 0.0, "tuned": "](http://x)|<b>"}
    folder, _ = written(change=evil, samples=40)
    text = (folder / "README.md").read_text().partition("\n---\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in html and "<b>" not in html and html.count("<h1>") == 1
    predictions = html.partition("<h2>Predictions</h2>")[2].partition("</table>")[0]
    assert all(row.count("<td") in (0, 6) for row in predictions.split("</tr>"))


@pytest.mark.parametrize(
    ("head", "settings", "verb", "tag"),
    [
        ("language", {}, "answer", "image-text-to-text"),
        ("label", {"labels": ("a", "b")}, "probabilities", "image-classification"),
        ("score", {"mean": 0.0, "deviation": 1.0}, "number", "image-text-to-text"),
    ],
)
def test_the_snippet_asks_as_the_model_was_trained(head, settings, verb, tag, written):
    folder, _ = written(binding_of(head=head, **settings))
    text = (folder / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(snippet, "card", "exec")
    assert 'finetune.load("me/emoji")' in snippet and f"model.{verb}('What is this?'" in snippet
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == tag


@pytest.mark.parametrize(
    ("media", "kind", "tag"),
    [
        (["audio"], "transcribe", "automatic-speech-recognition"),
        (["audio"], "answer", "audio-text-to-text"),
        (["video"], "answer", "video-text-to-text"),
        (["image", "audio"], "answer", "any-to-any"),
        ([], "answer", "text-generation"),
    ],
)
def test_the_hub_s_tag_is_what_the_model_does(media, kind, tag):
    assert card.pipeline_tag(media, [binding_of(kind)]) == tag


def test_the_certificate_is_a_paragraph_and_a_table():
    text = card.merge_text(Certificate.model_validate(certificate_content()))
    lines = text.splitlines()
    assert lines[0].startswith("Merged into the dequantized nf4 LLM: it is closer. Compared with the adapter over")
    assert {line.count("|") for line in lines[2:]} == {7} and len(lines) == 8
    assert "mood.f1" in lines[2] and "words" not in text
    assert "| merged into the dequantized nf4 LLM (kept) | 0.002 | 99.0% | 0.3 | 1.5 | 0.750 |" in lines


def test_a_merged_model_shows_what_the_merge_proved(written):
    folder, run = written(merged=True)
    text = (folder / "README.md").read_text()
    saved = json.loads((run / "certificate.json").read_text())["candidates"]["the 16-bit LLM"]
    assert "## Merge certificate" in text
    assert f"| merged into the 16-bit LLM (kept) | {saved['kl']:.2g} | {saved['agreement']:.1%} |" in text
    assert ModelCard.load(folder / "README.md").data.base_model_relation == "merge"
