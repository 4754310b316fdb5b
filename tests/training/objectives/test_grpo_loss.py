"""The loss of sampled answers beside trl's GRPOTrainer, on one text-only model and the same answers and rewards."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from packed import collator_of, shake, tokenized_sample
from tiny import tiny_composite, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from finetune.model.adapter import attach
from finetune.model.row_layout import RowKind
from finetune.model.row_plan import by_segments
from finetune.recipe.parts import ObjectivePart
from finetune.recipe.schema import Adapter, Stage
from finetune.training.rollouts import Drawn, Rollouts

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
# One of them twice, which is learned as one of twice the weight.
ANSWERS = [[[20, 21, 22], [30, 31, 32, 33, 34], [20]], [[40, 41, 42, 43], [44, 45], [44, 45]]]
DRAWN = [[Drawn(answer) for answer in answers] for answers in ANSWERS]
REWARDS = [[1.0, 0.0, 0.25], [0.0, 0.5, 0.5]]
LONGEST = 7


class Ours:
    """A composite that has changed since its stage began, and has sampled ANSWERS before that."""

    def __init__(self, kind=RowKind.SHARED, rewards=REWARDS, drawn=DRAWN, family="llama", **options):
        torch.manual_seed(0)
        self.model = tiny_composite(family)
        attach(self.model, Adapter(rank=2, alpha=4.0))
        self.base = deepcopy(self.model.language_model).merge_and_unload()
        self.part = ObjectivePart.of("grpo", answers=3, max_new_tokens=LONGEST, **options)
        add_fused_lm_head(self.model, self.part.options.temperature, outputs=("log_probs", "entropy", "is_top1"))
        questions = [tokenized_sample(prompt, [-100] * len(prompt)) for prompt in PROMPTS]
        given = iter([reward for group in rewards for reward in group])
        self.rollouts = Rollouts(
            Stage(name="reward", trains=["adapter"], learning_rate=1e-3, objective=self.part.dump()),
            [Question() for _ in PROMPTS],
            collator_of(questions, kind=kind),
            sampler=lambda questions, options, seed: drawn,
            decode=str,
            reward=lambda sample, answer: next(given),
            seed=1,
        )
        trained = [p for name, p in self.model.named_parameters() if "lora_" in name]
        self.rollouts.begin(trained)
        shake(self.model)
        self.model.train()
        self.step = 0

    def batches(self, rows=([[0], [1]],)):
        """As the model is now at first, then with the same answers."""
        packed = [{"groups": row, "filler": False} for row in rows]
        found = self.rollouts.batches(packed, self.step, self.model, nullcontext())
        self.step += 1
        return found

    def loss(self, batch):
        with by_segments(self.model.causal_lm) if "row_plan" in batch else nullcontext():
            return self.part.module.loss(self.model, self.model, batch, self.part.options)

    @property
    def policy(self):
        return deepcopy(self.model.language_model).merge_and_unload()

    def change(self):
        """As by an optimizer step, so that ratios leave 1."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.25 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


class Question:
    question = ()
    where = "rows.csv:2"


