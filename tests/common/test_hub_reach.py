"""Without a network: one line, in seconds; and what is in the cache is loaded all the same."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from cli import cli
from huggingface_hub.utils import _http
from loopback import asked_of, hub_on_loopback
from tiny import tiny_llm_folder, tiny_recipe, tiny_vision_folder
from transformers import AutoConfig

import finetune
from finetune.common import hub
from finetune.common.errors import DataError, FinetuneError, ModelError
from finetune.data.formats import hub as datasets_format
from finetune.merging.lora_weights import load_on_disk
from finetune.model.encoders import _transformers, vision
from finetune.model.language_model import load_language_model, load_tokenizer
from finetune.publishing.pull import pull
from finetune.recipe.schema import Llm

NAME = "someone/something"
LLM = Llm(name=NAME, quantize="none")
ENCODER = SimpleNamespace(name=NAME, revision=None)
LOADERS = {
    "tokenizer": lambda folder: load_tokenizer(NAME),
    "LLM": lambda folder: load_language_model(LLM, torch.float32),
    "LLM on disk": lambda folder: load_on_disk(LLM, torch.float32, folder),
    "encoder": lambda folder: _transformers.load_auto(ENCODER, AutoConfig),
    "dataset": lambda folder: next(iter(datasets_format.rows(Path(NAME), datasets_format.Options()))),
    "published model": lambda folder: hub.fetched(NAME),
    "pull": lambda folder: pull(NAME, folder / "pulled"),
}


@contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """A Hub that nobody can reach: its port is closed, its name unknown, or it never answers."""
    if kind == "unknown":
        yield "http://no-such-host.invalid"
        return
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "closed":
            server.close()
        yield url


@pytest.fixture
def waits(monkeypatch, tmp_path):
    """Seconds that huggingface_hub waited between attempts, without waiting."""
    seconds: list[float] = []

    @contextmanager
    def asking(url: str) -> Iterator[list[float]]:
        with asked_of(SimpleNamespace(url=url), monkeypatch, tmp_path / "cache"):
            monkeypatch.setattr(_http.time, "sleep", seconds.append)
            yield seconds

    yield asking
    hub._unreachable.cache_clear()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("closed", "Connection refused"),
        ("unknown", "Name or service|name resolution"),
        ("silent", r"no answer in 0\.2 s"),
    ],
)
def test_without_a_network_one_line_says_what_to_do(kind, why, loader, waits, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2" if kind == "silent" else "3")
    with endpoint(kind) as url, waits(url) as waited:
        begin = perf_counter()
        with pytest.raises(
            FinetuneError, match=rf"{NAME}.* {url} can't be reached \(.*({why}).*\); .*HF_ENDPOINT.*folder"
        ):
            LOADERS[loader](tmp_path)
        assert perf_counter() - begin < 5
    assert not waited


@pytest.mark.parametrize("verb", ["plan", "run", "train"])
def test_commands_end_with_one_line_without_a_network(verb, waits, tmp_path):
    recipe = tiny_recipe(tmp_path, model__llm={"name": NAME, "quantize": "none"})
    with endpoint("closed") as url, waits(url) as waited:
        done = cli(verb, recipe, cwd=tmp_path)
    *before, last = done.stderr.splitlines()
    assert done.returncode == (2 if verb == "plan" else 1) and not done.stdout and not waited
    assert last.startswith((f"tokenizer of {NAME!r}", f"LLM {NAME!r}")), done.stderr
    assert f"isn't in the cache, and {url} can't be reached" in last and "HF_ENDPOINT" in last
    assert all(line.startswith(("note: ", "warning: ")) for line in before), before


@pytest.mark.parametrize("loader", ["tokenizer", "LLM", "encoder"])
@pytest.mark.parametrize("cached", [False, True])
def test_offline_says_so_where_the_cache_lacks_a_model(loader, cached, tmp_path, monkeypatch):
    """Nothing of it, or another revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if cached:
        (tmp_path / f"models--{NAME.replace('/', '--')}").mkdir()
    with pytest.raises(ModelError, match=rf"{NAME}.* isn't in the cache, and HF_HUB_OFFLINE is set; unset it"):
        LOADERS[loader](tmp_path)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("loader", [load_tokenizer, lambda name: load_language_model(Llm(name=name), torch.float32)])
