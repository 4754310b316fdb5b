"""A packed row of samples -> the tensors of one training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from finetune.data.sample import Medium, Values, by_kind
from finetune.model.base.both_ways import answer_types
from finetune.model.prefixes import most_shared, prompt_tokens, shared_beginning, shared_tokens
from finetune.model.row_layout import RowKind
from finetune.model.row_plan import RowPlan, RowSegment
from finetune.model.teacher_distributions import TeacherDistributions
from finetune.model.tokenize import IGNORED
from finetune.training.samples import COUNTED, TokenizedSample, TokenizedSamples


class PackedRow(TypedDict):
    """An item of the trainer's dataset: numbers of samples, those together that share their beginning. A `filler` row
    only keeps a process busy while others have the last rows: nothing is learned from it.
    """

    groups: list[list[int]]
    filler: bool


class TokenBatch(TypedDict, total=False):
    """Token ids (B, T) with their labels, -100 where nothing is learned. Packed rows (1, T) have `position_ids` that
    restart with each sample and go on from its prefix, and a `row_plan` where attention goes by segments; padded ones
    have an `attention_mask`. Where positions have three dimensions, `position_ids` are (4, B, T), these three behind
    the others. `token_type_ids` (B, T), of bases that attend both ways in prompts: 1 in answers. `label_rows` (K,),
    indices into B*T of the states before a learned token, and `shift_labels` (1, K), those tokens: the output head is
    applied to them only.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    row_plan: RowPlan
    attention_mask: Tensor
    label_rows: Tensor
    shift_labels: Tensor


class HeadBatch(TypedDict):
    """K samples that one head answers: `rows`, indices into B*T of the last state of their questions; `targets`
    (K, outputs); `groups` (K,), equal for samples that are compared; `weights` (K,) of their losses.
    """

    rows: Tensor
    targets: Tensor
    groups: Tensor
    weights: Tensor


class ComparedBatch(TypedDict, total=False):
    """S answers that are compared, in the order of their tokens: how many `tokens` of each are learned, K in all;
    `roles`, see `TokenizedSample`; `weights` (S,) of their losses; `reference` (K,), log-probabilities of the learned
    tokens as the stage found the weights.
    """

    tokens: list[int]
    roles: list[str]
    weights: Tensor
    reference: Tensor


class DistributionsBatch(TypedDict):
    """Another model's distributions at the K learned tokens: see `TeacherDistributions`."""

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


class RolloutBatch(TypedDict, total=False):
    """Answers sampled from the model itself: `answers` of them, of `tokens` tokens in all. S of them are in the batch;
    the others equal one of these, or have no gradient. `advantages` (S,); `before` (K,): log-probabilities when they
    were sampled, `drawn` (K,): by the engine that sampled them; `figures`: of all answers.
    """

    advantages: Tensor
    before: Tensor
    drawn: Tensor
    answers: int
    tokens: int
    figures: dict[str, float]


class Batch(TokenBatch, total=False):
    """One training step. `features` {medium: each (S, L, W)}, or `media`, prepared for their encoder; `teacher`, where
    a stage distills; `distributions`, where its teacher is another model; `compared`, where answers are compared;
    `rollout`, where these are sampled from the model itself. `items`: what the loss is a mean over, where that isn't
    the learned tokens: pairs, or labelled answers. Where losses are weighted: `loss_weights` (1, K), `heads` {name:
    HeadBatch}, and `items` counts learned tokens and samples that heads answer. `output_router_logits`: the LLM is to
    give its routers' auxiliary loss.
    """

    features: dict[str, list[Tensor]]
    media: dict[str, list[Values]]
    teacher: TokenBatch
    distributions: DistributionsBatch
    loss_weights: Tensor
    items: int
    heads: dict[str, HeadBatch]
    compared: ComparedBatch
    rollout: RolloutBatch
    output_router_logits: bool


class DistributionsBySample(Protocol):
    def __getitem__(self, number: int, /) -> TeacherDistributions: ...


