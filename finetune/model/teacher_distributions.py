"""Next-token distributions of a teacher, truncated to the top k tokens, and a student's KL divergence from them.

Shapes:  K tokens   V size of a vocabulary   k most likely tokens, which are stored
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherDistributions:
    """At K tokens, softened by `temperature`: `ids` (K, k), int64, and `log_probs` (K, k), float32, of the teacher's
    most likely tokens in descending order; `rest` (K,), float32: the log of the total probability of all others, -inf
    where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, temperature: float, top_k: int, vocabulary: int) -> "TeacherDistributions":
        """From logits (K, V), float32. Tokens from `vocabulary` on, which a student may lack, are among the others."""
        log_probs = (logits / temperature).log_softmax(-1)
        kept, ids = log_probs[:, :vocabulary].topk(min(top_k, vocabulary, log_probs.shape[1]))
        return cls(ids, kept, _rest(log_probs, ids), temperature)

    def divergence(self, logits: Tensor) -> Tensor:
        """The KL divergence of a student's logits (K, V), float32, from these, in nats, summed over K. All tokens
        beyond the top k count as one: the divergence is at most that of the whole distributions, and equal to it where
        k is the size of the vocabulary.
        """
        log_probs = (logits / self.temperature).log_softmax(-1)
        total = (self.log_probs.exp() * (self.log_probs - log_probs.gather(-1, self.ids))).sum()
        if self.ids.shape[1] < log_probs.shape[1]:
            others = self.rest.exp()
            total = total + (torch.xlogy(others, others) - others * _rest(log_probs, self.ids)).sum()
        return total

    def agreement(self, logits: Tensor) -> Tensor:
        """At how many of the K tokens the most likely ones are equal."""
        return (logits.argmax(-1) == self.ids[:, 0]).sum()


def _rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """The log of the total probability (K,) of each distribution (K, V) without `ids` (K, k)."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
