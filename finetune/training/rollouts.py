"""Answers sampled from the model while it trains, and their rewards and advantages. They are sampled before an
optimizer step, with the weights of that moment, and are the same for the same seed, step and weights.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import TrainerCallback

from finetune.common.errors import ArtifactError, DataError, TrainingError
from finetune.common.run_folder import read_json, write_json
from finetune.data.sample import Answer, Message, Sample
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding
from finetune.model.features import MediaView
from finetune.model.padding import going_on
from finetune.model.prefixes import IGNORED
from finetune.model.row_layout import RowKind
from finetune.recipe.parts import FusionPart
from finetune.recipe.schema import Stage, Train
from finetune.training.checkpoints import STAGING, step_of
from finetune.training.collate import Batch, Collator, PackedRow, RolloutBatch
from finetune.training.pack import Row, plan_rows
from finetune.training.reference import learned_log_probs
from finetune.training.samples import TokenizedSample, TokenizedSamples

Reward: TypeAlias = Callable[[Sample, str], float]
"""The reward of an answer to a sample's question: a finite number; higher is better."""
SMALLEST_DEVIATION = 1e-4  # added to the deviation of rewards, as in trl


class Drawn(NamedTuple):
    """An answer as token ids, the end token included if it was reached. `log_probs`: of these, by an engine that isn't
    the model itself.
    """

    tokens: list[int]
    log_probs: Sequence[float] = ()


class Sampler(Protocol):
    """The source of sampled answers."""

    def __call__(self, questions: Sequence[Sequence[Message]], options: Any, seed: int) -> list[list[Drawn]]:
        """`options.answers` answers to each question."""


@dataclass(frozen=True)
class SampledAnswer:
    """`tokens`: its ids. `before`, `reference`: log-probabilities of these under the weights that it was sampled with,
    and under those that the stage began with; `drawn`: by the engine that sampled it. Empty where the loss doesn't need
    them.
    """

    tokens: list[int]
    reward: float
    advantage: float = 0.0
    before: Sequence[float] = ()
    reference: Sequence[float] = ()
    drawn: Sequence[float] = ()


@dataclass(frozen=True)
class Group:
    """Answers to one question, `number` of the stage's samples."""

    number: int
    answers: list[SampledAnswer]

    @property
    def rewards(self) -> list[float]:
        return [answer.reward for answer in self.answers]

    @property
    def distinct(self) -> list[tuple[SampledAnswer, int]]:
        """(answer, count) of its distinct answers: equal ones are learned as one, weighted by their count."""
        counts = Counter((tuple(one.tokens), one.advantage) for one in self.answers)
        firsts = {(tuple(one.tokens), one.advantage): one for one in reversed(self.answers)}
        return [(firsts[key], count) for key, count in counts.items()]

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ."""
        return max(self.rewards) > min(self.rewards)


def policy_sampler(assistant: Assistant, view: MediaView) -> Sampler:
    """Samples from the model that trains, without dropout."""

    def sample(questions: Sequence[Sequence[Message]], options: Any, seed: int) -> list[list[Drawn]]:
        device = assistant.model.get_input_embeddings().weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens = assistant.draw(
                [question for question in questions for _ in range(options.answers)],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                view=view,
            )
        drawn = [Drawn(one) for one in tokens]
        return [drawn[start : start + options.answers] for start in range(0, len(drawn), options.answers)]

    return sample


def task_reward(bindings: Mapping[str, TaskBinding], name: str) -> Reward:
    """The measure `name` of a sample's task as the reward."""

    def reward(sample: Sample, text: str) -> float:
        binding = bindings[sample.task]
        return float(binding.task.measure(binding.task.read(Answer(text)), binding.target(sample))[name])

    return reward


