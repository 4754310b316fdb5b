"""What was published once stays loadable, and says what it said: one fixture of every format there has been."""

import json

import pytest
import torch
from fixture_folders import FIXTURES, PICTURE, expected_of, fixture_folder
from fixtures.make import said

import finetune
from finetune.common.errors import ArtifactError
from finetune.model import adapter

NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "expected.json").is_file())


def test_every_format_has_its_fixture():
    formats = {f"format-{number}" for number in adapter.READABLE} | {
        f"merged-{number}" for number in range(1, adapter.MERGED_FORMAT + 1)
    }
    assert set(NAMES) == formats and adapter.READABLE[-1] == adapter.FORMAT
    for number in adapter.READABLE:
        content = json.loads((FIXTURES / f"format-{number}" / "multimodal.json").read_text())
        assert content["format"] == number


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_says_what_it_said(name, tmp_path):
    found, expected = said(finetune.load(fixture_folder(name, tmp_path)), PICTURE), expected_of(name)
    assert found["answer"] == expected["answer"] and found.keys() == expected.keys()
    for figures in ("logits", "projected"):
        torch.testing.assert_close(torch.tensor(found[figures]), torch.tensor(expected[figures]), atol=1e-4, rtol=0)
    assert found.get("probabilities") == pytest.approx(expected.get("probabilities"), abs=1e-4)


@pytest.mark.parametrize(
    ("file", "number", "advice"),
    [("format-3", 1, "train again"), ("format-3", 99, "newer finetune"), ("merged-1", 99, "newer finetune")],
)
def test_another_format_is_refused_with_what_to_do(file, number, advice, tmp_path):
    folder = fixture_folder(file, tmp_path)
    path = folder / ("config.json" if file.startswith("merged") else "multimodal.json")
    content = json.loads(path.read_text())
    (content["parts"] if file.startswith("merged") else content)["format"] = number
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"format {number}.*{advice}"):
        finetune.load(folder)


def test_a_checkpoint_of_another_library_is_not_taken_for_ours():
    with pytest.raises(ArtifactError, match="not a model that `finetune merge` wrote"):
        finetune.load(FIXTURES / "base" / "llm")
