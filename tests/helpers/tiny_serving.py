"""A model to be served, built in code, and how tests ask an engine."""

import asyncio
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny import COMMON, FAMILIES, FUSIONS, fresh_tokenizer, part, tiny_encoder, tiny_llm, tiny_picture

from finetune.data.sample import Medium, Message
from finetune.model.asks import Ask
from finetune.model.assistant import Assistant
from finetune.model.composite import PLACEHOLDERS, compose
from finetune.model.heads import HeadSettings
from finetune.model.tokenize import add_placeholders
from finetune.serving.engine.contract import Request
from finetune.serving.engine.engine import Engine

WORDS = ("What", "is", "this", "Describe", "the", "picture", "red", "green", "blue", "yellow", "a", "square", "of")
MORE_FAMILIES: dict[str, dict[str, Any]] = {  # a window shorter than the question; another memory than keys and values
    "mistral": COMMON | {"num_key_value_heads": 2, "sliding_window": 6},
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
}


def tiny_assistant(family: str = "llama", fusion: str = "prefix", ends: range = range(40, 60)) -> Assistant:
    """Random weights, and so many tokens that end an answer that answers are of all lengths."""
    torch.manual_seed(0)
    tokenizer = fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, ["image"], PLACEHOLDERS)
    with patch.dict(FAMILIES, MORE_FAMILIES):
        llm = tiny_llm(family, vocabulary=len(tokenizer))
    llm.generation_config.eos_token_id = list(ends)
    encoder = tiny_encoder()
    ask = Ask(part("tasks", "classify"), part("heads", "label"), HeadSettings(labels=("blue", "red")))
    model = compose(
        llm.eval(),
        encoders={"image": ("vision", encoder)},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholder_ids={"image": placeholders["image"].id},
        asks={"colour": ask},
    )
    with torch.no_grad():
        for parameter in model.projectors.parameters():
            parameter.mul_(3)  # so that answers depend on what is seen
    return Assistant(model.eval(), tokenizer, placeholders, {"image": encoder})


def pictures(folder: Path, count: int = 5) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        tiny_picture((50 * number, 250 - 50 * number, 30 * number)).save(path)
    return paths


def conversation(chance: random.Random, paths: list[Path], words: int = 12) -> tuple[Message, ...]:
    """A question of some words, with none to two pictures somewhere in it."""
    content: list[Any] = [" ".join(chance.choices(WORDS, k=chance.randint(1, words)))]
    for _ in range(chance.choice([0, 1, 1, 2])):
        content.insert(chance.randint(0, len(content)), Medium("image", chance.choice(paths)))
    return (Message("user", tuple(content)),)


@contextmanager
def serving(assistant: Any, **options: Any):
    """An engine that runs. `assistant`: one, as 'tiny', or several by name."""
    engine = Engine(assistant if isinstance(assistant, dict) else {"tiny": assistant}, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)


async def read(stream: Any) -> tuple[str, str | None, list[Any]]:
    """All of an answer: its text, why it ended, its pieces."""
    pieces = [piece async for piece in stream]
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason if pieces else None, pieces


def request(messages: tuple[Message, ...], max_new_tokens: int = 16, model: str = "tiny", **more: Any) -> Request:
    return Request(model, messages, max_new_tokens, **more)


def ask_all(engine: Any, requests: list[Request], within_seconds: float = 0.0, seed: int = 0) -> list[Any]:
    """Answers to requests that come at random times, or what they raised."""
    chance = random.Random(seed)

    async def one(wanted: Request, wait: float) -> Any:
        await asyncio.sleep(wait)
        stream = engine.submit(wanted)
        text, reason, pieces = await read(stream)
        return text, reason, pieces, stream

    async def all_of_them() -> list[Any]:
        waits = [chance.uniform(0, within_seconds) for _ in requests]
        return await asyncio.gather(*map(one, requests, waits), return_exceptions=True)

    return asyncio.run(all_of_them())