def trl_trainer(policy, base, folder, rewards=REWARDS, beta=0.0, **options):
    """It is given the answers and the reference, and does all else itself."""
    flat = [reward for group in rewards for reward in group]
    trainer = GRPOTrainer(
        model=policy.requires_grad_(True),
        reward_funcs=lambda completions, **columns: flat,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=3,
            per_device_train_batch_size=6,
            max_completion_length=LONGEST,
            disable_dropout=False,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.beta, trainer.ref_model = beta, base
    add_fused_lm_head(base, trainer.temperature)
    answers = [answer for group in ANSWERS for answer in group]
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    trainer._generate = lambda texts: (prompts, answers, None, ["a"] * 6, None, {}, None, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


KINDS = [RowKind.SHARED, RowKind.SEGMENTS, RowKind.PADDED]


KIN = [  # (loss, its options, and trl's where these have another name)
    ("cispo", {"clip_high": 1.05, "epsilon_high": 1.05}),
    ("sapo", {}),
    ("sapo", {"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 5.0}),
    ("luspo", {"importance_sampling_level": "sequence"}),
    ("luspo", {}),
    ("vespo", {}),
    ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 0.5, "vespo_lambda_neg": 0.0}),
    ("grpo", {"importance_sampling_level": "sequence"}),  # GSPO
    ("dapo", {"importance_sampling_level": "sequence"}),
]
PLAIN = {"beta": 0.0, "temperature": 1.0}
WITH_KL = {"beta": 0.3, "temperature": 0.7}
CASES = [
    *((loss, options) for loss in ("grpo", "bnpo", "dr_grpo", "dapo") for options in (PLAIN, WITH_KL)),
    *((loss, options | WITH_KL) for loss, options in KIN),
]


def both(loss, tmp_path, **options):
    """(ours, its batch, trl's trainer, its inputs), where the weights have changed since answers were sampled."""
    theirs = {"epsilon": 0.1, "epsilon_high": 0.15} | options
    theirs.pop("clip_high", None)
    own = {"clip": 0.1, "clip_high": 0.15} | options
    own.pop("epsilon_high", None)
    ours = Ours(loss=loss, iterations=2, **own)
    ours.batches()
    trainer = trl_trainer(ours.policy, ours.base, tmp_path, loss_type=loss, num_iterations=2, **theirs)
    inputs = trainer._generate_and_score_completions([{"prompt": text} for text in "aaabbb"])
    ours.change()
    trainer.model.load_state_dict(ours.policy.state_dict())
    (batch,) = ours.batches()
    return ours, batch, trainer, inputs


@pytest.mark.parametrize("loss, options", CASES)
def test_it_is_trl_s_where_ratios_have_left_1(loss, options, tmp_path):
    ours, batch, theirs, inputs = both(loss, tmp_path, **options)
    found = ours.loss(batch)
    expected = theirs._compute_loss(theirs.model, inputs)
    assert found.total.item() / batch["items"] == pytest.approx(expected.item(), abs=1e-5)
    metrics = theirs._metrics["train"]
    shares = metrics.get("clip_ratio/region_mean") or metrics.get("cispo_clip_ratio")
    assert ("clipped" in found.figures) == bool(shares)
    if shares:
        assert 0.05 < found.figures["clipped"] == pytest.approx(shares[0], abs=1e-6)
    assert found.figures["reward"] == pytest.approx(metrics["reward"][0])
    if options["beta"]:
        assert 1e-3 < found.figures["kl"] == pytest.approx(metrics["kl"][0], abs=1e-5)
    assert abs(expected.item()) > 1e-3
    (found.total / batch["items"]).backward()
    expected.backward()
    assert_gradients_are(ours, theirs)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trl_s_for_answers_of_now(kind, scale, tmp_path):
    """Its first step on them: rewards of one group are all equal, and have no gradient."""
    rewards = [REWARDS[0], [0.5, 0.5, 0.5]]
    ours = Ours(kind, rewards=rewards, loss="grpo", scale_rewards=scale)
    theirs = trl_trainer(ours.policy, ours.base, tmp_path, rewards, loss_type="grpo", scale_rewards=scale)
    inputs = theirs._generate_and_score_completions([{"prompt": text} for text in "aaabbb"])
    theirs._compute_loss(theirs.model, inputs).backward()
    (batch,) = ours.batches()
    found = ours.loss(batch)
    (found.total / batch["items"]).backward()
    assert len(batch["compared"]["tokens"]) == 3 and batch["items"] == 6
    assert found.figures["no_signal"] == 0.5
    if scale != "batch":  # where trl counts all or none
        assert theirs._metrics["train"]["frac_reward_zero_std"] == [0.5]
    assert_gradients_are(ours, theirs)


@pytest.mark.parametrize("kind", [RowKind.SEGMENTS, RowKind.PADDED])
def test_the_auxiliary_loss_of_routers_is_trl_s(kind, tmp_path, monkeypatch):
    """Of answers that differ: equal ones are read once, and their tokens count once in its mean."""
    answers = [ANSWERS[0], [*ANSWERS[1][:2], [46, 47]]]
    monkeypatch.setitem(globals(), "ANSWERS", answers)
    drawn = [[Drawn(answer) for answer in group] for group in answers]
    ours = Ours(kind, family="mixtral", loss="grpo", drawn=drawn)
    found = []
    for coefficient in (0.7, 0.0):
        trainer = trl_trainer(
            ours.policy, ours.base, tmp_path, loss_type="grpo", router_aux_loss_coef=coefficient, scale_rewards="none"
        )
        inputs = trainer._generate_and_score_completions([{"prompt": text} for text in "aaabbb"])
        found.append(trainer._compute_loss(trainer.model, inputs).item())
    (batch,) = ours.batches()
    auxiliary = ours.loss(batch | {"output_router_logits": True}).auxiliary
    assert 0.7 * auxiliary.item() == pytest.approx(found[0] - found[1], abs=1e-5) and found[0] - found[1] > 0.1


def assert_gradients_are(ours, theirs):
    """The gradient of a merged weight W + s B A, sent on to A: s B^T G."""
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}
    checked = 0
    for name, module in ours.model.language_model.named_modules():
        if hasattr(module, "lora_A"):
            whole = gradients[name.removeprefix("base_model.model.") + ".weight"]
            expected = module.scaling["default"] * module.lora_B["default"].weight.T @ whole
            torch.testing.assert_close(module.lora_A["default"].weight.grad, expected, atol=1e-6, rtol=1e-3)
            checked += float(expected.abs().sum()) > 0
    assert checked > 5


@pytest.mark.parametrize("loss, options", KIN)
def test_other_losses_are_other_losses(loss, options, tmp_path):
    """A control: trl's next of kin, on the same answers, is further off than the bound by far."""
    ours, batch, theirs, inputs = both(loss, tmp_path, **options)
    theirs.loss_type, theirs.importance_sampling_level = (
        "dapo" if loss in ("cispo", "dapo", "vespo") else "grpo",
        "token",
    )
    found = ours.loss(batch).total.item() / batch["items"]
    assert abs(found - theirs._compute_loss(theirs.model, inputs).item()) > 1e-3


def test_cispo_needs_its_bound():
    with pytest.raises(ValueError, match="cispo needs clip_high"):
        ObjectivePart.of("grpo", loss="cispo")


def test_vespo_is_not_corrected_twice():
    with pytest.raises(ValueError, match=r"vespo weighs whole answers itself: .* write correction: none"):
        ObjectivePart.of("grpo", loss="vespo", sampler="vllm")
    assert not ObjectivePart.of("grpo", loss="vespo", sampler="vllm", correction="none").options.corrected


def drawn_otherwise():
    """ANSWERS by a sampler whose log-probabilities are up to 1.5 from the model's."""
    exact = Ours(iterations=2)
    exact.batches()
    generator, noise = torch.Generator().manual_seed(5), {}
    for group in exact.rollouts.rows[0]:
        for one in group.answers:  # equal answers have equal ones
            noise.setdefault(tuple(one.tokens), 3 * torch.rand(len(one.tokens), generator=generator) - 1.5)
    return [
        [Drawn(one.tokens, (torch.tensor(one.before) + noise[tuple(one.tokens)]).tolist()) for one in group.answers]
        for group in exact.rollouts.rows[0]
    ]


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"])
@pytest.mark.parametrize("iterations, loss, beta", [(1, "grpo", 0.0), (2, "dapo", 0.3), (2, "sapo", 0.0)])
def test_another_sampler_s_probabilities_are_corrected_as_by_trl(mode, iterations, loss, beta, tmp_path):
    drawn, limit = drawn_otherwise(), 1.5
    ours = Ours(
        drawn=drawn,
        sampler="vllm",
        correction=mode,
        correction_limit=limit,
        loss=loss,
        iterations=iterations,
        beta=beta,
    )
    (batch,) = ours.batches()
    options = {"loss_type": loss, "num_iterations": iterations}
    if mode != "none":
        options["vllm_importance_sampling_mode"] = mode
    theirs = trl_trainer(
        ours.policy, ours.base, tmp_path, beta=beta, vllm_importance_sampling_clip_max=limit, **options
    )
    theirs.use_vllm, theirs.vllm_importance_sampling_correction = True, mode != "none"
    log_probs = [list(one.log_probs) for group in drawn for one in group]
    generated = theirs._generate([])
    theirs._generate = lambda texts: (*generated[:4], log_probs, *generated[5:])
    inputs = theirs._generate_and_score_completions([{"prompt": text} for text in "aaabbb"])
    if iterations > 1:
        ours.change()
        theirs.model.load_state_dict(ours.policy.state_dict())
        (batch,) = ours.batches()
    found = ours.loss(batch)
    expected = theirs._compute_loss(theirs.model, inputs)
    assert found.total.item() / batch["items"] == pytest.approx(expected.item(), abs=1e-5)
    uncorrected = ours.part.options.model_copy(update={"correction": "none"})
    if mode != "none":
        with by_segments(ours.model.causal_lm):
            without = ours.part.module.loss(ours.model, ours.model, batch, uncorrected)
        assert abs(without.total.item() - found.total.item()) > 1e-2
        assert 0 < found.figures["correction"] != 1


def test_a_row_without_signal_is_a_step_without_gradient():
    ours = Ours(rewards=[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    (batch,) = ours.batches()
    found = ours.loss(batch)
    found.total.backward()
    assert found.total.item() == 0 and batch["items"] == sum(len(answer) for group in ANSWERS for answer in group)
    assert found.figures == {
        "reward": 0.5,
        "reward_deviation": 0.0,
        "no_signal": 1.0,
        "answer_tokens": pytest.approx(17 / 6),
    }
    gradients = [p.grad for name, p in ours.model.named_parameters() if "lora_" in name]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "luspo", "vespo"])
def test_a_step_of_several_rows_is_that_of_one_row(loss):
    one, several = Ours(loss=loss), Ours(loss=loss)
    (batch,) = one.batches()
    expected = one.loss(batch)
    several.rollouts.sampler = lambda questions, options, seed, left=[*DRAWN]: [left.pop(0)]
    batches = several.batches([[[0]], [[1]]])
    found = [several.loss(batch) for batch in batches]
    assert sum(batch["items"] for batch in batches) == batch["items"]
    torch.testing.assert_close(found[0].total + found[1].total, expected.total)
