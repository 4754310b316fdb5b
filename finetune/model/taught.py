"""Next-token distributions of a teacher, as few numbers a token, and how far a student is from them.

Shapes:  K tokens   V size of a vocabulary   k likeliest tokens that are kept of it
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Taught:
    """Of K tokens, softened by `temperature`: `ids` (K, k), int64, and `log_probs` (K, k), float32, of the teacher's
    likeliest tokens, the likeliest first; `rest` (K,), float32: the log of the probability of all others together,
    -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, temperature: float, likeliest: int, vocabulary: int) -> "Taught":
        """From logits (K, V), float32. Tokens from `vocabulary` on, which a student may lack, are among the others."""
        log_probs = (logits / temperature).log_softmax(-1)
        kept, ids = log_probs[:, :vocabulary].topk(min(likeliest, vocabulary, log_probs.shape[1]))
        return cls(ids, kept, _rest(log_probs, ids), temperature)

    def divergence(self, logits: Tensor) -> Tensor:
        """The KL divergence of a student's logits (K, V), float32, from these, in nats, summed over K. What isn't kept
        of the teacher counts as one token more: the divergence is then at most that of the whole distributions, and
        equal to it where all tokens are kept.
        """
        log_probs = (logits / self.temperature).log_softmax(-1)
        total = (self.log_probs.exp() * (self.log_probs - log_probs.gather(-1, self.ids))).sum()
        if self.ids.shape[1] < log_probs.shape[1]:
            others = self.rest.exp()
            total = total + (torch.xlogy(others, others) - others * _rest(log_probs, self.ids)).sum()
        return total

    def agreement(self, logits: Tensor) -> Tensor:
        """On how many of K the most likely tokens are equal."""
        return (logits.argmax(-1) == self.ids[:, 0]).sum()


def _rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """The log of what is left of each distribution (K, V) without `ids` (K, k): (K,)."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
