"""Export of runs and merged folders: loaded in a process of its own, refused if the answers differ."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest
import soundfile
from safetensors.torch import load_file, save_file
from saved_adapter import saved_adapter
from tiny import part, tiny_encoder
from tiny_encoders import tiny_encoder_of, tiny_sound
from tiny_merged import tiny_merged
from trained_runs import change_json

import finetune
from finetune.common.certificate import file_hashes
from finetune.common.errors import ArtifactError, ExportRefused, RecipeError
from finetune.common.registry import load_part, part_names
from finetune.data.media import decode, noise
from finetune.data.predictions import Prediction, write_predictions
from finetune.data.sample import KINDS, Medium, Message
from finetune.export import _run as stage
from finetune.export import adapter as adapter_target
from finetune.export._check.probes import answered, held_out_questions
from finetune.export._check.process import answers_of_process, last_error
from finetune.export._contract import (
    EngineAnswers,
    EngineMissing,
    ExportedModel,
    Probe,
    TargetOptions,
    Verification,
)
from finetune.export._run import compare, export_run
from finetune.model.load import load_merged
from finetune.model.manifest import AdapterManifest

pytestmark = pytest.mark.slow


def test_a_run_becomes_llava_that_another_process_loads(run, llm):
    result = export_run(run, "transformers")
    folder = run / "exports" / "transformers"
    assert result.folder == folder and result.model_class == "LlavaForConditionalGeneration"
    engine = result.verification.engine
    assert engine.startswith("transformers 5") and result.not_verified is None
    different = result.verification.different
    assert result.verification == Verification(engine, 4, equal_first_tokens=4, equal=4, different=different)
    content = json.loads((folder / "export.json").read_text())
    assert content["verified"] == asdict(result.verification) and 1 <= different <= 4
    assert content["options"] == {"min_equal": 0.9} and content["notes"] == [] and content["not_verified"] is None
    assert content["to"] == "transformers" and content["class"] == result.model_class
    hashes = file_hashes(folder)
    hashes.pop("export.json")
    assert content["sha256"] == hashes and "model.safetensors" in hashes
    assert not any(str(llm.parent) in path.read_text() for path in folder.glob("*.json"))
    with pytest.raises(ArtifactError, match="exists already: remove it, or choose another folder with out="):
        export_run(run, "transformers", verify=False)
    assert file_hashes(folder).keys() == {*hashes, "export.json"}


def test_a_merged_folder_becomes_the_own_class_beside_it(merged, monkeypatch):
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 8)
    result = export_run(merged, "transformers")
    assert result.folder == merged.with_name("model-transformers")
    assert result.model_class == "MultimodalForConditionalGeneration" and "2 encoders (image, video)" in result.reason
    assert result.verification.rows == result.verification.equal == 11  # 3 of each, both, and 4 of text alone
    picture = merged.parent / "picture.png"
    noise("image").save(picture)
    answers = [finetune.load(folder).answer("What?", image=picture) for folder in (merged, result.folder)]
    assert answers[0] == answers[1]


def test_the_adapter_by_itself_is_loaded_by_plain_peft(run, llm, tmp_path):
    result = export_run(run, "adapter", tmp_path / "adapter")
    assert result.verification.engine.startswith("peft") and result.verification.rows >= 4
    assert result.verification.equal == result.verification.rows
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "projectors.safetensors", "tokenizer.json"} <= names
    assert "README.md" not in names
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llm) and config["revision"] is None
    assert any("other machines need their own" in note for note in result.notes)


class FakeTarget:
    """`answer_to` makes an answer of a probe."""

    Options = TargetOptions
    COMPARED_MEDIA = KINDS

    def __init__(self, answer_to):
        self.answer_to, self.probes = answer_to, []

    def write(self, model, folder, options):
        (folder / "model").write_text("x")
        return ExportedModel("Test", "because")

    def answer(self, folder, probes, options, max_new_tokens):
        self.probes = list(probes)
        return EngineAnswers("test 1", tuple(self.answer_to(probe) for probe in probes))


def with_target(monkeypatch, answer_to):
    target = FakeTarget(answer_to)
    monkeypatch.setattr("finetune.export._target.load_part", lambda folder, name: target)
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 5)
    return target


def test_a_missing_engine_leaves_the_export(merged, tmp_path, monkeypatch):
    def missing(probe):
        raise EngineMissing("pip install engine")

    with_target(monkeypatch, missing)
    result = export_run(merged, "test", tmp_path / "out")
    assert result.not_verified == "pip install engine" and result.verification is None
    assert (tmp_path / "out" / "model").is_file()


def test_other_answers_leave_nothing(merged, tmp_path, monkeypatch):
    target = with_target(monkeypatch, lambda probe: (probe.answer[0], 7, *probe.answer[2:]))
    with pytest.raises(ExportRefused, match=r"test 1 begins 0 of 11 answers like the merged model; min_equal is 0.9"):
        export_run(merged, "test", tmp_path / "out")
    assert all(probe.answer and probe.messages for probe in target.probes)
    assert list(tmp_path.iterdir()) == []
    assert export_run(merged, "test", tmp_path / "out", ["min_equal=0"]).verification.equal_first_tokens == 0


def test_first_tokens_and_whole_answers_are_counted():
    probes = [Probe((), ids) for ids in ((1, 2, 3, 4, 5), (1, 2), (), (1, 2, 3, 4, 5))]
    answers = ((1, 2, 3, 4, 9), (1, 2, 3), (), (1, 2, 3, 9, 5))
    assert compare(probes, EngineAnswers("e", answers)) == Verification(
        "e", 4, equal_first_tokens=2, equal=1, different=3
    )


def test_probes_have_media_that_any_decoder_reads_alike(tmp_path):
    """A JPEG turned by its EXIF tag, and a stereo recording at 8 kHz: decoded once, kept without loss."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    noise("image").save(tmp_path / "a.jpg", exif=exif)
    soundfile.write(tmp_path / "a.wav", np.stack([tiny_sound(0.5), tiny_sound(0.5, seed=1)], 1), 8_000)
    encoders = {"image": tiny_encoder(), "audio": tiny_encoder_of("whisper")}
    projectors = {"image": part("projectors", "mlp"), "audio": part("projectors", "stack")}
    folder = tiny_merged(tmp_path / "merged", encoders, projectors)
    media = (Medium("image", tmp_path / "a.jpg"), Medium("audio", tmp_path / "a.wav"))
    (probe,) = answered(load_merged(folder), [(Message("user", (*media, "What?")),)], tmp_path, 3)
    picture, sound, text = probe.messages[0].content
    assert picture.path.suffix == ".png" and sound.path.suffix == ".wav" and text == "What?"
    assert PIL.Image.open(picture.path).tobytes() == decode("image", media[0].path).tobytes()
    samples, rate = soundfile.read(sound.path, dtype="float32")
    assert rate == 16_000 and np.array_equal(samples, decode("audio", media[1].path))


