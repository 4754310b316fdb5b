"""Group relative policy optimization: several answers are sampled to each question, and those with a higher reward than
others to the same question become more likely (Shao et al. 2024, https://arxiv.org/abs/2402.03300).
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._preferences import answers_of

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "prompts"
REFERENCE = False  # answers change from step to step: there is none to be computed once
HEADS = False
FIGURES: tuple[str, ...] = ("reward", "reward_deviation", "no_signal", "answer_tokens", "clipped", "kl", "correction")


class Options(PartOptions):
    answers: int = Field(8, ge=2, description="Answers sampled to each question: the size of a group.")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature of sampling and of the loss.")
    max_new_tokens: int = Field(64, ge=1, description="Length limit of a sampled answer, in tokens.")
    reward: str = Field(
        "good",
        min_length=1,
        description="The task's measure that is the reward: good, by which the task compares answers, or another one, "
        "such as exact_match or json_valid.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Standard deviation that advantages are divided by: of the group, of the step, or none."
    )
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        "dapo",
        description="What the loss is a mean over, by trl's names: tokens of an answer, then answers (grpo); tokens of "
        "a packed row, then rows (bnpo); answers of max_new_tokens each (dr_grpo); all tokens of the step (dapo).",
    )
    clip: float = Field(
        0.2, gt=0, lt=1, description="How far a token's probability ratio may fall below 1 before it is clipped."
    )
    clip_high: float | None = Field(None, gt=0, description="How far it may rise above 1; null: as far as `clip`.")
    iterations: int = Field(1, ge=1, description="Optimizer steps on the same sampled answers.")
    beta: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the weights that the stage began with; 0: none."
    )
    sampler: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What samples the answers: the model that trains, by transformers' generate, or a vLLM server with "
        "its weights, which runs beside it in an environment of its own.",
    )
    sampler_memory: float = Field(0.4, gt=0, lt=1, description="Share of the GPU's memory that vLLM takes.")
    correction: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"] = Field(
        "sequence_mask",
        description="What is done where vLLM's probabilities aren't the model's, by trl's names: losses are multiplied "
        "by the ratio of both, of a token or of the answer (sequence); where it is above `correction_limit` by 0 "
        "(mask), or by the limit (truncate).",
    )
    correction_limit: float = Field(3.0, gt=0, description="The largest of these ratios.")

    @property
    def corrected(self) -> bool:
        """Whether the loss needs log-probabilities by the sampler."""
        return self.sampler == "vllm" and self.correction != "none"


def items_of(options: Options, tokens: int, answers: int) -> int:
    """What the loss of a packed row is a sum over, by its answers and their tokens."""
    return {"grpo": answers, "dr_grpo": answers, "dapo": tokens, "bnpo": 1}[options.loss]


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    """As trl's GRPOTrainer. Answers without an advantage have no gradient where `beta` is 0: they may be left out of
    the batch, but count among the items.
    """
    answers, rollout = answers_of(model, batch), batch["rollout"]
    own, counts = answers.by_token, answers.tokens.long()
    advantages = rollout["advantages"].repeat_interleave(counts, output_size=len(own))
    weights = answers.weights.repeat_interleave(counts, output_size=len(own))
    ratio = (own - rollout.get("before", own.detach())).exp()
    low, high = 1 - options.clip, 1 + (options.clip if options.clip_high is None else options.clip_high)
    losses = -(ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    figures = dict(rollout["figures"])
    trained = bool(answers.of("sampled"))
    if options.corrected:
        correction = corrections(rollout.get("before", own.detach()) - rollout["drawn"], answers.tokens, options)
        losses = losses * correction
        if trained:
            figures["correction"] = float((correction * weights).sum() / weights.sum())
    if trained:
        figures["clipped"] = float((clipped * weights).sum() / weights.sum())
    if options.beta:
        distance = batch["compared"]["reference"] - own
        # Times the ratio, for an unbiased gradient (https://arxiv.org/abs/2512.02556).
        divergence = (distance.exp() - distance - 1) * ratio
        losses = losses + options.beta * divergence
        if trained:
            figures["kl"] = float((divergence.detach() * weights).sum() / weights.sum())
    losses = losses * weights
    if options.loss == "grpo":
        losses = losses / answers.tokens.repeat_interleave(counts, output_size=len(own))
    elif options.loss == "dr_grpo":
        losses = losses / options.max_new_tokens
    elif options.loss == "bnpo":
        losses = losses / max(rollout["tokens"], 1)
    return BatchLoss(
        losses.sum(), batch["items"], answers.right, len(own) * trained, figures, weight=rollout["answers"]
    )


def corrections(differences: "Tensor", counts: "Tensor", options: Options) -> "Tensor":
    """What the losses of tokens are multiplied by (K,). `differences` (K,): of their log-probabilities, the model's
    less the sampler's; `counts` (S,): tokens of each answer.
    """
    if options.correction.startswith("sequence"):
        owner = counts.new_ones(len(counts)).cumsum(0).long() - 1
        owner = owner.repeat_interleave(counts.long(), output_size=len(differences))
        differences = differences.new_zeros(len(counts)).index_add(0, owner, differences)[owner]
    ratios = differences.exp()
    if options.correction.endswith("truncate"):
        return ratios.clamp(max=options.correction_limit)
    return ratios.masked_fill(ratios > options.correction_limit, 0.0)
