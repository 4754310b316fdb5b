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


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- for m in messages -%}{% if loop.first %}{% continue %}{% endif %}\n  {{ m.content|tojson }}{% endfor %}",
        "{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}{{ messages[0]['content'] }}\n",
    ],
)
def test_chat_templates_are_rendered_as_transformers_does(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": role, "content": f"<b>'{role}'</b> é"} for role in ("system", "user", "assistant")]
    for messages, prompt in ((turns, False), (turns[:2], True)):
        ((expected,), _) = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
        assert compiled(template).render(messages=messages, add_generation_prompt=prompt) == expected
