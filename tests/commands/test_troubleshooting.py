"""docs/troubleshooting.md explains what `check` prints: each message is provoked, and found among its rows."""

import json
import re
from pathlib import Path

import pytest
from tiny import tiny_recipe

from finetune.commands.check import check
from finetune.common.errors import FinetuneError

DOCS = Path(__file__).parents[2] / "docs"
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
# The beginning of a row: what makes check print its message, as --set or as a new first row of train.csv.
PROVOKED = {
    "Did you mean": ["model.llm.nme=x"],
    "... needs an encoder for": ["data.0.task={kind: classify, media: [audio]}"],
    "has no projector": ["model.projectors={}"],
    "no rows to evaluate on": ["data.1.split=train"],
    "also data....": ["data.0.hold_out=0.1", "data.1.split=train", "data.1.path=HERE/data/train.csv"],
    "... has weights that no stage trains": ["data.0.head=label", "data.1.head=label"],
    "the fusion ... starts closed": ["model.fusion=cross_attention"],
    "stores features of frozen encoders": ["tune_encoders.image.last_layers=1"],
    "... is a ..., with encoders of its own": ["model.llm.name=HERE/llava"],
    "no column": "image,colour\nimages/train0.png,red\n",
    "column ... holds": "image,label\nimages/train0.png,\n",
    "... leads to": "image,label\n../../outside.png,red\n",
    "no such": "image,label\nimages/none.png,red\n",
}


def cells(page: str, *sections: str) -> list[str]:
    """The messages of sections."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [text.partition(f"\n## {section}\n")[2].partition("\n## ")[0] for section in sections]
    return re.findall(r"^\| `([^`]+)`", "".join(found), flags=re.MULTILINE)


@pytest.mark.parametrize("cell", PROVOKED)
def test_what_check_prints_is_explained(cell, tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps(LLAVA))
    recipe, change = tiny_recipe(tmp_path), PROVOKED[cell]
    if isinstance(change, str):
        (tmp_path / "data" / "train.csv").write_text(change)
        change = []
    overrides = [one.replace("HERE", str(tmp_path)) for one in change]
    with pytest.raises(FinetuneError) as refused:
        check(recipe, overrides)
    (explained,) = [one for one in cells("troubleshooting.md", "The recipe", "Rows and media") if one.startswith(cell)]
    pattern = ".*".join(map(re.escape, re.split(r"\.\.\.(?!\.)", explained)))
    assert re.search(pattern, str(refused.value)), str(refused.value)


def test_every_message_about_a_recipe_is_provoked_and_in_chinese_too():
    assert all(one.startswith(tuple(PROVOKED)) for one in cells("troubleshooting.md", "The recipe"))
    english, chinese = cells("troubleshooting.md", "The recipe", "Rows and media"), ("配方", "数据与媒体")
    assert cells("troubleshooting.zh.md", *chinese) == english and len(english) > 15
