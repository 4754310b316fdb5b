"""From held-out samples to answers, predictions and scores: the same while training, at the end, and in a sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.common.errors import ArtifactError, TrainingError
from finetune.common.memory import ANSWERING, Halving
from finetune.data.metrics import lower_is_better, main_metric
from finetune.data.rows import by_task
from finetune.data.sample import Answer, Sample
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding, bindings_of
from finetune.model.features import MediaView
from finetune.model.manifest import AdapterManifest
from finetune.model.tokenize import IGNORED, tokenize
from finetune.recipe.schema import Evaluate, Source, task_names

Scores = dict[str, dict[str, float]]  # {task binding: {metric: value}}
Measures = list[dict[str, Any]]  # what a task's `score` sums up, one a sample


def known_bindings(folder: Path, samples: Sequence[Sample], sources: Sequence[Source]) -> dict[str, TaskBinding]:
    """The task bindings that the adapter in `folder` was trained for, and those of other samples that the LLM's own
    head can answer. Heads keep the labels and scales of their training rows, whatever their files hold today.
    Raises ArtifactError where a sample needs a head that the adapter lacks.
    """
    bindings = dict(AdapterManifest.read(folder).bindings)
    names = task_names(sources)
    for name in by_task(samples):
        if name not in bindings:
            source = sources[names.index(name)]
            if source.head.trained:
                raise ArtifactError(f"{folder}: has no head {name!r}; it was trained for {', '.join(bindings)}")
            bindings[name] = bindings_of([source.model_copy(update={"name": name})], [])[name]
    return bindings


def answer_batches() -> Halving:
    """How many questions are answered at once, by what memory allows."""
    return Halving("answering", "evaluate.batch", ANSWERING)


def answers_to(
    assistant: Assistant,
    samples: Sequence[Sample],
    settings: Evaluate,
    view: MediaView,
    step: Callable[[], None] = lambda: None,
    halving: Halving | None = None,
) -> list[Answer]:
    """The model's answers to the samples' questions, `settings.batch` at once, or fewer where memory runs out; `step`
    is called after each. `halving`: `answer_batches()`, where there are several calls. Raises OutOfMemory.
    """
    answers: dict[int, Answer] = {}
    halving = halving or answer_batches()
    for name, numbers in by_task(samples).items():

        def ask(chunk: Sequence[int], name: str = name) -> list[Answer]:
            questions = [samples[i].question for i in chunk]
            return assistant.ask(name, questions, max_new_tokens=settings.max_new_tokens, view=view)

        for i, answer in halving.over(numbers, settings.batch, ask):
            answers[i] = answer
            step()
    return [answers[i] for i in range(len(samples))]


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of a right answer, in nats, over its number of tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def answer_losses(assistant: Assistant, samples: Sequence[Sample]) -> list[AnswerLoss]:
    """Of samples without media: how likely their right answers are. Before and after training it shows how much of its
    language the LLM has kept.
    """
    losses = []
    for sample in samples:
        tokens = tokenize(sample, assistant.tokenizer, assistant.placeholders, lambda medium: [])
        device = assistant.model.get_input_embeddings().weight.device
        ids, labels = (torch.tensor([values], device=device) for values in (tokens.input_ids, tokens.labels))
        count = int((labels[:, 1:] != IGNORED).sum())
        losses.append(AnswerLoss(float(assistant.model(ids, labels=labels).loss) * count, count))
    return losses


def measured(binding: TaskBinding, samples: Sequence[Sample], answers: Sequence[Answer]) -> tuple[list[Any], Measures]:
    """(predictions read from the answers, what the task's `score` sums up of each)."""
    predictions = [binding.task.read(answer) for answer in answers]
    targets = [binding.target(sample) for sample in samples]
    measures = [binding.task.measure(*pair) for pair in zip(predictions, targets, strict=True)]
    for measure, sample in zip(measures, samples, strict=True):
        if measure.get("group"):  # two files may both have a user 1
            measure["group"] = f"{sample.source}/{measure['group']}"
    return predictions, measures


def measures_by_task(
    bindings: Mapping[str, TaskBinding], samples: Sequence[Sample], answers: Sequence[Answer]
) -> dict[str, Measures]:
    return {
        name: measured(bindings[name], [samples[i] for i in numbers], [answers[i] for i in numbers])[1]
        for name, numbers in by_task(samples).items()
    }


def scored(bindings: Mapping[str, TaskBinding], samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    measures = measures_by_task(bindings, samples, answers)
    return {name: bindings[name].task.score(own) for name, own in measures.items()}


def selection_score(scores: Scores, bindings: Mapping[str, TaskBinding], metric: str) -> float:
    """One number that is better when higher: `metric` is NAME.METRIC, or 'mean' of the tasks' main metrics; errors
    count negatively. Raises TrainingError for a metric that doesn't exist.
    """
    if metric == "mean":
        mains = [(metrics, main_metric(bindings[name].task.primary, metrics)) for name, metrics in scores.items()]
        return sum(-metrics[main] if lower_is_better(main) else metrics[main] for metrics, main in mains) / len(mains)
    name, _, key = metric.partition(".")
    if key not in scores.get(name, {}):
        known = ", ".join(f"{name}.{key}" for name, metrics in scores.items() for key in metrics)
        raise TrainingError(f"train.validation.metric: no {metric!r} on the validation rows; there are: {known}")
    return -scores[name][key] if lower_is_better(key) else scores[name][key]
