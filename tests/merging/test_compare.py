"""The measures of a certificate, against what torch and a plain forward give."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packed import shake
from tiny import fresh_tokenizer, part, tiny_encoder, tiny_llm

from finetune.data.sample import Layout, Medium, Message, Sample
from finetune.merging import compare
from finetune.merging.compare import ComparedSamples, Distance, EncodedOnce, distances, head_logits
from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.model.heads import HeadSettings
from finetune.model.run import Run
from finetune.model.tokenize import IGNORED, add_placeholders, tokenize, tokenize_prompt
from finetune.recipe.schema import Adapter

PICTURES = [Medium("image", Path(f"{number}.png"), known_key=str(number)) for number in range(3)]


class View:
    """Media that are known by their features alone: 16 patches, 4 placeholder tokens."""

    def __init__(self):
        self.calls = []

    def layout(self, medium):
        return Layout(16)

    def features(self, medium):
        self.calls.append(medium)
        return torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(int(medium.key)))


def sample_of(question, answer, *media, task="caption"):
    return Sample((Message("user", (*media, question)), Message("assistant", (answer,))), "rows.csv:2", task)


SAMPLES = [
    sample_of("What is this?", "a red square", PICTURES[0]),
    sample_of("Describe the picture.", "blue"),
    sample_of("What?", "a green picture of a square", PICTURES[1], PICTURES[2]),
]


@pytest.fixture(scope="module")
def composite():
    """A composite with LoRA that has learned something; `tokenizer` and `placeholders` are its own."""
    torch.manual_seed(0)
    tokenizer = fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, ["image"], {"image": "<|image|>"})
    model = compose(
        tiny_llm(vocabulary=len(tokenizer)),
        encoders={"image": tiny_encoder()},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", "prefix"),
        placeholder_ids={"image": placeholders["image"].id},
    )
    attach(model, Adapter(rank=4, alpha=8.0))
    shake(model.eval())
    model.requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=tokenizer, placeholders=placeholders)


def comparison_of(composite, samples=SAMPLES, answered=(), **bindings):
    # Without a placement: media are placed as the compared model does.
    components = SimpleNamespace(tokenizer=composite.tokenizer, placeholders=composite.placeholders)
    run = Run(None, SimpleNamespace(evaluate="settings"), components, None, bindings)
    return ComparedSamples(run, samples, answered)


def plain_next_tokens(composite, sample):
    """By one forward over the whole conversation."""
    segments = composite.model.composition.placement.segments_by(View().layout)
    tokens = tokenize(sample, composite.tokenizer, composite.placeholders, segments)
    features = {"image": [View().features(medium) for medium in tokens.media]} if tokens.media else {}
    with torch.no_grad():
        logits = composite.model(torch.tensor([tokens.input_ids]), features=features).logits[0]
    return torch.stack(
        [logits[place - 1] for place, label in enumerate(tokens.labels) if place and label != IGNORED]
    ).log_softmax(-1)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_next_tokens_are_those_of_a_plain_forward_however_many_at_once(batch, composite):
    rows = list(comparison_of(composite).next_tokens(composite.model, View(), batch=batch))
    assert len(rows) == len(SAMPLES)
    for row, sample in zip(rows, SAMPLES, strict=True):
        torch.testing.assert_close(row, plain_next_tokens(composite, sample), atol=1e-4, rtol=1e-4)
        assert row.dtype == torch.float32 and row.exp().sum(-1).allclose(torch.ones(len(row)))


def test_without_the_adapter_they_are_those_of_the_bare_llm(composite):
    comparison = comparison_of(composite)
    bare = list(comparison.next_tokens(composite.model, View(), bare=True))
    with composite.model.language_model.disable_adapter():
        expected = [plain_next_tokens(composite, sample) for sample in SAMPLES]
    for row, other in zip(bare, expected, strict=True):
        torch.testing.assert_close(row, other, atol=1e-4, rtol=1e-4)
    trained = next(comparison.next_tokens(composite.model, View()))
    assert (trained - bare[0]).abs().max() > 0.1


@pytest.mark.parametrize(("bound", "value"), [("POSITIONS", 8), ("LOGITS", 8 * 403), ("POSITIONS", 1)])
def test_of_many_positions_the_first_of_each_sample_are_kept(bound, value, composite, monkeypatch):
    vocabulary = composite.model.config.text_config.vocab_size
    monkeypatch.setattr(compare, bound, value // 403 * vocabulary if bound == "LOGITS" else value)
    most = max(1, 8 // 3 if value > 1 else 0)
    rows = list(comparison_of(composite).next_tokens(composite.model, View()))
    for row, sample in zip(rows, SAMPLES, strict=True):
        assert len(row) == most
        torch.testing.assert_close(row, plain_next_tokens(composite, sample)[:most], atol=1e-4, rtol=1e-4)


def test_batches_keep_the_order_and_never_mix_heads():
    tasks = ["words", "words", "words", "rate", "rate", "words", "mood"]
    samples = [sample_of("What?", str(number), task=task) for number, task in enumerate(tasks)]
    model = SimpleNamespace(heads={"rate": None, "mood": None})
    batches = list(ComparedSamples(None, samples, [])._batches(model, 2))
    assert [(head, [sample.answer for sample in chunk]) for head, chunk in batches] == [
        (None, ["0", "1"]),
        (None, ["2"]),
        ("rate", ["3", "4"]),
        (None, ["5"]),
        ("mood", ["6"]),
    ]


def test_of_a_head_with_weights_its_scores_of_the_question_are_compared(composite, monkeypatch):
    """The model's own head is put off by one that returns what it is given."""
    settings, model, given = HeadSettings(labels=("a", "b")), composite.model, []

    def outputs(model, name, batch):
        given.append((name, batch.input_ids, batch.attention_mask, batch.features))
        return torch.arange(2.0 * len(batch.input_ids)).view(len(batch.input_ids), 2)

    monkeypatch.setattr(compare, "head_outputs", outputs)

    stub = SimpleNamespace(
        heads={"mood": None},
        bindings={"mood": SimpleNamespace(settings=settings)},
        composition=model.composition,
        placement=model.placement,
        config=model.config,
        llm_takes=model.llm_takes,
        language_model=model.language_model,
        get_input_embeddings=model.get_input_embeddings,
    )
    samples = [sample_of("What?", "a", task="mood"), sample_of("What is this?", "b", *PICTURES[:2], task="mood")]
    rows = list(comparison_of(composite, samples).next_tokens(stub, View(), batch=2))
    ((name, ids, mask, features),) = given
    assert name == "mood" and list(features) == ["image"]
    assert torch.equal(torch.cat(features["image"]), torch.cat([View().features(medium) for medium in PICTURES[:2]]))
    segments = model.composition.placement.segments_by(View().layout)
    for number, sample in enumerate(samples):
        prompt = tokenize_prompt(sample.question, composite.tokenizer, composite.placeholders, segments)
        assert ids[number][mask[number].bool()].tolist() == prompt.input_ids
        assert mask[number, -1] == 1  # padded on the left
        torch.testing.assert_close(rows[number], torch.tensor([[0.0, 1.0]]).log_softmax(-1))
    assert set(ids[0][~mask[0].bool()].tolist()) == {composite.tokenizer.pad_token_id}


