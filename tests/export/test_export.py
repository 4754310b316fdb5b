"""Export of runs and merged folders: loaded in a process of its own, refused where it is something else."""

import json
import shutil
from types import SimpleNamespace

import pytest
from runs import copy_of
from safetensors.torch import load_file, save_file
from tiny import part, tiny_encoder
from tiny_encoders import tiny_encoder_of
from tiny_merged import tiny_merged

import finetune
from finetune.common.certificate import file_hashes
from finetune.common.errors import ArtifactError, ExportRefused, RecipeError
from finetune.common.registry import load_part, part_names
from finetune.export import _run as stage
from finetune.export import adapter as adapter_target
from finetune.export import transformers as transformers_target
from finetune.export._check.probes import held_out, noise
from finetune.export._check.process import asked_in_process
from finetune.export._contract import Answered, EngineMissing, Probe
from finetune.export._run import compared, export_run


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A run that LLaVA's class fits; a copy, since exports are written into it."""
    return copy_of(finished_run("plain"), tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def llm(finished_run):
    return finished_run("plain").parent / "llm"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    encoders = {"image": ("vision", tiny_encoder()), "video": ("video", tiny_encoder_of("siglip_frames"))}
    projectors = {"image": part("projectors", "mlp"), "video": part("projectors", "linear")}
    return tiny_merged(tmp_path_factory.mktemp("bare") / "model", encoders, projectors, louder=4.0)


@pytest.mark.slow
def test_a_run_becomes_llava_that_another_process_loads(run, llm):
    result = export_run(run, "transformers")
    folder = run / "exports" / "transformers"
    assert result["folder"] == str(folder) and result["class"] == "LlavaForConditionalGeneration"
    assert result["verified"]["rows"] == 4 == result["verified"]["equal"] == result["verified"]["equal_first_tokens"]
    assert result["verified"]["engine"].startswith("transformers 5") and result["not_verified"] is None
    told = json.loads((folder / "export.json").read_text())
    assert told["verified"] == result["verified"] and told["options"] == {"min_equal": 0.9}
    hashes = file_hashes(folder)
    hashes.pop("export.json")
    assert told["sha256"] == hashes and "model.safetensors" in hashes
    assert not any(str(llm.parent) in path.read_text() for path in folder.glob("*.json"))
    with pytest.raises(ArtifactError, match="is there already: remove it, or name another place with --out"):
        export_run(run, "transformers", verify=False)
    assert file_hashes(folder).keys() == {*hashes, "export.json"}


@pytest.mark.slow
def test_a_merged_folder_becomes_the_own_class_beside_it(merged, monkeypatch):
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 8)
    result = export_run(merged, "transformers")
    assert result["folder"] == str(merged.with_name("model-transformers"))
    assert result["class"] == "MultimodalForConditionalGeneration" and "2 encoders (image, video)" in result["why"]
    assert result["verified"]["rows"] == result["verified"]["equal"] == 11  # 3 of each, both, and 4 of text alone
    picture = merged.parent / "picture.png"
    noise("image").save(picture)
    answers = [finetune.load(folder).answer("What?", image=picture) for folder in (merged, result["folder"])]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_the_adapter_by_itself_is_loaded_by_plain_peft(run, llm, tmp_path):
    result = export_run(run, "adapter", tmp_path / "adapter")
    assert result["verified"]["engine"].startswith("peft") and result["verified"]["rows"] >= 4
    assert result["verified"]["equal"] == result["verified"]["rows"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "projectors.safetensors", "tokenizer.json"} <= names
    assert "README.md" not in names
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llm) and config["revision"] is None
    assert any("others name their own copy" in note for note in result["notes"])


class Target:
    """A target of the test's own: `says` makes an answer of a probe."""

    Options = transformers_target.Options

    def __init__(self, says):
        self.says, self.asked = says, []

    def write(self, source, folder, options):
        (folder / "model").write_text("x")
        return SimpleNamespace(loads_as="Test", why="because", notes=(), details=None)

    def answer(self, folder, probes, options, max_new_tokens):
        self.asked = list(probes)
        return Answered("test 1", tuple(self.says(probe) for probe in probes))


def with_target(monkeypatch, says):
    target = Target(says)
    monkeypatch.setattr(stage, "load_part", lambda folder, name: target)
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 5)
    return target


def test_an_engine_that_tells_only_text_is_compared_by_text(merged, tmp_path, monkeypatch):
    target = with_target(monkeypatch, lambda probe: probe.text)
    result = export_run(merged, "test", tmp_path / "text")
    assert result["verified"]["equal"] == len(target.asked) == 11
    assert all(probe.token_ids and probe.messages for probe in target.asked)


def test_an_engine_that_is_not_there_leaves_what_was_written(merged, tmp_path, monkeypatch):
    def missing(probe):
        raise EngineMissing("pip install engine")

    with_target(monkeypatch, missing)
    result = export_run(merged, "test", tmp_path / "out")
    assert result["not_verified"] == "pip install engine" and result["verified"] is None
    assert (tmp_path / "out" / "model").is_file()