def test_a_name_whose_first_folder_is_here_may_be_meant_as_a_path(loader, offline, waits, tmp_path, monkeypatch):
    (tmp_path / "weights" / "minimind").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with hub_on_loopback() as server, waits(server.url):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        hub_says = "HF_HUB_OFFLINE is set" if offline else "weights/minimnd"
        nearest = r"no folder weights/minimnd here; the nearest is weights/minimind$"
        with pytest.raises(ModelError, match=f"{hub_says}.*As a path: there is {nearest}"):
            loader("weights/minimnd")
        with pytest.raises(ModelError, match=r"no folder weights/typo here; weights has minimind$"):
            loader("weights/typo")
        with pytest.raises(ModelError, match=r"no folder weight/minimind here; the nearest is weights/minimind$"):
            loader("weight/minimind")
        with pytest.raises(ModelError, match="someone/minimind") as caught:
            loader("someone/minimind")
        assert "path" not in str(caught.value)
    with pytest.raises(FinetuneError, match=r"weights/minimnd: no such run or folder; the nearest is weights/minimind"):
        finetune.load("weights/minimnd")


def test_what_is_in_the_cache_is_loaded_without_a_network(waits, tmp_path):
    llm, eyes = tiny_llm_folder(tmp_path / "llm"), tiny_vision_folder(tmp_path / "eyes")
    with hub_on_loopback() as server:
        server.add(NAME, llm)
        server.add("someone/eyes", eyes)
        with waits(server.url):
            for name in (NAME, "someone/eyes"):
                hub.fetched(name)
    hub._unreachable.cache_clear()
    with endpoint("closed") as url, waits(url) as waited:
        model, tokenizer = load_language_model(LLM, torch.float32), load_tokenizer(NAME)
        options = vision.Options(name="someone/eyes")
        assert vision.build(options, torch.float32, torch.device("cpu")).width == 16
        assert Path(hub.fetched(NAME)).is_dir()
        with pytest.raises(ModelError, match=r"someone/else: .* can't be reached"):
            hub.fetched("someone/else")
    expected = load_language_model(Llm(name=str(llm), quantize="none"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert tokenizer("a b") == load_tokenizer(str(llm))("a b")
    assert not waited


def test_the_hub_is_asked_once_a_minute_and_never_about_folders_or_offline(waits, tmp_path, monkeypatch):
    folder = tiny_llm_folder(tmp_path / "llm")
    with hub_on_loopback() as server, waits(server.url):
        load_tokenizer(str(folder))
        assert not server.requests
        assert hub.unreachable() is None and hub.unreachable() is None
        assert server.requests == [("HEAD", "/")]
        hub._unreachable.cache_clear()
        server.faults["HEAD /"] = (503, 0)
        assert hub.unreachable() == f"{server.url} can't be reached (it answers 503)"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert hub.unreachable() is None


def test_a_dataset_in_the_cache_is_left_to_datasets(waits, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / f"datasets--{NAME.replace('/', '--')}"
    for name, content in {"refs/main": "1" * 40, f"snapshots/{'1' * 40}/README.md": "Rows."}.items():
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(content)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, *_, **__: asked.append(name) or [])
    with endpoint("closed") as url, waits(url):
        with pytest.raises(DataError):
            next(iter(datasets_format.rows(Path("someone/else"), datasets_format.Options())))
        assert not asked
        datasets_format._loaded(Path(NAME), datasets_format.Options())
    assert asked == [NAME]
