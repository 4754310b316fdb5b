"""A small random model to serve, and helpers that send requests to an engine."""

import asyncio
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny import COMMON, FAMILIES, FUSIONS, fresh_tokenizer, part, tiny_encoder, tiny_llm, tiny_picture

from finetune.data.sample import Medium, Message
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding
from finetune.model.compose import compose
from finetune.model.composition import PLACEHOLDERS
from finetune.model.heads import HeadSettings
from finetune.model.tokenize import add_placeholders
from finetune.serving.engine.contract import EngineLimits, Request
from finetune.serving.engine.engine import BatchingEngine

WORDS = ("What", "is", "this", "Describe", "the", "picture", "red", "green", "blue", "yellow", "a", "square", "of")
MORE_FAMILIES: dict[str, dict[str, Any]] = {  # a window shorter than the question; another memory than keys and values
    "mistral": COMMON | {"num_key_value_heads": 2, "sliding_window": 6},
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
}


def tiny_assistant(family: str = "llama", fusion: str = "prefix", ends: range = range(40, 60)) -> Assistant:
    """Random weights; so many tokens end an answer that answers have all lengths."""
    torch.manual_seed(0)
    tokenizer = fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, ["image"], PLACEHOLDERS)
    with patch.dict(FAMILIES, MORE_FAMILIES):
        llm = tiny_llm(family, vocabulary=len(tokenizer))
    llm.generation_config.eos_token_id = list(ends)
    encoder = tiny_encoder()
    settings = HeadSettings(labels=("blue", "red"))
    binding = TaskBinding(task=part("tasks", "classify"), head=part("heads", "label"), settings=settings)
    model = compose(
        llm.eval(),
        encoders={"image": encoder},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholder_ids={"image": placeholders["image"].id},
        bindings={"colour": binding},
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


def conversation(generator: random.Random, paths: list[Path], words: int = 12) -> tuple[Message, ...]:
    """A question of at most `words` words, with none to two pictures somewhere in it."""
    content: list[str | Medium] = [" ".join(generator.choices(WORDS, k=generator.randint(1, words)))]
    for _ in range(generator.choice([0, 1, 1, 2])):
        content.insert(generator.randint(0, len(content)), Medium("image", generator.choice(paths)))
    return (Message("user", tuple(content)),)


def questions(paths, count, tokens=None, seed=0, words=12, **options) -> list[Request]:
    """Random conversations; `tokens`: of each answer, by default 1 to 20."""
    generator = random.Random(seed)
    return [
        request(conversation(generator, paths, words), tokens or generator.randint(1, 20), **options)
        for _ in range(count)
    ]


def alone(assistant: Assistant, requests: list[Request], **options: Any) -> list[str]:
    """The model's own answers, one at a time."""
    return [assistant.answers([r.messages], max_new_tokens=r.max_new_tokens, **options)[0] for r in requests]


@contextmanager
def serving(assistants: Assistant | dict[str, Assistant], **limits: int):
    """A running engine; a single model is named 'tiny'."""
    models = assistants if isinstance(assistants, dict) else {"tiny": assistants}
    engine = BatchingEngine(models, EngineLimits(**limits))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)


async def read(stream: Any) -> tuple[str, str | None, list[Any]]:
    """A whole answer: its text, its finish reason, its pieces."""
    pieces = [piece async for piece in stream]
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason if pieces else None, pieces


def request(messages: tuple[Message, ...], max_new_tokens: int = 16, model: str = "tiny", **options: Any) -> Request:
    return Request(model, messages, max_new_tokens, **options)


def ask_all(engine: Any, requests: list[Request], within_seconds: float = 0.0, seed: int = 0) -> list[Any]:
    """(text, finish reason, pieces, stream) of requests sent at random times, or the exceptions they raised."""
    generator = random.Random(seed)

    async def one(wanted: Request, delay: float) -> Any:
        await asyncio.sleep(delay)
        stream = engine.submit(wanted)
        return (*await read(stream), stream)

    async def gathered() -> list[Any]:
        delays = [generator.uniform(0, within_seconds) for _ in requests]
        return await asyncio.gather(*map(one, requests, delays), return_exceptions=True)

    return asyncio.run(gathered())
