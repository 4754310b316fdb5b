"""Heads on the composite: what they read when packed, what they add to the loss, what they say of each label."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from packed import (
    OUTPUTS,
    PICTURE,
    batch_of,
    collator_of,
    composite_with_heads,
    features_of,
    head_scores,
    samples_of,
    shake,
    train_composite,
)
from tiny import COMMON, FAMILIES, FUSIONS

from finetune.common.errors import DataError
from finetune.model.adapter import attach, load_trained, save_trained
from finetune.model.bindings import refuse_reserved
from finetune.model.language_model import decoder_layers
from finetune.model.prompts import PromptBatch, answer_log_probabilities, head_outputs
from finetune.model.row_layout import packs_exactly
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter
from finetune.training.collate import IGNORED
from finetune.training.samples import TokenizedSample
from finetune.training.shared import Shared


def mixed_samples(placeholders: int = 4) -> list[TokenizedSample]:
    """Two that the LLM answers, two for each head."""
    heads = ["", "colour", "price", "colour", "", "price"]
    targets = {"colour": [[1.0, 0, 0], [0, 0, 1.0]], "price": [[2.0], [1.0]]}
    samples = []
    for number, (sample, head) in enumerate(zip(samples_of([9, 6, 12, 7, 8, 10], placeholders), heads, strict=True)):
        sample = replace(sample, loss_weight=1.0 + number / 2)
        if head:
            labels = [IGNORED] * len(sample.labels)
            sample = replace(sample, labels=labels, head=head, target=targets[head].pop(0), group="g")
        samples.append(sample)
    return samples


@pytest.mark.parametrize("family, fusion", list(zip(FAMILIES, cycle(FUSIONS))))  # in turns
def test_a_head_reads_the_same_packed_padded_and_asked_alone(family, fusion):
    model = composite_with_heads(family, fusion)
    samples = mixed_samples(PICTURE[fusion])
    with torch.no_grad():
        padded = dict(head_scores(model, batch_of(samples, range(6), packed=False, heads=OUTPUTS)))
        if packs_exactly(model.causal_lm):
            packed = head_scores(model, batch_of(samples, [3, 0, 1, 2, 5, 4], heads=OUTPUTS))
            for name, order in (("colour", [1, 0]), ("price", [0, 1])):
                torch.testing.assert_close(packed[name], padded[name][order], atol=2e-4, rtol=1e-3)
        for name, numbers in (("colour", [1, 3]), ("price", [2, 5])):
            longest = max(len(samples[i].input_ids) for i in numbers)
            pads = [longest - len(samples[i].input_ids) for i in numbers]
            ids = torch.tensor([[0] * pad + samples[i].input_ids for pad, i in zip(pads, numbers, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            features = {"image": [features_of("image", str(i)) for i in numbers]}
            alone = head_outputs(model, name, PromptBatch(ids, mask, features))
            torch.testing.assert_close(alone, padded[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family, fusion", list(zip(FAMILIES, cycle(reversed(FUSIONS)))))
def test_labels_are_as_likely_as_written_out_one_by_one(family, fusion):
    """Sharing the question's keys and values gives what a whole forward pass of question and answer gives."""
    model = composite_with_heads(family, fusion)
    samples = samples_of([9, 6], PICTURE[fusion])
    questions = [sample.input_ids for sample in samples]
    # One answer is as long as the question is: fusions tell the two apart by their lengths.
    answers = [[5], [7, 9, 11], list(range(20, 20 + max(map(len, questions))))]
    longest = max(map(len, questions))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in questions])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in questions])
    features = {"image": [features_of("image", str(i)) for i in range(2)]}
    log_probabilities = answer_log_probabilities(model, PromptBatch(ids, mask, features), answers)
    assert log_probabilities.shape == (2, 3)
    for i, question in enumerate(questions):
        for j, answer in enumerate(answers):
            whole = torch.tensor([question + answer])
            with torch.no_grad():
                logits = model(
                    whole,
                    features={"image": [features_of("image", str(i))]},
                    attention_mask=torch.ones_like(whole),
                    use_cache=False,
                ).logits[0]
            expected = logits.log_softmax(-1)[len(question) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).sum()
            assert float(log_probabilities[i, j]) == pytest.approx(float(expected), abs=5e-3, rel=1e-4)