def test_media_are_counted_and_each_task_has_its_main_metric(composite):
    binding = SimpleNamespace(task=SimpleNamespace(primary="bleu"))
    comparison = comparison_of(composite, caption=binding)
    assert comparison.media == {"image": 3}
    assert comparison.primary == {"caption": "bleu"}


def test_scores_are_rounded_and_those_that_these_rows_lack_are_none(composite, monkeypatch):
    states = []

    def answers_to(assistant, samples, settings, view):
        states.append(any(module.disable_adapters for module in composite.model.modules() if hasattr(module, "lora_A")))
        assert (assistant.model, assistant.tokenizer) == (composite.model, composite.tokenizer)
        assert (samples, settings, view.layout(PICTURES[0])) == (SAMPLES[:1], "settings", Layout(16))
        return ["an answer"]

    def scored(bindings, samples, answers):
        assert (bindings, samples, answers) == ({"caption": 1}, SAMPLES[:1], ["an answer"])
        return {"caption": {"bleu": 0.123456, "recall": math.nan}}

    monkeypatch.setattr(compare, "answers_to", answers_to)
    monkeypatch.setattr(compare, "scored", scored)
    features = SimpleNamespace(encoders={}, limits=None)
    comparison = comparison_of(composite, answered=SAMPLES[:1], caption=1)
    for bare in (False, True):
        scores = comparison.scores(composite.model, features, View(), bare=bare)
        assert scores == {"caption": {"bleu": 0.1235, "recall": None}}
    comparison.scores(composite.model, features, View())
    assert states == [False, True, False]
    assert comparison_of(composite).scores(composite.model, features, View()) is None


def test_a_medium_is_encoded_once():
    view = View()
    once = EncodedOnce(view)
    assert once.layout(PICTURES[0]) == Layout(16)
    first = once.features(PICTURES[0])
    assert once.features(PICTURES[0]) is first and torch.equal(first, View().features(PICTURES[0]))
    assert not torch.equal(once.features(PICTURES[1]), first)
    assert view.calls == PICTURES[:2]


