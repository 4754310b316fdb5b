"""What `finetune check` says before anything is trained."""

import json
import subprocess
import sys
from types import SimpleNamespace

import forked
import numpy
import pytest
import soundfile
from cli import cli
from families import ZOO
from families.recipes import base_recipe
from hub_server import Hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from loopback import asked_of, hub_on_loopback
from tiny import tiny_dataset, tiny_picture, tiny_recipe

import finetune
from finetune.commands._reader import Reader
from finetune.commands.check import TEXT_PART_LOADS, check, refuse_multimodal
from finetune.common.errors import DataError, ModelError, RecipeError
from finetune.data.rows import read_splits
from finetune.data.sample import Medium, Message, Sample
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Limits, Llm, Model
from finetune.training.lengths import estimate
from finetune.training.pack import plan_rows


@pytest.fixture
def held_out(tmp_path):
    """A recipe that holds rows out of one file of 100."""
    tiny_dataset(tmp_path / "data", train=100)
    rows = [{"path": str(tmp_path / "data" / "train.csv"), "task": "classify", "hold_out": 0.1}]
    return tiny_recipe(tmp_path, data=rows, evaluate__limit=None)


def test_few_rows_to_score_are_a_warning_with_the_share_that_is_enough(held_out):
    result = check(held_out)
    assert result.splits["test"].rows == 10
    (warning,) = [text for text in result.warnings if "to score" in text]
    assert "only 10 rows to score" in warning and "hold_out: 0.3 would do" in warning
    assert not [text for text in check(held_out, ["data.0.hold_out=0.3"]).warnings if "to score" in text]


def test_a_limit_is_named_only_where_it_is_too_low(held_out):
    """10 rows are held out: a higher limit gives no more."""
    (warning,) = [text for text in check(held_out, ["evaluate.limit=100"]).warnings if "to score" in text]
    assert "raise evaluate.limit" not in warning and "hold_out: 0.3 would do" in warning
    (warning,) = [text for text in check(held_out, ["evaluate.limit=10"]).warnings if "to score" in text]
    assert "raise evaluate.limit" in warning and "hold_out: 0.3 would do" in warning
    shares = ["evaluate.limit=10", "data.0.hold_out=0.3"]
    (warning,) = [text for text in check(held_out, shares).warnings if "to score" in text]
    assert "raise evaluate.limit" in warning and "hold_out" not in warning


def test_too_few_rows_in_all_are_to_be_added_to(tmp_path):
    tiny_dataset(tmp_path / "data", train=12)
    rows = [{"path": str(tmp_path / "data" / "train.csv"), "task": "classify", "hold_out": 0.2}]
    (warning,) = check(tiny_recipe(tmp_path, data=rows)).warnings[:1]
    assert "; label more: 30 of 12 rows are too many to hold out; or add a source with split: test" in warning


def test_labels_that_only_rows_to_score_have_are_a_warning(tmp_path):
    data = tiny_dataset(tmp_path / "data", train=40)
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text("\n".join(line for line in lines if not line.endswith(("red", "blue"))))
    rows = [{"path": str(data / f"{split}.csv"), "task": "classify", "split": split} for split in ("train", "test")]
    found = [text for text in check(tiny_recipe(tmp_path, data=rows)).warnings if "can't be learned" in text]
    assert found == [
        "no training row has 'red' (2), 'blue' (2), which rows to score have: they can't be learned; label more rows "
        "of them, or leave them out"
    ]


def test_no_row_to_score_is_an_error_before_training(held_out):
    """All rows are of one picture, so that none can be held out."""
    images = held_out.parent / "data" / "images"
    for path in images.iterdir():
        tiny_picture().save(path)
    with pytest.raises(DataError, match=r"no row is held out for test: .*1 set of 100 or more rows.*split: test"):
        check(held_out)
    done = cli("run", held_out, cwd=held_out.parent)
    assert done.returncode == 2 and not (held_out.parent / "runs").exists()


