"""A Hub that fails, lies or changes at every step: what is pulled is whole or not there, what is pushed is one commit
or none, and a second try ends well.
"""

import json

import pytest
from hub_server import CARRIED_OUT
from loopback import asked_of, hub_on_loopback

import finetune
from finetune.common import hub as hub_of_finetune
from finetune.common.errors import ArtifactError, ModelError, PublishError
from finetune.publishing.upload import state_of, upload

pytestmark = pytest.mark.slow
RECIPE = b"name: tiny\n"
FILES = {
    "multimodal.json": b"{}",
    "recipe.yaml": RECIPE,
    "README.md": b"# tiny",
    "tokenizer.json": json.dumps({"a": 1}).encode(),
    "adapter_model.safetensors": b"a" * 100_000,
    "projectors.safetensors": b"b" * 100_000,
}
EXTRA = {"modeling_evil.py": b"raise SystemExit", "weights.bin": b"\x80\x04.", "sub/setup.py": b"x"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "cache"):
        hub.add("me/tiny", dict(FILES))
        yield hub


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PULLS = {
    "a changed file": {"damaged": {"projectors.safetensors"}},
    "half a file": {"truncated": {"adapter_model.safetensors"}},
    "half a settings file": {"truncated": {"tokenizer.json"}},
    "a file cut": {"faults": {"GET /me/tiny/resolve": (0, 3)}},
    "429": {"faults": {"/api/models/me/tiny": (429, 0)}},
    "429 with Retry-After": {"faults": {"/api/models/me/tiny": (429, 0)}, "retry_after": "7"},
    "503": {"faults": {"/api/models/me/tiny": (503, 1)}},
    "503 with Retry-After": {"faults": {"/api/models/me/tiny": (503, 0)}, "retry_after": "7"},
    "500 in the list of files": {"faults": {"/tree/": (500, 0)}},
    "500 for each file": {"faults": {"GET /me/tiny/resolve": (500, 2)}},
    "429 for each file": {"faults": {"GET /me/tiny/resolve": (429, 2)}, "retry_after": "1"},
}


def shared(faults, in_ci):
    return [one if one in in_ci else pytest.param(one, marks=pytest.mark.full) for one in faults]


@pytest.mark.parametrize("fault", shared(PULLS, ("half a file", "429 with Retry-After", "500 for each file")))
def test_what_is_pulled_is_whole_or_not_there(fault, hub, tmp_path, tried):
    hub.repositories["me/tiny"].files.update(EXTRA)
    for name, value in PULLS[fault].items():
        setattr(hub, name, value)
    with pytest.raises((ArtifactError, ModelError), match="me/tiny") as error:
        finetune.pull("me/tiny", tmp_path / "pulled")
    if "with Retry-After" in fault:
        assert f"answers {fault[:3]}, and asks to come again after 7 s" in str(error.value)
    assert not list(tmp_path.glob("pulled*"))
    hub.faults, hub.damaged, hub.truncated = {}, set(), set()
    assert content_of(finetune.pull("me/tiny", tmp_path / "pulled").path) == FILES  # and none of EXTRA
    tried(f"pull: {fault}", "an error; nothing left behind; the next one is whole")


@pytest.mark.parametrize("status", shared([429, 500, 503], [429]))
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(status, hub, tmp_path, tried):
    hub.faults, hub.retry_after = {"HEAD /me/tiny/resolve": (status, 1, 2), "/tree/": (status, 0, 2)}, "1"
    assert content_of(finetune.pull("me/tiny", tmp_path / "pulled").path) == FILES
    tried(f"pull: {status} twice", "asked again; whole")


