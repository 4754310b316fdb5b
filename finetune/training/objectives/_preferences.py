"""What objectives that learn from preferences share: log-probabilities of whole answers, and what is logged of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.training.objectives import BatchLoss

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.training.collate import Batch

PAIR_FIGURES = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
REFERENCE_FIGURES = ("kl",)


@dataclass(frozen=True)
class Answers:
    """The S answers of a batch. `log_probs` (S,): log-probabilities of whole answers, float32, with gradient;
    `reference` (S,): the same as the stage found the weights, None without a reference; `tokens` (S,): of each answer;
    `weights` (S,): of their losses; `roles`: which answer each is; `by_token` (K,): log-probabilities of the tokens;
    `right`: tokens that are the most likely ones; `kl`: half the mean squared log-ratio of a token's probabilities to
    the reference's, in nats, an estimate of the KL divergence of a token (k2, http://joschu.net/blog/kl-approx.html);
    `auxiliary`: as in `BatchLoss`.
    """

    log_probs: "Tensor"
    reference: "Tensor | None"
    tokens: "Tensor"
    weights: "Tensor"
    roles: Sequence[str]
    by_token: "Tensor"
    right: float
    kl: float
    auxiliary: "Tensor | None"

    def of(self, role: str) -> list[int]:
        return [number for number, other in enumerate(self.roles) if other == role]

    @property
    def means(self) -> "Tensor":
        """Mean log-probability of a token of each answer (S,)."""
        return self.log_probs / self.tokens

    @property
    def ratios(self) -> "Tensor":
        """Log-ratios of whole answers to the reference (S,)."""
        assert self.reference is not None
        return self.log_probs - self.reference

    @property
    def cross_entropy(self) -> "Tensor":
        """Mean over the tokens of chosen answers."""
        owners = [
            role == "chosen"
            for role, count in zip(self.roles, self.tokens.tolist(), strict=True)
            for _ in range(int(count))
        ]
        chosen = self.by_token[self.by_token.new_tensor(owners).bool()]
        return -chosen.sum() / max(chosen.numel(), 1)


def answers_of(model: Any, batch: "Batch") -> Answers:
    """Run the model over a batch of compared answers."""
    import torch

    compared = batch["compared"]
    inputs = {key: value for key, value in batch.items() if key not in ("compared", "items", "rollout")}
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    by_token = outputs.log_probs[0].float()
    counts = compared["tokens"]
    sums = torch.stack([own.sum() for own in by_token.split(counts)])
    reference, kl = None, 0.0
    if "reference" in compared:
        before = compared["reference"]
        reference = torch.stack([own.sum() for own in before.split(counts)])
        kl = float((by_token.detach() - before).square().sum()) / 2 / max(len(before), 1)
    return Answers(
        log_probs=sums,
        reference=reference,
        tokens=sums.new_tensor(counts),
        weights=compared["weights"],
        roles=compared["roles"],
        by_token=by_token,
        right=float(outputs.is_top1.sum()),
        kl=kl,
        auxiliary=outputs.aux_loss,
    )


def pair_loss(answers: Answers, losses: "Tensor", rewards: "Tensor", sft_weight: float) -> BatchLoss:
    """The loss of P pairs. `losses` (P,); `rewards` (S,), by which chosen and rejected answers are compared in the log;
    `sft_weight`: of the chosen answers' cross-entropy, a mean over the tokens of the batch.
    """
    chosen, rejected = answers.of("chosen"), answers.of("rejected")
    total = (losses * answers.weights[chosen]).sum()
    if sft_weight:
        total = total + sft_weight * answers.cross_entropy * len(chosen)
    if not chosen:  # a filler row: all weights stay in the graph
        return BatchLoss(total + 0.0 * answers.by_token.sum(), 0, 0.0, 0, auxiliary=answers.auxiliary)
    rewards = rewards.detach()
    better, worse = rewards[chosen], rewards[rejected]
    values = ((better > worse).float(), better - worse, better, worse)
    figures = {name: float(value.mean()) for name, value in zip(PAIR_FIGURES, values, strict=True)}
    figures |= {"kl": answers.kl} if answers.reference is not None else {}
    learned = answers.by_token.numel()
    return BatchLoss(total, len(chosen), answers.right, learned, figures, auxiliary=answers.auxiliary)


def smoothed(margins: "Tensor", label_smoothing: float) -> "Tensor":
    """Negative log-likelihood (P,) of the preferences by the logistic model, where a share of them is wrong."""
    from torch.nn import functional

    right, wrong = -functional.logsigmoid(margins), -functional.logsigmoid(-margins)
    return (1 - label_smoothing) * right + label_smoothing * wrong
