"""`finetune push`: from a run to a Hub on loopback, and back."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hub_server import READ_TOKEN, TOKEN
from huggingface_hub import ModelCard
from loopback import asked_of, hub_on_loopback
from safetensors.torch import load_file, save_file
from trained_runs import copy_of

import finetune
import finetune.publishing.push as push_module
from finetune.common.certificate import read_certificate, verify
from finetune.common.errors import ArtifactError, FinetuneError, PublishError
from finetune.publishing.compare import HeldOutQuestions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A copy, since what is published is written into it."""
    return copy_of(finished_run("plain"), tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def project(finished_run):
    return finished_run("plain").parent


@pytest.fixture
def hub(project, monkeypatch, tmp_path):
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "cache"):
        hub.add("org/llm", project / "llm")
        hub.add("org/encoder", project / "encoder")
        yield hub


@pytest.fixture
def without_answers(monkeypatch):
    """No model is loaded: what is tested is the way to the Hub."""
    monkeypatch.setattr(push_module, "answers_here", lambda *_: ({}, "answered"))
    monkeypatch.setattr(push_module, "compare_downloaded", lambda *_: "answered again")


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be spoilt."""
    return copy_of(finished, tmp_path)


def with_publish(run: Path, **publish) -> Path:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["publish"] |= publish
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def output_of(snippet: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(snippet, {})
    return out.getvalue().strip()


def test_an_adapter_is_published_in_one_commit_and_answers_as_here(finished, project, hub, tmp_path):
    result = finetune.push(finished, "tiny")
    repository = hub.repositories["me/tiny"]
    assert result.url == f"{hub.url}/me/tiny" and result.commit == repository.head
    assert len(repository.commits) == 2 and repository.private  # the one that makes it, and ours
    assert {"adapter_model.safetensors", "multimodal.json", "README.md", "recipe.yaml"} <= set(repository.files)
    content = json.loads(repository.files["multimodal.json"])
    for part, name in (
        (content["model"]["llm"], "org/llm"),
        (content["model"]["encoders"]["image"], "org/encoder"),
    ):
        assert (part["name"], part["revision"]) == (name, hub.repositories[name].head)
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "org/llm"
    everything = b"".join(repository.files.values())
    assert not any(str(folder).encode() in everything for folder in (finished, project))
    assert TOKEN.encode() not in everything
    card = repository.files["README.md"].decode()
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == (["org/llm", "org/encoder"], "adapter")
    picture = tmp_path / "sample.webp"
    picture.write_bytes(repository.files["samples/1.webp"])
    expected = finetune.load(finished / "adapter").answer("What is this?", image=picture)
    assert output_of(snippet_of(card)) == expected.strip()
    assert any("4 of 4 rows are answered as here" in line for line in result.checks)


def test_a_merged_model_is_published_and_pulled_whole(finished, project, hub, tmp_path):
    result = finetune.push(finished, "me/whole", merged=True, private=False)
    assert not hub.repositories["me/whole"].private
    folder = finetune.pull("me/whole", tmp_path / "whole", revision=result.commit).path
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (finished / "merged" / name).read_bytes()
    assert str(project) not in (folder / "config.json").read_text()
    assert ModelCard.load(folder / "README.md").data.base_model_relation == "merge"
    verify(read_certificate(folder), folder)
    picture = project / "data/images/test1.png"
    here, there = finetune.load(finished / "merged"), finetune.load(folder)
    assert there.answer("What is this?", image=picture) == here.answer("What is this?", image=picture)
    assert "## Merge certificate" in (folder / "README.md").read_text()


def test_a_second_push_goes_on_top_of_the_first(run, hub, without_answers):
    finetune.push(run, "tiny")
    hub.repositories["me/tiny"].files["old.txt"] = b"from an older version"
    first = hub.repositories["me/tiny"].head
    finetune.push(with_publish(run, limits="Squares only."), "tiny")
    repository = hub.repositories["me/tiny"]
    assert len(repository.commits) == 3 and repository.head != first
    assert b"Squares only." in repository.files["README.md"] and "old.txt" not in repository.files
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(set(sent))  # weights that are there aren't sent again


FAULTS = {
    "cut": ({"PUT /_lfs": (0, 1)}, TOKEN, "nothing was published.*push again"),
    "no space": ({"info/lfs/objects/batch": (507, 0)}, TOKEN, "no space left on the Hub"),
    "may only read": ({}, READ_TOKEN, "the token lacks the permission"),
    "nobody": ({}, None, "hf auth login"),
    "gone": ({"POST /api/repos/create": (0, 0)}, TOKEN, "doesn't answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_on_the_way_up_leaves_the_hub_as_it_was(
    fault, finished, hub, without_answers, monkeypatch, tmp_path
):
    faults, token, message = FAULTS[fault]
    hub.faults = dict(faults)
    with asked_of(hub, monkeypatch, tmp_path / "cache", token):
        with pytest.raises(PublishError, match=message) as error:
            finetune.push(finished, "me/tiny")
        assert TOKEN not in str(error.value) and READ_TOKEN not in str(error.value)
    repository = hub.repositories.get("me/tiny")
    assert repository is None or set(repository.files) == {".gitattributes"}
    hub.faults = {}
    with asked_of(hub, monkeypatch, tmp_path / "cache"):
        assert finetune.push(finished, "me/tiny").commit == hub.repositories["me/tiny"].head


def test_a_repository_with_other_content_is_not_touched(finished, hub):
    hub.add("me/tiny", {"README.md": b"mine", "notes.txt": b"x"})
    with pytest.raises(PublishError, match=r"me/tiny: already exists.*another name"):
        finetune.push(finished, "me/tiny")
    hub.add("me/tiny", {"recipe.yaml": b"name: other", "multimodal.json": b"{}"})
    with pytest.raises(PublishError, match="recipe 'other', not the adapter one of 'tiny'"):
        finetune.push(finished, "me/tiny")
    assert not [path for method, path in hub.requests if method in ("POST", "PUT")]


def test_other_weights_on_the_hub_are_found_after_the_upload(finished, project, hub, tmp_path):
    other = shutil.copytree(project / "llm", tmp_path / "llm")
    tensors = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    hub.add("org/llm", other)
    with pytest.raises(PublishError, match=r"online \(commit .*otherwise than here.*hub_names"):
        finetune.push(finished, "me/tiny")


def test_a_full_disk_on_the_way_down_is_reported(finished, hub, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(PublishError, match=r"me/tiny is online.*no space left on this disk"):
        finetune.push(finished, "me/tiny")


def test_all_that_must_not_be_published_is_reported_at_once(run, hub):
    (run / "adapter" / "notes.bin").write_bytes(b"x")
    with_publish(run, licenses={"encoders.audio": "mit"}, hub_names={}, repo=None)
    with pytest.raises(PublishError) as error:
        finetune.push(run, "me/tiny")
    message = str(error.value)
    for part in ("encoders.audio", "licence of llm", "licence of encoders.image", "licence of the data", "merged=True"):
        assert part in message, part
    assert not [path for method, path in hub.requests if method in ("POST", "PUT")]
    assert not list(run.glob("published/*.partial"))


def test_files_that_give_something_away_are_refused(run):
    (run / "adapter" / "notes.txt").write_text(f"made in {run}")
    (run / "adapter" / "weights.bin").write_bytes(b"x")
    with pytest.raises(PublishError) as error:
        finetune.push(run, "me/tiny", dry_run=True)
    message = str(error.value)
    assert f"notes.txt:1: holds '{run}', a path of this machine" in message and "weights.bin" in message


def test_a_dry_run_writes_the_card_and_asks_nothing(finished):
    result = finetune.push(finished, "tiny", dry_run=True)  # the tests are offline
    assert result.url is None and result.commit is None
    assert "# tiny" in (Path(result.folder) / "README.md").read_text()
    assert any("licences: llm: apache-2.0" in line for line in result.checks)
    results = ModelCard.load(Path(result.folder) / "README.md").data.eval_results
    assert {result.dataset_split for result in results} == {"test"}


@pytest.mark.parametrize("name", ["评论", "me/评论", "a b", "me/tiny/2"])
def test_a_name_that_the_hub_refuses_is_refused_by_a_dry_run_too(name, finished):
    with pytest.raises(PublishError, match=r"isn't the name of a repository: .* of Latin letters"):
        finetune.push(finished, name, dry_run=True)


def test_a_certificate_of_other_weights_is_refused(run):
    path = run / "merged" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(PublishError, match=r"model\.safetensors.*certif"):
        finetune.push(run, "me/tiny", merged=True, dry_run=True)


def test_an_adapter_trained_since_the_merge_is_refused(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(PublishError, match=r"adapter_model\.safetensors: sha256 .*merge again"):
        finetune.push(run, "me/tiny", merged=True, dry_run=True)
    finetune.push(run, "me/tiny", dry_run=True)


@pytest.mark.parametrize("files", [{}, {"recipe.yaml": b"name: tiny", "multimodal.json": b"{}"}])
def test_a_public_repository_is_not_written_where_private_is_asked_for(files, finished, hub, without_answers):
    hub.add("me/tiny", files, private=False)
    with pytest.raises(PublishError, match="me/tiny: is public, but private=True was given"):
        finetune.push(finished, "me/tiny", private=True)
    assert not [path for method, path in hub.requests if method in ("POST", "PUT")]
    hub.repositories["me/tiny"].private = True
    finetune.push(finished, "me/tiny", private=True)
    hub.repositories["me/tiny"].private = False
    assert finetune.push(finished, "me/tiny").commit == hub.repositories["me/tiny"].head


def test_nine_of_ten_rows_must_be_answered_as_they_were_evaluated(monkeypatch, tmp_path):
    class Asked(HeldOutQuestions):
        def predictions_of(self, path):
            return {"a": ["yes"] * equal[path.name] + ["no"] * (10 - equal[path.name])}

    monkeypatch.setattr(push_module, "load_folder", lambda path: path)
    rows = [SimpleNamespace(where=f"rows.csv:{i}") for i in range(10)]
    questions, merged, adapter = Asked({"a": rows}, {"a": ["yes"] * 10}, 8), tmp_path / "merged", tmp_path / "adapter"
    equal = {"adapter": 9, "merged": 2}
    assert "9 of 10" in push_module.answers_here(adapter, questions, adapter)[1]
    answers, line = push_module.answers_here(merged, questions, adapter)
    assert answers["a"].count("yes") == 2 and "2 of 10" in line and "by its adapter, 9 of 10" in line
    equal = {"adapter": 8, "merged": 2}
    for path in (adapter, merged):
        with pytest.raises(PublishError, match=r"adapter: only 8 of 10 .* 90% must be; the others: rows.csv:8, rows.c"):
            push_module.answers_here(path, questions, adapter)


@pytest.mark.parametrize("missing", ["adapter", "metrics.json", "recipe.yaml"])
def test_a_run_that_has_not_got_that_far_is_refused(missing, run):
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    with pytest.raises(ArtifactError, match=f"no {missing} here"):
        finetune.push(run, "me/tiny", dry_run=True)


def test_rows_that_changed_since_the_evaluation_are_refused(run, hub):
    path = run / "predictions.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(FinetuneError, match="run `finetune evaluate` again"):
        finetune.push(run, "me/tiny")
    assert "me/tiny" not in hub.repositories


def test_an_adapter_trained_since_the_evaluation_is_refused(run, hub):
    path = run / "adapter" / "projectors.safetensors"
    save_file({name: -30 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(PublishError, match="only 0 of 4 held-out rows are answered as they were evaluated"):
        finetune.push(run, "me/tiny")
    assert "me/tiny" not in hub.repositories


def test_the_command_line_publishes_and_another_process_loads(finished, hub, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(Path(finetune.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "finetune.commands.cli", "push", finished, "--repo", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/tiny" in done.stdout and "4 of 4 rows are answered as here" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_without_a_name_the_recipe_s_is_taken(finished, hub, without_answers, tmp_path):
    with pytest.raises(PublishError, match=r"repo=, or publish\.repo in .*recipe\.yaml"):
        finetune.push(finished)
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    text = (run / "recipe.yaml").read_text()
    assert "publish:\n  repo: null" in text
    (run / "recipe.yaml").write_text(text.replace("publish:\n  repo: null", "publish:\n  repo: me/by-recipe"))
    finetune.push(run)
    assert "README.md" in hub.repositories["me/by-recipe"].files
