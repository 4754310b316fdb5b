"""What is asked of an exported model: held-out rows or noise, and what the merged model answers to it."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.common.errors import ArtifactError, DataError
from finetune.data.sample import Medium, Message, Prepared
from finetune.export._contract import Probe
from finetune.model.assistant import Assistant
from finetune.model.build import segments_by
from finetune.model.features import encode_one, read_medium
from finetune.model.language_model import context_length
from finetune.model.tokenize import answer_ends, tokenize_prompt

TEXTS = ("What is this?", "Describe a red square.", "Who are you?", "Count: one, two,")


def held_out(predictions: Path, limit: int) -> list[tuple[Message, ...]]:
    """At most `limit` questions of predictions.jsonl, from all tasks and kinds of media in turn."""
    groups: dict[tuple[str, ...], list[tuple[Message, ...]]] = {}
    for number, line in enumerate(predictions.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            media = tuple(Medium(*pair) for pair in zip(row["kinds"], map(Path, row["media"]), strict=True))
            group, question = (row["task"], *row["kinds"]), row["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{predictions}:{number} is damaged ({error!r}): run `finetune evaluate` again"
            ) from None
        groups.setdefault(group, []).append((Message("user", (*media, question)),))
    in_turn = chain.from_iterable(zip_longest(*groups.values()))
    return [messages for messages in in_turn if messages is not None][:limit]


def examples(kinds: Sequence[str], folder: Path) -> list[tuple[Message, ...]]:
    """Questions about noise, written into `folder`, each kind by itself and all at once; and some of text alone."""
    seen = [[_written(kind, seed, folder) for kind in kinds] for seed in range(3)]
    shown = [(medium,) for media in seen for medium in media] + [tuple(seen[0])] * (len(kinds) > 1)
    asked = [(*media, "What is this?") for media in shown] + [(text,) for text in TEXTS]
    return [(Message("user", parts),) for parts in asked]


def own_answers(assistant: Assistant, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Probe]:
    """What the merged model writes, greedily. Questions that it can't be asked any more (a file that is gone, a text
    that is too long) are left out.
    """
    tokenizer, causal_lm = assistant.tokenizer, assistant.model.causal_lm
    ends, context = answer_ends(tokenizer, causal_lm.generation_config), context_length(causal_lm)
    found = []
    for messages in conversations:
        try:
            media = media_of(messages)
            prepared = {m: read_medium(assistant.encoders[m.kind], m.kind, m.path, assistant.limits) for m in media}
            batch = prompt_batch(assistant, messages, prepared)
        except DataError:
            continue
        if context and batch["input_ids"].shape[1] + max_new_tokens > context:
            continue
        tokens = assistant.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )[0].tolist()
        ids = tuple(tokens[:-1] if tokens[-1:] and tokens[-1] in ends else tokens)
        found.append(Probe(tuple(messages), ids, tokenizer.decode(ids, skip_special_tokens=True).strip()))
    return found


def prompt_batch(
    assistant: Assistant, messages: Sequence[Message], prepared: Mapping[Medium, Prepared]
) -> dict[str, Any]:
    """Keywords of the composite's `forward` and `generate` for a conversation. Raises DataError."""
    segments = segments_by(assistant.model.config, lambda medium: prepared[medium].layout)
    tokens = tokenize_prompt(messages, assistant.tokenizer, assistant.placeholders, segments)
    ids = torch.tensor([tokens.input_ids], device=assistant.model.get_input_embeddings().weight.device)
    features: dict[str, list[Tensor]] = {}
    for medium in tokens.media:
        features.setdefault(medium.kind, []).append(encode_one(assistant.encoders[medium.kind], prepared[medium]))
    return {"input_ids": ids, "features": features, "attention_mask": torch.ones_like(ids)}


def media_of(messages: Sequence[Message]) -> list[Medium]:
    return [part for message in messages for part in message.content if isinstance(part, Medium)]


def as_chat(messages: Sequence[Message], given: Mapping[Medium, Any]) -> list[dict[str, Any]]:
    """The conversation as processors of transformers take it, with what is given for each medium."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: given[part]}
                for part in message.content
            ],
        }
        for message in messages
    ]


def noise(kind: str, seed: int = 0) -> Any:
    """A decoded picture, recording or clip of which no two places are alike: pictures of odd sizes, recordings that end
    inside a row of features, everywhere else inside it for each seed.
    """
    import numpy as np
    import PIL.Image

    from finetune.data.media.video import Clip

    random = np.random.default_rng(seed)
    if kind == "audio":
        return random.uniform(-0.5, 0.5, 16_001 + 170 * seed).astype(np.float32)
    sizes = (3 if kind == "video" else 1, 60 + 7 * seed, 81, 3)
    frames = [PIL.Image.fromarray(frame) for frame in random.integers(0, 256, sizes, np.uint8)]
    return frames[0] if kind == "image" else Clip(tuple(frames), (0.0, 0.5, 1.0))


def _written(kind: str, seed: int, folder: Path) -> Medium:
    """Noise as a file."""
    import soundfile

    made, path = noise(kind, seed), folder / f"{kind}{seed}"
    if kind == "image":
        made.save(path := path.with_suffix(".png"))
    elif kind == "audio":
        soundfile.write(path := path.with_suffix(".wav"), made, 16_000)
    else:
        made.frames[0].save(
            path := path.with_suffix(".gif"), save_all=True, append_images=made.frames[1:], duration=500
        )
    return Medium(kind, path)
