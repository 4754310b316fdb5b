"""Group relative policy optimization: several answers are sampled to each question, and those with a higher reward than
others to the same question become more likely (Shao et al. 2024, https://arxiv.org/abs/2402.03300).
"""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._policy_losses import LOSSES, SampledTokens, ratios_of
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
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = Field(
        "dapo",
        description="The loss, by trl's names. A mean over tokens of an answer, then answers (grpo); tokens of a "
        "packed row, then rows (bnpo); answers of max_new_tokens each (dr_grpo); all tokens of the step (dapo); sums "
        "of answers (luspo). In place of clipped ratios: ratios as weights (cispo), a sigmoid (sapo), a weight of the "
        "whole answer (vespo).",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token",
        description="Whose probability ratio: of a token, or the geometric mean of those of an answer (sequence), "
        "which is GSPO with loss: grpo, and is meant for luspo; vespo has weights of its own.",
    )
    clip: float = Field(
        0.2, gt=0, lt=1, description="How far a token's probability ratio may fall below 1 before it is clipped."
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="How far it may rise above 1; null: as far as `clip`. With cispo, which needs it, the largest "
        "weight, such as 5.0.",
    )
    sapo_temperature_pos: float = Field(
        1.0, gt=0, description="Steepness of sapo's sigmoid where advantages are positive."
    )
    sapo_temperature_neg: float = Field(1.05, gt=0, description="The same where they are not.")
    vespo_k_pos: float = Field(2.0, ge=0, description="Power of vespo's weight where advantages aren't negative.")
    vespo_lambda_pos: float = Field(3.0, ge=0, description="Exponential decay of that weight.")
    vespo_k_neg: float = Field(3.0, ge=0, description="Power of vespo's weight where advantages are negative.")
    vespo_lambda_neg: float = Field(2.0, ge=0, description="Exponential decay of that weight.")
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "cispo" and self.clip_high is None:
            raise ValueError(
                "loss: cispo needs clip_high, the largest weight of a token: 5.0 is usual; trl's default, `clip`, "
                "gives nearly all tokens the same weight"
            )
        if self.loss == "vespo" and self.corrected:
            raise ValueError("loss: vespo weighs whole answers itself: with sampler: vllm write correction: none")
        return self


def items_of(options: Options, tokens: int, answers: int) -> int:
    """What the loss of a packed row is a sum over, by its answers and their tokens."""
    counts = {"answers": answers, "sums": answers, "longest": answers, "tokens": tokens, "rows": 1}
    return counts[LOSSES[options.loss].mean_over]


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    """As trl's GRPOTrainer. Answers without an advantage have no gradient where `beta` is 0: they may be left out of
    the batch, but count among the items.
    """
    answers, rollout = answers_of(model, batch), batch["rollout"]
    own, counts = answers.by_token, answers.tokens.long()
    tokens = SampledTokens(
        log_probs=own,
        log_ratios=own - rollout.get("before", own.detach()),
        advantages=rollout["advantages"].repeat_interleave(counts, output_size=len(own)),
        counts=counts.tolist(),
    )
    weights = answers.weights.repeat_interleave(counts, output_size=len(own))
    ratios = ratios_of(tokens, options.importance_sampling_level)
    losses, clipped = LOSSES[options.loss].of(tokens, ratios, options)
    figures = dict(rollout["figures"])
    trained = bool(answers.of("sampled"))
    if options.corrected:
        correction = corrections(tokens, rollout.get("before", own.detach()) - rollout["drawn"], options)
        losses = losses * correction
        if trained:
            figures["correction"] = float((correction * weights).sum() / weights.sum())
    if trained and clipped is not None:
        counted = weights / tokens.lengths if options.importance_sampling_level == "sequence" else weights
        figures["clipped"] = float((clipped * counted).sum() / counted.sum())
    if options.beta:
        distance = batch["compared"]["reference"] - own
        # Times the ratio, for an unbiased gradient (https://arxiv.org/abs/2512.02556).
        divergence = (distance.exp() - distance - 1) * ratios
        losses = losses + options.beta * divergence
        if trained:
            figures["kl"] = float((divergence.detach() * weights).sum() / weights.sum())
    losses = losses * weights
    mean_over = LOSSES[options.loss].mean_over
    if mean_over == "answers":
        losses = losses / tokens.lengths
    elif mean_over == "longest":
        losses = losses / options.max_new_tokens
    elif mean_over == "rows":
        losses = losses / max(rollout["tokens"], 1)
    return BatchLoss(
        losses.sum(),
        batch["items"],
        answers.right,
        len(own) * trained,
        figures,
        weight=rollout["answers"],
        auxiliary=answers.auxiliary,
    )


def corrections(tokens: SampledTokens, differences: "Tensor", options: Options) -> "Tensor":
    """What the losses of tokens are multiplied by (K,). `differences` (K,): of their log-probabilities, the model's
    less the sampler's.
    """
    ratios = (tokens.sums(differences) if options.correction.startswith("sequence") else differences).exp()
    if options.correction.endswith("truncate"):
        return ratios.clamp(max=options.correction_limit)
    return ratios.masked_fill(ratios > options.correction_limit, 0.0)
