"""Run folders of somebody else, poisoned in one place: nothing of theirs is executed, and what can't be read without
executing it is refused with its reason. (Checkpoints: test_killed_saves.py.)
"""

import json
import os
import pickle
import shutil
import struct

import pytest
from cli import cli
from loopback import asked_of, hub_on_loopback
from trained_runs import copy_of

import finetune
from finetune.common.errors import FinetuneError
from finetune.data.sample import Message

pytestmark = pytest.mark.slow


class Payload:
    """Unpickled it makes a folder."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


def poisoned_pickle(flag):
    return pickle.dumps({"weight": Payload(flag)})


def code(flag):
    return f"import os\nos.mkdir({str(flag)!r})\n"


def json_changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def model_of(adapter):
    """A copy of the adapter's LLM, named by its manifest."""
    manifest = json.loads((adapter / "multimodal.json").read_text())
    copy = adapter.parent / "llm"
    shutil.copytree(manifest["model"]["llm"]["name"], copy)
    manifest["model"]["llm"]["name"] = str(copy)
    manifest["llm_sha256"] = {}
    (adapter / "multimodal.json").write_text(json.dumps(manifest))
    return copy


def pickled_adapter(adapter, flag):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(poisoned_pickle(flag))


def pickle_named_safetensors(adapter, flag):
    (adapter / "projectors.safetensors").write_bytes(poisoned_pickle(flag))


def huge_header(adapter, flag):
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 100 * 2**30) + b"{}")


def template(text):
    def poison(adapter, flag):
        (adapter / "chat_template.jinja").write_text(text.replace("FLAG", str(flag)))

    return poison


def tokenizer_code(adapter, flag):
    (adapter / "evil.py").write_text(code(flag))
    json_changed(
        adapter / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T"
    )


def llm_code(adapter, flag):
    llm = model_of(adapter)
    (llm / "evil.py").write_text(code(flag))
    json_changed(
        llm / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        trust_remote_code=True,
    )


def asks_for_trust(adapter, flag):
    llm_code(adapter, flag)
    manifest = json.loads((adapter / "multimodal.json").read_text())
    manifest["model"]["llm"] |= {"trust_remote_code": True, "revision": "a" * 40}
    (adapter / "multimodal.json").write_text(json.dumps(manifest))


def auto_mapping(adapter, flag):
    (adapter / "evil.py").write_text(code(flag))
    json_changed(
        adapter / "adapter_config.json",
        auto_mapping={"base_model_class": "C", "parent_library": "evil"},
        task_type=None,
    )


def pickled_llm(adapter, flag):
    llm = model_of(adapter)
    for file in llm.glob("*.safetensors"):
        file.unlink()
    (llm / "pytorch_model.bin").write_bytes(poisoned_pickle(flag))


def link_outside(adapter, flag):
    (adapter / "projectors.safetensors").unlink()
    (adapter / "projectors.safetensors").symlink_to("/etc/passwd")


ATTACK = "{{ cycler.__init__.__globals__.os.mkdir('FLAG') }}"
SUBCLASSES = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__.os.mkdir('FLAG') }}{% endfor %}"
)
ADAPTER = {
    "a pickled adapter": pickled_adapter,
    "a pickle called safetensors": pickle_named_safetensors,
    "a safetensors header of 100 GiB": huge_header,
    "a template that reaches for os": template(ATTACK),
    "a template that goes through subclasses": template(SUBCLASSES),
    "an auto_map in its tokenizer": tokenizer_code,
    "an auto_map in its LLM": llm_code,
    "trust_remote_code in its manifest": asks_for_trust,
    "an auto_mapping in its adapter": auto_mapping,
    "a pickled LLM": pickled_llm,
    "a link out of its folder": link_outside,
}
HARMLESS = {"an auto_mapping in its adapter", "an auto_map in its tokenizer"}  # of no use to anybody: never read
QUICK = ("a pickled adapter", "an auto_map in its LLM")


def outcome_of(adapter):
    try:
        finetune.load(adapter).answers([[Message("user", ("go on",))]], max_new_tokens=2)
    except FinetuneError as error:
        assert len(str(error)) < 1000
        return str(error)
    return ""


def pull_from_loopback(adapter, to, monkeypatch):
    """The folder, as it comes back from a repository that holds all of its files."""
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, to.parent / "cache"):
        hub.add("me/poisoned", files)
        pulled = finetune.pull("me/poisoned", to).path
    assert not list(pulled.glob("*.py")) and not list(pulled.glob("*.bin"))
    return pulled


@pytest.mark.parametrize(
    "what", [one if one in QUICK else pytest.param(one, marks=pytest.mark.full) for one in ADAPTER]
)
def test_a_poisoned_adapter_executes_nothing(what, finished_run, tmp_path, monkeypatch, full, tried):
    flag = tmp_path / "executed"
    run = copy_of(finished_run("plain"), tmp_path, "merged")
    adapter = run / "adapter"
    ADAPTER[what](adapter, flag)
    monkeypatch.chdir(adapter)  # where Python would find its modules
    monkeypatch.syspath_prepend(str(adapter))
    reason = outcome_of(adapter)
    assert not flag.exists()
    assert reason or what in HARMLESS
    if full:
        doors = [f"chat {adapter} hi", f"merge {run}", f"export {run} --to vllm", f"push {run} --dry-run"]
        if reason and not reason.startswith("prompt: "):  # else it would serve
            doors.append(f"serve {adapter} --port 0")
        doors.append(f"train {run / 'recipe.yaml'} --run {run} --resume")  # which may make the adapter anew
        pulled = pull_from_loopback(adapter, tmp_path / "pulled", monkeypatch)
        doors.append(f"chat {pulled} hi")
        for door in doors:
            cli(*door.split())  # which raises what would be a traceback
            assert not flag.exists(), door
    others = ", chat, merge, export, push, serve, train --resume, and pulled" * full
    tried(f"{what}, by load{others}", "nothing executed" + ", refused" * bool(reason))


def test_a_recipe_in_a_run_builds_no_objects(tmp_path, tried):
    flag, run = tmp_path / "executed", tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "multimodal.json").write_text("{}")
    (run / "recipe.yaml").write_text(f"name: !!python/object/apply:os.mkdir [{flag}]\n")
    for door in ("evaluate", "merge", "report", "push --dry-run"):
        done = cli(*door.split(), run)
        assert (done.returncode or door == "report") and "Traceback" not in done.stderr, (
            door,
            done,
        )  # a report quotes it
    assert not flag.exists()
    tried("YAML tags in a run's recipe, by evaluate, merge, report, push", "nothing executed")