def distributions(count, width=50, seed=0, spread=3.0):
    return (spread * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def measured(ours, theirs):
    return distances([ours], [theirs], [theirs])


def test_the_divergence_is_torchs_a_position():
    ours, theirs, base = distributions(7), distributions(7, seed=1), distributions(7, seed=2)
    cut = [3, 4]
    measures = distances(ours.split(cut), theirs.split(cut), base.split(cut), {"task": {"f1": 0.5}})
    kl = torch.nn.functional.kl_div
    expected = kl(ours, theirs, log_target=True, reduction="sum") / 7
    assert measures.kl == pytest.approx(expected.item(), rel=1e-5)
    expected = kl(ours, base, log_target=True, reduction="sum") / 7
    assert measures.kl_from_base == pytest.approx(expected.item(), rel=1e-5)
    assert measures.scores == {"task": {"f1": 0.5}}


def test_a_model_is_at_no_distance_from_itself():
    row = distributions(5)
    measures = distances([row], [row], [row])
    assert (measures.kl, measures.agreement, measures.largest_logit_difference) == (0, 1, 0)
    assert measures.kl_from_base == 0 and measures.scores is None


def test_each_sample_has_its_counterpart():
    row = distributions(5)
    for rows in ([row], [row, row, row]):
        with pytest.raises(ValueError, match="argument"):
            distances(rows, [row, row], [row, row])


def test_rounding_gives_no_negative_divergence():
    row = distributions(5)
    assert measured(row + 1e-7, row).kl == 0


def test_the_agreement_is_the_share_of_equal_most_likely_tokens():
    theirs = torch.eye(4).mul(5).log_softmax(-1)
    ours = theirs.clone()
    ours[3] = ours[3].roll(1)
    assert measured(ours, theirs).agreement == 0.75


def test_the_largest_difference_is_among_likely_tokens_of_all_samples():
    theirs = torch.tensor([[0.5, 0.4999, 5e-5, 5e-5]]).log()
    near, far = theirs.clone(), theirs.clone()
    near[0, 2] -= 7  # of a token that the reference gives less than one in ten thousand
    near[0, 1] -= 0.25
    far[0, 0] += 0.5
    assert measured(near, theirs).largest_logit_difference == pytest.approx(0.25, abs=1e-5)
    for order in ([near, far], [far, near]):
        measures = distances(order, [theirs, theirs], [theirs, theirs])
        assert measures.largest_logit_difference == pytest.approx(0.5, abs=1e-5)
    likely = torch.tensor([[0.9998, 2e-4]]).log()
    assert measured(likely - torch.tensor([0, 3.0]), likely).largest_logit_difference == pytest.approx(3, abs=1e-5)


def test_a_model_that_gives_no_numbers_is_infinitely_far():
    theirs = distributions(2)
    broken = torch.full_like(theirs, math.nan)
    for rows in ([broken, theirs], [theirs, broken]):
        measures = distances(rows, [theirs, theirs], [theirs, theirs])
        assert measures.kl == measures.kl_from_base == math.inf
    assert measures.largest_logit_difference == math.inf
    distance = Distance()
    distance.add(broken, theirs)
    distance.add(theirs, theirs)
    assert math.isnan(distance.divergence)


def test_tokens_that_one_vocabulary_lacks_or_the_reference_excludes_do_not_count():
    theirs = distributions(3)
    wider = torch.cat([theirs, torch.full((3, 2), -50.0)], 1)
    assert measured(wider, theirs).kl == measured(theirs, wider).kl == 0
    excluded = torch.cat([theirs, torch.full((3, 1), -math.inf)], 1)
    assert measured(wider, excluded).kl == 0


def test_a_choice_of_labels_has_the_heads_own_probabilities():
    scores = torch.tensor([1.0, -2.0, 0.5])
    one = head_logits(scores, HeadSettings(labels=("a", "b", "c")))
    torch.testing.assert_close(one.softmax(-1), scores.softmax(-1)[None])
    several = head_logits(scores, HeadSettings(labels=("a", "b", "c"), several=True))
    torch.testing.assert_close(several.softmax(-1)[:, 0], scores.sigmoid())


def test_a_number_is_a_bell_of_a_tenth_of_a_deviation():
    """The divergence of two normal distributions of one deviation: (difference / deviation)^2 / 2."""
    settings = HeadSettings(mean=3.0, deviation=2.0)

    def distribution(value):
        return head_logits(torch.tensor([value]), settings).log_softmax(-1)

    assert distribution(0.0).shape == (1, 161)
    for value in (0.3, 2.0):
        assert measured(distribution(value), distribution(0.0)).kl == pytest.approx((value / 0.1) ** 2 / 2, rel=1e-3)
    for beyond, bound in ((20.0, 8.0), (-20.0, -8.0)):
        assert torch.equal(distribution(beyond), distribution(bound))
        assert distribution(bound).argmax() == (160 if bound > 0 else 0)
