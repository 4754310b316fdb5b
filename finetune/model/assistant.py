"""A model with all that answering needs: `finetune.load(folder)` gives one, `.answer("What is this?", image=...)`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from finetune.common import display
from finetune.common.errors import DataError
from finetune.common.registry import kind_of
from finetune.data.sample import Answer, Layout, Medium, Message, Prepared
from finetune.model.bindings import TaskBinding
from finetune.model.composite import MultimodalModel
from finetune.model.encoders import Encoder
from finetune.model.features import MediaView, encode_one, read_medium
from finetune.model.language_model import context_length
from finetune.model.prefixes import shared_beginning
from finetune.model.prompts import (
    PromptBatch,
    PromptPrefix,
    answer_log_probabilities,
    generate,
    head_outputs,
    reads_on,
)
from finetune.model.tokenize import Placeholder, Tokens, answer_ends, answer_tokens, tokenize_prompt
from finetune.recipe.schema import Limits

# Path or bytes of a file, or an object: see `Assistant.answer`.
MediumInput: TypeAlias = (
    Path | str | bytes | PIL.Image.Image | np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], float] | dict[str, Any]
)
MediaInput: TypeAlias = MediumInput | Sequence[MediumInput] | None
Strength = float | Mapping[str, float] | None
SHOWN_LABELS = 10  # in notebooks
LEAST_SHARED = 0.2  # of the prompts' tokens; below that they're read whole
ANSWER_TOKENS = 4096  # of questions with answers that are read at once


class PromptGroup(NamedTuple):
    """Numbers of prompts, and how many tokens they all begin with."""

    members: list[int]
    tokens: int


def groups_by_first_medium(prompts: Sequence[Tokens]) -> list[PromptGroup]:
    """Prompts with the same first medium, or with none, and what they share."""
    groups: dict[object, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.beginning.media[:1], []).append(number)
    return [
        PromptGroup(members, shared_beginning([prompts[number].beginning for number in members]))
        for members in groups.values()
    ]


class Assistant:
    """`encoders`: {medium: a built encoder}. `limits`: bounds of what is decoded."""

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: Any,
        placeholders: Mapping[str, Placeholder],
        encoders: Mapping[str, Encoder],
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.placeholders = placeholders
        self.encoders = encoders
        self.limits = limits or Limits()

    def __repr__(self) -> str:
        llm = Path(str(getattr(self.model.causal_lm.config, "_name_or_path", ""))).name
        bindings = ", ".join(self.model.bindings) or "none"
        return f"<Assistant {llm}; media: {', '.join(self.encoders) or 'none'}; tasks: {bindings}>"

    def _repr_html_(self) -> str:
        rows = [(f"encoder of {medium}", kind_of(encoder)) for medium, encoder in self.encoders.items()]
        for name, binding in self.model.bindings.items():
            labels = binding.settings.labels
            shown = ", ".join(labels[:SHOWN_LABELS]) + ", ..." * (len(labels) > SHOWN_LABELS)
            rows.append((f"task {name}", f"{binding.task.kind}: {shown}" if shown else binding.task.kind))
        return display.line(repr(self)) + display.table(("", ""), rows, left=True)

    def answer(
        self,
        prompt: str = "",
        *,
        image: MediaInput = None,
        audio: MediaInput = None,
        video: MediaInput = None,
        task: str | None = None,
        strength: Strength = None,
        max_new_tokens: int = 64,
    ) -> str:
        """The greedy answer to one question about any number of pictures, recordings and videos.

        `image`, `audio`, `video`: a medium or a list of them. Each is the path or the bytes of a file, or an object: a
        picture as a PIL image or an array (height, width, 3) of uint8, RGB; a recording as (samples, rate), an array
        (samples,) of floats in [-1, 1] and its sampling rate; a video as (frames, rate), an array (frames, height,
        width, 3) of uint8 and the frames a second. `task`: answer as trained under this name: one of its labels, or a
        number; `probabilities` and `number` say more. Default: the only task, if it isn't answered by free text.
        `strength`: factor of what media add to the text (cross-attention only), or one per medium; at 0 a medium isn't
        even mentioned, and the answer is that of the LLM (with its adapter) to the text alone.
        Raises DataError for media that the model doesn't take or that can't be read.
        """
        turns = [Message("user", (*media_of(image=image, audio=audio, video=video), prompt))]
        task = task or self.only_task()
        if task is None:
            return self.answers([turns], max_new_tokens=max_new_tokens, strength=strength)[0]
        answer = self.ask(task, [turns], max_new_tokens=max_new_tokens, strength=strength)[0]
        return answer.text if answer.number is None else f"{answer.number:g}"

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        view: MediaView | None = None,
        strength: Strength = None,
        temperature: float = 0.0,
    ) -> list[str]:
        """Conversations that end on the user's turn -> the assistant's next turns, as one batch.

        `view`: how media are shown; by default their files are read and encoded. `temperature`: 0 for greedy answers,
        else of the softmax that tokens are drawn from.
        """
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {max_new_tokens}; write 1 or more")
        strengths = self.strengths(strength)
        view = view or FileView(self.encoders, self.limits)
        prompts = self._prompts(conversations, strengths, view)
        tokens = self.generate(self._together(prompts, view, max_new_tokens), max_new_tokens, strengths, temperature)
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def generate(
        self, batch: PromptBatch, max_new_tokens: int, strengths: Mapping[str, float] = {}, temperature: float = 0.0
    ) -> Tensor:
        """Answers, new tokens only (B, T'); they end where the LLM's context does. `temperature`: as in `answers`."""
        sampling: dict[str, Any] = {}
        if temperature:
            media = [placeholder.id for placeholder in self.placeholders.values()]
            sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "suppress_tokens": media or None}
        longest, context = batch.whole_mask.shape[1], context_length(self.model.causal_lm)
        with self.with_strengths(strengths):
            return generate(
                self.model,
                batch,
                max_new_tokens=min(max_new_tokens, context - longest) if context else max_new_tokens,
                do_sample=bool(temperature),
                **sampling,
                repetition_penalty=1.0,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=answer_ends(self.tokenizer, self.model.causal_lm.generation_config),
            )

    def draw(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float,
        view: MediaView,
    ) -> list[list[int]]:
        """As `answers`, drawn at a temperature above 0: token ids up to the one that ends the answer, if it comes."""
        prompts = self._prompts(conversations, self.strengths(None), view)
        tokens = self.generate(self._together(prompts, view, max_new_tokens), max_new_tokens, temperature=temperature)
        ends = answer_ends(self.tokenizer, self.model.causal_lm.generation_config)
        return [up_to_end(one, ends) for one in tokens.tolist()]

    @torch.no_grad()
    def embedded(self, conversations: Sequence[Sequence[Message]], view: MediaView) -> list[Tensor]:
        """What the LLM reads of each conversation: embeddings (T, D) of its tokens and media, in the LLM's dtype."""
        dtype = self.model.causal_lm.dtype
        batches = [self._padded([one], view) for one in self._prompts(conversations, self.strengths(None), view)]
        return [self.model.embed(batch.input_ids, batch.features)[0].to(dtype) for batch in batches]

    def probabilities(
        self,
        prompt: str = "",
        *,
        task: str | None = None,
        image: MediaInput = None,
        audio: MediaInput = None,
        video: MediaInput = None,
    ) -> dict[str, float]:
        """The probability of each label of `task`, the name of a task binding; it needn't be named where only one has
        labels. Raises DataError.
        """
        labelled = [name for name, binding in self.model.bindings.items() if binding.settings.labels]
        media = media_of(image=image, audio=audio, video=video)
        return dict(self._only_answer(labelled, task, "labels", (*media, prompt)).probabilities or {})

    def number(
        self,
        prompt: str = "",
        *,
        task: str | None = None,
        image: MediaInput = None,
        audio: MediaInput = None,
        video: MediaInput = None,
    ) -> float:
        """The number that the score head of `task` gives. As `probabilities`."""
        numeric = [name for name, binding in self.model.bindings.items() if binding.settings.deviation is not None]
        media = media_of(image=image, audio=audio, video=video)
        number = self._only_answer(numeric, task, "a number", (*media, prompt)).number
        return float("nan") if number is None else number

    def _only_answer(
        self, names: Sequence[str], task: str | None, answer: str, question: tuple[str | Medium, ...]
    ) -> Answer:
        """The answer of `task`, or of the only one of `names`: the task bindings with such an answer. Raises
        DataError.
        """
        if task is None and len(names) != 1:
            raise DataError(f"name one with task=: {', '.join(names) or 'no task was trained with such a head'}")
        if task is not None and task not in names:
            raise DataError(f"{task!r} isn't answered by {answer}; these are: {', '.join(names) or 'none'}")
        return self.ask(task or names[0], [(Message("user", question),)])[0]

    def only_task(self) -> str | None:
        """The only task binding, if it is answered otherwise than by free text."""
        names = [name for name, binding in self.model.bindings.items() if not binding.settings.free_text]
        return names[0] if len(names) == len(self.model.bindings) == 1 else None

    def ask(
        self,
        name: str,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 64,
        view: MediaView | None = None,
        strength: Strength = None,
    ) -> list[Answer]:
        """Answers of the task binding `name` to conversations that end on the user's turn, as one batch: text, the
        labels' probabilities, or a number. Raises DataError for a name that this model doesn't have.
        """
        binding = self.model.bindings.get(name)
        if binding is None:
            raise DataError(f"this model has no task {name!r}; it was trained for {', '.join(self.model.bindings)}")
        if binding.settings.free_text:
            texts = self.answers(conversations, max_new_tokens=max_new_tokens, view=view, strength=strength)
            return [Answer(text) for text in texts]
        strengths = self.strengths(strength)
        view = view or FileView(self.encoders, self.limits)
        with self.with_strengths(strengths):
            if not binding.trained:
                return self._likeliest(binding, conversations, strengths, view)
            prompts = self._prompts(conversations, strengths, view)
            outputs = head_outputs(self.model, name, self._together(prompts, view, 0))
        head = binding.head
        return [head.module.answer(row, binding.settings, head.options) for row in outputs.tolist()]

    def _likeliest(
        self,
        binding: TaskBinding,
        conversations: Sequence[Sequence[Message]],
        strengths: Mapping[str, float],
        view: MediaView,
    ) -> list[Answer]:
        """The label of each question that the LLM most likely writes. The keys and values of a question are copied for
        every label: as many questions, and labels of one, are read at once as have ANSWER_TOKENS together.
        """
        labels = binding.settings.labels
        answers = [answer_tokens(label, self.tokenizer) for label in labels]
        room = max(map(len, answers))
        prompts = self._prompts(conversations, strengths, view, room)
        longest = max(len(prompt.input_ids) for prompt in prompts) + room
        copies, questions = len(labels), 1
        if self.model.shares_memory:
            copies = max(1, ANSWER_TOKENS // longest)
            questions = max(1, copies // len(labels))
        found: list[Answer] = []
        for begin in range(0, len(prompts), questions):
            batch = self._together(prompts[begin : begin + questions], view, room)
            log_probabilities = [
                answer_log_probabilities(self.model, batch, answers[start : start + copies])
                for start in range(0, len(labels), copies)
            ]
            for shares in torch.cat(log_probabilities, 1).softmax(-1).tolist():
                probabilities = dict(zip(labels, shares, strict=True))
                found.append(Answer(max(probabilities, key=lambda label: probabilities[label]), probabilities))
        return found

    def batch(
        self,
        conversations: Sequence[Sequence[Message]],
        strengths: Mapping[str, float] = {},
        view: MediaView | None = None,
        room: int = 0,
    ) -> PromptBatch:
        """Conversations as a batch, after which the LLM must have room for `room` tokens. Raises DataError."""
        view = view or FileView(self.encoders, self.limits)
        return self._padded(self._prompts(conversations, strengths, view, room), view)

    def _prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        strengths: Mapping[str, float],
        view: MediaView,
        room: int = 0,
    ) -> list[Tokens]:
        absent = [kind for kind, strength in strengths.items() if strength == 0]
        conversations = [without_kinds(messages, absent) for messages in conversations]
        segments = self.model.placement.segments_by(view.layout)
        prompts = [tokenize_prompt(messages, self.tokenizer, self.placeholders, segments) for messages in conversations]
        if any(prompt.positions for prompt in prompts):  # a part of a text would begin at 0 again
            prompts = [prompt.with_positions() for prompt in prompts]
        context, longest = context_length(self.model.causal_lm), max(len(prompt.input_ids) for prompt in prompts)
        if context and longest + room >= context:
            raise DataError(f"a prompt of {longest} tokens, but the LLM reads {context}: fewer media, or shorter text")
        return prompts

    def _padded(self, prompts: Sequence[Tokens], view: MediaView) -> PromptBatch:
        device = self.model.get_input_embeddings().weight.device
        return PromptBatch.of(prompts, view, self.tokenizer.pad_token_id, device)

    def _together(self, prompts: Sequence[Tokens], view: MediaView, room: int) -> PromptBatch:
        """Prompts as a batch: behind what they share, where that pays, or whole."""
        shared = self._shared(prompts, view, room)
        return self._padded(prompts, view) if shared is None else shared

    def _shared(self, prompts: Sequence[Tokens], view: MediaView, room: int) -> PromptBatch | None:
        """Prompts behind what several of them begin with; None where that is little, or this model can't share it."""
        longest = max(len(prompt.input_ids) for prompt in prompts) + room
        if self.model.composition.fusion.by_sample or not reads_on(self.model, 2 * longest):
            return None
        groups = groups_by_first_medium(prompts)
        if sum(group.tokens * (len(group.members) - 1) for group in groups) < LEAST_SHARED * sum(
            len(prompt.input_ids) for prompt in prompts
        ):
            return None
        owner = [0] * len(prompts)
        branches: list[Tokens] = list(prompts)
        for number, group in enumerate(groups):
            for member in group.members:
                owner[member], branches[member] = number, prompts[member].after(group.tokens)
        prefixes = self._padded([prompts[group.members[0]].before(group.tokens) for group in groups], view)
        prefix = PromptPrefix(prefixes, torch.tensor(owner, device=prefixes.input_ids.device))
        return replace(self._padded(branches, view), prefix=prefix)

    def strengths(self, strength: Strength, defaults: Mapping[str, float] | None = None) -> dict[str, float]:
        """The strength of each medium: as asked, else of `defaults`, else as the model has it now; {} where the fusion
        has none. Raises DataError.
        """
        defaults = self.model.fusion.strength if defaults is None else defaults
        if strength is None:
            return dict(defaults or {})
        if defaults is None:
            kind = self.model.composition.fusion.kind
            raise DataError(f"strength is for models with cross-attention; this one's fusion is {kind!r}")
        chosen = dict.fromkeys(defaults, strength) if isinstance(strength, float | int) else strength
        if unknown := sorted(chosen.keys() - defaults.keys()):
            raise DataError(f"strength of {unknown[0]!r}: this model takes {', '.join(defaults)}")
        if wrong := [f"{value:g}" for value in chosen.values() if not 0 <= value < float("inf")]:
            raise DataError(f"strength is {wrong[0]}; write 0 or more, 1 as trained")
        return {**defaults, **chosen}

    @contextmanager
    def with_strengths(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """Media have these strengths inside the block."""
        fusion, before = self.model.fusion, self.model.fusion.strength
        fusion.strength = {**(before or {}), **strengths} or None
        try:
            yield
        finally:
            fusion.strength = before


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens of an answer with the first that ends it; what follows is padding."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


class FileView:
    """Media from their files, each read once, for its layout and for its features. `prepared`: those read before."""

    def __init__(
        self, encoders: Mapping[str, Encoder], limits: Limits, prepared: Mapping[Medium, Prepared] = {}
    ) -> None:
        self.encoders, self.limits = encoders, limits
        self._prepared = dict(prepared)

    def layout(self, medium: Medium) -> Layout:
        return self._read(medium).layout

    def features(self, medium: Medium) -> Tensor:
        return encode_one(self.encoders[medium.kind], self._read(medium))

    def _read(self, medium: Medium) -> Prepared:
        if medium not in self._prepared:
            self._prepared[medium] = read_medium(self.encoders[medium.kind], medium, self.limits)
        return self._prepared[medium]


def without_kinds(messages: Sequence[Message], kinds: Sequence[str]) -> list[Message]:
    """The conversation without media of these kinds."""
    return [
        Message(m.role, tuple(p for p in m.content if not (isinstance(p, Medium) and p.kind in kinds)))
        for m in messages
    ]


def media_of(**inputs: MediaInput) -> tuple[Medium, ...]:
    """Media by kind, each one or a list of them, in the order of the kinds. What is no medium raises MediaError when it
    is decoded.
    """
    media: list[Medium] = []
    for kind, value in inputs.items():
        # (samples, rate) and (frames, rate) are one medium each.
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)
        several = list(value) if isinstance(value, list | tuple) and not pair else [] if value is None else [value]
        for number, one in enumerate(several, 1):
            if isinstance(one, str | os.PathLike):
                media.append(Medium(kind, Path(one)))
            else:
                media.append(Medium(kind, Path(f"{kind} {number}"), content=one))
    return tuple(media)