def test_held_out_rows_are_of_all_tasks_and_kinds_in_turn(tmp_path):
    def row(task, question, *files):
        media = tuple(Medium(kind, tmp_path / name) for kind, name in files)
        return Prediction(task, "rows.csv:2", media, question, "red")

    rows = [row("a", f"q{i}", ("image", f"{i}.png")) for i in range(20)]
    rows += [row("a", "text"), row("b", "both", ("image", "a.png"), ("audio", "a.wav"))]
    write_predictions(tmp_path / "p.jsonl", rows)
    questions = held_out_questions(tmp_path / "p.jsonl", 5)
    assert [messages[0].content[-1] for messages in questions] == ["q0", "text", "both", "q1", "q2"]
    assert [medium.kind for medium in questions[2][0].content[:2]] == ["image", "audio"]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0].as_json()) + "\n{}\n")
    with pytest.raises(ArtifactError, match=r"p.jsonl:2 is damaged .*evaluate` again"):
        held_out_questions(tmp_path / "p.jsonl", 5)


def test_media_that_are_gone_leave_noise_to_ask_about(run, tmp_path, monkeypatch):
    copied = shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (copied / "predictions.jsonl").read_text().splitlines()]
    gone = [line | {"media": ["/nowhere/gone.png"]} for line in lines]
    (copied / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gone))
    target = with_target(monkeypatch, lambda probe: probe.answer)
    export_run(copied, "test")
    assert len(target.probes) == 7  # three pictures, four texts


@pytest.mark.parametrize("name", part_names("export"))
def test_every_target_keeps_the_contract(name):
    target = load_part("export", name)
    assert callable(target.write) and callable(target.answer) and set(target.COMPARED_MEDIA) <= set(KINDS)
    assert issubclass(target.Options, TargetOptions) and 0 <= target.Options().min_equal <= 1
    assert all(field.description for field in target.Options.model_fields.values())


def test_bad_input_is_reported_in_one_line_and_nothing_is_written(run, llm, merged, tmp_path):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match="is called 'transfomers': did you mean 'transformers'"):
        export_run(run, "transfomers", tmp_path / "out")
    with pytest.raises(RecipeError, match="options: min_equl=1: unknown key; did you mean 'min_equal'"):
        export_run(run, "transformers", tmp_path / "out", ["min_equl=1"])
    with pytest.raises(RecipeError, match="options: min_equal=2: Input should be less than or equal to 1"):
        export_run(run, "transformers", tmp_path / "out", ["min_equal=2"])
    with pytest.raises(RecipeError, match="options: min_equal: no '='; write KEY=VALUE, of min_equal"):
        export_run(run, "transformers", tmp_path / "out", ["min_equal"])
    with pytest.raises(ArtifactError, match="no such run or folder"):
        export_run(tmp_path / "nowhere", "transformers")
    with pytest.raises(ArtifactError, match="an adapter folder; only merged models are exported"):
        export_run(run / "adapter", "transformers", tmp_path / "out")
    with pytest.raises(ArtifactError, match="a 'llama', not a model that `finetune merge` wrote"):
        export_run(llm, "transformers", tmp_path / "out")
    with pytest.raises(ExportRefused, match="a merged folder has no adapter: name the run"):
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
    assert export_run(copied, "transformers", verify=False).model_class == "LlavaForConditionalGeneration"


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ExportRefused, match=r"fails in a process of its own: ModuleNotFoundError: .*nowhere"):
        answers_of_process(tmp_path, {"chats": [], "max_new_tokens": 1}, ["nowhere"])


def test_an_error_of_several_lines_is_told_whole():
    code = "raise ImportError('\\nSome class requires some library.\\nInstall it.\\n')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert last_error(process) == "ImportError: Some class requires some library. Install it."


def test_an_adapter_over_a_gguf_base_is_not_compared(tmp_path):
    folder = saved_adapter(tmp_path)
    model = AdapterManifest.read(folder).model.model_dump(mode="json")
    model["llm"]["name"] = "/x/y.gguf"
    change_json(folder / "multimodal.json", model=model)
    with pytest.raises(EngineMissing, match="peft takes folders and Hub names, no GGUF files"):
        adapter_target.answer(folder, [], adapter_target.Options(), 4)
