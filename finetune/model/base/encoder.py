"""The encoder and projector of a base as one frozen encoder: media by the base's own processor, features by its own
methods, in the width of its language model.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from finetune.common.errors import MediaError, ModelError
from finetune.data.media.image import image_size, shrunk_size
from finetune.data.sample import Layout, Medium, Prepared, Values
from finetune.model.base.existing import ExistingModel, beside_language, media_modules
from finetune.model.encoders import Encoder
from finetune.model.encoders._transformers import hash_tensors
from finetune.recipe.schema import Limits

ENCODING = 1  # version: to be raised when features of the same medium change
PICTURES = 4096  # sizes whose layouts are cached
# What a processor gives beside what the encoders take.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets")
ARGUMENT = {"image": "images", "audio": "audio", "video": "videos"}


class BaseEncoder(Encoder):
    """Of one kind of media. Features (1, R, D) are one segment, whatever the text has between them."""

    def __init__(self, existing: ExistingModel, kind: str) -> None:
        self.existing, self.kind = existing, kind
        self.processor = existing.processor
        self.options = None  # type: ignore[assignment]
        self.layout_of_size = lru_cache(PICTURES)(self._layout_of_size)

    @property
    def module(self) -> Any:  # type: ignore[override]
        return self.existing.model

    @cached_property
    def width(self) -> int:  # type: ignore[override]
        """Of all depths at which the decoder reads features, side by side."""
        size: int = self.existing.config.get_text_config().hidden_size
        vision = getattr(self.existing.config, "vision_config", None)
        depths = () if self.kind == "audio" else getattr(vision, "deepstack_visual_indexes", ())
        return size * (1 + len(depths))

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 of all weights beside the decoder, of the processor and of the config."""
        model = self.existing.model
        digest = hashlib.sha256(f"{ENCODING} {self.kind} {type(model).__name__}".encode())
        digest.update(self.processor.to_json_string().encode())
        digest.update(self.existing.config.to_json_string(use_diff=False).encode())
        for name in beside_language(model):
            hash_tensors(digest, {f"{name}{one}": t for one, t in model.get_submodule(name).state_dict().items()})
        return digest.hexdigest()

    @property
    def sampling(self) -> dict[str, float]:
        return {"count": VIDEO_FRAMES} if self.kind == "video" else {}

    def layout_at(self, medium: Medium, limits: Limits) -> Layout | None:
        """By the size in a picture's header. Raises MediaError."""
        source = medium.path if medium.content is None else medium.content
        if self.kind == "image" and isinstance(source, Path | bytes):
            return self.layout_of_size(*shrunk_size(*image_size(source, where=medium.place), limits))
        return None

    def _layout_of_size(self, width: int, height: int) -> Layout:
        import PIL.Image

        return self.prepare(PIL.Image.new("RGB", (width, height))).layout

    def prepare(self, decoded: Any) -> Prepared:
        """A decoded medium -> the inputs that the base's processor makes of it alone."""
        if ARGUMENT[self.kind] not in signature(type(self.processor).__call__).parameters:
            return self._extracted(decoded)
        given: dict[str, Any] = {ARGUMENT[self.kind]: [decoded]}
        if self.kind == "audio":
            given |= {"sampling_rate": RATE}
        if self.kind == "video":
            given = {"videos": [[list(decoded.frames)]], "do_sample_frames": False}
        token = self.existing.placeholders()[self.kind].token
        try:
            inputs = self.processor(text=[token], return_text_replacement_offsets=True, return_tensors="pt", **given)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise MediaError(f"the base's processor refuses this {self.kind}: {str(error).splitlines()[0]}") from None
        (replaced,) = inputs["text_replacement_offsets"][0]
        left_out = OF_TEXT if self._method is not None else OF_TEXT[1:]
        values = {name: value for name, value in inputs.items() if name not in left_out and isinstance(value, Tensor)}
        return Prepared(values, self._layout(replaced["replacement"], values))

    def _extracted(self, decoded: Any) -> Prepared:
        """Voxtral's processor takes recordings in conversations only, by a tokenizer of Mistral's."""
        settings = dict(self.processor.audio_kwargs)
        frames = settings.pop("max_source_positions")
        features = self.processor.feature_extractor(decoded, **settings)["input_features"]
        windows = features.unflatten(-1, (-1, frames)).transpose(1, 2).flatten(0, 1)
        rows = self._rows(self.existing.skeleton, {"input_features": windows.to("meta", self.existing.dtype)})
        return Prepared({"input_features": windows}, Layout(rows=len(rows)))

    def _layout(self, text: str, values: dict[str, Tensor]) -> Layout:
        """Of the text that stands for a medium: runs of the placeholder, and what is before, between and behind."""
        token = self.existing.tokenizer.convert_ids_to_tokens(self.existing.token_id(self.kind))
        runs = [
            (mark, len(run) // len(token)) for mark, run in re.findall(f"(.*?)((?:{re.escape(token)})+)", text, re.S)
        ]
        if not runs:
            raise ModelError(f"the base's processor writes no {token} for {self.kind}")
        end = text[sum(len(mark) + len(token) * count for mark, count in runs) :]
        if len({count for _, count in runs}) > 1:  # segments of one row each
            runs = [(mark if not row else "", 1) for mark, count in runs for row in range(count)]
        grid = values.get(f"{self.kind}_grid_thw")
        if self.kind == "audio" and self.existing.rope is not None and "feature_attention_mask" in values:
            grid = values["feature_attention_mask"].sum(-1, keepdim=True)
        seconds = values.get("second_per_grid_ts", values.get("video_second_per_grid"))  # Qwen-VL's and Qwen-Omni's
        return Layout(
            rows=runs[0][1],
            marks=tuple(mark for mark, _ in runs),
            end=end,
            grid=None if grid is None else tuple(grid[0].tolist()),
            grid_seconds=None if seconds is None else float(seconds[0]),
        )

    def encode(self, batch: Values) -> Tensor:
        """One prepared medium -> features (1, 1, R, D), in the dtype of the base; wider where they're of several
        depths.
        """
        assert not isinstance(batch, Tensor)
        model = self.existing.model
        half = self.existing.dtype != torch.float32
        beside = [p for name in beside_language(model) for p in model.get_submodule(name).parameters()]
        kinds = {p.dtype for p in beside if p.is_floating_point()}
        # Where projectors have trained, they are float32.
        with torch.autocast(self.existing.device.type, self.existing.dtype, enabled=half and len(kinds) > 1):
            inputs = BatchFeature({**batch}).to(self.existing.device, self.existing.dtype)
            return self._rows(model, {**inputs})[None, None]

    def _rows(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if self._method is None:
            return self._decoder_inputs(model, inputs)
        method = getattr(model.base_model, self._method)
        taken = signature(method).parameters
        output = method(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)
        return torch.cat([_rows(one) for one in (output.pooler_output, *getattr(output, "deepstack_features", ()))], 1)

    @property
    def _method(self) -> str | None:
        name = f"get_{self.kind}_features"
        return name if hasattr(self.existing.skeleton.base_model, name) else None

    def _decoder_inputs(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Features of a base without a method for them: what its decoder reads at the placeholders, or what the module
        in its decoder gives that media enter.
        """
        given: list[Tensor] = []

        def stop(embeddings: Tensor) -> None:
            given.append(embeddings)
            raise _Stop

        decoder = model.get_decoder()
        if inside := media_modules(decoder):
            handle = decoder.get_submodule(inside[-1]).register_forward_hook(lambda module, args, output: stop(output))
        else:
            handle = decoder.register_forward_pre_hook(
                lambda module, args, kwargs: stop(kwargs["inputs_embeds"]), with_kwargs=True
            )
        try:
            taken = signature(model.forward).parameters
            model(
                attention_mask=torch.ones_like(inputs["input_ids"]), **{n: v for n, v in inputs.items() if n in taken}
            )
        except _Stop:
            pass
        finally:
            handle.remove()
        return given[0][inputs["input_ids"] == self.existing.token_id(self.kind)]


def _rows(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(R, D)."""
    whole = features if isinstance(features, Tensor) else torch.cat([part.flatten(0, -2) for part in features])
    return whole.flatten(0, -2)


class _Stop(Exception):
    """The decoder needn't run."""


RATE = 16_000
VIDEO_FRAMES = 8
