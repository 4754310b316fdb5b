"""What was published once stays loadable and answers as it did, and what has another format is refused."""

import json
import shutil

import pytest
import torch
from saved_adapter import FIXTURES, PICTURE, expected_responses, responses_of, saved_adapter

import finetune
from finetune.common.errors import ArtifactError


def test_a_published_adapter_answers_as_it_did(tmp_path):
    responses, expected = responses_of(finetune.load(saved_adapter(tmp_path)), PICTURE), expected_responses()
    assert responses["answer"] == expected["answer"] and responses.keys() == expected.keys()
    for name in ("logits", "projected"):
        torch.testing.assert_close(torch.tensor(responses[name]), torch.tensor(expected[name]), atol=1e-4, rtol=0)
    assert responses["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


@pytest.mark.parametrize(("kind", "number", "advice"), [
    ("adapter", 0, "train again"), ("adapter", 99, "newer finetune"), ("merged", 99, "newer finetune")
])  # fmt: skip
def test_another_format_is_refused_with_what_to_do(kind, number, advice, finished_run, tmp_path):
    without = shutil.ignore_patterns("certificate.json")  # it would be compared first
    folder = shutil.copytree(finished_run("plain") / kind, tmp_path / kind, ignore=without)
    path = folder / ("config.json" if kind == "merged" else "multimodal.json")
    content = json.loads(path.read_text())
    (content["parts"] if kind == "merged" else content)["format"] = number
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"format {number}.*{advice}"):
        finetune.load(folder)


def test_a_checkpoint_of_another_library_is_not_taken_for_ours():
    with pytest.raises(ArtifactError, match="not a model that `finetune merge` wrote"):
        finetune.load(FIXTURES / "base" / "llm")
