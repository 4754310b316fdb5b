"""Losses of preferences beside trl's own, on one text-only model and the same rows."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from packed import collator_of, shake, tokenized_sample
from tiny import tiny_composite, tiny_tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from finetune.model.adapter import attach
from finetune.model.row_layout import RowKind
from finetune.model.row_plan import by_segments
from finetune.recipe.parts import ObjectivePart
from finetune.recipe.schema import Adapter
from finetune.training.reference import Reference

KINDS = [RowKind.SHARED, RowKind.SEGMENTS, RowKind.PADDED]
# (prompt, chosen, rejected) as token ids; and one question with two answers of one token
PAIRS = [
    ([5, 6, 7, 8], [20, 21, 22], [30, 31, 32, 33, 34]),
    ([9, 10, 11], [40, 41, 42, 43], [44, 45]),
    ([12, 13, 14, 15, 16], [50], [51]),
]


def answer(prompt, ids, role, group):
    return tokenized_sample(prompt + ids, [-100] * len(prompt) + ids, role=role, group=str(group))


def pairs():
    return [
        answer(prompt, ids, role, number)
        for number, (prompt, chosen, rejected) in enumerate(PAIRS)
        for role, ids in (("chosen", chosen), ("rejected", rejected))
    ]


VERDICTS = [True, False, True]


def labelled_answers():
    samples = []
    for number, (prompt, own, _) in enumerate(PAIRS):
        role = "desirable" if VERDICTS[number] else "undesirable"
        samples += [answer(prompt, own, role, number), answer(prompt, PAIRS[number - 1][1], "other", number)]
    return samples


class Ours:
    """A composite whose reference was taken before its LoRA was changed."""

    def __init__(self, samples, kind, folder, family="llama"):
        torch.manual_seed(0)
        self.model = tiny_composite(family)
        self.base = deepcopy(self.model.causal_lm)
        attach(self.model, Adapter(rank=2, alpha=4.0))
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy", "is_top1"))
        self.collator = collator_of(samples, kind=kind)
        self.row = [[2 * number, 2 * number + 1] for number in range(len(samples) // 2)]
        reference = Reference(folder / "reference.safetensors", "", self.model, self.collator)
        self.collator.reference = reference.log_probs([self.row], nullcontext(), resumed=False)
        shake(self.model)
        self.model.train()

    def loss(self, kind, routed=False, **options):
        part = ObjectivePart.of(kind, **options)
        batch = self.collator([{"groups": self.row, "filler": False}]) | {"output_router_logits": routed}
        if not part.reference:
            batch["compared"].pop("reference")
        with by_segments(self.model.causal_lm) if "row_plan" in batch else nullcontext():
            return part.module.loss(self.model, self.model, batch, part.options)

    @property
    def policy(self):
        return deepcopy(self.model.language_model).merge_and_unload()


def text_rows(**columns):
    return Dataset.from_dict({name: [value] * 3 for name, value in columns.items()})


def dpo_trainer(ours, folder, **options):
    return DPOTrainer(
        model=ours.policy,
        ref_model=ours.base,
        args=DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_dropout=False, **options
        ),
        train_dataset=text_rows(prompt="a", chosen="b", rejected="c"),
        processing_class=tiny_tokenizer(),
    )


def trl_dpo(ours, folder, rows=PAIRS, **options):
    trainer = dpo_trainer(ours, folder, **options)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])
    return trainer._compute_loss(trainer.model, batch, False).item(), trainer._metrics["train"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, theirs", [({}, {}), ({"sft_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]})]
)
def test_dpo_is_trl_s(kind, options, theirs, tmp_path):
    ours = Ours(pairs(), kind, tmp_path)
    found = ours.loss("dpo", beta=0.3, **options)
    expected, metrics = trl_dpo(ours, tmp_path / "trl", beta=0.3, **theirs)
    assert found.items == 3 and found.total.item() / 3 == pytest.approx(expected, abs=1e-5)
    for name, trl in {
        "accuracy": "accuracies",
        "margin": "margins",
        "chosen": "chosen",
        "rejected": "rejected",
    }.items():
        assert found.figures[f"reward_{name}"] == pytest.approx(metrics[f"rewards/{trl}"][0], abs=1e-5)
    assert found.figures["reward_margin"] != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ipo_is_trl_s(kind, tmp_path):
    ours = Ours(pairs(), kind, tmp_path)
    expected, _ = trl_dpo(ours, tmp_path / "trl", beta=0.3, loss_type="ipo")
    assert ours.loss("ipo", beta=0.3).total.item() / 3 == pytest.approx(expected, abs=1e-5)


def test_smoothed_labels_are_trl_s(tmp_path):
    """trl smooths in `aot`, which for one pair at a time is the same."""
    ours = Ours(pairs(), RowKind.SHARED, tmp_path)
    options = {"beta": 0.3, "label_smoothing": 0.2}
    expected = [trl_dpo(ours, tmp_path / "trl", [row], loss_type="aot", **options)[0] for row in PAIRS]
    assert ours.loss("dpo", **options).total.item() == pytest.approx(sum(expected), abs=1e-5)


def mean_log_probs(ours):
    """Of chosen and of rejected answers, by the policy over each alone."""
    policy = ours.policy.eval()
    found = []
    for place in (1, 2):
        values = []
        for row in PAIRS:
            ids = torch.tensor([row[0] + row[place]])
            with torch.no_grad():
                log_probs = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            values.append(log_probs[-len(row[place]) :].mean())
        found.append(torch.stack(values))
    return found


def test_simpo_is_trl_s(tmp_path):
    ours = Ours(pairs(), RowKind.SHARED, tmp_path)
    trl = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        loss_type="simpo",
        simpo_gamma=0.7,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, better, worse = CPOTrainer.cpo_loss(trl, *mean_log_probs(ours))
    found = ours.loss("simpo", beta=2.0, gamma=0.7, label_smoothing=0.1)
    assert found.total.item() / 3 == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found.figures["reward_margin"] == pytest.approx((better - worse).mean().item(), abs=1e-5)


def test_orpo_is_trl_s(tmp_path):
    """Its odds are trl's; its cross-entropy is that of the chosen answers, while trl's counts their prompts too."""
    ours = Ours(pairs(), RowKind.SHARED, tmp_path)
    chosen, rejected = mean_log_probs(ours)
    trl = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    odds = ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)[0]
    sizes = torch.tensor([len(row[1]) for row in PAIRS])
    expected = -(chosen * sizes).sum() / sizes.sum() - odds.mean()
    assert ours.loss("orpo", beta=0.4).total.item() / 3 == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kto_is_trl_s(kind, tmp_path):
    ours = Ours(labelled_answers(), kind, tmp_path)
    found = ours.loss("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    trainer = KTOTrainer(
        model=ours.policy,
        ref_model=ours.base,
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=0.3,
            desirable_weight=1.3,
            undesirable_weight=0.8,
            disable_dropout=False,
        ),
        train_dataset=text_rows(prompt="a", completion="b", label=True),
        processing_class=tiny_tokenizer(),
    )
    rows = [
        {"prompt_ids": row[0], "completion_ids": row[1], "KL_completion_ids": PAIRS[n - 1][1], "label": VERDICTS[n]}
        for n, row in enumerate(PAIRS)
    ]
    expected = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False).item()
    assert found.items == 3 and found.total.item() / 3 == pytest.approx(expected, abs=1e-5)
    assert found.figures["kl_of_others"] == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-5)
    assert found.figures["reward_desirable"] == pytest.approx(trainer._metrics["train"]["rewards/chosen"][0], abs=1e-5)


@pytest.mark.parametrize("kind", [RowKind.SEGMENTS, RowKind.PADDED])
def test_the_auxiliary_loss_of_routers_is_trl_s(kind, tmp_path):
    ours = Ours(pairs(), kind, tmp_path, "mixtral")
    with_it, without = (trl_dpo(ours, tmp_path / str(c), router_aux_loss_coef=c)[0] for c in (0.7, 0.0))
    found = ours.loss("dpo", routed=True)
    assert found.total.item() / 3 == pytest.approx(without, abs=1e-5)
    assert 0.7 * found.auxiliary.item() == pytest.approx(with_it - without, abs=1e-5) and with_it - without > 0.1
    for other in ("ipo", "simpo", "orpo"):
        assert ours.loss(other, routed=True).auxiliary.item() == pytest.approx(found.auxiliary.item())
    assert Ours(labelled_answers(), kind, tmp_path / "kto", "mixtral").loss("kto", routed=True).auxiliary.requires_grad


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "orpo"])
def test_gradients_behind_a_shared_prefix_are_those_of_padded_rows(objective, tmp_path):
    gradients = []
    for kind in (RowKind.SHARED, RowKind.PADDED):
        ours = Ours(pairs(), kind, tmp_path)
        ours.loss(objective).total.backward()
        gradients.append({name: p.grad for name, p in ours.model.named_parameters() if "lora_" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)
        assert gradient.abs().sum() > 0


def test_an_unchanged_model_has_no_margin_and_no_divergence(tmp_path):
    ours = Ours(pairs(), RowKind.SHARED, tmp_path)
    with torch.no_grad():
        for name, parameter in ours.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = ours.loss("dpo")
    assert found.total.item() / 3 == pytest.approx(0.693147, abs=1e-5)
    assert found.figures["kl"] == pytest.approx(0, abs=1e-9) and found.figures["reward_margin"] == pytest.approx(
        0, abs=1e-6
    )


def test_pairs_about_one_question_may_stand_behind_one_prefix(tmp_path):
    prompt, answers = [5, 6, 7, 8], [[20, 21], [22], [23, 24, 25], [26]]
    samples = [answer(prompt, ids, ("chosen", "rejected")[n % 2], n // 2) for n, ids in enumerate(answers)]
    totals = []
    for row in ([[0, 1], [2, 3]], [[0, 1, 2, 3]]):
        ours = Ours(samples, RowKind.SHARED, tmp_path)
        ours.row = row
        totals.append(ours.loss("dpo").total.item())
    assert totals[0] == pytest.approx(totals[1], abs=1e-6) and totals[0] != pytest.approx(2 * 0.693147, abs=1e-4)
