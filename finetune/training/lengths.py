"""About how many tokens the rows of a recipe have: from the tokenizer's and the encoders' files, without torch."""

import heapq
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError, ModelError
from finetune.common.hub import PROBE_SECONDS, loading, reason, unreachable
from finetune.common.run_folder import JsonObject, read_json
from finetune.data.sample import Medium, Message, Sample, media_in, texts_in
from finetune.model.template_limit import limited
from finetune.recipe.parts import EncoderPart
from finetune.recipe.schema import LanguageModel, Limits, Model

LLM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BASE_FILES = (*LLM_FILES, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
ENCODER_FILES = ("config.json", "preprocessor_config.json")
COUNTED = 1000  # samples; the others are taken to be as long
LONGEST = 50  # samples with the most text, media or bytes, counted too
MARK_TOKENS = 4  # "1.5s " before a frame
BYTES = 4  # of UTF-8 a token, where the tokenizer isn't at hand: an English word, or a Chinese character and a third
STRIDE = 32  # pixels that a cell of a convolutional backbone's last grid stands for
PYRAMIDS = {
    "depths",
    "hidden_sizes",
    "neck_hidden_sizes",
}  # in configs of backbones whose last grid is coarser than their patches


@dataclass(frozen=True)
class Estimate:
    """`lengths`: tokens of each sample; `longest`: of the longest, with as many tiles as it may have; `unknown`: kinds
    of media that both leave out; `by_characters`: text was counted without the tokenizer; `media`: {kind: the least and
    the most tokens of one medium}, those of a base.
    """

    lengths: list[int]
    longest: int
    unknown: tuple[str, ...]
    by_characters: bool = False
    media: dict[str, tuple[int, int]] = field(default_factory=dict)


def local_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a model: in its folder, or in the Hub's cache; None where it isn't there."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError, OSError):
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def fetch_settings(model: Model) -> dict[str, str]:
    """Download into the Hub's cache what tells how long the rows are, where it isn't there: settings and tokenizers, no
    weights; without a network, nothing. Returns why the Hub refuses: {model: reason}.
    """
    parts: list[Any] = [(part.options, ENCODER_FILES) for part in model.encoders.values()]
    parts.insert(0, (model.language_model, BASE_FILES if model.base else LLM_FILES))
    refused = {source.name: fetch(source.name, source.revision, files) for source, files in parts}
    return {name: why for name, why in refused.items() if why}


def fetch(name: str, revision: str | None, files: Sequence[str]) -> str | None:
    """The same for some files of one model."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    if Path(name).exists() or name.endswith(".gguf"):
        return None
    try:
        for file in files:
            if try_to_load_from_cache(name, file, revision=revision) is None and unreachable() is None:
                with suppress(RemoteEntryNotFoundError):
                    hf_hub_download(name, file, revision=revision, etag_timeout=PROBE_SECONDS)
    except (HfHubHTTPError, OSError, ValueError) as error:
        return reason(error)
    return None


@dataclass(frozen=True)
class Count:
    """Tokens: `usual`, about how many; `most`: with as many tiles as there may be; `least`: how many there are for
    certain.
    """

    least: int
    usual: int
    most: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.least + other.least, self.usual + other.usual, self.most + other.most)


def settings_of(name: str, revision: str | None, file: str) -> JsonObject:
    path = local_file(name, revision, file)
    with suppress(OSError, ValueError):
        if path is not None and isinstance(read := read_json(path), dict):
            return read
    return {}


def estimate(model: Model, samples: Sequence[Sample], limits: Limits) -> Estimate | None:
    """The lengths of samples, with media decoded within limits; None where there are none."""
    if not samples:
        return None
    counter = Counter.of(model, limits)
    numbers = _some(samples)
    known = {number: counter.tokens(samples[number].messages) for number in counted(samples)}
    lengths = [known.get(number, known[numbers[number % len(numbers)]]).usual for number in range(len(samples))]
    longest = max(count.most for count in known.values())
    unknown = tuple(sorted(counter.unknown))
    media = {kind: (min(counts), max(counts)) for kind, counts in counter.counts.items()}
    return Estimate(lengths, longest, unknown, by_characters=counter.tokenizer is None, media=media)


def _some(samples: Sequence[Sample]) -> list[int]:
    return random.Random(0).sample(range(len(samples)), min(COUNTED, len(samples)))


def counted(samples: Sequence[Sample]) -> set[int]:
    """Numbers of the samples whose tokens are counted: some at random, and those that are likely the longest."""
    return {*_some(samples), *likely_longest(samples)}


def _tokenizer(llm: LanguageModel) -> Any:
    """Of the library tokenizers; None where its file isn't at hand."""
    path = local_file(llm.name, llm.revision, "tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer

    with suppress(Exception):  # of the Rust library, for a file of another version
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    return None


def likely_longest(samples: Sequence[Sample]) -> set[int]:
    """Numbers of the samples with the most text, with the most media, and with the largest files of each suffix."""

    def characters(number: int) -> int:
        return sum(map(len, texts_in(samples[number].messages)))

    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # suffix -> {sample: bytes}
    for number, sample in enumerate(samples):
        for medium in sample.media:
            with suppress(OSError):
                sizes[medium.path.suffix.lower()][number] += medium.path.stat().st_size
    found = {*heapq.nlargest(LONGEST, range(len(samples)), key=characters)}
    counts = [len(sample.media) for sample in samples]
    if len({*counts}) > 1:
        found.update(heapq.nlargest(LONGEST, range(len(samples)), key=counts.__getitem__))
    for of_suffix in sizes.values():
        found.update(heapq.nlargest(LONGEST, of_suffix, key=of_suffix.__getitem__))
    return found


@dataclass
class Counter:
    """Counts the tokens of conversations. `unknown`: kinds of media whose tokens aren't known; `counts`, of a base:
    {kind: how many tokens single media have}.
    """

    model: Model
    limits: Limits
    tokenizer: Any
    template: "_Template"
    unknown: set[str] = field(default_factory=set)
    counts: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    encoders: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: Model, limits: Limits) -> "Counter":
        return cls(model, limits, _tokenizer(model.language_model), _Template(model))

    def tokens(self, messages: Sequence[Message]) -> Count:
        """Of a conversation, or of a question up to where the assistant's turn begins."""
        text, rendered = self.template.render(messages)
        if self.tokenizer is None:
            usual = ceil(len(text.encode()) / BYTES)
        else:
            usual = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        count = Count(usual if rendered and self.tokenizer is not None else 0, usual, usual)
        return sum(map(self.of_medium, media_in(messages)), count)

    def of_medium(self, medium: Medium) -> Count:
        if self.model.base is not None:
            return self._of_base(medium)
        part = self.model.encoders.get(medium.kind)
        if part is not None and (layout := _layout(part, medium)) is not None:
            certain, segments, most, rows, marks = layout
            with suppress(ModelError):  # of a projector that doesn't fit
                placed = self.model.fusion.placeholders(self.model.projectors[medium.kind].length(rows))
                return Count(certain * placed, segments * (placed + marks), most * (placed + marks))
        self.unknown.add(medium.kind)
        return Count(0, 0, 0)

    def _of_base(self, medium: Medium) -> Count:
        """By the base's own processor, where the file's header holds the size."""
        if self.encoders is None:
            self.encoders = _encoders_of_base(self.model.base)
        encoder = self.encoders.get(medium.kind)
        layout = None
        if encoder is not None:
            with suppress(DataError):  # reported where media are read
                layout = encoder.layout_at(medium, self.limits)
        if encoder is None or layout is None:
            self.unknown.add(medium.kind)
            return Count(0, 0, 0)
        marks = encoder.existing.tokenizer("".join([*layout.marks, layout.end]), add_special_tokens=False)["input_ids"]
        count = layout.rows * len(layout.marks) + len(marks)
        self.counts[medium.kind].add(count)
        return Count(count, count, count)


def _encoders_of_base(base: Any) -> dict[str, Any]:
    """{medium: encoder}, without weights. Raises ModelError."""
    with loading(f"base {base.name!r}", base.name):  # reports what is out of reach before torch is imported
        pass
    import torch

    from finetune.model.base.encoder import BaseEncoder
    from finetune.model.base.existing import ExistingModel

    existing = ExistingModel.load(base, torch.float32, torch.device("cpu"))
    return {kind: BaseEncoder(existing, kind) for kind in existing.media}


class _Template:
    """The LLM's chat template, rendered as transformers does; where it has none, turns of plain text."""

    def __init__(self, model: Model) -> None:
        name, revision = model.language_model.name, model.language_model.revision
        settings = settings_of(name, revision, "tokenizer_config.json")
        file = model.language_model.chat_template or local_file(name, revision, "chat_template.jinja")
        text = file.read_text(encoding="utf-8") if file else settings.get("chat_template")
        self.of_base = model.base is not None
        self.tokens = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token")}
        self.template: Any = None
        if isinstance(text, str):
            from jinja2 import TemplateError

            with suppress(TemplateError):
                self.template = compiled(text)

    def render(self, messages: Sequence[Message]) -> tuple[str, bool]:
        """The text, and whether it is the template's own."""
        prompt = messages[-1].role != "assistant"
        turns: list[dict[str, Any]] = [
            {"role": message.role, "content": "".join(texts_in([message]))} for message in messages
        ]
        parts = turns
        if self.of_base:
            parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        if self.template is not None:
            try:
                with limited():
                    return self.template.render(messages=parts, add_generation_prompt=prompt, **self.tokens), True
            except Exception:  # of any template, for turns that it doesn't take
                self.template = None
        ends = {"assistant": self.tokens["eos_token"]}
        lines = [f"{turn['role'].capitalize()}:\n{turn['content']}{ends.get(turn['role'], '')}\n" for turn in turns]
        return self.tokens["bos_token"] + "".join(lines) + "Assistant:\n" * prompt, False


def compiled(text: str) -> Any:
    """A chat template, with what transformers adds to Jinja: its import would take longer. Raises TemplateError."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    environment.globals |= {"tools": None, "documents": None}
    # A block that marks the answer, as its content alone.
    marked = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", lambda tag: _shown(*tag.groups()), text)
    return environment.from_string(marked)


def _shown(begin: str, closes: str | None, end: str) -> str:
    return f"{begin}{'endif' if closes else 'if true'}{end}"


def _text(token: object) -> str:
    """A special token, which may be an object with its content."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _layout(part: EncoderPart, medium: Medium) -> tuple[int, int, int, int, int] | None:
    """(segments that there are for certain, segments, most segments, feature rows of each, tokens of its mark) of a
    medium; None where only the weights tell.
    """
    options: Any = part.options
    if part.kind == "whisper":
        return _windows(options, medium)
    if part.kind not in ("vision", "video"):
        return None
    grid = _grid(options)
    if grid is None:
        return None
    if part.kind == "vision":
        extra = int(options.tokens == "all")
        config = _config(options)
        certain = int("patch_size" in config and not PYRAMIDS & config.keys())
        # Of tiles there are as many as the picture's shape and size ask for: half of the most, on average.
        segments, most = (1, 1) if options.tiles == 1 else (1 + (options.tiles + 1) // 2, 1 + options.tiles)
        return certain, segments, most, grid[0] * grid[1] + extra, 0
    if options.frames is None:
        return None
    side = options.pool or max(grid)
    rows = min(grid[0], side) * min(grid[1], side)
    return 0, options.frames, options.frames, rows, MARK_TOKENS * options.time  # a short clip has fewer


def _config(options: Any) -> JsonObject:
    """Of a vision backbone."""
    config = settings_of(options.name, options.revision, "config.json")
    return config.get("vision_config", config)  # type: ignore[no-any-return]


def _grid(options: Any) -> tuple[int, int] | None:
    config = _config(options)
    processor = settings_of(options.name, options.revision, "preprocessor_config.json")
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
        side = size if isinstance(size, int) else config.get("image_size")
        size = {"height": side, "width": side}
    patch = STRIDE if PYRAMIDS & config.keys() else config.get("patch_size", STRIDE)
    if not all(isinstance(number, int) for number in (size["height"], size["width"], patch)):
        return None
    return size["height"] // patch, size["width"] // patch


def _windows(options: Any, medium: Medium) -> tuple[int, int, int, int, int] | None:
    import soundfile

    try:
        seconds = float(soundfile.info(str(medium.path)).duration)
    except RuntimeError:
        return None
    windows = max(1, int(-(-seconds // options.window_seconds)))
    each = 30.0 if options.pad_to_30_seconds else seconds / windows
    return 0, windows, windows, max(1, round(50 * each / options.pool)), 0