HYBRIDS = {  # with another memory than keys and values, and with a window shorter than the question
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "mamba": {"state_size": 4},
    "mistral": {"sliding_window": 6, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_labels_are_as_likely_whatever_an_llm_remembers_by(family, monkeypatch):
    monkeypatch.setitem(
        FAMILIES,
        family,
        (COMMON if family != "mamba" else {"hidden_size": 32, "num_hidden_layers": 2}) | HYBRIDS[family],
    )
    model = composite_with_heads(family)
    question, answers = samples_of([19])[0].input_ids, [[5], [7, 9, 11]]
    ids = torch.tensor([question])
    features = {"image": [features_of("image", "0")]}
    assert model.shares_memory == (family == "mistral")
    log_probabilities = answer_log_probabilities(model, PromptBatch(ids, torch.ones_like(ids), features), answers)
    for place, answer in enumerate(answers):
        whole = torch.tensor([question + answer])
        with torch.no_grad():
            logits = model(whole, features=features, attention_mask=torch.ones_like(whole), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(question) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).sum()
        assert float(log_probabilities[0, place]) == pytest.approx(float(expected), abs=5e-3, rel=1e-4)


def test_nothing_of_a_fusion_stays_on_an_llm_that_is_released():
    model = composite_with_heads(fusion="cross_attention")
    layers = decoder_layers(model.causal_lm)
    assert sum(len(layer._forward_pre_hooks) for layer in layers) > 0
    shared = Shared(None, None, None, model)
    shared.language_model = model.language_model  # loaded
    shared.release()
    assert sum(len(layer._forward_pre_hooks) for layer in layers) == 0


@pytest.mark.parametrize("name", ["type", "values", "train"])
def test_a_head_is_not_called_as_torch_calls_its_own(name):
    with pytest.raises(DataError, match=f"can't be called '{name}'"):
        refuse_reserved(name)


def test_the_mixed_loss_is_the_weighed_sum_by_hand(tmp_path):
    """One step of training reports (tokens' losses + samples' losses, each weighed) / how many there are."""
    model = composite_with_heads()
    samples = mixed_samples()
    rows = [[[number] for number in range(6)]]
    batch = batch_of(samples, range(6), heads=OUTPUTS)
    with torch.no_grad():
        arguments = {"features": batch["features"], "position_ids": batch["position_ids"], "use_cache": False}
        logits = model(batch["input_ids"], **arguments).logits
        losses = -logits[0, :-1].log_softmax(-1).gather(-1, batch["labels"][0, 1:].clamp(min=0)[:, None])[:, 0]
        owner = (batch["position_ids"][0] == 0).cumsum(0)[1:] - 1
        learned = batch["labels"][0, 1:] != IGNORED
        weights = torch.tensor([samples[int(i)].loss_weight for i in owner])
        total = (losses * weights * learned).sum()
        scores = head_scores(model, batch)
        for name, binding in model.bindings.items():
            head = batch["heads"][name]
            part_losses = binding.head.module.loss(
                scores[name], head["targets"], head["groups"], binding.settings, binding.head.options
            )
            total = total + (part_losses * head["weights"]).sum()
    expected = float(total) / (int(learned.sum()) + 4)
    log = run(model, samples, rows, tmp_path)
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-4)


def run(model, samples, rows, folder, trains=("projectors", "heads"), **changes):
    collator = collator_of(samples, heads=OUTPUTS)
    return train_composite(model, folder, trains=trains, rows=rows, collator=collator, **changes)


def test_accumulated_batches_weigh_as_one(tmp_path):
    samples = mixed_samples()
    together, apart = composite_with_heads(), composite_with_heads()
    run(together, samples, [[[number] for number in range(6)]], tmp_path / "a", max_grad_norm=1e9)
    # Price's two samples are of one group: they stay in one row.
    run(apart, samples, [[[0], [1]], [[2], [5]], [[3], [4]]], tmp_path / "b", accumulate=3, max_grad_norm=1e9)
    for (name, one), (_, other) in zip(together.heads.named_parameters(), apart.heads.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=name)


def test_a_row_without_anything_for_the_llm_trains_too(tmp_path):
    log = run(composite_with_heads(), mixed_samples(), [[[1]], [[2], [5]], [[0]]], tmp_path)
    assert len(log) == 3 and all(entry["loss"] > 0 for entry in log)


def test_trained_heads_are_exactly_the_heads_and_survive_saving(tmp_path):
    model = composite_with_heads()
    attach(model, Adapter(rank=2, alpha=4.0))
    shake(model)
    counts = set_trainable(model, ["heads"])
    assert counts == {"heads.colour": 2 * 32 + 3 * 32 + 3, "heads.price": 2 * 32 + 32 + 1}
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"heads"}
    save_trained(model, tmp_path)
    other = composite_with_heads()
    attach(other, Adapter(rank=2, alpha=4.0))
    with torch.no_grad():
        for parameter in other.heads.parameters():
            parameter.add_(1)
    load_trained(other, tmp_path)
    for one, two in zip(model.heads.parameters(), other.heads.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