def test_a_stage_whose_rows_are_all_held_out_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "data" / "one.csv").write_text("image,label\nimages/one.png,red\n")
    tiny_picture((1, 2, 3)).save(tmp_path / "data" / "images" / "one.png")
    content = json.loads(recipe.read_text())
    content["data"].append({"path": str(tmp_path / "data" / "one.csv"), "task": "classify", "hold_out": 0.9})
    recipe.write_text(json.dumps(content))
    assert check(recipe).splits["train"].rows == 12
    with pytest.raises(DataError, match=r"train.stages.1.sources: all rows of .*one.csv are held out.*stage tune"):
        check(recipe, ["train.stages.1.sources=[2]"])


def test_steps_are_not_counted_without_all_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.training.lengths._layout", lambda part, medium: None)
    result = check(tiny_recipe(tmp_path, train__tokens_per_batch=4096))
    assert result.stages == () and not any("steps" in warning for warning in result.warnings)
    assert any("steps aren't counted" in note and "image" in note for note in result.notes)


def test_the_longest_recording_is_counted(tmp_path, monkeypatch):
    """Among more samples than are counted, beside samples with more text."""
    model = load_recipe(tiny_recipe(tmp_path)).model
    audio = {"encoders": {"audio": {"kind": "whisper", "name": "x"}}, "projectors": {"audio": {"kind": "linear"}}}
    model = Model.model_validate({"llm": model.llm, **audio})
    samples = []
    for number in range(40):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, numpy.zeros(16000 * (20 if number == 7 else 1)), 16000)
        text = "What is said?" * (1 if number == 7 else 3)
        samples.append(Sample((Message("user", (Medium("audio", path), text)), Message("assistant", ("a",))), "here"))
    exact = estimate(model, samples, Limits())
    monkeypatch.setattr("finetune.training.lengths.COUNTED", 2)
    monkeypatch.setattr("finetune.training.lengths.LONGEST", 2)
    few = estimate(model, samples, Limits())
    assert exact is not None and few is not None and few.longest == exact.longest > 2 * min(exact.lengths)


def test_steps_are_counted_and_what_gives_more_is_enough(tmp_path):
    recipe = tiny_recipe(tmp_path, train__tokens_per_batch=4096)
    result = check(recipe)
    assert [(stage.stage, stage.steps) for stage in result.stages] == [("align", 1), ("tune", 2)]
    (warning,) = [text for text in result.warnings if "optimizer steps" in text]
    assert "1 of align and 2 of tune" in warning and "tokens_per_batch: 128" in warning
    numbers = [int(piece.split(" in ")[0]) for piece in warning.split("epochs: ")[1:]]
    better = ["train.tokens_per_batch=128", *(f"train.stages.{n}.epochs={e}" for n, e in enumerate(numbers))]
    again = check(recipe, better)
    assert min(stage.steps for stage in again.stages) >= 50
    assert not [text for text in again.warnings if "optimizer steps" in text]


def test_numbers_for_auto_are_printed_where_the_encoders_config_is_at_hand(tmp_path):
    tune = {"name": "tune", "trains": ["projectors"], "learning_rate": 0.001, "epochs": "auto"}
    recipe = tiny_recipe(tmp_path, train__tokens_per_batch="auto", train__stages=[tune])
    result = check(recipe)
    lines = str(result).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  tokens_per_batch: 32, the least"))
    assert lines[first + 1] == "  epochs: 9 in stage tune, so that its 12 rows give 108 steps"
    assert lines[first + 2] == "  stage tune: about 108 optimizer steps, 9 epochs of 12 rows"
    assert result.recipe.train.tokens_per_batch == "auto" and not any("steps" in text for text in result.warnings)
    unread = check(recipe, ["model.encoders.image.name=nobody/has-this-encoder"])
    assert unread.numbers == unread.stages == ()
    assert any("chosen when the run begins" in note for note in unread.notes)


