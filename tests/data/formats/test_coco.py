import json

import pytest
import tiny_formats

from finetune.common.errors import DataError
from finetune.data.formats import coco

IMAGES = [{"id": 7, "file_name": "1.png"}, {"id": "b", "file_name": "2.png"}]
NOTES = [{"image_id": 7, "caption": "A cat."}, {"image_id": "b", "caption": "红"}, {"image_id": 7, "caption": "Cat. "}]


def read(path, **options):
    return list(coco.rows(path, coco.Options(**options)))


@pytest.mark.parametrize(
    "document", [{"images": IMAGES, "annotations": NOTES}, {"annotations": NOTES, "images": IMAGES}]
)
@pytest.mark.parametrize("style", [{}, {"indent": 1}])
def test_a_row_per_caption_or_per_picture(document, style, tmp_path):
    path = tiny_formats.put(tmp_path / "c.json", "\ufeff" + json.dumps(document, **style))
    assert coco.detects(path)
    found = [(number, row["image"], row["caption"], row["image_id"]) for number, row in read(path)]
    assert found == [(1, "1.png", "A cat.", "7"), (2, "2.png", "红", "b"), (3, "1.png", "Cat. ", "7")]
    joined = [(row["image"], row["caption"], row["references"]) for _, row in read(path, join=True)]
    assert joined == [("1.png", "A cat.", ["A cat.", "Cat."]), ("2.png", "红", ["红"])]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": IMAGES, "annotations": [{"image_id": 8, "caption": "x"}]}, "c.json:1: .*no image has the id 8"),
        ({"images": IMAGES, "annotations": [{"image_id": 7, "bbox": [0]}]}, "boxes and keypoints aren't supported"),
        ({"images": [{"id": 7}], "annotations": NOTES}, "images.0: without 'id' and 'file_name'"),
        ({"images": [3], "annotations": NOTES}, "images.0: a int, not an object"),
        ({"info": {}, "annotations": NOTES}, "no 'images'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(document, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tiny_formats.put(tmp_path / "c.json", document))


def test_a_file_that_is_cut_off_is_an_error_not_fewer_rows(tmp_path):
    whole = json.dumps({"images": IMAGES, "annotations": NOTES})
    for end in range(20, len(whole) - 1):
        with pytest.raises(DataError, match=r"not JSON|no 'images'"):
            read(tiny_formats.put(tmp_path / "c.json", whole[:end]))
