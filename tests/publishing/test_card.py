"""The card says what the run's files say, and nothing of the machine that it was written on."""

import json
import re
from dataclasses import replace

import pytest
from finished_run import predictions_of, recipe_of, source_of, write_run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from finetune.evaluation.report.content import SavedBinding, read_content
from finetune.publishing import card
from finetune.publishing.parts import Base, Publication
from finetune.publishing.staging import cleaned, public_names
from finetune.recipe.schema import Recipe

OPTIONS = {"languages": ["zh"], "datasets": ["org/rows"], "limits": "Drawn pictures only."}
BASES = [
    Base("llm", "/home/someone/weights/minimind2-small", "org/minimind2", "c" * 40, "apache-2.0"),
    Base("encoders.image", "org/mobilenet-v2", "org/mobilenet-v2", None, "mit"),
]


def binding_of(task="classify", head="language", settings=None) -> SavedBinding:
    content = {"task": {"kind": task}, "head": {"kind": head}, "settings": settings or {}}
    return SavedBinding.model_validate(content)


def written(tmp_path, binding=None, merged=False, change=None, **options):
    rows = predictions_of("classify", "emoji", "image", "label", 3)
    for row in change or ():
        rows[0] |= row
    run = write_run(tmp_path / "run", recipe_of(source_of()) | {"publish": OPTIONS | options}, rows)
    content = read_content(run)
    recipe = content.recipe.model_dump(mode="json")
    recipe = Recipe.model_validate(cleaned(recipe, public_names(BASES) | {source_of()["path"]: "test.csv"}))
    certificate = content.certificate if merged else None
    content = replace(content, recipe=recipe, bindings={"classify": binding or binding_of()}, certificate=certificate)
    folder = tmp_path / "card"
    folder.mkdir()
    card.write_card(folder, Publication("me/emoji", merged, recipe, content, BASES, {"test.csv": "ofl-1.1"}))
    return folder, run


def test_its_metadata_are_the_runs(tmp_path):
    folder, run = written(tmp_path)
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == ["org/minimind2", "org/mobilenet-v2"] and data.base_model_relation == "adapter"
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["zh"], ["org/rows"])
    assert (data.library_name, data.pipeline_tag) == ("finetune", "image-text-to-text")
    scores = json.loads((run / "metrics.json").read_text())["scores"]["classify"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        metric: values["tuned"] for metric, values in scores.items()
    }


def test_its_tables_have_the_scores_under_every_condition(tmp_path):
    folder, run = written(tmp_path)
    text = (folder / "README.md").read_text()
    for values in json.loads((run / "metrics.json").read_text())["scores"]["classify"].values():
        for condition, value in values.items():
            assert value is None or f"{value:.3f}" in text, condition
    for part in ("Drawn pictures only.", "test.csv: ofl-1.1", "GiB", "Wh", "torch 2.13.0", "align", "0.0004", "blank"):
        assert part in text, part
    assert "/home" not in text and "someone" not in text and "nan" not in text.lower().split()


def test_samples_are_right_and_wrong_ones_with_their_pictures(tmp_path):
    from PIL import Image

    folder, _ = written(tmp_path, samples=6)
    text = (folder / "README.md").read_text()
    named = re.findall(r"!\[image\]\((samples/[^)]+)\)", text)
    assert len(named) == 6 and text.count("✓") == 3 and text.count("✗") == 3
    for name in named:
        with Image.open(folder / name) as picture:
            assert max(picture.size) <= 160
    folder, _ = written(tmp_path / "none", samples=0)
    assert "## Predictions" not in (folder / "README.md").read_text() and not (folder / "samples").exists()


def test_what_rows_hold_cannot_become_markup(tmp_path):
    evil = [{"question": "a | b\n# c <script>alert(1)</script> `x`", "good": 0.0, "tuned": "](http://x)|<b>"}]
    folder, _ = written(tmp_path, change=evil, samples=40)
    text = (folder / "README.md").read_text().partition("\n---\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in html and "<b>" not in html and html.count("<h1>") == 1
    predictions = html.partition("<h2>Predictions</h2>")[2].partition("</table>")[0]
    assert all(row.count("<td") in (0, 6) for row in predictions.split("</tr>"))


@pytest.mark.parametrize(
    ("head", "settings", "verb", "tag"),
    [
        ("language", {}, "answer", "image-text-to-text"),
        ("label", {"labels": ["a", "b"], "several": False}, "probabilities", "image-classification"),
        ("score", {"mean": 0.0, "deviation": 1.0}, "number", "image-text-to-text"),
    ],
)
def test_the_snippet_asks_as_the_model_was_trained(head, settings, verb, tag, tmp_path):
    folder, _ = written(tmp_path, binding_of(head=head, settings=settings))
    text = (folder / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(snippet, "card", "exec")
    assert 'finetune.load("me/emoji")' in snippet and f"model.{verb}('图片里是什么？'" in snippet
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


def test_a_merged_model_shows_what_the_merge_proved(tmp_path):
    folder, _ = written(tmp_path, merged=True)
    text = (folder / "README.md").read_text()
    assert "## Merge certificate" in text and "| 2e-09 | 100.0% |" in text
    assert ModelCard.load(folder / "README.md").data.base_model_relation == "merge"