def test_other_answers_leave_nothing(merged, tmp_path, monkeypatch):
    with_target(monkeypatch, lambda probe: (probe.token_ids[0], 7, *probe.token_ids[2:]))
    with pytest.raises(
        ExportRefused, match=r"test 1 begins 0 of 11 answers as the merged model does; min_equal is 0.9"
    ):
        export_run(merged, "test", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export_run(merged, "test", tmp_path / "out", ["min_equal=0"])["verified"]["equal_first_tokens"] == 0


def test_what_counts_as_begun_alike():
    probes = [Probe((), ids, "") for ids in ((1, 2, 3, 4, 5), (1, 2), (), (1, 2, 3, 4, 5))]
    answers = ((1, 2, 3, 4, 9), (1, 2, 3), (), (1, 2, 3, 9, 5))
    found = compared(probes, Answered("e", answers), None)
    assert found == {"engine": "e", "rows": 4, "equal_first_tokens": 2, "equal": 1}


def test_held_out_rows_are_of_all_tasks_and_kinds_in_turn(tmp_path):
    rows = [{"task": "a", "kinds": ["image"], "media": [f"{i}.png"], "question": f"q{i}"} for i in range(20)]
    rows += [{"task": "a", "kinds": [], "media": [], "question": "text"}]
    rows += [{"task": "b", "kinds": ["image", "audio"], "media": ["a.png", "a.wav"], "question": "both"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = held_out(tmp_path / "p.jsonl", 5)
    assert [messages[0].content[-1] for messages in found] == ["q0", "text", "both", "q1", "q2"]
    assert [medium.kind for medium in found[2][0].content[:2]] == ["image", "audio"]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n{}\n")
    with pytest.raises(ArtifactError, match=r"p.jsonl:2 is damaged .*evaluate` again"):
        held_out(tmp_path / "p.jsonl", 5)


def test_media_that_are_gone_leave_noise_to_ask_about(run, tmp_path, monkeypatch):
    copied = shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (copied / "predictions.jsonl").read_text().splitlines()]
    gone = [line | {"media": ["/nowhere/gone.png"]} for line in lines]
    (copied / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gone))
    target = with_target(monkeypatch, lambda probe: probe.token_ids)
    export_run(copied, "test")
    assert len(target.asked) == 7  # three pictures, four texts


@pytest.mark.parametrize("name", part_names("export"))
def test_every_target_keeps_the_contract(name):
    target = load_part("export", name)
    assert callable(target.write) and callable(target.answer)
    assert 0 <= target.Options().min_equal <= 1
    assert all(field.description for field in target.Options.model_fields.values())


def test_bad_input_is_told_in_one_line_and_nothing_is_written(run, llm, merged, tmp_path):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match="is called 'transfomers': did you mean 'transformers'"):
        export_run(run, "transfomers", tmp_path / "out")
    with pytest.raises(RecipeError, match="--option min_equl=1: unknown key; did you mean 'min_equal'"):
        export_run(run, "transformers", tmp_path / "out", ["min_equl=1"])
    with pytest.raises(RecipeError, match="--option min_equal=2: Input should be less than or equal to 1"):
        export_run(run, "transformers", tmp_path / "out", ["min_equal=2"])
    with pytest.raises(RecipeError, match="--option min_equal: no '='; write KEY=VALUE, of min_equal"):
        export_run(run, "transformers", tmp_path / "out", ["min_equal"])
    with pytest.raises(ArtifactError, match="no such folder: name a run, or a merged folder"):
        export_run(tmp_path / "nowhere", "transformers")
    with pytest.raises(ArtifactError, match="an adapter folder; what is exported is merged first"):
        export_run(run / "adapter", "transformers", tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"neither a run nor a folder .* \(its config.json is of type 'llama'\)"):
        export_run(llm, "transformers", tmp_path / "out")
    with pytest.raises(ExportRefused, match="a merged folder holds no adapter: name the run"):
        export_run(merged, "adapter", tmp_path / "out", verify=False)
    assert set(tmp_path.rglob("*")) == before


def test_a_run_that_is_not_merged_or_was_changed_since_is_refused(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged", "exports"))
    with pytest.raises(ArtifactError, match="no merged here: not a run folder, or `finetune merge` hasn't finished"):
        export_run(copied, "transformers")
    shutil.copytree(run / "merged", copied / "merged")
    weights = load_file(copied / "merged" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, copied / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model.safetensors: sha256 .* the certificate belongs to other weights"):
        export_run(copied, "transformers")
    (copied / "merged" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer.json is missing, but certified"):
        export_run(copied, "transformers")
    assert not (copied / "exports").exists()


def test_an_adapter_trained_since_the_merge_is_not_exported_as_it_was(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports"))
    path = copied / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: sha256 .*merge again"):
        export_run(copied, "transformers")
    shutil.rmtree(copied / "adapter")
    assert export_run(copied, "transformers", verify=False)["class"] == "LlavaForConditionalGeneration"


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ExportRefused, match=r"can't be asked in a process of its own: ModuleNotFoundError: .*nowhere"):
        asked_in_process(tmp_path, {"chats": []}, ["nowhere"])


def test_an_adapter_over_a_gguf_base_is_not_compared(tmp_path):
    (tmp_path / "multimodal.json").write_text(json.dumps({"language_model": {"name": "/x/y.gguf"}}))
    with pytest.raises(EngineMissing, match="peft takes folders and Hub names, no GGUF files"):
        adapter_target.answer(tmp_path, [], adapter_target.Options(), 4)
