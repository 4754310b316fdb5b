"""A processor of transformers for the composite: text and media to the model's inputs."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature, ProcessorMixin

from finetune.common.errors import DataError
from finetune.data.media.audio import RATE
from finetune.data.media.image import over_white
from finetune.data.media.video import Clip
from finetune.data.sample import Prepared
from finetune.model.chat_template import PART_TYPES, with_media_parts
from finetune.model.composite import MultimodalConfig
from finetune.model.composition import PLACEHOLDERS, Composition
from finetune.model.features import decode_for
from finetune.model.padding import left_padded
from finetune.model.tokenize import Placeholder, segment_ids

Media = dict[str, list[Any]]  # {kind: media as clients give them}
MEDIUM_KEYS = ("url", "path", "base64", "data")  # of a part of a message, besides its kind


class MultimodalProcessor(ProcessorMixin):
    """Conversations, or texts with placeholders and their media -> inputs of the model's `generate` and `forward`.

    `parts`: of the model's config. A medium is a path, bytes or a data URI, which are decoded within the limits of the
    training run, or decoded: a Pillow image, samples at 16 kHz, a `finetune.data.media.video.Clip`.
    """

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, parts: Any = None) -> None:
        self.parts: dict[str, Any] = parts or MultimodalConfig().parts
        self._composition = Composition.model_validate(self.parts)
        ids = self._composition.placeholders
        self._placeholders = {kind: Placeholder(PLACEHOLDERS[kind], ids[kind]) for kind in ids}
        with torch.device("meta"):  # preprocessing and shapes; no weights
            self._encoders = {kind: saved.restore(torch.float32) for kind, saved in self._composition.encoders.items()}
        if tokenizer is not None:
            tokenizer.chat_template = chat_template or tokenizer.chat_template
            chat_template = tokenizer.chat_template = with_media_parts(tokenizer, self._placeholders)
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "MultimodalProcessor":
        """From a folder or Hub repository that `save_pretrained` or `finetune merge` wrote."""
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        if "parts" not in saved:
            kwargs["parts"] = MultimodalConfig.from_pretrained(pretrained_model_name_or_path, **hub).parts
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[return-value]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "media"]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Any:
        """One conversation or several, in the form of transformers or of OpenAI's API -> text; with `tokenize` token
        ids (B, T), with `return_dict` as well all inputs of the model. `kwargs` go to the chat template.
        """
        conversations = [conversation] if isinstance(conversation[0], dict) else list(conversation)
        texts = [
            self.tokenizer.apply_chat_template(
                turns,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for turns in conversations
        ]
        if not tokenize:
            return texts[0] if isinstance(conversation[0], dict) else texts
        media: Media = {kind: [] for kind in self._encoders}
        for kind, medium in media_in(conversations):
            if kind not in media:
                self._refuse(kind)
            media[kind].append(medium)
        inputs = self._inputs(texts, media, return_tensors)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts, with a placeholder for each medium -> `input_ids`, `attention_mask` (B, T), padded on the left, and
        `media` {kind: prepared media, in the order of their placeholders}. Special tokens aren't added: the chat
        template writes them. Raises DataError if the media don't fit the text or the model.
        """
        if (rate := kwargs.get("sampling_rate", RATE)) != RATE:
            raise DataError(f"sampling_rate is {rate}; give samples at {RATE:,} a second, or a file")
        media: Media = {}
        for kind, values in (("image", images), ("audio", audio), ("video", videos)):
            if values is not None:
                if kind not in self._encoders:
                    self._refuse(kind)
                media[kind] = list(_flat(values))
        return self._inputs([text] if isinstance(text, str) else list(text or [""]), media, return_tensors)

    def _refuse(self, kind: str) -> NoReturn:
        raise DataError(f"the input has {kind}, but this model takes {', '.join(self._encoders) or 'text only'}")

    def _inputs(self, texts: Sequence[str], media: Media, return_tensors: str | None) -> BatchFeature:
        if return_tensors not in ("pt", None):
            raise DataError(f"return_tensors is {return_tensors!r}; write 'pt'")
        prepared = {kind: [self._prepared(kind, one) for one in values] for kind, values in media.items()}
        remaining = {kind: iter(values) for kind, values in prepared.items()}
        rows = [self._expanded(text, remaining) for text in texts]
        if unused := [kind for kind, values in remaining.items() if next(values, None) is not None]:
            raise DataError(f"more {unused[0]} than there are {PLACEHOLDERS[unused[0]]} in the text")
        ids, mask = left_padded(rows, self.tokenizer.pad_token_id)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if any(prepared.values()):
            inputs["media"] = {kind: [one.values for one in values] for kind, values in prepared.items() if values}
        return BatchFeature(inputs)

    def _expanded(self, text: str, remaining: Mapping[str, Iterator[Prepared]]) -> list[int]:
        """Token ids, with each placeholder replaced by its medium's segments: a mark, and a placeholder per row."""
        kinds = {placeholder.id: kind for kind, placeholder in self._placeholders.items()}
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token not in kinds:
                ids.append(token)
                continue
            medium = next(remaining.get(kinds[token], iter(())), None)
            if medium is None:
                raise DataError(f"fewer {kinds[token]} than there are {PLACEHOLDERS[kinds[token]]} in the text")
            ids += segment_ids(self._composition.placement.segments(kinds[token], medium.layout), token, self.tokenizer)
        return ids

    def _prepared(self, kind: str, medium: Any) -> Prepared:
        encoder = self._encoders[kind]
        if isinstance(medium, str) and medium.startswith("data:"):
            medium = base64.b64decode(medium.partition(",")[2])
        if isinstance(medium, str) and "://" in medium:
            raise DataError(f"{medium[:60]}: nothing is downloaded here; download it, and give the file's path")
        if isinstance(medium, str | Path):
            medium = Path(medium)
        if isinstance(medium, io.BytesIO):
            medium = medium.getvalue()
        if isinstance(medium, Path | bytes):
            medium = decode_for(encoder, kind, medium, self._composition.media)
        return encoder.prepare(_canonical(kind, medium))