def test_estimated_lengths_are_those_of_the_tokens(tmp_path):
    recipe = finetune.load_recipe(tiny_recipe(tmp_path))
    samples = read_splits(recipe.data, recipe.seed).train
    estimated, reader = estimate(recipe.model, samples, recipe.media), Reader(recipe)
    exact = [len(reader.tokens(sample, sample.source).input_ids) for sample in samples]
    assert estimated is not None and not estimated.unknown
    assert sum(estimated.lengths) == pytest.approx(sum(exact), rel=0.05)
    rows = plan_rows(exact, [1.0] * len(exact), capacity=96, epochs=2, seed=1)
    assert check(tmp_path / "recipe.yaml").stages[1].steps == pytest.approx(len(rows), abs=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "vision_config": {},
                "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"},
            },
            r"is a LlavaForConditionalGeneration, with encoders of its own \(vision\).*'lmsys/vicuna-7b-v1.5'",
        ),
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": {}},
            "is a Qwen2VLForConditionalGeneration, with encoders of its own",
        ),
        (
            {"architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon", "vq_config": {}},
            r"is a ChameleonForConditionalGeneration, with encoders of its own \(vq\)",
        ),
        (
            {"architectures": ["VibeVoiceAsr"], "acoustic_tokenizer_encoder_config": {}, "text_config": {}},
            r"is a VibeVoiceAsr, with encoders of its own \(acoustic_tokenizer_encoder\)",
        ),
        ({"architectures": ["FuyuForCausalLM"], "model_type": "fuyu"}, r"encoders of its own \(vision\)"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
            "is a T5ForConditionalGeneration, an encoder and decoder",
        ),
    ],
)
def test_an_llm_with_encoders_of_its_own_is_refused_by_its_config(config, message, tmp_path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=message):
        check(recipe)


def test_without_the_llms_files_steps_are_rough(tmp_path):
    known = check(tiny_recipe(tmp_path))
    result = check(tmp_path / "recipe.yaml", ["model.llm.name=nobody/has-this-llm"])
    assert any("'nobody/has-this-llm'" in note for note in result.notes)
    assert any("steps are rough" in note for note in result.notes)
    for rough, stage in zip(result.stages, known.stages, strict=True):
        assert stage.steps / 2 <= rough.steps <= stage.steps * 2


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """(a Hub that has the tiny recipe's LLM and encoder, the recipe that names them) and an empty cache."""
    recipe = tiny_recipe(tmp_path)
    content = json.loads(recipe.read_text())
    content["model"]["llm"]["name"], content["model"]["encoders"]["image"]["name"] = "someone/llm", "someone/encoder"
    recipe.write_text(json.dumps(content))
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "hub"):
        for name in ("llm", "encoder"):
            hub.add(f"someone/{name}", tmp_path / name)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": tmp_path / "hub", "HF_HUB_OFFLINE": 0}.items():
            monkeypatch.setenv(name, str(value))  # for processes of their own
        yield hub, recipe


def weights_asked_for(hub: Hub) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and "safetensors" in path]


def test_steps_are_counted_from_files_that_are_downloaded_once(on_the_hub, tmp_path):
    hub, recipe = on_the_hub
    result = check(recipe)
    local = check(recipe, [f"model.llm.name={tmp_path / 'llm'}", f"model.encoders.image.name={tmp_path / 'encoder'}"])
    assert result.stages == local.stages and len(result.stages) == 2 and not result.notes
    assert not weights_asked_for(hub)
    hub.requests.clear()
    assert check(recipe).stages == result.stages and not [path for _, path in hub.requests if "resolve" in path]


def test_a_gated_llm_is_asked_for_once(on_the_hub):
    hub, recipe = on_the_hub
    hub.faults["llm/resolve"] = (403, 0)
    result = check(recipe)
    assert any("steps are rough" in note for note in result.notes) and result.stages
    assert len([path for _, path in hub.requests if "llm/resolve" in path]) == 1


