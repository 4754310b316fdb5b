"""An engine's answers with a base are the base's own, batched or not."""

import pytest
import torch
from families import family_folder
from tiny_serving import alone, ask_all, pictures, questions, serving

from finetune.model.assistant import Assistant
from finetune.model.build import build_model, load_components
from finetune.recipe.schema import Base, Model


@pytest.mark.parametrize(
    ("family", "joins_later"), [("llava", True), ("qwen3_vl", False), ("gemma3", False), ("paligemma", False)]
)
def test_answers_are_those_of_each_question_alone(family, joins_later, tmp_path):
    folder = family_folder(family, tmp_path / "published")
    parts = load_components(Model(base=Base(name=str(folder), quantize="none")), {}, 0, torch.device("cpu"))
    model = build_model(parts, None, seed=0, bindings={}, with_encoders=False)
    _only_whole_characters(model, parts.tokenizer)
    model.causal_lm.generation_config.eos_token_id = list(range(100, 140))  # answers of many lengths
    assistant = Assistant(model, parts.tokenizer, parts.placeholders, parts.encoders)
    requests = questions(pictures(tmp_path), 8, tokens=6)
    expected = alone(assistant, requests)
    assert len(set(expected)) > 2
    with serving(assistant, max_batch=4) as engine:
        assert (engine._hosted["tiny"].static == 0) == joins_later
        assert [text.strip() for text, *_ in ask_all(engine, requests)] == expected


def _only_whole_characters(model, tokenizer) -> None:
    """Bytes that are no characters are read otherwise one at a time than together."""
    head = model.get_output_embeddings().weight
    pieces = [tokenizer.decode([token]) for token in range(len(head))]
    with torch.no_grad():
        head[[token for token, text in enumerate(pieces) if not (text.isascii() and text.isalpha())]] = 0
