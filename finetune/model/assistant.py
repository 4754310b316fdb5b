"""A model with all that answering needs: `finetune.load(folder)` gives one, `.answer("What is this?", image=...)`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.common.errors import DataError
from finetune.common.registry import load_part
from finetune.data.media import Limits
from finetune.data.sample import Answer, Layout, Medium, Message, Prepared
from finetune.model.build import segments_by
from finetune.model.composite import MultimodalModel
from finetune.model.features import encode_one, read_medium
from finetune.model.language_model import context_length
from finetune.model.tokenize import Placeholder, answer_ends, answer_tokens, tokenize_prompt

Media = Path | str | Sequence[Path | str] | None
ANSWER_TOKENS = 4096  # of questions with answers that are read at once


@dataclass(frozen=True)
class Look:
    """How media are seen: the layout of one, and its features (S, L, W)."""

    layout: Callable[[Medium], Layout]
    features: Callable[[Medium], Tensor]


class Assistant:
    """`encoders`: {name: Encoder}. `limits` bound what is decoded."""

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: Any,
        placeholders: Mapping[str, Placeholder],
        encoders: Mapping[str, Any],
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.placeholders = placeholders
        self.encoders = encoders
        self.limits = limits or Limits()

    def answer(
        self,
        prompt: str = "",
        *,
        image: Media = None,
        audio: Media = None,
        video: Media = None,
        strength: float | Mapping[str, float] | None = None,
        max_new_tokens: int = 64,
    ) -> str:
        """One question, after any number of pictures, recordings and videos, answered greedily.

        `strength`: factor of what media add to the text (cross-attention only), or one per medium; at 0 a medium isn't
        even mentioned, and the answer is that of the LLM (with its adapter) to the text alone.
        Raises DataError for media that the model doesn't take or that can't be read.
        """
        media = media_of(image=image, audio=audio, video=video)
        return self.answers([(Message("user", (*media, prompt)),)], max_new_tokens=max_new_tokens, strength=strength)[0]

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        look: Look | None = None,
        strength: float | Mapping[str, float] | None = None,
    ) -> list[str]:
        """Conversations that end on the user's turn -> the assistant's next turns, greedily, as one batch.

        `look` gives media otherwise than by reading and encoding their files.
        """
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {max_new_tokens}; write 1 or more")
        weights = self.strengths(strength)
        batch = self._batch(conversations, weights, look)
        longest, context = batch["input_ids"].shape[1], context_length(self.model.causal_lm)
        with self.weighing(weights):
            tokens = self.model.generate(
                **batch,
                max_new_tokens=min(max_new_tokens, context - longest) if context else max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=answer_ends(self.tokenizer, self.model.causal_lm.generation_config),
            )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def probabilities(
        self,
        prompt: str = "",
        *,
        task: str | None = None,
        image: Media = None,
        audio: Media = None,
        video: Media = None,
    ) -> dict[str, float]:
        """The probability of each label that `task`, the name of what was trained, knows; it needn't be named where
        only one task has labels. Raises DataError.
        """
        said = self._ask_one(prompt, task, "labels", media_of(image=image, audio=audio, video=video))
        return dict(said.probabilities or {})

    def number(
        self,
        prompt: str = "",
        *,
        task: str | None = None,
        image: Media = None,
        audio: Media = None,
        video: Media = None,
    ) -> float:
        """The number that `task`'s score head gives. As `probabilities`."""
        said = self._ask_one(prompt, task, "deviation", media_of(image=image, audio=audio, video=video))
        return float("nan") if said.number is None else said.number

    def _ask_one(self, prompt: str, task: str | None, has: str, media: tuple[Medium, ...]) -> Answer:
        names = [name for name, ask in self.model.asks.items() if getattr(ask.settings, has)]
        if task is None and len(names) != 1:
            raise DataError(f"name one with task=: {', '.join(names) or 'no task was trained with such a head'}")
        if task is not None and task not in names:
            kind = "labels" if has == "labels" else "a number"
            raise DataError(f"{task!r} isn't answered by {kind}; these are: {', '.join(names) or 'none'}")
        return self.ask(task or names[0], [(Message("user", (*media, prompt)),)])[0]

    def names_without_text(self) -> list[str]:
        """What was trained to be answered otherwise than by free text."""
        return [name for name, ask in self.model.asks.items() if not ask.settings.free_text]

    def ask(
        self,
        name: str,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 64,
        look: Look | None = None,
        strength: float | Mapping[str, float] | None = None,
    ) -> list[Answer]:
        """What the head that was trained for `name` says to conversations that end on the user's turn, as one batch:
        text, the labels' probabilities, or a number. Raises DataError for a name that this model doesn't know.
        """
        if (found := self.model.asks.get(name)) is None:
            there = ", ".join(self.model.asks)
            raise DataError(f"this model knows no {name!r}; it was trained for {there}")
        if not found.trained and not found.settings.labels:
            written = self.answers(conversations, max_new_tokens=max_new_tokens, look=look, strength=strength)
            return [Answer(text) for text in written]
        weights = self.strengths(strength)
        if found.trained:
            with self.weighing(weights):
                outputs = self.model.head_outputs(name, **self._batch(conversations, weights, look))
            part = load_part("heads", found.head[0])
            return [part.answer(row, found.settings, found.head[1]) for row in outputs.tolist()]
        labels = found.settings.labels
        answers = [answer_tokens(label, self.tokenizer) for label in labels]
        longest, shares = max(map(len, answers)), self.model.shares_memory()
        said: list[Answer] = []
        for conversation in conversations:
            # One question at a time: its keys and values are copied for every answer that is read at once.
            batch = self._batch([conversation], weights, look, room=longest)
            copies = max(1, ANSWER_TOKENS // (batch["input_ids"].shape[1] + longest)) if shares else len(labels)
            with self.weighing(weights):
                told = [
                    self.model.answer_log_probabilities(answers=answers[start : start + copies], **batch)
                    for start in range(0, len(labels), copies)
                ]
            for row in torch.cat(told, 1).softmax(-1).tolist():
                probabilities = dict(zip(labels, row, strict=True))
                said.append(Answer(max(probabilities, key=lambda label: probabilities[label]), probabilities))
        return said

    def _batch(
        self,
        conversations: Sequence[Sequence[Message]],
        weights: Mapping[str, float],
        look: Look | None,
        room: int = 0,
    ) -> dict[str, Any]:
        """Conversations as a batch padded on the left: `input_ids`, `attention_mask`, `features`. The LLM must have
        room for as many tokens more. Raises DataError.
        """
        conversations = [
            without_kinds(messages, [kind for kind in weights if weights[kind] == 0]) for messages in conversations
        ]
        look = look or self._reading()
        segments = segments_by(self.model.config, look.layout)
        prompts = [tokenize_prompt(messages, self.tokenizer, self.placeholders, segments) for messages in conversations]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        context = context_length(self.model.causal_lm)
        if context and longest + room >= context:
            raise DataError(f"a prompt of {longest} tokens, but the LLM reads {context}: fewer media, or shorter text")
        device = self.model.get_input_embeddings().weight.device
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor(
            [[pad] * n + p.input_ids for n, p in zip(padding, prompts, strict=True)], device=device
        )
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        media: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            for medium in prompt.media:
                media.setdefault(medium.kind, []).append(look.features(medium))
        return {"input_ids": input_ids, "attention_mask": mask, "features": media}

    def strengths(
        self, strength: float | Mapping[str, float] | None, own: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """What each medium is to weigh: as asked, else `own`, by default as the model has it now; {} where the fusion
        knows none.
        """
        own = self.model.fusion.strength if own is None else own
        if strength is None:
            return dict(own or {})
        if own is None:
            kind = self.model.config.parts["fusion"]["kind"]
            raise DataError(f"strength is for models with cross-attention; this one's fusion is {kind!r}")
        given = dict.fromkeys(own, strength) if isinstance(strength, float | int) else strength
        if unknown := sorted(given.keys() - own.keys()):
            raise DataError(f"strength of {unknown[0]!r}: this model takes {', '.join(own)}")
        if wrong := [f"{value:g}" for value in given.values() if not 0 <= value < float("inf")]:
            raise DataError(f"strength is {wrong[0]}; write 0 or more, 1 as trained")
        return {**own, **given}

    @contextmanager
    def weighing(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """Media weigh this much for the time being."""
        fusion = self.model.fusion
        before = dict(fusion.strength or {})
        if strengths:
            fusion.strength.update(strengths)
        try:
            yield
        finally:
            if strengths:
                fusion.strength.update(before)

    def _reading(self) -> Look:
        """Each file is read once, for its length and for its features."""
        ready: dict[Medium, Prepared] = {}

        def prepared(medium: Medium) -> Prepared:
            if medium.kind not in self.encoders:
                raise DataError(f"this model takes {', '.join(self.encoders) or 'text only'}, not {medium.kind}")
            if medium not in ready:
                ready[medium] = read_medium(self.encoders[medium.kind], medium.kind, medium.path, self.limits)
            return ready[medium]

        return Look(
            lambda medium: prepared(medium).layout,
            lambda medium: encode_one(self.encoders[medium.kind], prepared(medium)),
        )


def without_kinds(messages: Sequence[Message], kinds: Sequence[str]) -> list[Message]:
    """The conversation without media of these kinds."""
    return [
        Message(m.role, tuple(p for p in m.content if not (isinstance(p, Medium) and p.kind in kinds)))
        for m in messages
    ]


def media_of(**given: Media) -> tuple[Medium, ...]:
    """Media by kind, each a path or several, in the order of the kinds. Raises DataError for anything else."""
    found: list[Medium] = []
    for kind, paths in given.items():
        several = [paths] if isinstance(paths, str | Path) else [] if paths is None else paths
        if not isinstance(several, list | tuple) or not all(isinstance(path, str | Path) for path in several):
            raise DataError(f"{kind}: give a file's path or a list of them, not a {type(paths).__name__}")
        found += [Medium(kind, Path(path)) for path in several]
    return tuple(found)
