import json

import pytest
from tiny import CHATML, fresh_tokenizer, tiny_llm, tiny_picture, tiny_recipe

import finetune
from finetune.common.errors import ArtifactError, DataError, MediaError, ModelError, TrainingError
from finetune.model.language_model import PLAIN_TEMPLATE
from finetune.model.tokenize import answer_ends
from finetune.training.bad_rows import SKIPPED, FiniteGradients

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return finetune.train(finetune.load_recipe(tiny_recipe(folder)), folder / "run").path


def test_an_answer_ends_on_the_token_that_was_learned_to_end_it():
    tokenizer = fresh_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as base models with ChatML have it
    tokenizer.chat_template = CHATML
    generation = tiny_llm().generation_config
    generation.eos_token_id = [5, 7]
    ends = answer_ends(tokenizer, generation)
    assert set(ends) == {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")} | {5, 7}


def test_an_answer_under_the_plain_template_ends_on_the_end_of_text():
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    generation = tiny_llm().generation_config
    generation.eos_token_id = None
    assert answer_ends(tokenizer, generation) == [tokenizer.eos_token_id]


def test_an_adapter_cannot_ask_for_foreign_code(run, tmp_path):
    content = json.loads((run / "adapter" / "multimodal.json").read_text())
    assert content["model"]["llm"]["trust_remote_code"] is False
    content["model"]["llm"]["trust_remote_code"] = True
    loaded = []

    def load_components(model, *others):
        loaded.append(model.llm)
        raise ArtifactError("far enough")

    (tmp_path / "multimodal.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.model.load.load_components", load_components)
        with pytest.raises(ArtifactError, match="far enough"):
            finetune.load(tmp_path)
    assert [llm.trust_remote_code for llm in loaded] == [False]
    with pytest.raises(ArtifactError, match="names no commit"):
        finetune.load(tmp_path, trust_remote_code=True)


def test_an_adapter_folder_answers(run):
    picture = next((run.parent / "data" / "images").iterdir())
    assert isinstance(finetune.load(run / "adapter").answer("What is this?", image=picture, max_new_tokens=3), str)


def test_the_head_cannot_be_a_target(tmp_path):
    recipe = tiny_recipe(tmp_path, adapter={"rank": 2, "targets": ["q_proj", "lm_head"]})
    with pytest.raises(ModelError, match="the output head can't be one"):
        finetune.train(finetune.load_recipe(recipe), tmp_path / "run")


def test_a_run_is_not_resumed_over_other_rows(tmp_path):
    recipe = finetune.load_recipe(tiny_recipe(tmp_path))
    finetune.train(recipe, tmp_path / "run")
    with (tmp_path / "data" / "train.csv").open("a") as file:
        file.write("images/train0.png,blue\n")
    with pytest.raises(TrainingError, match="rows or their media have changed"):
        finetune.train(recipe, tmp_path / "run", resume=True)


def test_float16_that_never_takes_a_step_is_stopped():
    class Optimizer:
        step_was_skipped = True

    class State:
        global_step = 20

    guard = FiniteGradients({}, TrainingError)
    for _ in range(SKIPPED - 1):
        guard.on_step_end(None, State(), None, optimizer=Optimizer())
    with pytest.raises(TrainingError, match="were skipped"):
        guard.on_step_end(None, State(), None, optimizer=Optimizer())


def test_a_run_is_not_resumed_by_another_number_of_processes(run):
    versions = run / "versions.json"
    content = json.loads(versions.read_text())
    assert content["processes"] == 1
    versions.write_text(json.dumps(content | {"processes": 2}))
    with pytest.raises(TrainingError, match="began with 2 processes and can't go on with 1"):
        finetune.train(finetune.load_recipe(run.parent / "recipe.yaml"), run, resume=True)
    versions.write_text(json.dumps(content))


@pytest.mark.parametrize("command", [finetune.evaluate, finetune.merge, finetune.run])
def test_what_is_for_one_process_says_so(command, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="is for one process, not 2"):
        command(run)


def test_the_recipe_s_bounds_of_media_go_with_the_model(tmp_path):
    recipe = finetune.load_recipe(tiny_recipe(tmp_path, media={"max_pixels": 2_000}))
    run = finetune.train(recipe, tmp_path / "run").path
    finetune.merge(run)
    large = tmp_path / "large.png"
    tiny_picture(size=(50, 50)).save(large)
    for folder in ("adapter", "merged"):
        with pytest.raises(MediaError, match="50x50 pixels; at most 2,000 are decoded"):
            finetune.load(run / folder).answer("What is this?", image=large)


def test_a_prompt_longer_than_the_context_is_refused_and_an_answer_ends_with_it(run):
    assistant = finetune.load(run / "adapter")
    assert isinstance(assistant.answer("What is this?", max_new_tokens=10_000), str)
    with pytest.raises(DataError, match="but the LLM reads 256"):
        assistant.answer("What is this? " * 100)


def test_what_cannot_be_asked_is_a_data_error(run):
    assistant = finetune.load(run / "adapter")
    with pytest.raises(MediaError, match="image 1: a int; give a path, bytes of a file, a PIL image"):
        assistant.answer("What?", image=3)
    with pytest.raises(DataError, match="max_new_tokens is 0; write 1 or more"):
        assistant.answer("What?", max_new_tokens=0)
    with pytest.raises(DataError, match="prompt: holds audio, but this model takes image"):
        assistant.answer("What?", audio="sound.wav")
    assert assistant.answer(image=run.parent / "data" / "images" / "test0.png", max_new_tokens=3) is not None


def test_an_empty_prompt_is_a_question(run):
    picture = run.parent / "data" / "images" / "test0.png"
    assert finetune.chat(run, "", picture, max_new_tokens=3) == finetune.load(run).answer(
        "", image=picture, max_new_tokens=3
    )
