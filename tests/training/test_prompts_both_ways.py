"""PaliGemma: prompts are read both ways, answers forward. Compared with transformers' own processor, which gives
`token_type_ids` of 0 in the prompt and 1 in the answer, and its forward.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import conversation
from families.family import write_family
from families.gemma import PALIGEMMA
from families.native import native_inputs, native_model, native_processor

from finetune.data.sample import Medium, Message, Sample
from finetune.model.assistant import FileView
from finetune.model.build import build_model, load_components
from finetune.model.row_layout import RowKind
from finetune.model.row_plan import by_segments
from finetune.model.tokenize import tokenize, tokenize_prompt
from finetune.recipe.schema import Base, Limits, Model
from finetune.training.base_trial import base_row_kind
from finetune.training.collate import Collator
from finetune.training.prefixes import sharing_of
from finetune.training.samples import TokenizedSample, TokenizedSamples

WINDOWED = {"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 16}  # shorter than a picture
FAMILIES = {
    "gemma": PALIGEMMA,
    "gemma2": replace(
        PALIGEMMA, config={**PALIGEMMA.config, "text_config": PALIGEMMA.config["text_config"] | WINDOWED}
    ),
}
ANSWERS = ("a red square", "green", "a square")
KINDS = (RowKind.PADDED, RowKind.SEGMENTS, RowKind.SHARED)


class Opened:
    """A folder of the family as a base; three samples, the first two with the same picture and question."""

    def __init__(self, folder: Path, family) -> None:
        self.folder = write_family(family, folder)
        model = Model(base=Base(name=str(self.folder), quantize="none"))
        self.components = load_components(model, {}, 0, torch.device("cpu"))
        self.model = build_model(self.components, None, seed=0, bindings={}, with_encoders=False)
        self.view = FileView(self.components.encoders, Limits())
        self.segments = self.components.placement.segments_by(self.view.layout)
        self.conversations = [conversation("paligemma", answer=answer) for answer in ANSWERS]
        self.conversations[2][0]["content"][1]["text"] = "Describe the picture."
        self.media = Medium(
            "image", folder / "shown", known_key="shown", content=self.conversations[0][0]["content"][0]["image"]
        )
        tokens = [self.tokens(one) for one in self.conversations]
        self.samples = TokenizedSamples.of(TokenizedSample.of(one, "row") for one in tokens)

    def tokens(self, turns):
        question = (self.media, turns[0]["content"][1]["text"])
        sample = Sample((Message("user", question), Message("assistant", (turns[1]["content"][0]["text"],))), "row")
        return tokenize(sample, self.components.tokenizer, self.components.placeholders, self.segments)

    def batch(self, kind: RowKind, prompts_both_ways: bool = True):
        collator = Collator(
            self.samples, self.view.features, field="features", kind=kind, prompts_both_ways=prompts_both_ways
        )
        groups = [[2], [0, 1]] if kind is RowKind.SHARED else [[2], [0], [1]]
        return collator([{"groups": groups, "filler": False}])

    def states(self, batch, **changes):
        """(tokens of the rows, D)."""
        given = {
            name: batch[name] for name in ("input_ids", "features", "position_ids", "attention_mask") if name in batch
        }
        given |= {name: batch[name] for name in ("row_plan", "token_type_ids") if name in batch}
        with by_segments(self.model.causal_lm) if "row_plan" in batch else nullcontext(), torch.no_grad():
            return self.model.backbone(**given | changes, use_cache=False).last_hidden_state.flatten(0, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    return Opened(tmp_path_factory.mktemp(request.param) / "base", FAMILIES[request.param])


@pytest.fixture(scope="module")
def expected(opened):
    """Logits at the learned tokens of each sample, by transformers."""
    model, processor = native_model(opened.folder), native_processor(opened.folder)
    logits = []
    with torch.no_grad():
        for turns in opened.conversations:
            inputs = native_inputs(processor, turns)
            answered = int(inputs["token_type_ids"].sum())
            logits.append(model(**inputs).logits[0, -answered - 1 : -1])
    return torch.cat([logits[2], logits[0], logits[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_training_rows_are_those_of_transformers(opened, expected, kind):
    batch = opened.batch(kind)
    with by_segments(opened.model.causal_lm) if "row_plan" in batch else nullcontext(), torch.no_grad():
        found = opened.model.label_logits(**batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_sees_nothing_of_its_answer(opened, kind):
    """States of prompts are the same with other answers; they aren't if all tokens were of prompts."""
    batch = opened.batch(kind)
    types = batch["token_type_ids"]
    others = torch.where(types == 1, 20, batch["input_ids"])
    assert int((types == 1).sum()) == int(batch["shift_labels"].numel()) or kind is RowKind.PADDED
    prompts = (types == 0).flatten()
    if "attention_mask" in batch:
        prompts &= batch["attention_mask"].flatten().bool()
    assert torch.equal(opened.states(batch)[prompts], opened.states(batch, input_ids=others)[prompts])
    seen = [opened.states(batch, input_ids=ids, token_type_ids=0 * types) for ids in (batch["input_ids"], others)]
    assert kind is RowKind.SHARED or not torch.allclose(seen[0][prompts], seen[1][prompts])


def test_rows_share_whole_prompts_or_nothing(opened):
    """The picture alone can't be shared, as it sees the question."""
    assert base_row_kind(opened.model, opened.components, [("image",)], share=True, segments=True)[0] is RowKind.SHARED
    assert len(set(sharing_of(opened.samples).group)) == 1  # if attention were causal
    sharing = sharing_of(opened.samples, whole_prompts=True)
    prompt = opened.samples[0].labels.index(opened.samples[0].labels[-opened.samples[0].learned])
    assert list(sharing.group) == [0, 0, 2] and list(sharing.saved)[:2] == [prompt, prompt]
    collator = Collator(
        opened.samples, opened.view.features, field="features", kind=RowKind.SHARED, prompts_both_ways=True
    )
    batch = collator([{"groups": [[0, 2]], "filler": False}])
    assert len(batch["row_plan"].segments) == 2 and len(batch["features"]["image"]) == 2


def test_of_a_conversation_the_last_answer_is_learned(opened):
    turns = (
        Message("user", (opened.media, "What is this?")),
        Message("assistant", ("a square",)),
        Message("user", ("Which colour?",)),
        Message("assistant", ("red",)),
    )
    parts = opened.components
    tokens = tokenize(Sample(turns, "row"), parts.tokenizer, parts.placeholders, opened.segments)
    prompt = tokenize_prompt(turns[:3], parts.tokenizer, parts.placeholders, opened.segments)
    learned = [label for label in tokens.labels if label >= 0]
    assert parts.tokenizer.decode(learned) == "red<eos>"
    assert tokens.input_ids == prompt.input_ids + learned
    assert parts.tokenizer.decode(prompt.input_ids[16:]) == "<bos>What is this?\na square\nWhich colour?\n"
