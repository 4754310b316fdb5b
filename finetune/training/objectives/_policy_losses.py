"""Losses of sampled answers, token by token, by the names of trl's GRPOTrainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SampledTokens:
    """The K tokens of S answers, one after another. `log_probs`, `log_ratios` (K,): under the weights as they are, and
    their differences from those under the weights that sampled the answers, with gradient; `advantages` (K,): of their
    answers; `counts`: tokens of each answer.
    """

    log_probs: "Tensor"
    log_ratios: "Tensor"
    advantages: "Tensor"
    counts: list[int]

    def sums(self, values: "Tensor") -> "Tensor":
        """The sum of `values` (K,) over its answer, at each token (K,)."""
        import torch

        return torch.cat([own.sum().expand(len(own)) for own in values.split(self.counts)])

    @property
    def lengths(self) -> "Tensor":
        """Tokens of its answer, at each token (K,)."""
        return self.sums(self.log_probs.new_ones(len(self.log_probs)))


Losses: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Losses (K,), and which of them were clipped; None where nothing is."""


def ratios_of(tokens: SampledTokens, level: str) -> "Tensor":
    """Probability ratios (K,) to the weights that sampled: of each token, or, with "sequence", their geometric mean
    over the answer (GSPO, https://arxiv.org/abs/2507.18071).
    """
    mean = tokens.sums(tokens.log_ratios) / tokens.lengths
    return (mean if level == "sequence" else tokens.log_ratios).exp()


def clipped(tokens: SampledTokens, ratios: "Tensor", options: Any) -> Losses:
    """No gradient beyond `clip` and `clip_high` (https://arxiv.org/abs/1707.06347)."""
    advantages = tokens.advantages
    low, high = 1 - options.clip, 1 + (options.clip if options.clip_high is None else options.clip_high)
    losses = -(ratios * advantages).minimum(ratios.clamp(low, high) * advantages)
    return losses, ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))


def cispo(tokens: SampledTokens, ratios: "Tensor", options: Any) -> Losses:
    """The ratio is a weight of at most `clip_high`, without a gradient (https://arxiv.org/abs/2506.13585)."""
    losses = -ratios.detach().clamp(max=options.clip_high) * tokens.advantages * tokens.log_probs
    return losses, (ratios > options.clip_high) & (tokens.advantages > 0)


def sapo(tokens: SampledTokens, ratios: "Tensor", options: Any) -> Losses:
    """A sigmoid around 1 in place of the clip (https://arxiv.org/abs/2511.20347)."""
    positive = tokens.advantages > 0
    temperatures = positive * options.sapo_temperature_pos + ~positive * options.sapo_temperature_neg
    return -4 / temperatures * (temperatures * (ratios - 1)).sigmoid() * tokens.advantages, None


def vespo(tokens: SampledTokens, ratios: "Tensor", options: Any) -> Losses:
    """The weight of an answer, without a gradient, is w^k exp(λ (1 - w)), where w is the ratio of the whole answer
    (https://arxiv.org/abs/2602.10693). The bounds are trl's.
    """
    import torch

    whole = tokens.sums(tokens.log_ratios.detach().clamp(-20, 20)).clamp(-18.420680743952367, 20)  # ln 1e-8
    positive = tokens.advantages >= 0
    power = torch.where(positive, options.vespo_k_pos, options.vespo_k_neg)
    decay = torch.where(positive, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    weights = (decay + power * whole - decay * whole.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
    return -weights * tokens.advantages * tokens.log_probs, None


@dataclass(frozen=True)
class PolicyLoss:
    """`of`: the losses of tokens. `mean_over`: "tokens" of the step; its "answers", of which each is the mean of its
    tokens; "sums" of answers; "longest": answers of `max_new_tokens` each; "rows" of the step, likewise means.
    """

    of: Callable[[SampledTokens, "Tensor", Any], Losses]
    mean_over: str


LOSSES = {
    "grpo": PolicyLoss(clipped, "answers"),
    "bnpo": PolicyLoss(clipped, "rows"),
    "dr_grpo": PolicyLoss(clipped, "longest"),
    "dapo": PolicyLoss(clipped, "tokens"),
    "cispo": PolicyLoss(cispo, "tokens"),
    "sapo": PolicyLoss(sapo, "answers"),
    "luspo": PolicyLoss(clipped, "sums"),
    "vespo": PolicyLoss(vespo, "tokens"),
}
