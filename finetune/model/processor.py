"""What the composite takes, made of text and media the way processors of transformers do it."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, ProcessorMixin

from finetune.common.errors import DataError
from finetune.common.registry import load_part
from finetune.data.media import Limits, decode
from finetune.data.media.image import over_white
from finetune.data.sample import Prepared
from finetune.model.chat_template import PART_TYPES, with_media_parts
from finetune.model.composite import PLACEHOLDERS, MultimodalConfig, segments_of
from finetune.model.tokenize import Placeholder

if TYPE_CHECKING:
    import numpy as np

KEYS = ("url", "path", "base64", "data")  # under which clients give a medium, besides its kind


class MultimodalProcessor(ProcessorMixin):
    """Conversations, or text with placeholders beside media, -> what the model's `generate` and `forward` take.

    `parts`: those of the model's config. Media are files (within the bounds that the model was trained with), their
    bytes, data URIs, or decoded: pictures of Pillow, samples at 16 kHz, `finetune.data.media.video.Clip`.
    """

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, parts: Any = None) -> None:
        self.parts: dict[str, Any] = parts or MultimodalConfig().parts
        ids = self.parts["placeholders"]
        self._placeholders = {kind: Placeholder(PLACEHOLDERS[kind], ids[kind]) for kind in ids}
        with torch.device("meta"):  # preprocessing and shapes; no weights
            self._encoders = {
                kind: load_part("encoders", part["kind"]).restore(part["settings"], torch.float32)
                for kind, part in self.parts["encoders"].items()
            }
        known = {field.name for field in fields(Limits)}
        self._limits = Limits(**{k: v for k, v in self.parts.get("media", {}).items() if k in known})
        if tokenizer is not None:
            tokenizer.chat_template = chat_template or tokenizer.chat_template
            chat_template = tokenizer.chat_template = with_media_parts(tokenizer, self._placeholders)
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "MultimodalProcessor":
        """Of a folder or Hub id that `save_pretrained` or `finetune merge` wrote."""
        where = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        processor_parts, _ = cls.get_processor_dict(pretrained_model_name_or_path, **where)
        if "parts" not in processor_parts:
            config = MultimodalConfig.from_pretrained(pretrained_model_name_or_path, **where)
            kwargs["parts"] = config.parts
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
        ids (B, T), with `return_dict` too all that the model takes. `kwargs` go to the chat template.
        """
        several = [conversation] if isinstance(conversation[0], dict) else list(conversation)
        texts = [
            self.tokenizer.apply_chat_template(
                turns,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for turns in several
        ]
        if not tokenize:
            return texts[0] if isinstance(conversation[0], dict) else texts
        media: dict[str, list[Any]] = {kind: [] for kind in self._encoders}
        for kind, medium in media_in(several):
            if kind not in media:
                raise DataError(f"holds {kind}, but this model takes {', '.join(media) or 'text only'}")
            media[kind].append(medium)
        found = self._of(texts, media, return_tensors)
        return found if return_dict else found["input_ids"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts, with a placeholder where each medium stands -> `input_ids`, `attention_mask` (B, T), padded on the
        left, and `media` {kind: prepared media, in the order of their placeholders}. Special tokens aren't added: the
        chat template has written them. Raises DataError where the media don't fit.
        """
        given = {"image": images, "audio": audio, "video": videos}
        if (rate := kwargs.get("sampling_rate", 16_000)) != 16_000:
            raise DataError(f"sampling_rate is {rate}; give samples at 16,000 a second, or a file")
        if unknown := [kind for kind, media in given.items() if media is not None and kind not in self._encoders]:
            raise DataError(f"holds {unknown[0]}, but this model takes {', '.join(self._encoders) or 'text only'}")
        media = {kind: list(_flat(found)) for kind, found in given.items() if found is not None}
        return self._of([text] if isinstance(text, str) else list(text or [""]), media, return_tensors)

    def _of(self, texts: Sequence[str], media: dict[str, list[Any]], return_tensors: str | None) -> BatchFeature:
        if return_tensors not in ("pt", None):
            raise DataError(f"return_tensors is {return_tensors!r}; write 'pt'")
        prepared = {kind: [self._prepared(kind, one) for one in found] for kind, found in media.items()}
        waiting = {kind: iter(found) for kind, found in prepared.items()}
        rows = [self._expanded(text, waiting) for text in texts]
        if left := [kind for kind, found in waiting.items() if next(found, None) is not None]:
            raise DataError(f"more {left[0]} than there are {PLACEHOLDERS[left[0]]} in the text")
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        padding = [longest - len(row) for row in rows]
        found: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * n + row for n, row in zip(padding, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        }
        if any(prepared.values()):
            found["media"] = {kind: [one.values for one in all_of] for kind, all_of in prepared.items() if all_of}
        return BatchFeature(found)

    def _expanded(self, text: str, waiting: dict[str, Iterator[Prepared]]) -> list[int]:
        """Token ids, each placeholder as its medium's segments: a mark, and as many placeholders as it has rows."""
        kinds = {placeholder.id: kind for kind, placeholder in self._placeholders.items()}
        config = MultimodalConfig(parts=self.parts)
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token not in kinds:
                ids.append(token)
                continue
            medium = next(waiting.get(kinds[token], iter(())), None)
            if medium is None:
                raise DataError(f"fewer {kinds[token]} than there are {PLACEHOLDERS[kinds[token]]} in the text")
            for mark, count in segments_of(config, kinds[token], medium.layout):
                ids += self.tokenizer(mark, add_special_tokens=False)["input_ids"] if mark else []
                ids += [token] * count
        return ids

    def _prepared(self, kind: str, medium: Any) -> Prepared:
        encoder = self._encoders[kind]
        if isinstance(medium, str) and medium.startswith("data:"):
            medium = base64.b64decode(medium.partition(",")[2])
        if isinstance(medium, str) and "://" in medium:
            raise DataError(f"{medium[:60]}: media are read from files; download it first")
        if isinstance(medium, str | Path):
            medium = Path(medium)
        if isinstance(medium, io.BytesIO):
            medium = medium.getvalue()
        if isinstance(medium, Path | bytes):
            medium = decode(kind, medium, limits=self._limits, **encoder.sampling)
        return encoder.prepare(_canonical(kind, medium))


def media_in(conversations: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """(kind, medium) of every part that is one, in order. Raises DataError for a part without any."""
    kinds = {name: kind for kind, names in PART_TYPES.items() for name in names}
    for turns in conversations:
        for turn in turns:
            for part in turn["content"] if not isinstance(turn["content"], str) else ():
                if (kind := kinds.get(part["type"])) is None:
                    continue
                inside = part.get(part["type"], part.get(kind))
                given = inside if isinstance(inside, dict) else {"data": inside} if inside is not None else part
                found = next((key for key in KEYS if given.get(key) is not None), None)
                if found is None:
                    raise DataError(f"a part of type {part['type']!r} holds no medium: give a file's path as {kind!r}")
                encoded = found == "base64" or (isinstance(inside, dict) and found == "data")
                yield kind, base64.b64decode(given[found]) if encoded else given[found]


def _flat(media: Any) -> Iterator[Any]:
    if isinstance(media, list | tuple):
        for one in media:
            yield from _flat(one)
    else:
        yield media


def _canonical(kind: str, medium: Any) -> Any:
    """A decoded medium in the form that encoders take. Raises DataError for what is none."""
    import numpy as np
    import PIL.Image

    from finetune.data.media.video import Clip

    if kind == "image" and isinstance(medium, PIL.Image.Image):
        return over_white(medium) if medium.has_transparency_data else medium.convert("RGB")
    if kind == "audio" and isinstance(medium, np.ndarray | torch.Tensor):
        return _samples(medium)
    if kind == "video" and isinstance(medium, Clip):
        return medium
    raise DataError(f"{kind}: give a file's path, its bytes, or it decoded, not a {type(medium).__name__}")


def _samples(sound: Any) -> "np.ndarray":
    import numpy as np

    samples = np.asarray(sound, np.float32).squeeze()
    if samples.ndim != 1:
        raise DataError(f"audio: samples of shape {samples.shape}; give one channel, at 16,000 a second")
    return samples
