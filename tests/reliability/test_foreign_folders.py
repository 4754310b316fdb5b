"""Folders of models that somebody else has made: what would run forever, or break in the middle, is refused with one
message, in bounded time.
"""

import json
import shutil
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import pytest
import torch
from families import family_folder
from trained_runs import copy_of

import finetune
from finetune.common.errors import FinetuneError, ModelError
from finetune.data.sample import Message
from finetune.model import template_limit
from finetune.model.base.existing import ExistingModel
from finetune.recipe.schema import Base

pytestmark = pytest.mark.slow
SECONDS = 30.0
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LATE_LOOP = "{% for m in messages %}{% if 'go' in m['content'] %}" + LOOP + "{% endif %}{{ m['content'] }}{% endfor %}"


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def json_key(file, *keys, value):
    """Puts a value under a path of keys."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return change


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def named(section, file, *keys, value):
    """Changes what the adapter's LLM or encoder is, in a copy."""

    def change(folder):
        manifest = json.loads((folder / "multimodal.json").read_text())
        part = manifest["model"]["llm"] if section == "llm" else manifest["model"]["encoders"]["image"]
        copy = folder.parent / section
        shutil.copytree(part["name"], copy)
        json_key(file, *keys, value=value)(copy)
        part["name"] = str(copy)
        manifest["llm_sha256"] = {}
        (folder / "multimodal.json").write_text(json.dumps(manifest))

    return change


ADAPTER = {
    "a template that loops": template(LOOP),
    "a template that loops on a word": template(LATE_LOOP),
    "a million layers": named("llm", "config.json", "num_hidden_layers", value=10**6),
    "a million layers of an encoder": named("encoder", "config.json", "num_hidden_layers", value=10**6),
    "a wide LLM": named("llm", "config.json", "hidden_size", value=10**9),
    "ten million iterations": json_key("adapter_config.json", "init_lora_weights", value="pissa_niter_9999999"),
    "a huge rank": json_key("adapter_config.json", "r", value=10**9),
    "no rank": json_key("adapter_config.json", "r", value=None),
    "targets of a wrong type": json_key("adapter_config.json", "target_modules", value={"a": [1]}),
    "media of a wrong type": json_key("multimodal.json", "media", value=[1]),
    "bounds of a wrong type": json_key("multimodal.json", "media", "max_pixels", value="many"),
    "placeholders of a wrong type": json_key("multimodal.json", "placeholders", value=7),
    "an LLM of a wrong type": json_key("multimodal.json", "model", "llm", value=["x"]),
    "a deep manifest": text("multimodal.json", "[" * 200_000),
    "a deep adapter config": text("adapter_config.json", '{"a":' * 100_000),
    "a list": text("adapter_config.json", "[]"),
    "a deep tokenizer": text("tokenizer_config.json", "[" * 200_000),
    "a tokenizer of a wrong type": text("tokenizer_config.json", "[1, 2]"),
    "an activation that isn't": named("llm", "config.json", "hidden_act", value="no such"),
    "heads of zero": named("llm", "config.json", "num_attention_heads", value=0),
}


QUICK = ("a template that loops on a word", "a million layers", "ten million iterations", "a deep manifest")


def answers(folder: Path, results) -> None:
    """Puts what loading and asking it ends with."""
    try:
        assistant = finetune.load(folder)
        assistant.answers([[Message("user", ("go on",))]], max_new_tokens=2)
        results.put(("answered", ""))
    except FinetuneError as error:
        results.put(("refused", str(error)))
    except BaseException as error:
        results.put(("traceback", repr(error)[:500]))


@pytest.mark.parametrize(
    "what", [one if one in QUICK else pytest.param(one, marks=pytest.mark.full) for one in ADAPTER]
)
def test_a_foreign_adapter_is_refused_with_one_message(what, finished_run, tmp_path, tried):
    folder = copy_of(finished_run("plain") / "adapter", tmp_path)
    ADAPTER[what](folder)
    context = get_context("fork")
    results = context.SimpleQueue()
    begin = monotonic()
    process = context.Process(target=answers, args=(folder, results))
    process.start()
    process.join(SECONDS)
    try:
        assert not process.is_alive(), "it hangs"
        outcome, message = results.get()
        assert outcome == "refused", message
        assert "\n" not in message and len(message) < 1000
    finally:
        process.kill()
        process.join()
    tried(f"an adapter folder with {what}", f"refused in {monotonic() - begin:.0f} s")


def test_a_limit_that_is_over_leaves_other_renderings_alone(monkeypatch):
    monkeypatch.setattr(template_limit, "SECONDS", 0.2)
    for _ in range(3):
        with pytest.raises(template_limit.TemplateTimeout), template_limit.limited():
            while True:
                pass
        with template_limit.limited():
            sum(range(1000))
    end = monotonic() + 0.5
    while monotonic() < end:  # nothing arrives late
        pass


BASES = {
    "a template that loops": (template(LOOP + " 'image'"), "wasn't rendered within"),
    "a template that refuses": (template("{{ raise_exception('no') }}"), "refuses a question and its answer: no"),
    "a template that is none": (template("{% nonsense"), "refuses a question and its answer"),
    "a million layers": (json_key("config.json", "vision_config", "depth", value=10**6), "is the most"),
}


@pytest.mark.parametrize("what", BASES)
def test_a_foreign_base_is_refused_with_one_message(what, tmp_path, monkeypatch):
    monkeypatch.setattr(template_limit, "SECONDS", 0.5)
    base = family_folder("qwen2_5_vl", tmp_path / "base")
    change, message = BASES[what]
    change(base)
    begin = monotonic()
    with pytest.raises(ModelError, match=message):
        ExistingModel.load(Base(name=str(base)), torch.float32, torch.device("cpu"))
    assert monotonic() - begin < SECONDS
