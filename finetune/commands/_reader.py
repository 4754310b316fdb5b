"""Rows as training will read them, without the LLM's weights: shared by the commands that examine data."""

from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from finetune.common.errors import DataError, MediaError
from finetune.data.check.inspect import View, text_remarks, view
from finetune.data.check.ledger import Examined, Finding
from finetune.data.check.lenient import lenient_rows
from finetune.data.hold_out import content_key, holds_out, keys_of, sample_key, splits_of
from finetune.data.preferences import sample_of
from finetune.data.rows import group_of
from finetune.data.sample import Layout, Medium, Row, Sample
from finetune.model.tokenize import Tokens, tokenize, tokenize_prompt
from finetune.recipe.load import Recipe
from finetune.recipe.schema import task_names

CACHED_MEDIA = 512  # media whose view is kept: questions about one picture follow each other
CACHED_LENGTHS = 2**14  # of different samples


class Reader:
    """Tokenizer and encoders of a recipe, on the CPU. Raises ModelError if they can't be loaded."""

    def __init__(self, recipe: Recipe) -> None:
        import torch

        from finetune.common.progress import quiet_libraries
        from finetune.model.build import load_components
        from finetune.model.language_model import context_of, read_config

        quiet_libraries()
        self.recipe = recipe
        self.names = task_names(recipe.data)
        # Tuning an encoder doesn't change what it reads.
        self.components = load_components(recipe.model, {}, recipe.seed, torch.device("cpu"))
        self.segments = self.components.placement.segments_by(lambda medium: self.inspected(medium)[1])
        self.context = context_of(read_config(recipe.model.language_model))
        self.lengths: dict[bytes, int] = {}  # digest of a sample's texts and layouts -> its tokens
        self.inspected = lru_cache(CACHED_MEDIA)(self._inspected)

    def sample(self, source: int, row: Row) -> Sample:
        """Raises DataError."""
        return sample_of(row, self.recipe.data[source].task)

    def tokens(self, sample: Sample, source: int, split: str = "train") -> Tokens:
        """The whole conversation if its answer is learned as text, else up to the answer. Raises DataError."""
        tokenizer, placeholders = self.components.tokenizer, self.components.placeholders
        if split != "train" or self.recipe.data[source].head.trained:
            return tokenize_prompt(sample.question, tokenizer, placeholders, self.segments, sample.where)
        return tokenize(sample, tokenizer, placeholders, self.segments)

    def _length(self, sample: Sample, source: int, split: str) -> int:
        """Tokens of a sample. Rows with media often have equal texts and layouts, and then as many; texts alone differ.
        Raises DataError.
        """
        if not sample.media:
            return len(self.tokens(sample, source, split).input_ids)
        whole = split == "train" and not self.recipe.data[source].head.trained
        digest = sha256(repr(whole).encode())
        for message in sample.messages if whole else sample.question:
            parts = [part if isinstance(part, str) else (part.kind, *self.segments(part)) for part in message.content]
            digest.update(repr((message.role, parts)).encode())
        known = self.lengths.get(digest.digest())
        if known is None:
            known = len(self.tokens(sample, source, split).input_ids)
            if len(self.lengths) >= CACHED_LENGTHS:
                self.lengths.clear()
            self.lengths[digest.digest()] = known
        return known

    def _inspected(self, medium: Medium) -> tuple[View, Layout]:
        """What a medium shows, and its layout. Raises DataError, and MediaError if it can't be decoded."""
        from finetune.model.features import decode_for

        if medium.kind not in self.components.encoders:
            kinds = ", ".join(self.components.encoders) or "text only"
            raise DataError(f"holds {medium.kind}, but this model reads {kinds}")
        encoder = self.components.encoders[medium.kind]
        decoded = decode_for(encoder, medium.kind, medium.path, self.recipe.media)
        return view(medium, decoded), encoder.layout or encoder.prepare(decoded).layout

    def examine(self, number: int, source: int, row: Row, split: str) -> Examined:
        """All findings about one row by itself. `number`: of the row, over all sources."""
        result = Examined(number, source, row.number)

        def add(code: str, text: str, path: Path | str = "") -> None:
            result.findings.append(Finding(code, text, number, source, row.number, str(path)))

        if not any(value for value in row.columns.values() if value != "" and not str(value).isspace()):
            add("empty", f"{row.where}: all of its columns are empty")
            return result
        try:
            sample = self.sample(source, row)
            group_of(row, self.recipe.data[source])
        except DataError as error:
            add("medium" if isinstance(error, MediaError) else "row", str(error))
            return result
        for medium in dict.fromkeys(sample.media):
            try:
                result.media.append(self.inspected(medium)[0])
            except DataError as error:
                add("medium", str(error), medium.path)
        if result.findings:
            result.media.clear()
            return result
        for shown in result.media:
            for remark in shown.remarks:
                add(*remark, shown.path)
        for text in dict.fromkeys(p for m in sample.messages for p in m.content if isinstance(p, str)):
            for remark in text_remarks(text):
                add(*remark)
        try:
            self._measure(result, sample, split)
        except DataError as error:
            add("tokens", str(error))
        return result

    def _measure(self, result: Examined, sample: Sample, split: str) -> None:
        """Add split, tokens, contents and labels. Raises DataError if the row can't be tokenized."""
        source = self.recipe.data[result.source]
        tokens = self._length(sample, result.source, split)
        problem, limit = None, self.recipe.train.tokens_per_batch
        if split == "train" and limit != "auto" and tokens > limit:  # auto holds the longest row
            problem = "long", f"{tokens:,} tokens, more than train.tokens_per_batch ({limit:,})"
        elif self.context and tokens >= self.context + (split == "train"):
            problem = "context", f"{tokens:,} tokens, more than the LLM's context of {self.context:,}"
        if problem:
            result.findings.append(Finding(*problem, result.row, result.source, result.number))
        result.split, result.tokens = split, tokens
        result.question = content_key(sample.question)
        result.content = sample_key(sample)
        result.ranked = bool(sample.group)
        if "label" in source.task.heads:
            labels = sample.target if isinstance(sample.target, list) else [sample.answer]
            result.labels = tuple(str(label) for label in labels)
            result.label_set = f"{self.names[result.source]} {source.task.options.model_dump_json()}"
            result.answer = sample.answer


def held_out(recipe: Recipe) -> dict[tuple[int, int], str]:
    """{(number of a source, place of a row among its `lenient_rows`): split} of the usable rows of sources that hold
    rows out.
    """
    places: list[tuple[int, int]] = []
    keys: list[list[str]] = []
    for number, source in enumerate(recipe.data):
        if holds_out(source):
            for place, row in enumerate(lenient_rows(source, lambda line, text, raw: None, recipe.media.max_bytes)):
                with suppress(DataError):  # a finding of its own
                    keys.append(keys_of(sample_of(row, source.task), group_of(row, source)))
                    places.append((number, place))
    splits = splits_of(keys, [number for number, _ in places], recipe.data, recipe.seed)
    return dict(zip(places, splits, strict=True))
