"""The questions that a merged model and its export both answer: held-out rows, or noise."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.data.media import noise
from finetune.data.media.audio import RATE
from finetune.data.predictions import read_predictions
from finetune.data.sample import Medium, Message, Prepared, media_in
from finetune.export._contract import Probe, without_end
from finetune.model.assistant import Assistant, FileView
from finetune.model.features import decode_for
from finetune.model.prompts import PromptBatch
from finetune.model.tokenize import answer_ends

TEXTS = ("What is this?", "Describe a red square.", "Who are you?", "Count: one, two,")

Conversation = tuple[Message, ...]


def held_out_questions(predictions: Path, limit: int) -> list[Conversation]:
    """At most `limit` questions of predictions.jsonl, taking tasks and kinds of media in turn. Raises ArtifactError."""
    groups: dict[tuple[str, ...], list[Conversation]] = {}
    for prediction in read_predictions(predictions):
        kinds = [medium.kind for medium in prediction.media]
        groups.setdefault((prediction.task, *kinds), []).append(prediction.conversation)
    in_turn = chain.from_iterable(zip_longest(*groups.values()))
    return [conversation for conversation in in_turn if conversation is not None][:limit]


def noise_questions(kinds: Sequence[str], folder: Path) -> list[Conversation]:
    """Questions about noise, which is written into `folder`: each kind of medium alone, all together, and none."""
    media = [[_noise_file(kind, seed, folder) for kind in kinds] for seed in range(3)]
    shown = [(medium,) for row in media for medium in row] + [tuple(media[0])] * (len(kinds) > 1)
    contents = [(*row, "What is this?") for row in shown] + [(text,) for text in TEXTS]
    return [(Message("user", content),) for content in contents]


def answered(
    assistant: Assistant, conversations: Sequence[Conversation], folder: Path, max_new_tokens: int
) -> list[Probe]:
    """Probes with the merged model's greedy answers; decoded media are written into `folder`.

    Conversations whose files can't be read, or that are too long for the LLM, are left out.
    """
    end_ids = answer_ends(assistant.tokenizer, assistant.model.causal_lm.generation_config)
    files: dict[Medium, Medium] = {}
    prepared: dict[Medium, Prepared] = {}
    probes = []
    for messages in conversations:
        try:
            for medium in media_in(messages):
                if medium not in prepared:
                    encoder = assistant.encoders[medium.kind]
                    decoded = decode_for(encoder, medium.kind, medium.path, assistant.limits)
                    prepared[medium] = encoder.prepare(decoded)
                    files[medium] = _lossless(medium, decoded, folder / f"decoded-{len(files)}")
            batch = prompt_batch(assistant, messages, prepared, max_new_tokens - 1)
        except DataError:
            continue
        tokens = assistant.generate(batch, max_new_tokens)[0].tolist()
        probes.append(Probe(_with_files(messages, files), without_end(tokens, end_ids)))
    return probes


def prompt_batch(
    assistant: Assistant, messages: Sequence[Message], prepared: Mapping[Medium, Prepared], room: int = 0
) -> PromptBatch:
    """One conversation about prepared media; see `Assistant.batch`. Raises DataError."""
    return assistant.batch([messages], view=FileView(assistant.encoders, assistant.limits, prepared), room=room)


def as_chat(messages: Sequence[Message], values: Mapping[Medium, Any]) -> list[dict[str, Any]]:
    """The conversation in the form that processors of transformers take, with a value in place of each medium."""

    def as_part(part: str | Medium) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": part.kind, part.kind: values[part]}

    return [{"role": message.role, "content": [*map(as_part, message.content)]} for message in messages]


def _noise_file(kind: str, seed: int, folder: Path) -> Medium:
    medium, decoded = Medium(kind, folder / f"noise-{kind}-{seed}.gif"), noise(kind, seed)
    if kind != "video":
        return _lossless(medium, decoded, medium.path)
    first, *others = decoded.frames
    first.save(medium.path, save_all=True, append_images=others, duration=500)
    return medium


def _lossless(medium: Medium, decoded: Any, path: Path) -> Medium:
    """The medium as a file that every decoder reads to the same values (see `Probe`)."""
    import soundfile

    if medium.kind == "image":
        decoded.save(path := path.with_suffix(".png"))
    elif medium.kind == "audio":
        soundfile.write(path := path.with_suffix(".wav"), decoded, RATE, subtype="FLOAT")
    else:  # only the kit's own class takes it, and decodes it the same way
        path = medium.path.absolute()
    return replace(medium, path=path)


def _with_files(messages: Conversation, files: Mapping[Medium, Medium]) -> Conversation:
    return tuple(
        replace(m, content=tuple(files[part] if isinstance(part, Medium) else part for part in m.content))
        for m in messages
    )