def advantages(rewards: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """By how much the reward of each answer exceeds its group's mean. `scale`: see `grpo.Options`; with "batch" the
    groups of all processes count.
    """
    everywhere = [reward for group in gather_object(list(rewards)) for reward in group] if scale == "batch" else []
    of_batch = stdev(everywhere) if everywhere else 0.0
    found = []
    for group in rewards:
        deviation = {"group": stdev(group), "batch": of_batch}.get(scale, 1.0)
        divisor = deviation + SMALLEST_DEVIATION * (scale != "none")
        mean, equal = fmean(group), max(group) == min(group)
        found.append([0.0 if equal else (reward - mean) / divisor for reward in group])
    return found


class Rollouts:
    """The batches of a stage that samples answers. `samples`: its rows; the samples of `collator` are their prompts;
    `decode(tokens)`: an answer's text.
    """

    def __init__(
        self,
        stage: Stage,
        samples: Sequence[Sample],
        collator: Collator,
        *,
        sampler: Sampler,
        decode: Callable[[Sequence[int]], str],
        reward: Reward,
        seed: int,
    ) -> None:
        self.stage, self.samples, self.collator = stage, samples, collator
        self.sampler, self.decode, self.reward, self.seed = sampler, decode, reward, seed
        self.options: Any = stage.objective.options
        self.rows: list[list[Group]] = []  # of the step
        self.initial: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, trained: Sequence[nn.Parameter], checkpoint: Path | None = None) -> None:
        """To be called with the weights that the stage begins with, also before a checkpoint is loaded. Where the loss
        has a KL divergence, the trained weights are copied, so that no second model is needed. Raises ArtifactError.
        """
        if self.options.beta:
            self.initial = [(parameter, parameter.detach().clone()) for parameter in trained]
        if checkpoint and step_of(checkpoint) % self.options.iterations:  # the next step has the same answers
            self.rows = answers_in(checkpoint / file_name(), len(self.samples), self.options.answers)

    def batches(
        self, rows: Sequence[PackedRow], step: int, model: Any, autocast: AbstractContextManager[None]
    ) -> list[Batch]:
        """The batches of an optimizer step. `model`: the composite with trl's fused head. Raises TrainingError."""
        if step % self.options.iterations == 0:
            training = model.training
            model.eval()
            with torch.no_grad():
                self.rows = self._sampled(rows, step)
                with autocast:
                    self.rows = [self._with_log_probs(groups, model) for groups in self.rows]
            model.train(training)
        return [batch_of(self.stage, self.collator, groups) for groups in self.rows]

    def _sampled(self, rows: Sequence[PackedRow], step: int) -> list[list[Group]]:
        drawn = []
        for place, row in enumerate(rows):
            numbers = [] if row["filler"] else [number for group in row["groups"] for number in group]
            drawn.append(self._answers_to(numbers, f"{step}/{place}") if numbers else [])
        found = advantages([group.rewards for groups in drawn for group in groups], self.options.scale_rewards)
        each = iter(found)
        return [[_with(group, "advantage", next(each)) for group in groups] for groups in drawn]

    def _answers_to(self, numbers: Sequence[int], place: str) -> list[Group]:
        origin = f"{self.seed}/{self.stage.name}/{place}/{PartialState().process_index}"
        seed = int.from_bytes(hashlib.sha256(origin.encode()).digest()[:4])
        drawn = self.sampler([self.samples[number].question for number in numbers], self.options, seed)
        corrected = self.options.corrected
        return [
            Group(
                number,
                [
                    SampledAnswer(
                        one.tokens,
                        self._reward_of(self.samples[number], one.tokens),
                        drawn=one.log_probs if corrected else (),
                    )
                    for one in own
                ],
            )
            for number, own in zip(numbers, drawn, strict=True)
        ]

    def _reward_of(self, sample: Sample, tokens: Sequence[int]) -> float:
        text = self.decode(tokens)
        value = float(self.reward(sample, text))
        if not math.isfinite(value):
            raise TrainingError(f"{sample.where}: the reward of {text[:40]!r} is {value}; return a finite number")
        return value

    def _with_log_probs(self, groups: list[Group], model: Any) -> list[Group]:
        """With those that the loss needs: `before` where several steps learn from the same answers."""
        needed = {"before": self.options.iterations > 1, "reference": self.options.beta > 0}
        if not any(has_gradient(group, self.options) for group in groups):
            return groups
        for name in [name for name, is_needed in needed.items() if is_needed]:
            batch = batch_of(self.stage, self.collator, groups)
            counts = batch["compared"]["tokens"]
            with self._initial_weights() if name == "reference" else nullcontext():
                flat = learned_log_probs(model, send_to_device(batch, next(model.parameters()).device))
            each = (own.tolist() for own in flat.split(counts))
            for place, group in enumerate(groups):
                if has_gradient(group, self.options):
                    known = {tuple(one.tokens): next(each) for one, _ in group.distinct}
                    groups[place] = _with(group, name, [known[tuple(one.tokens)] for one in group.answers])
        return groups

    @contextmanager
    def _initial_weights(self) -> Iterator[None]:
        now = [parameter.data for parameter, _ in self.initial]
        torch.clear_autocast_cache()  # it holds parameters in half precision, whatever their data is by now
        try:
            for parameter, before in self.initial:
                parameter.data = before
            yield
        finally:
            for (parameter, _), data in zip(self.initial, now, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()

    def close(self) -> None:
        """To be called when the stage ends: a sampler may have begun a process."""
        getattr(self.sampler, "close", lambda: None)()

    def save(self, path: Path) -> None:
        write_json(path, {"rows": [[asdict(group) for group in groups] for groups in self.rows]})


def has_gradient(group: Group, options: Any) -> bool:
    """Whether it has a gradient: where all rewards are equal, only the KL divergence has one."""
    return bool(options.beta) or group.has_signal


def batch_of(stage: Stage, questions: Collator, groups: Sequence[Group]) -> Batch:
    """The batch of a row's groups; a filler row where none of them has a gradient."""
    options: Any = stage.objective.options
    trained = [group for group in groups if has_gradient(group, options)]
    stand_in = SampledAnswer(questions.samples[0].input_ids[-1:], 0.0, 0.0, [0.0], [0.0], [0.0])
    learned = [(group.number, group.distinct) for group in trained] or [(0, [(stand_in, 1)])]
    answers = [answer for _, distinct in learned for answer, _ in distinct]
    collator = copy(questions)
    collator.samples = TokenizedSamples.of(
        _answered(questions.samples[number], answer.tokens, number, count)
        for number, distinct in learned
        for answer, count in distinct
    )
    collator.reference = [torch.tensor(answer.reference) for answer in answers] if options.beta else None
    places = iter(range(len(answers)))
    together = [[next(places) for _ in distinct] for _, distinct in learned]
    batch = collator([PackedRow(groups=together, filler=not trained)])
    drawn = [answer for group in groups for answer in group.answers]
    batch["rollout"] = RolloutBatch(
        advantages=torch.tensor([answer.advantage for answer in answers]),
        answers=len(drawn),
        tokens=sum(len(answer.tokens) for answer in drawn),
        figures=figures_of(groups),
    )
    if options.iterations > 1:
        batch["rollout"]["before"] = torch.tensor([value for answer in answers for value in answer.before])
    if options.corrected:
        batch["rollout"]["drawn"] = torch.tensor([value for answer in answers for value in answer.drawn])
    items_of = stage.objective.module.items_of
    batch["items"] = items_of(options, batch["rollout"]["tokens"], len(drawn)) if drawn else 0
    return batch


def _answered(question: TokenizedSample, tokens: list[int], number: int, count: int) -> TokenizedSample:
    return replace(
        question,
        input_ids=question.input_ids + tokens,
        labels=[IGNORED] * len(question.input_ids) + tokens,
        positions=going_on(question.positions, len(tokens)),
        loss_weight=count * question.loss_weight,
        role="sampled",
        group=str(number),
    )


def longest_answers(stage: Stage, collator: Collator, row: Row) -> Batch:
    """The batch of a row's questions with every answer at its length limit, for memory plans."""
    options: Any = stage.objective.options
    tokens = collator.samples[0].input_ids[-1:] * options.max_new_tokens
    zeros = [0.0] * len(tokens)
    answers = [
        SampledAnswer(tokens, float(number), float(number), zeros, zeros, zeros) for number in range(options.answers)
    ]
    groups = [Group(number, answers) for group in row for number in group]
    return batch_of(stage, collator, groups)


def _with(group: Group, name: str, values: Sequence[Any]) -> Group:
    answers = [replace(answer, **{name: value}) for answer, value in zip(group.answers, values, strict=True)]
    return replace(group, answers=answers)


def figures_of(groups: Sequence[Group]) -> dict[str, float]:
    """`reward_deviation`: within a group; `answer_tokens`: of an answer; `no_signal`: share of groups."""
    if not groups:
        return {}
    return {
        "reward": fmean(reward for group in groups for reward in group.rewards),
        "reward_deviation": fmean(stdev(group.rewards) for group in groups),
        "no_signal": fmean(not group.has_signal for group in groups),
        "answer_tokens": fmean(len(answer.tokens) for group in groups for answer in group.answers),
    }


def answers_in(path: Path, samples: int, each: int) -> list[list[Group]]:
    """What `Rollouts.save` wrote, of a stage with so many samples and answers to each. Raises ArtifactError."""
    try:
        rows = TypeAdapter(list[list[Group]]).validate_python(read_json(path).get("rows"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path} is damaged: rows{list(first['loc'])}: {first['msg']}") from None
    numbers = (group.number for groups in rows for group in groups)
    if unknown := [number for number in numbers if not 0 <= number < samples]:
        raise ArtifactError(f"{path} is damaged: it has answers to row {unknown[0]} of {samples}")
    for group in (group for groups in rows for group in groups):
        if len(group.answers) != each or not all(map(_is_whole, group.answers)):
            raise ArtifactError(f"{path} is damaged: the answers to row {group.number} aren't {each} whole ones")
    return rows


def _is_whole(answer: SampledAnswer) -> bool:
    sizes = {len(values) for values in (answer.before, answer.reference, answer.drawn) if len(values)}
    numbers = [answer.reward, answer.advantage, *answer.before, *answer.reference, *answer.drawn]
    whole = bool(answer.tokens) and min(answer.tokens) >= 0 and sizes <= {len(answer.tokens)}
    return whole and all(map(math.isfinite, numbers))


def file_name() -> str:
    """The file of this process's answers in a checkpoint."""
    return f"rollouts-{PartialState().process_index}.json"


class SaveRollouts(TrainerCallback):
    """Saves answers that later steps learn from in the checkpoint. To come before `WholeCheckpoints`."""

    def __init__(self, rollouts: Rollouts, folder: Path) -> None:
        self.rollouts, self.folder = rollouts, folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.rollouts.options.iterations:
            self.rollouts.save(self.folder / STAGING / f"checkpoint-{state.global_step}" / file_name())


def row_kind_of_answers(kind: RowKind, fusion: FusionPart) -> RowKind:
    """The layout of answers to one question: a fusion that finds media by their sample needs them in each."""
    return RowKind.SEGMENTS if kind is RowKind.SHARED and fusion.by_sample else kind


def rollout_rows(
    train: Train, stage: Stage, lengths: Sequence[int], weights: Sequence[float], seed: int, kind: RowKind
) -> Sequence[Row]:
    """Rows of prompts whose sampled answers, laid out as `kind` says, fit a packed row. Those of an optimizer step are
    repeated as often as the objective learns from them. Raises DataError.
    """
    objective = stage.objective
    options: Any = objective.options
    capacity = int(train.tokens_per_batch)
    copies = 0 if kind is RowKind.SHARED else options.answers - 1
    tokens = [objective.tokens_of(length) + copies * length for length in lengths]
    if max(tokens) > capacity:
        raise DataError(
            f"stage {stage.name!r}: with this LLM each of the {options.answers} answers needs its question beside it, "
            f"{max(tokens):,} tokens: raise train.tokens_per_batch (now {capacity:,})"
        )
    planned = plan_rows(tokens, weights, capacity=capacity, epochs=int(stage.epochs), seed=seed)
    if objective.iterations == 1:
        return planned
    rows = [*planned]
    step = train.accumulate * PartialState().num_processes
    rows += [[]] * (-len(rows) % step)
    steps = [rows[start : start + step] for start in range(0, len(rows), step)]
    return [row for own in steps for _ in range(objective.iterations) for row in own]
