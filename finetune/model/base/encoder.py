"""The encoder and projector of a base as one frozen encoder: media by the base's own processor, features by its own
methods, in the width of its language model.
"""

import hashlib
import re
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.common.errors import MediaError, ModelError
from finetune.data.media.image import image_size
from finetune.data.sample import Layout, Medium, Prepared, Values
from finetune.model.base.existing import ExistingModel, modules_beside
from finetune.model.encoders import Encoder

ENCODING = 1  # to be raised when features of the same medium change
PICTURES = 4096  # sizes whose layouts are kept
# What a processor gives beside what the encoders take.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets")
ARGUMENT = {"image": "images", "audio": "audio", "video": "videos"}


class BaseEncoder(Encoder):
    """Of one kind of media. Features are (1, S, L, D): segments of the text that the processor writes for a medium."""

    def __init__(self, existing: ExistingModel, kind: str) -> None:
        self.existing, self.kind = existing, kind
        self.processor = existing.processor
        self.options = None  # type: ignore[assignment]
        self.layout_of_size = lru_cache(PICTURES)(self._layout_of_size)
        self.runs: Any = None

    @property
    def module(self) -> Any:  # type: ignore[override]
        return self.existing.model

    @cached_property
    def width(self) -> int:  # type: ignore[override]
        size: int = self.existing.config.get_text_config().hidden_size
        return size

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 of all weights beside the decoder, of the processor and of the config."""
        model = self.existing.model
        digest = hashlib.sha256(f"{ENCODING} {self.kind} {type(model).__name__}".encode())
        digest.update(self.processor.to_json_string().encode())
        digest.update(self.existing.config.to_json_string(use_diff=False).encode())
        for name in modules_beside(model, model.get_decoder()):
            for inner, tensor in sorted(model.get_submodule(name).state_dict().items()):
                digest.update(f"{name}{inner}{tensor.dtype}{tuple(tensor.shape)}".encode())
                if tensor.device.type != "meta":
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def sampling(self) -> dict[str, float]:
        return {"count": VIDEO_FRAMES} if self.kind == "video" else {}

    def layout_at(self, medium: Medium) -> Layout | None:
        """By the size in a picture's header. Raises MediaError."""
        source = medium.path if medium.content is None else medium.content
        if self.kind == "image" and isinstance(source, Path | bytes):
            return self.layout_of_size(*image_size(source, where=medium.place))
        return None

    def _layout_of_size(self, width: int, height: int) -> Layout:
        import PIL.Image

        return self.prepare(PIL.Image.new("RGB", (width, height))).layout

    def prepare(self, decoded: Any) -> Prepared:
        """A decoded medium -> what the base's processor makes of it alone."""
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
        values = {name: value for name, value in inputs.items() if name not in OF_TEXT and isinstance(value, Tensor)}
        if self.features is None:
            values["text_ids"] = inputs["input_ids"]
        return Prepared(values, self._layout(replaced["replacement"], values))

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
        seconds = values.get("second_per_grid_ts")
        return Layout(
            rows=runs[0][1],
            marks=tuple(mark for mark, _ in runs),
            end=end,
            grid=None if grid is None else tuple(grid[0].tolist()),
            grid_seconds=None if seconds is None else float(seconds[0]),
        )

    def encode(self, batch: Values) -> Tensor:
        """One prepared medium -> features (1, S, L, D), in the dtype of the base."""
        assert not isinstance(batch, Tensor)
        model = self.existing.model
        inputs = {name: value.to(self.existing.device) for name, value in batch.items()}
        inputs = {n: v.to(self.existing.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        rows = self._rows(model, inputs)
        return rows[None, None]

    @property
    def features(self) -> Any:
        """The base's method that gives projected features, if it has one."""
        return getattr(self.existing.skeleton.base_model, f"get_{self.kind}_features", None)

    def _rows(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if self.features is None:
            return self._given_to_decoder(model, inputs)
        method = getattr(model.base_model, f"get_{self.kind}_features")
        taken = signature(method).parameters
        output = method(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)
        rows = output.pooler_output
        if not isinstance(rows, Tensor):
            rows = torch.cat([row.flatten(0, -2) for row in rows])
        return rows.flatten(0, -2)

    def _given_to_decoder(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Qwen2-Audio has no such method: rows (L, D) that stand for the medium where its text alone is read."""
        given: list[Tensor] = []

        def take(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            given.append(kwargs["inputs_embeds"])
            raise _Taken

        ids, taken = inputs["text_ids"], signature(model.base_model.forward).parameters
        handle = model.get_decoder().register_forward_pre_hook(take, with_kwargs=True)
        try:
            model.base_model(input_ids=ids, **{name: value for name, value in inputs.items() if name in taken})
        except _Taken:
            pass
        finally:
            handle.remove()
        return given[0][ids == self.existing.token_id(self.kind)]


class _Taken(Exception):
    """Ends a forward pass whose decoder isn't asked."""


RATE = 16_000
VIDEO_FRAMES = 8