@pytest.mark.slow
def test_the_command_counts_steps_and_plans_with_an_empty_cache(on_the_hub, monkeypatch):
    monkeypatch.setattr("finetune.training.plan.apart.LINE_SECONDS", 300.0)  # however busy the machine is
    monkeypatch.setattr("finetune.training.plan.apart.subprocess.Popen", forked.popen)
    hub, recipe = on_the_hub
    done = cli("check", recipe)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first == f"{recipe}: OK" and "aren't counted" not in done.stdout
    assert [line.split(":")[0] for line in lines if "optimizer steps," in line] == ["  stage align", "  stage tune"]
    assert last.startswith("  tiny: 0.5 GiB, fits ")
    assert not weights_asked_for(hub)


def test_without_a_plan_in_time_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.training.plan.apart.LINE_SECONDS", 0.01)
    recipe = tiny_recipe(tmp_path)
    assert cli("check", recipe).stdout.splitlines()[-1] == f"  memory, disk and hours: finetune plan {recipe}"


@pytest.mark.parametrize(
    ("error", "why"),
    [(RepositoryNotFoundError, "the Hub has no such model"), (GatedRepoError, "its owner grants access one by one")],
)
def test_an_llm_that_the_hub_does_not_give_is_a_note_with_its_reason(error, why, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise error("refused", response=SimpleNamespace(status_code=404, headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("finetune.training.lengths.unreachable", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    result = check(tiny_recipe(tmp_path, model__llm={"name": "nobody/misspelled"}))
    assert any(f"isn't known: 'nobody/misspelled': {why}" in note for note in result.notes)


def test_a_base_out_of_reach_is_an_error_before_anything_slow_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "finetune.model.base.existing", None)  # an import of it fails
    recipe = base_recipe(tmp_path, ZOO["llava"], tmp_path / "llava", "image", name="nobody/misspelled")
    with pytest.raises(ModelError, match="base 'nobody/misspelled' isn't in the cache"):
        check(recipe)


@pytest.mark.slow
def test_families_whose_text_part_loads_are_those_of_transformers():
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    loads = set()
    for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        sub_configs = getattr(CONFIG_MAPPING[family], "sub_configs", {}) if family in CONFIG_MAPPING else {}
        encoders = {"vision_config", "audio_config"} & sub_configs.keys()
        if encoders and getattr(transformers, name).config_class is sub_configs.get("text_config"):
            loads.add(family)
    assert loads <= {*TEXT_PART_LOADS} <= loads | {"emu3"}


@pytest.mark.slow
def test_every_multimodal_family_of_transformers_is_refused_and_no_text_only_llm(tmp_path):
    """By the default config of each family."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    multimodal = {
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - multimodal - {"gemma4_assistant"}  # has no default

    def taken(family: str) -> bool:
        (tmp_path / "config.json").write_text(CONFIG_MAPPING[family]().to_json_string())
        try:
            return not list(refuse_multimodal(Llm(name=str(tmp_path))))
        except RecipeError as error:
            return "an encoder and decoder" in str(error) and family in text

    assert len(multimodal) > 100
    assert {family for family in multimodal if taken(family)} == {*TEXT_PART_LOADS} & multimodal | {"mistral4"}
    assert {family for family in text if not taken(family)} == {"moshi"}


def test_a_task_takes_the_only_encoders_medium(tmp_path):
    recipe = tiny_recipe(tmp_path)
    content = json.loads(recipe.read_text())
    model = content["model"]
    model["encoders"] = {"video": {"kind": "video", "name": str(tmp_path / "encoder")}}
    model["projectors"] = {"video": {"kind": "linear"}}
    recipe.write_text(json.dumps(content))
    assert [source.task.media for source in finetune.load_recipe(recipe).data] == [("video",)] * 2
    content["data"][0]["task"] = {"kind": "classify", "media": ["image"]}
    recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"needs an encoder for 'image'.*media: \[video\]"):
        finetune.load_recipe(recipe)


def test_check_imports_no_torch(tmp_path):
    code = (
        f"import sys\nfrom finetune.commands.check import check\nprint(repr(check({str(tiny_recipe(tmp_path))!r})))\n"
    )
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and ": OK\n" in done.stdout, done.stderr
