"""Rows that are too long for a packed row: `check` says so as training does, by the files of tokenizer and encoders."""

import json
import re
from pathlib import Path

import pytest
from tiny import CHATML, tiny_recipe

import finetune
from finetune.common.errors import DataError
from finetune.training.lengths import compiled

LONG = "no idea at all, " * 9
OBJECTIVES = {
    "next_token": "next_token",
    "dpo": "dpo",
    "kto": "kto",
    "grpo": {"kind": "grpo", "answers": 8, "max_new_tokens": 64},
    "distill": {"kind": "distill", "answers": "given"},
}


def asking(folder: Path, objective: str, limit: int, **options) -> Path:
    """Questions about pictures, of uneven length."""
    recipe = tiny_recipe(folder)
    task = {"kind": "answer"} | ({"transcript": "caption"} if objective == "distill" else {})
    for split in ("train", "test"):
        rows = [
            {
                "image": f"images/{split}{number}.png",
                "question": f"What is {number}?" + " Say it." * number,
                "answer": LONG,
                "rejected": LONG + "sorry " * (number + 1),
                "desirable": number % 3 > 0,
                "caption": "a square of one colour, " * 20,
            }
            for number in range(6)
        ]
        text = "\n".join(map(json.dumps, rows))
        (folder / "data" / f"{split}.jsonl").write_text(text)
    data = [
        {"path": str(folder / "data" / f"{split}.jsonl"), "task": task, "split": split} for split in ("train", "test")
    ]
    stage = {"name": "learn", "trains": ["projectors", "adapter"], "learning_rate": 1e-3, "epochs": 1}
    stage["objective"] = OBJECTIVES[objective]
    return tiny_recipe(folder, data=data, train__stages=[stage], train__tokens_per_batch=limit, **options) or recipe


def refusal(begin) -> str:
    with pytest.raises(DataError, match="more than a row holds") as caught:
        begin()
    return str(caught.value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_check_refuses_what_training_refuses_with_the_same_words(objective, tmp_path):
    recipe = finetune.load_recipe(asking(tmp_path, objective, 32))
    if objective != "distill":  # which writes the teacher's texts once the LLM is there
        (tmp_path / "llm" / "model.safetensors").unlink()
    longest, found = 32, ""
    for _ in range(2):  # with each row refused by itself, then by what the objective adds
        begun = recipe.with_(**{"train.tokens_per_batch": longest})
        try:
            finetune.check(begun)
        except DataError as error:
            found = str(error)
            assert found == refusal(lambda begun=begun: finetune.train(begun, tmp_path / "run"))
            longest = max(int(number) for number in re.findall(r"(?:: | have )(\d+)[, ]", found))
    assert "raise train.tokens_per_batch" in found
    finetune.check(recipe.with_(**{"train.tokens_per_batch": longest}))
    with pytest.raises(DataError, match=f"(?s)of 6 training rows can't be used.* {longest}"):
        finetune.check(recipe.with_(**{"train.tokens_per_batch": longest - 1}))


def test_what_is_only_estimated_is_a_warning(tmp_path):
    """How many tiles a picture becomes isn't known from its recipe."""
    recipe = asking(tmp_path, "next_token", 256)
    tiled = ["model.encoders.image.tiles=16", "train.tokens_per_batch=200"]
    (warning,) = [text for text in finetune.check(recipe, tiled).warnings if "too long" in text]
    assert warning.startswith("4 of 6 training rows are likely too long, and the run would refuse them, such as train")


def test_padding_and_truncation_of_the_tokenizer_s_file_are_not_counted(tmp_path):
    """Of a model that was saved with rows filled up to a fixed length."""
    recipe = asking(tmp_path, "next_token", 512)
    file = tmp_path / "llm" / "tokenizer.json"
    settings = json.loads(file.read_text())
    padding = {"strategy": {"Fixed": 2048}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    file.write_text(json.dumps(settings | {"padding": padding}))
    finetune.check(recipe)
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(settings | {"truncation": truncation}))
    with pytest.raises(DataError, match="more than a row holds"):
        finetune.check(recipe, ["train.tokens_per_batch=32"])


@pytest.mark.parametrize("architecture", ["convnext", "swin"])
def test_rows_of_a_backbone_whose_grid_is_not_its_patches_are_no_certainty(architecture, tmp_path):
    recipe = asking(tmp_path, "next_token", 512)
    file = tmp_path / "encoder" / "config.json"
    file.write_text(json.dumps({"model_type": architecture, "patch_size": 4, "depths": [1], "image_size": 224}))
    finetune.check(recipe)


def test_the_llm_s_own_answers_are_not_those_of_the_rows(tmp_path):
    """They may be shorter: what is certain is the question in words."""
    recipe = json.loads(asking(tmp_path, "distill", 256).read_text())
    recipe["train"]["stages"][0]["objective"] = {"kind": "distill", "answers": "own", "max_new_tokens": 4}
    for source in recipe["data"]:
        file = Path(source["path"])
        rows = [json.loads(line) | {"answer": "no idea " * 20, "caption": "a square " * 30} for line in file.open()]
        file.write_text("\n".join(map(json.dumps, rows)))
    recipe_file, limit = tmp_path / "recipe.json", ["train.tokens_per_batch=300"]
    recipe_file.write_text(json.dumps(recipe))
    with pytest.raises(DataError) as refused:
        finetune.check(
            tmp_path / "recipe.json", ["train.stages.0.objective.answers=given", "train.tokens_per_batch=170"]
        )
    assert "more than a row holds" in str(refused.value)
    finetune.check(recipe_file, limit)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- for m in messages -%}{% if loop.first %}{% continue %}{% endif %}\n  {{ m.content|tojson }}{% endfor %}",
        "{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}{{ messages[0]['content'] }}\n",
        "{% if tools is not none %}Tools:{% endif %}{{ messages[0]['content'] }}",
    ],
)
def test_chat_templates_are_rendered_as_transformers_does(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": role, "content": f"<b>'{role}'</b> é"} for role in ("system", "user", "assistant")]
    for messages, prompt in ((turns, False), (turns[:2], True)):
        ((expected,), _) = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
        assert compiled(template).render(messages=messages, add_generation_prompt=prompt) == expected
