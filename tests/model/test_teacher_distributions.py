"""A teacher's distributions, against the divergence written out."""

import pytest
import torch
from torch.nn import functional

from finetune.model.teacher_distributions import TeacherDistributions

LOGITS = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) * 3
STUDENT = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)) * 3


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Of probabilities (K, V), summed over K; what has no probability adds nothing."""
    return sum(
        float(p * (p / q).log()) for p, q in zip(teacher.flatten(), student.flatten(), strict=True) if float(p) > 0
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_it_is_the_divergence_of_the_distributions(temperature):
    distributions = TeacherDistributions.of(LOGITS, temperature, 12, 12)
    expected = functional.kl_div(
        (STUDENT / temperature).log_softmax(-1), (LOGITS / temperature).softmax(-1), reduction="sum"
    )
    assert distributions.divergence(STUDENT).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distributions.divergence(LOGITS).item() == pytest.approx(0, abs=1e-5)
    assert torch.isinf(distributions.rest).all()


def test_what_is_not_kept_counts_as_one_token():
    distributions = TeacherDistributions.of(LOGITS, 2.0, 3, 12)
    p, q = (LOGITS / 2).softmax(-1), (STUDENT / 2).softmax(-1)
    best = p.topk(3).indices
    together = [torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], 1) for x in (p, q)]
    found = distributions.divergence(STUDENT).item()
    assert found == pytest.approx(divergence(*together), rel=1e-4) and found < divergence(p, q)
    assert distributions.divergence(LOGITS).item() == pytest.approx(0, abs=1e-5)


def test_tokens_that_a_student_may_lack_are_among_the_others():
    distributions = TeacherDistributions.of(LOGITS, 1.0, 12, 9)
    assert distributions.ids.shape == (5, 9) and distributions.ids.max() < 9
    left = LOGITS.softmax(-1)[:, 9:].sum(-1)
    torch.testing.assert_close(distributions.rest.exp(), left)
    shorter = torch.cat([STUDENT[:, :9], STUDENT[:, 9:].logsumexp(-1, keepdim=True)], 1)  # one token in place of three
    assert distributions.divergence(shorter).item() == pytest.approx(distributions.divergence(STUDENT).item(), rel=1e-5)


@pytest.mark.parametrize("top_k", [3, 12])
def test_its_gradient_moves_a_student_to_the_teacher(top_k):
    distributions = TeacherDistributions.of(LOGITS, 2.0, top_k, 12)
    student = STUDENT.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], 0.1)
    for _ in range(600):
        optimizer.zero_grad()
        loss = distributions.divergence(student)
        loss.backward()
        assert torch.isfinite(student.grad).all()
        optimizer.step()
    assert loss.item() < 1e-3 and (top_k == 3 or distributions.agreement(student) == 5)


def test_of_no_tokens_nothing_is_lost():
    distributions = TeacherDistributions.of(LOGITS[:0], 1.0, 3, 12)
    student = STUDENT[:0].clone().requires_grad_()
    distributions.divergence(student).backward()
    assert distributions.divergence(student).item() == 0 and student.grad.shape == (0, 12)
