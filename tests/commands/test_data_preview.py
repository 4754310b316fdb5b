import json

import pytest
from tiny import tiny_recipe

import finetune
from finetune.commands._reader import Reader
from finetune.commands.tables import print_previews
from finetune.common.errors import DataError
from finetune.data.rows import read_splits
from finetune.model.tokenize import IGNORED


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("preview"))


@pytest.fixture(scope="module")
def reader(recipe):
    return Reader(finetune.load_recipe(recipe))


def test_pieces_are_the_row_as_it_is_trained(recipe, reader):
    previews = finetune.data_preview(recipe, rows=3)
    samples = read_splits(reader.recipe.data, 3).train
    for preview, sample in zip(previews, samples, strict=False):
        tokens = reader.tokens(sample, sample.source)
        assert preview.tokens == len(tokens.input_ids)
        assert preview.learned == sum(label != IGNORED for label in tokens.labels)
        said = "".join(piece.text for piece in preview.pieces if piece.learned)
        assert said == f"{sample.answer}<|im_end|>"
        (medium,) = (piece for piece in preview.pieces if piece.medium)
        assert medium.tokens == 4 and medium.medium == sample.media[0]
    assert [preview.where for preview in previews] == ["train.csv:2", "train.csv:3", "train.csv:4"]


def test_two_pictures_and_text_between_keep_their_places(recipe, tmp_path, reader):
    parts = [
        {"type": "text", "text": "前"},
        {"type": "image", "image": "train0.png"},
        {"type": "image", "image": "train1.png"},
    ]
    turns = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "后"}]},
        {"role": "assistant", "content": "好"},
    ]
    images = recipe.parent / "data" / "images"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    content = json.loads(recipe.read_text())
    content["data"][0] = {"path": str(tmp_path / "rows.jsonl"), "task": "chat", "media_folder": str(images)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    (preview,) = finetune.data_preview(tmp_path / "recipe.yaml", rows=1, boundaries=True)
    shown = [piece.medium.path.name if piece.medium else piece.text for piece in preview.pieces]
    assert [text.rpartition("\n")[2] for text in shown[:4]] == ["前", "train0.png", "train1.png", ""]
    assert shown[3].startswith("后") and "好<|im_end|>" in shown
    for piece in preview.pieces:
        assert piece.medium or (len(piece.ends) == piece.tokens and piece.ends[-1] == len(piece.text))
        assert list(piece.ends) == sorted(piece.ends)


def test_rows_of_evaluation_end_where_the_answer_is_due(recipe):
    preview = finetune.data_preview(recipe, rows=1, split="test")[0]
    assert preview.learned == 0 and preview.answer == "red"
    assert preview.pieces[-1].text.endswith("<|im_start|>assistant\n")


def test_a_row_that_can_not_be_used_is_among_them(recipe, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("image,label\nnone.png,red\n")
    overrides = [f"data.0.path={tmp_path / 'rows.csv'}"]
    previews = finetune.data_preview(recipe, overrides, html=tmp_path / "page.html")
    assert "no such image" in previews[0].problem
    print_previews(previews)
    assert "unusable" in capsys.readouterr().out
    assert "no such image" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_holds_thumbnails_and_escapes_text(recipe, tmp_path):
    finetune.data_preview(recipe, ["data.0.task.prompt=<b>What?</b>"], rows=2, html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 2
    assert "<b>What?" not in text and "&lt;b&gt;What?" in text and "&lt;|im_start|&gt;" in text


def test_a_split_without_rows_is_told(recipe):
    with pytest.raises(DataError, match="no row is for validation: there are test, train"):
        finetune.data_preview(recipe, split="validation")
