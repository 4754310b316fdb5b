"""One model for pictures and sound: each is used, by the tasks that it belongs to and by no other."""

import json

import pytest
import torch
from cli import cli
from safetensors.torch import load_file
from tiny import FUSIONS
from trained_runs import MEDIA, media_recipe, trained

import finetune
from finetune.common.errors import DataError

pytestmark = pytest.mark.slow  # both runs are trained until they have learned


@pytest.fixture(scope="module", params=FUSIONS)
def run(request, tmp_path_factory):
    """Trained until it tells colours and tones apart."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    return trained(media_recipe(folder, request.param, {"train": 32, "test": 16}))


def test_without_one_medium_only_its_own_tasks_suffer(run):
    scores = {name: table["accuracy"] for name, table in finetune.evaluate(run).scores.items()}
    assert set(scores) == set(MEDIA)
    for name, media in MEDIA.items():
        assert scores[name]["tuned"] >= 0.5, (name, scores[name])  # chance: 0.25, and 0.06 of both
        for medium in ("image", "audio"):
            blanked = scores[name][f"blank_{medium}"]
            if medium in media:
                assert blanked <= scores[name]["tuned"] - 0.25, (name, medium, scores[name])
            else:
                assert blanked == scores[name]["tuned"], (name, medium, scores[name])


def test_a_stage_sees_only_its_sources_and_changes_only_its_parts(run):
    stages = json.loads((run / "metrics.json").read_text())["train"]["stages"]
    assert [stages[name]["samples"] for name in ("see", "hear", "both")] == [4 * 32, 4 * 32, 20 * 96]
    assert "projectors.image" not in stages["hear"]["trained_weights"]
    saved = {name: load_file(run / "checkpoints" / name / "final" / "projectors.safetensors") for name in stages}
    for name, tensor in saved["see"].items():
        assert torch.equal(saved["hear"][name], tensor) == (".image." in name)


def test_media_weigh_as_much_as_is_asked(run):
    """Cross-attention: at strength 0 what is shown doesn't matter, for each medium by itself."""
    assistant, data = finetune.load(run / "adapter"), run.parent / "data"
    pictures, sounds = [data / f"test{n}.png" for n in (0, 1)], [data / f"test{n}.wav" for n in (0, 4, 8, 12)]

    def answers(strength) -> dict[tuple[int, int], str]:
        return {
            (see, hear): assistant.answer(
                "both?", image=pictures[see], audio=sounds[hear], strength=strength, max_new_tokens=8
            )
            for see in range(2)
            for hear in range(4)
        }

    full = answers(None)
    assert full[0, 0] != full[1, 0] and len({full[0, hear] for hear in range(4)}) > 1
    if assistant.model.fusion.strength is None:
        with pytest.raises(
            DataError, match="strength is for models with cross-attention; this one's fusion is 'prefix'"
        ):
            answers(0.5)
        return
    assert answers(1.0) == full == answers({"image": 1.0})
    # At 0 it is the LLM that was asked the same without media.
    assert set(answers(0.0).values()) == {assistant.answer("both?", max_new_tokens=8)}
    deaf = answers({"audio": 0.0})
    assert [len({deaf[see, hear] for hear in range(4)}) for see in range(2)] == [1, 1] and deaf[0, 0] != deaf[1, 0]
    assert assistant.model.fusion.strength == {"image": 1.0, "audio": 1.0}  # as before
    with pytest.raises(DataError, match="strength of 'video': this model takes "):
        answers({"video": 1.0})
    with pytest.raises(DataError, match="strength is -1; write 0 or more"):
        answers(-1.0)


def test_the_command_line_takes_media_and_strength(run):
    data = run.parent / "data"
    media = ["--image", data / "test0.png", "--audio", data / "test0.wav"]
    done = cli("chat", run, "both?", *media, "--strength", "audio=0.5")
    if "cross_attention" in str(run):
        assert done.returncode == 0 and done.stdout.strip()
    else:
        assert done.returncode == 2 and "strength is for models with cross-attention" in done.stderr
        assert "Traceback" not in done.stderr


def test_media_that_a_row_does_not_have_are_not_encoded(run, monkeypatch):
    assistant = finetune.load(run / "adapter")
    heard = []
    encoder = assistant.encoders["audio"]
    monkeypatch.setattr(
        type(encoder), "encode", lambda self, batch: heard.append(batch.shape) or pytest.fail("encoded")
    )
    assert assistant.answer("pictures?", image=run.parent / "data" / "test0.png", max_new_tokens=3) is not None
    assert not heard