def test_a_repository_that_grows_is_read_at_one_commit(hub, tmp_path, tried):
    repository = hub.repositories["me/tiny"]
    first = repository.head

    def grow(request):
        if "/resolve/" in request:
            number = len(repository.commits)
            repository.commit({name: content + b"%d" % number for name, content in FILES.items()} | EXTRA)

    hub.before = grow
    pulled = finetune.pull("me/tiny", tmp_path / "pulled")
    assert content_of(pulled.path) == FILES and pulled.commit == first and len(repository.commits) > 3
    hub.before = lambda _: None
    newest = repository.head
    hub.before = grow
    fetched = content_of(hub_of_finetune.fetched("me/tiny"))
    assert {name: repository.commits[newest][name] for name in fetched} == fetched
    tried("pull and load: a repository with a new commit at each request", "all files of one commit")


def test_half_a_download_is_never_loaded(hub, monkeypatch, tried):
    from huggingface_hub import constants

    hub.faults = {"/tokenizer.json": (0, 0)}
    with pytest.raises(ModelError):
        hub_of_finetune.fetched("me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="isn't in the cache"):
        hub_of_finetune.fetched("me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.faults = {}
    assert content_of(hub_of_finetune.fetched("me/tiny")).keys() == FILES.keys() - {"README.md", "recipe.yaml"}
    tried("load by name: cut, then offline", "refused; the next download is whole")


CUTS = {
    "while the repository is made": ("POST /api/repos/create", 0),
    "before the files are sent": ("/preupload/", 0),
    "in the list of weights": ("info/lfs/objects/batch", 0),
    "in the first file": ("PUT /_lfs", 0),
    "in the second file": ("PUT /_lfs", 1),
    "in the commit": ("POST /api/models/me/tiny/commit", 0),
}


@pytest.mark.parametrize("there", shared([False, True], [False]), ids=["new", "there"])
@pytest.mark.parametrize("cut", CUTS)
def test_an_upload_that_is_cut_publishes_nothing_and_is_taken_up_again(cut, there, hub, tmp_path, full, tried):
    place, after = CUTS[cut]
    folder = tmp_path / "staged"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content + b"2" if name != "recipe.yaml" else content)
    if not there:
        del hub.repositories["me/tiny"]
    for status in (0, 500, 429) if full else (0,):
        hub.faults = {place: (status, after)}
        if not (there and "create" in place):  # which exists: nothing is made
            with pytest.raises(PublishError, match=r"nothing was published and nothing changed|can't be created"):
                upload(folder, "me/tiny", state(), private=True, message="m")
        assert files_of(hub) == (FILES if there else {})
        after = 0
    hub.faults = {}
    commit = upload(folder, "me/tiny", state(), private=True, message="m")
    assert hub.repositories["me/tiny"].head == commit and files_of(hub) == content_of(folder)
    assert len(hub.stored) == len(set(hub.stored)) == 2  # what had arrived isn't sent again
    tried(f"push: cut {cut}", "nothing published; the next one is one whole commit")


def state():
    return state_of("me/tiny", recipe="tiny", kind="adapter", private=False)


def files_of(hub):
    found = hub.repositories.get("me/tiny")
    return {name: content for name, content in (found.files if found else {}).items() if name != ".gitattributes"}


def test_a_commit_whose_answer_is_lost_is_told_as_it_is(hub, tmp_path, tried):
    folder = tmp_path / "staged"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_bytes(b"# another")
    hub.faults = {"POST /api/models/me/tiny/commit": (CARRIED_OUT, 0)}
    with pytest.raises(PublishError, match="all of it seems to be published, unchecked; push again"):
        upload(folder, "me/tiny", state(), private=True, message="m")
    assert files_of(hub) == content_of(folder)
    (folder / "README.md").write_bytes(b"# a third")
    hub.faults = {"POST /api/models/me/tiny/commit": (0, 0)}

    def away(request):
        if "/commit/" in request:
            hub.faults["/api/models/me/tiny"] = (503, 0)

    hub.before = away
    with pytest.raises(PublishError, match="whether anything was published isn't known; push again"):
        upload(folder, "me/tiny", state(), private=True, message="m")
    hub.before, hub.faults = lambda _: None, {}
    upload(folder, "me/tiny", state(), private=True, message="m")
    tried("push: a commit whose answer is lost", "reported as lost; the next one is one whole commit")
