"""Captions as COCO writes them, in one object:

{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}

A row per caption, or with `join` per picture. Columns: image, caption, image_id; with `join` also references, the list
of all captions of the picture, of which `caption` is the first.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _json


class Options(PartOptions):
    join: bool = Field(False, description="One row per picture, with all of its captions in the column references.")


def detects(path: Path) -> bool:
    return _json.outline(path)[0] == "captions"


def rows(path: Path, options: Options) -> NumberedRows:
    files: dict[Any, str] = {}
    for number, image in _elements(path, "images"):
        if not isinstance(image.get("id"), str | int) or not isinstance(image.get("file_name"), str):
            raise DataError(f"{path.name}: images.{number - 1}: without 'id' and 'file_name': {str(image)[:80]}")
        files[image["id"]] = image["file_name"]
    if not files:
        raise DataError(f"{path}: no 'images'; captions of COCO have 'images' and 'annotations'")
    joined: dict[Any, list[str]] = {}
    for number, note in _elements(path, "annotations"):
        caption, image_id = note.get("caption"), note.get("image_id")
        if not isinstance(caption, str):
            problem = "no 'caption'; boxes and keypoints aren't supported"
            raise DataError(f"{path.name}:{number}: annotations.{number - 1}: {problem}: {str(note)[:80]}")
        if not isinstance(image_id, str | int) or image_id not in files:
            raise DataError(f"{path.name}:{number}: annotations.{number - 1}: no image has the id {image_id!r}")
        if options.join:
            joined.setdefault(image_id, []).append(caption.strip())
        else:
            yield number, {"image": files[image_id], "caption": caption, "image_id": str(image_id)}
    for number, (image_id, captions) in enumerate(joined.items(), 1):
        row = {"image": files[image_id], "caption": captions[0], "references": captions, "image_id": str(image_id)}
        yield number, row


def _elements(path: Path, key: str) -> NumberedRows:
    for number, element in _json.array_of(path, key):
        if not isinstance(element, dict):
            raise DataError(f"{path.name}: {key}.{number - 1}: a {type(element).__name__}, not an object")
        yield number, element