def media_in(conversations: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """(kind, medium) of every media part, in order. Raises DataError for a media part without a medium."""
    kinds = {name: kind for kind, names in PART_TYPES.items() for name in names}
    for turns in conversations:
        for turn in turns:
            for part in turn["content"] if not isinstance(turn["content"], str) else ():
                if (kind := kinds.get(part["type"])) is None:
                    continue
                content = part.get(part["type"], part.get(kind))
                values = content if isinstance(content, dict) else part if content is None else {"data": content}
                key = next((key for key in MEDIUM_KEYS if values.get(key) is not None), None)
                if key is None:
                    raise DataError(f"a part of type {part['type']!r} has no medium: give a file's path as {kind!r}")
                encoded = key == "base64" or (isinstance(content, dict) and key == "data")
                yield kind, base64.b64decode(values[key]) if encoded else values[key]


def _flat(media: Any) -> Iterator[Any]:
    if isinstance(media, list | tuple):
        for one in media:
            yield from _flat(one)
    else:
        yield media


def _canonical(kind: str, medium: Any) -> Any:
    """A decoded medium in the form that encoders take. Raises DataError for other types."""
    if kind == "image" and isinstance(medium, PIL.Image.Image):
        return over_white(medium) if medium.has_transparency_data else medium.convert("RGB")
    if kind == "audio" and isinstance(medium, np.ndarray | torch.Tensor):
        samples = np.asarray(medium, np.float32).squeeze()
        if samples.ndim != 1:
            raise DataError(f"audio: samples of shape {samples.shape}; give one channel, at {RATE:,} samples a second")
        return samples
    if kind == "video" and isinstance(medium, Clip):
        return medium
    raise DataError(f"{kind}: give a file's path, its bytes, or a decoded medium, not a {type(medium).__name__}")
