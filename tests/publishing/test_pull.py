"""`finetune pull`, and loading by a Hub id: whole, or an error that says why."""

import json
import shutil
from pathlib import Path

import pytest
from hub_server import READ_TOKEN
from loopback import asked_of, hub_on_loopback
from saved_adapter import PICTURE, expected_responses, saved_adapter

import finetune
from finetune.common import hub as hub_of_finetune
from finetune.common.errors import ArtifactError, ModelError

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one published adapter, me/tiny."""
    folder = saved_adapter(tmp_path / "made")
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "cache"):
        hub.add("me/tiny", folder)
        yield hub


def test_three_lines_load_and_ask(hub):
    model = finetune.load("me/tiny")
    probabilities = expected_responses()["probabilities"]  # its only task is answered by one of its labels
    assert model.answer("What is this?", image=PICTURE) == max(probabilities, key=probabilities.get)


def test_a_revision_is_that_revision(hub, tmp_path):
    repository = hub.repositories["me/tiny"]
    first = repository.head
    repository.commit({"README.md": b"emptied"})
    assert (hub_of_finetune.fetched("me/tiny", first) / "multimodal.json").is_file()
    assert (finetune.pull("me/tiny", tmp_path / "first", revision=first).path / "multimodal.json").is_file()
    with pytest.raises(ArtifactError, match="neither an adapter nor a merged model"):
        finetune.pull("me/tiny", tmp_path / "second")
    with pytest.raises(ModelError, match="me/tiny at none-such: it has no such revision"):
        finetune.load("me/tiny", revision="none-such")
    with pytest.raises(ModelError, match="not for folders"):
        finetune.load(tmp_path / "first", revision=first)


def test_nothing_that_can_hold_code_is_downloaded(hub, tmp_path):
    for name in ("model.bin", "evil.py", "sub/pickle.pkl"):
        hub.repositories["me/tiny"].files[name] = b"x"
    result = finetune.pull("me/tiny", tmp_path / "pulled")
    assert repr(result).startswith("Pulled: me/tiny (commit ") and "multimodal.json" in result._repr_html_()
    pulled = Path(result)
    fetched = hub_of_finetune.fetched("me/tiny")
    for folder in (pulled, fetched):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not {path.suffix for path in folder.rglob("*") if path.is_file()} & {".bin", ".py", ".pkl"}
    assert not (pulled / ".cache").exists()
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".py", ".pkl"))]


def test_a_file_that_is_not_the_one_on_the_hub_is_named(hub, tmp_path):
    hub.damaged = {"projectors.safetensors"}
    with pytest.raises(ArtifactError, match=r"projectors\.safetensors isn't the file on the Hub"):
        finetune.pull("me/tiny", tmp_path / "pulled")
    assert not list(tmp_path.glob("pulled*"))
    hub.damaged = set()
    assert finetune.pull("me/tiny", tmp_path / "pulled").path.is_dir()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_merged_model_that_is_not_the_certified_one_is_not_loaded(damage, hub, finished_run, tmp_path):
    hub.add("me/whole", finished_run("plain") / "merged")
    assert (finetune.pull("me/whole", tmp_path / "pulled").path / "certificate.json").is_file()
    path = tmp_path / "pulled" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256"):
        finetune.load(tmp_path / "pulled")
    files = hub.repositories["me/whole"].files
    if damage == "changed":
        files["model.safetensors"] = path.read_bytes()
    else:
        del files["tokenizer.json"]
    error = r"model\.safetensors: sha256" if damage == "changed" else r"tokenizer\.json is missing, but certified"
    with pytest.raises(ArtifactError, match=error):
        finetune.pull("me/whole", tmp_path / "again")
    assert not list(tmp_path.glob("again*"))
    with pytest.raises(ArtifactError, match=error):
        finetune.load("me/whole")


def test_an_existing_folder_is_not_overwritten(hub, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="already exists"):
        finetune.pull("me/tiny")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["mine.txt"]
    shutil.rmtree(tmp_path / "tiny")
    assert finetune.pull("me/tiny").path.name == "tiny"


def test_what_the_hub_does_not_give_is_reported(hub, monkeypatch, tmp_path):
    repository = hub.repositories["me/tiny"]
    with pytest.raises(ModelError, match="me/nothing: the Hub has no such model"):
        finetune.load("me/nothing")
    with pytest.raises(ArtifactError, match="isn't the name of a repository"):
        finetune.pull("just-a-name")
    repository.private = True
    with asked_of(hub, monkeypatch, tmp_path / "a", None), pytest.raises(ModelError, match=r"private.*hf auth login"):
        finetune.load("me/tiny")
    repository.private, repository.gated = False, True
    with asked_of(hub, monkeypatch, tmp_path / "b", READ_TOKEN), pytest.raises(ModelError, match="grants access"):
        finetune.load("me/tiny")


def test_offline_the_cache_is_used_or_its_lack_is_reported(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    cached = hub_of_finetune.fetched("me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_of_finetune.fetched("me/tiny") == cached
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        finetune.pull("me/other", tmp_path / "other")


def test_a_server_that_is_gone_is_reported(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"me/tiny: .*connection"):
        finetune.pull("me/tiny", tmp_path / "pulled")


def test_a_folder_that_is_neither_here_nor_a_name_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such run or folder"):
        finetune.load(tmp_path / "nothing")


def spoilt(folder, file, change):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content) or content))
    with pytest.raises(ArtifactError, match=rf"{file} is damaged.*pull the model again"):
        finetune.load(folder)


ADAPTER_CHANGES = {
    "no encoders": lambda content: content["model"].pop("encoders") and None,
    "no LLM": lambda content: content["model"].pop("llm") and None,
    "an LLM without a name": lambda content: content["model"]["llm"].pop("name") and None,
    "an unknown bound": lambda content: content["media"].update(x=1),
    "an unknown option": lambda content: content["model"]["encoders"]["image"].update(x=1),
    "an odd seed": lambda content: content.update(seed="x"),
    "an empty binding": lambda content: content.update(bindings={"a": {}}),
    "a list": lambda content: [1],
}
MERGED_CHANGES = {
    "no encoders": lambda content: content["parts"].pop("encoders") and None,
    "no placeholders": lambda content: content["parts"].pop("placeholders") and None,
    "an unknown medium": lambda content: content["parts"]["placeholders"].update(x=1),
    "an unknown bound": lambda content: content["parts"]["media"].update(x=1),
    "no projector's width": lambda content: content["parts"]["projectors"]["image"].pop("width_in") and None,
    "a list": lambda content: [1],
}


@pytest.fixture
def merged(finished_run, tmp_path):
    """Without a certificate, which would be compared first."""
    without = shutil.ignore_patterns("certificate.json")
    return shutil.copytree(finished_run("plain") / "merged", tmp_path / "merged", ignore=without)


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_an_adapter_with_damaged_settings_names_the_file(change, tmp_path):
    spoilt(saved_adapter(tmp_path), "multimodal.json", ADAPTER_CHANGES[change])


@pytest.mark.parametrize("change", MERGED_CHANGES)
def test_a_merged_model_with_damaged_settings_names_the_file(change, merged):
    spoilt(merged, "config.json", MERGED_CHANGES[change])


@pytest.mark.parametrize("damage", ["cut", "missing", "shard", "index"])
def test_damaged_weights_of_a_merged_model_are_named(damage, merged):
    folder, message = merged, r"model\.safetensors is damaged"
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage != "cut":
        path.unlink()
        message = r"model\.safetensors is missing"
    if damage in ("shard", "index"):
        content = {"weight_map": {"x": "model-1.safetensors"}} if damage == "shard" else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        message = r"model-1\.safetensors is missing" if damage == "shard" else r"index\.json is damaged"
    with pytest.raises(ArtifactError, match=f"{message}.*pull the model again"):
        finetune.load(folder)
