"""Rows as training will see them, without the LLM's weights: what the stages that look at data share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError, MediaError
from finetune.common.registry import load_part
from finetune.data.check.inspect import View, text_remarks, view
from finetune.data.check.ledger import Examined, Finding
from finetune.data.media import decode
from finetune.data.rows import Source, group_of, split_of
from finetune.data.sample import Layout, Medium, Row, Sample
from finetune.data.sources import limits_of, model_arguments, sources_of
from finetune.model.tokenize import Tokens, tokenize, tokenize_prompt
from finetune.recipe.schema import Limits, Recipe

KEPT = 512  # media whose view is kept: questions about one picture stand side by side


@dataclass(frozen=True)
class Asked:
    """What rows are read with. `model`: keywords of `assemble.load_parts`."""

    sources: Sequence[Source]
    model: Mapping[str, Any]
    limits: Limits
    seed: int
    tokens_per_batch: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Asked":
        # Whether an encoder is tuned changes nothing about what it reads.
        model = model_arguments(recipe) | {"tune_encoders": {}}
        return cls(sources_of(recipe), model, limits_of(recipe), recipe.seed, recipe.train.tokens_per_batch)


class Reader:
    """Tokenizer and encoders of a recipe, on the CPU. Raises ModelError where they can't be loaded."""

    def __init__(self, asked: Asked) -> None:
        import torch

        from finetune.common.progress import quiet_libraries
        from finetune.model.build import composite_config, load_parts, segments_by

        quiet_libraries()
        self.asked = asked
        self.parts = load_parts(**asked.model, seed=asked.seed, device=torch.device("cpu"))
        self.segments = segments_by(composite_config(self.parts), lambda m: self.look(m.kind, m.path)[1])
        self.context = context_of(asked.model["llm"])
        self.look = lru_cache(KEPT)(self._look)

    def sample(self, source: int, row: Row) -> Sample:
        """Raises DataError."""
        kind, options = self.asked.sources[source].task
        return load_part("tasks", kind).sample(row, options)

    def tokens(self, sample: Sample, source: int, split: str = "train") -> Tokens:
        """As training has them where they are learnt from, and else up to the answer. Raises DataError."""
        head, _ = self.asked.sources[source].head
        given = self.parts.tokenizer, self.parts.placeholders, self.segments
        if split != "train" or load_part("heads", head).TRAINED:
            return tokenize_prompt(sample.question, *given, sample.where)
        return tokenize(sample, *given)

    def _look(self, kind: str, path: Path) -> tuple[View, Layout]:
        """What a medium shows, and how many features it becomes. Raises MediaError, DataError."""
        if kind not in self.parts.encoders:
            takes = ", ".join(self.parts.encoders) or "text only"
            raise DataError(f"holds {kind}, but this model takes {takes}")
        encoder = self.parts.encoders[kind][1]
        decoded = decode(kind, path, limits=self.asked.limits, **encoder.sampling)
        return view(kind, path, decoded), encoder.layout or encoder.prepare(decoded).layout

    def examine(self, number: int, source: int, row: Row) -> Examined:
        """Everything about one row by itself. `number`: of the row, over all sources."""
        result = Examined(number, source, row.number)

        def found(code: str, text: str, path: Path | str = "") -> None:
            result.findings.append(Finding(code, text, number, source, row.number, str(path)))

        if not any(value for value in row.columns.values() if value != "" and not str(value).isspace()):
            found("empty", f"{row.where}: all of its columns are empty")
            return result
        try:
            sample = self.sample(source, row)
            group = group_of(row, self.asked.sources[source])
        except DataError as error:
            found("medium" if isinstance(error, MediaError) else "row", str(error))
            return result
        views: dict[Medium, View] = {}
        for medium in sample.media:
            try:
                views[medium] = self.look(medium.kind, medium.path)[0]
            except DataError as error:
                found("medium", str(error), medium.path)
        if result.findings:
            return result
        for medium, seen in views.items():
            result.media.append((seen.digest, medium.kind, str(medium.path), seen.hash, seen.thumbnail))
            for code, text in seen.remarks:
                found(code, text, medium.path)
        for text in dict.fromkeys(p for m in sample.messages for p in m.content if isinstance(p, str)):
            for code, remark in text_remarks(text):
                found(code, remark)
        self._measure(result, sample, group, views, found)
        return result

    def _measure(self, result: Examined, sample: Sample, group: str, views: Mapping[Medium, View], found: Any) -> None:
        source = self.asked.sources[result.source]
        split = split_of(sample, group, source, self.asked.seed, lambda medium: views[medium].digest.hex())
        try:
            tokens = len(self.tokens(sample, result.source, split).input_ids)
        except DataError as error:
            found("tokens", str(error))
            return
        if split == "train" and tokens > self.asked.tokens_per_batch:
            found("long", f"{tokens:,} tokens, more than train.tokens_per_batch ({self.asked.tokens_per_batch:,})")
        elif self.context and tokens >= self.context + (split == "train"):
            found("context", f"{tokens:,} tokens, but the LLM reads {self.context:,}")
        result.split, result.tokens = split, tokens
        result.question = content_of(sample.question, views)
        result.content = content_of(sample.messages, views)
        if "label" in load_part("tasks", source.task[0]).HEADS:
            several = sample.target if isinstance(sample.target, list) else [sample.answer]
            result.labels = tuple(str(label) for label in several)
            result.asked = f"{source.name or source.task[0]} {source.task[1].model_dump_json()}"
            result.answer = sample.answer


def content_of(messages: Sequence[Any], views: Mapping[Medium, View]) -> bytes:
    """16 bytes, equal for what says and shows the same, whatever its files are called."""
    digest = hashlib.sha256()
    for message in messages:
        for part in (message.role, *message.content):
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else views[part].digest
            digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()[:16]


def context_of(llm: Mapping[str, Any]) -> int | None:
    """Tokens that the LLM reads at once, by its config; None where it names no end. Raises ModelError."""
    from transformers import AutoConfig

    from finetune.common.hub import loading

    name, revision = llm["name"], llm["revision"]
    with loading(f"LLM {name!r}"):
        if name.endswith(".gguf"):
            config = AutoConfig.from_pretrained(str(Path(name).parent), gguf_file=Path(name).name)
        else:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=llm["trust_remote_code"])
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