class LabelledTokens(NamedTuple):
    """`positions` (3, T), where they have three dimensions."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    positions: Sequence[Sequence[int]] | None = None


class Layout(NamedTuple):
    """`ends`: indices into B*T of the last token of each sample."""

    batch: TokenBatch
    ends: list[int]


class Collator:
    """Samples one after the other in one row, or padded in rows of their own, as `kind` says.

    `read(medium)` gives a medium's features (S, L, W), or its prepared tensor where nothing is cached; `field` says
    which. `heads`, {name: outputs}, where losses are weighted: see `Batch`. `reference`, to be set before it is used
    where the objective needs one: of each sample, the log-probabilities of its learned tokens (K,). `distributions`:
    of each sample, another model's at these tokens. `prompts_both_ways`: of a base that attends so; prompts are then
    shared whole or not at all.
    """

    def __init__(
        self,
        samples: TokenizedSamples,
        read: Callable[[Medium], Values],
        *,
        field: Literal["features", "media"],
        kind: RowKind,
        pad_token_id: int = 0,
        heads: Mapping[str, int] | None = None,
        distributions: DistributionsBySample | None = None,
        prompts_both_ways: bool = False,
    ) -> None:
        self.samples = samples
        self.read = read
        self.field = field
        self.kind = kind
        self.pad_token_id = pad_token_id
        self.heads = heads
        self.distributions = distributions
        self.prompts_both_ways = prompts_both_ways
        self.reference: Sequence[Tensor] | None = None

    def __call__(self, rows: Sequence[PackedRow]) -> Batch:
        numbers = [group for row in rows for group in row["groups"]]
        groups = [[self.samples[number] for number in group] for group in numbers]
        if self.kind is not RowKind.SHARED:
            groups = [[sample] for group in groups for sample in group]
        labelled = [[LabelledTokens(s.input_ids, s.labels, s.positions) for s in group] for group in groups]
        beginnings = [[sample.beginning for sample in group] for group in groups]
        shared = [shared_beginning(group) if len(group) > 1 else 0 for group in beginnings]
        prefixes = self._whole(labelled, shared)
        layout = self._lay_out(labelled, prefixes)
        batch = Batch(**layout.batch)
        media = by_kind(_media(groups, prefixes))
        batch[self.field] = {kind: [*map(self.read, own)] for kind, own in media.items()}
        if self.heads is not None:
            self._add_heads(batch, [sample for group in groups for sample in group], layout.ends, self.heads)
        if groups[0][0].teacher_input_ids:
            batch["teacher"] = self._lay_out_teachers(groups)
        if self.distributions is not None:
            batch["distributions"] = _distributions(
                [self.distributions[number] for group in numbers for number in group]
            )
        if groups[0][0].role:
            self._add_compared(batch, [number for group in numbers for number in group])
        if any(row.get("filler") for row in rows):
            _ignore(batch)
        return batch

    def _add_heads(
        self, batch: Batch, chosen: Sequence[TokenizedSample], ends: Sequence[int], heads: Mapping[str, int]
    ) -> None:
        learned = [sample.learned for sample in chosen]
        weights = [sample.loss_weight for sample, count in zip(chosen, learned, strict=True) for _ in range(count)]
        if not weights:  # the LLM's own head needs a row, even if nothing is learned from it
            batch["label_rows"], batch["shift_labels"] = torch.tensor([0]), torch.tensor([[IGNORED]])
            weights = [0.0]
        groups = {group: number for number, group in enumerate(dict.fromkeys(sample.group for sample in chosen))}
        batch["loss_weights"] = torch.tensor([weights])
        batch["heads"] = {}
        for name, outputs in heads.items():
            numbers = [i for i, sample in enumerate(chosen) if sample.head == name]
            batch["heads"][name] = HeadBatch(
                rows=torch.tensor([ends[i] for i in numbers], dtype=torch.long),
                targets=torch.tensor([chosen[i].target for i in numbers]).view(len(numbers), outputs),
                groups=torch.tensor([groups[chosen[i].group] for i in numbers], dtype=torch.long),
                weights=torch.tensor([chosen[i].loss_weight for i in numbers]),
            )
        batch["items"] = sum(learned) + sum(sample.head != "" for sample in chosen)

    def _add_compared(self, batch: Batch, numbers: Sequence[int]) -> None:
        answers = [self.samples[number] for number in numbers]
        batch["compared"] = ComparedBatch(
            tokens=[answer.learned for answer in answers],
            roles=[answer.role for answer in answers],
            weights=torch.tensor([answer.loss_weight for answer in answers]),
        )
        if self.reference is not None:
            batch["compared"]["reference"] = torch.cat([self.reference[number] for number in numbers])
        batch["items"] = sum(answer.role in COUNTED for answer in answers)

    def _lay_out_teachers(self, groups: Sequence[Sequence[TokenizedSample]]) -> TokenBatch:
        rows = [[LabelledTokens(s.teacher_input_ids or (), s.teacher_labels or ()) for s in group] for group in groups]
        shared = [
            shared_tokens([row.input_ids for row in group], min(most_shared(row.labels) for row in group))
            if len(group) > 1
            else 0
            for group in rows
        ]
        return self._lay_out(rows, self._whole(rows, shared)).batch

    def _whole(self, groups: Sequence[Sequence[LabelledTokens]], prefixes: Sequence[int]) -> list[int]:
        """The tokens that groups share; none where they would cut a prompt that is read both ways."""
        cut = [
            any(prompt_tokens(row.labels) > prefix for row in group)
            for group, prefix in zip(groups, prefixes, strict=True)
        ]
        return [0 if self.prompts_both_ways and one else prefix for one, prefix in zip(cut, prefixes, strict=True)]

    def _lay_out(self, groups: Sequence[Sequence[LabelledTokens]], prefixes: Sequence[int]) -> Layout:
        samples = [sample for group in groups for sample in group]
        if self.kind is RowKind.PADDED:
            layout = _padded(samples, self.pad_token_id)
        else:
            layout = _in_one_row(groups, prefixes, planned=self.kind is not RowKind.PACKED)
        if any(sample.positions for sample in samples):
            if self.kind is RowKind.PADDED:
                rope = _rope_padded(samples)
                first = torch.arange(rope.shape[2]).expand(rope.shape[1:])
            else:
                rope, first = _rope_in_one_row(groups, prefixes), layout.batch["position_ids"]
            layout.batch["position_ids"] = torch.cat([first[None], rope])
        if self.prompts_both_ways:
            layout.batch["token_type_ids"] = self._types(groups, prefixes, layout.batch)
        return layout

    def _types(self, groups: Sequence[Sequence[LabelledTokens]], prefixes: Sequence[int], batch: TokenBatch) -> Tensor:
        """(B, T): 0 in prompts, 1 in answers."""
        prompts = [prompt_tokens(sample.labels) for group in groups for sample in group]
        if self.kind is RowKind.PADDED:
            return answer_types(batch["attention_mask"], prompts)
        types: list[int] = []
        for group, prefix in zip(groups, prefixes, strict=True):
            types += [0] * prefix
            for sample in group:
                behind = max(0, prompt_tokens(sample.labels) - prefix)
                types += [0] * behind + [1] * (len(sample.input_ids) - prefix - behind)
        return torch.tensor([types])


def _distributions(samples: Sequence[TeacherDistributions]) -> DistributionsBatch:
    return DistributionsBatch(
        ids=torch.cat([one.ids for one in samples]),
        log_probs=torch.cat([one.log_probs for one in samples]),
        rest=torch.cat([one.rest for one in samples]),
    )


def _media(groups: Sequence[Sequence[TokenizedSample]], prefixes: Sequence[int]) -> Iterator[Medium]:
    """In the order of their placeholders: those of a prefix once."""
    for group, prefix in zip(groups, prefixes, strict=True):
        for number, sample in enumerate(group):
            for medium, begin in zip(sample.media, sample.media_begins, strict=True):
                if number == 0 or begin >= prefix:
                    yield medium


def _in_one_row(groups: Sequence[Sequence[LabelledTokens]], prefixes: Sequence[int], planned: bool) -> Layout:
    input_ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    label_rows: list[int] = []
    ends: list[int] = []
    segments: list[RowSegment] = []
    for group, prefix in zip(groups, prefixes, strict=True):
        first = len(input_ids)
        if prefix:
            input_ids += group[0].input_ids[:prefix]
            labels += [IGNORED] * prefix
            positions += range(prefix)
            segments.append(RowSegment(first, first + prefix))
        for sample in group:
            begin = len(input_ids)
            input_ids += sample.input_ids[prefix:]
            # What comes first in the row of a sample follows another's last token: nothing predicts it.
            labels += sample.labels[prefix:] if prefix else [IGNORED, *sample.labels[1:]]
            positions += range(prefix, len(sample.input_ids))
            learned = [place for place in range(begin, len(labels)) if labels[place] != IGNORED]
            label_rows += [place - 1 if place > begin else first + prefix - 1 for place in learned]
            segments.append(RowSegment(begin, len(input_ids), first, first + prefix))
            ends.append(len(input_ids) - 1)
    batch = TokenBatch(
        input_ids=torch.tensor([input_ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        label_rows=torch.tensor(label_rows, dtype=torch.long),
        shift_labels=torch.tensor([[label for label in labels if label != IGNORED]], dtype=torch.long),
    )
    if planned:
        batch["row_plan"] = RowPlan(tuple(segments))
    return Layout(batch, ends)


def _rope(sample: LabelledTokens) -> Tensor:
    """(3, T)."""
    if sample.positions is None:
        return torch.arange(len(sample.input_ids)).expand(3, -1)
    return torch.tensor(sample.positions)


def _rope_in_one_row(groups: Sequence[Sequence[LabelledTokens]], prefixes: Sequence[int]) -> Tensor:
    """(3, 1, T), in the order of `_in_one_row`. Positions of a sample go on from those of its prefix by themselves."""
    pieces = []
    for group, prefix in zip(groups, prefixes, strict=True):
        pieces.append(_rope(group[0])[:, :prefix])
        pieces += [_rope(sample)[:, prefix:] for sample in group]
    return torch.cat(pieces, 1)[:, None]


def _rope_padded(samples: Sequence[LabelledTokens]) -> Tensor:
    """(3, B, T)."""
    width = max(len(sample.input_ids) for sample in samples)
    return torch.stack([functional.pad(_rope(s), (0, width - len(s.input_ids))) for s in samples], 1)


def _padded(samples: Sequence[LabelledTokens], pad_token_id: int) -> Layout:
    width = max(len(sample.input_ids) for sample in samples)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (width - len(values))]

    labels = torch.tensor([pad([IGNORED, *sample.labels[1:]], IGNORED) for sample in samples])
    learned = torch.nonzero(labels.flatten() != IGNORED).flatten()
    batch = TokenBatch(
        input_ids=torch.tensor([pad(sample.input_ids, pad_token_id) for sample in samples]),
        labels=labels,
        attention_mask=torch.tensor([pad([1] * len(sample.input_ids), 0) for sample in samples]),
        label_rows=learned - 1,
        shift_labels=labels.flatten()[learned][None],
    )
    return Layout(batch, [number * width + len(sample.input_ids) - 1 for number, sample in enumerate(samples)])


def _ignore(batch: Batch) -> None:
    """Learn nothing from a batch."""
    batch["labels"].fill_(IGNORED)
    batch["shift_labels"].fill_(IGNORED)
    if "teacher" in batch:
        batch["label_rows"] = batch["label_rows"][:0]
        batch["teacher"]["label_rows"] = batch["teacher"]["label_rows"][:0]
    if "distributions" in batch:
        batch["label_rows"], distributions = batch["label_rows"][:0], batch["distributions"]
        batch["distributions"] = DistributionsBatch(
            ids=distributions["ids"][:0], log_probs=distributions["log_probs"][:0], rest=distributions["rest"][:0]
        )
    if "compared" in batch:
        batch["items"] = 0
        batch["compared"]["roles"] = [""] * len(batch["compared"]["roles"])
    if "heads" in batch:
        batch["items"] = 0
        batch["loss_weights"].zero_()
        for head in batch["heads"].values():
            head["rows"], head["targets"] = head["rows"][:0], head["targets"][:0]
            head["groups"], head["weights"] = head["groups"][:0], head["weights"][:0]
