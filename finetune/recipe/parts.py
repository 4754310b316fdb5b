"""Parts as a recipe names them: a kind, which is the name of a file in a folder of parts, and its validated options.

The classes here are all that the rest of the program knows of a part's file: `projector.length(rows)` calls
`finetune/model/projectors/<kind>.py` with the options. Imports no torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from finetune.common.errors import RecipeError
from finetune.common.registry import PartOptions, load_part, nearest, part_names
from finetune.recipe.words import describe, problem, problem_at

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import nn


JsonSchema: TypeAlias = dict[str, Any]
# What an objective needs of a row: an answer; its media's text, for the LLM itself as teacher; another model's outputs;
# a chosen and a rejected answer; a single answer and whether it is desirable; or the prompt alone.
Needs: TypeAlias = Literal["answers", "texts", "teacher", "pairs", "unpaired", "prompts"]


@dataclass(frozen=True)
class Part:
    """`{kind: mlp, hidden: 2048}`, or just `mlp`."""

    kind: str
    options: PartOptions
    folder: ClassVar[str]

    @property
    def module(self) -> "ModuleType":
        """The part's file."""
        result: ModuleType = load_part(self.folder, self.kind)
        return result

    @classmethod
    def of(cls, kind: str, **options: Any) -> Self:
        """A part with these options, and defaults for the others. Raises RecipeError for a kind that doesn't exist."""
        return cls(kind, load_part(cls.folder, kind).Options(**options))

    @classmethod
    def parse(cls, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        mapping = {"kind": value} if isinstance(value, str) else value
        kinds = ", ".join(part_names(cls.folder))
        if not isinstance(mapping, dict):
            raise problem(f"got {describe(value)}; write one of {kinds}, or {{kind: ..., its options}}.")
        kind = mapping.get("kind")
        below: tuple[str, ...] = ("kind",) if "kind" in mapping and mapping is value else ()
        if "kind" not in mapping:
            wrong = _meant_by_kind(mapping, part_names(cls.folder))
            if wrong is not None:
                raise problem_at(cls, (wrong,), f"unknown key. Did you mean 'kind'? One of {kinds}.", mapping[wrong])
            raise problem(f"'kind' is missing: one of {kinds}.")
        if not isinstance(kind, str) or not re.fullmatch("[A-Za-z0-9_-]{1,40}", kind):
            raise problem_at(cls, below, f"got {describe(kind)}; write one of {kinds}.", kind)
        try:
            options = load_part(cls.folder, kind).Options
        except RecipeError as error:
            raise problem_at(cls, below, str(error), kind) from None
        # By JSON: strict about numbers and text, yet a list may become a tuple and text a path.
        written = json.dumps({key: option for key, option in mapping.items() if key != "kind"})
        return cls(kind, options.model_validate_json(written, strict=True))

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(cls.dump)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=written)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {"part": cls.folder}  # in its place: `kind_schema` of one kind, or `any_kind_schema`


def _meant_by_kind(mapping: JsonSchema, kinds: Sequence[str]) -> str | None:
    """The key that is spelled like `kind`, or else one that names a kind."""
    keys = [key for key in mapping if isinstance(key, str)]
    return nearest("kind", keys) or next((key for key in keys if mapping[key] in kinds), None)


def kind_schema(folder: str, kind: str, definitions: JsonSchema) -> JsonSchema:
    """JSON schema of a part of one kind; the definitions that it refers to are added to `definitions`."""
    part = load_part(folder, kind)
    prefix = f"{folder}.{kind}."
    options = part.Options.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
    definitions |= {prefix + name: definition for name, definition in options.pop("$defs", {}).items()}
    paragraph = (part.__doc__ or kind).strip().partition("\n\n")[0]
    about = {"title": kind, "description": " ".join(paragraph.split())}
    properties = {"kind": {"const": kind}, **options.get("properties", {})}
    return {**options, **about, "properties": properties, "required": ["kind", *options.get("required", [])]}


def any_kind_schema(folder: str, definitions: JsonSchema) -> JsonSchema:
    """JSON schema of a part of any kind, which may be its name alone where no option is required."""
    kinds = [kind_schema(folder, kind, definitions) for kind in part_names(folder)]
    short = [kind["title"] for kind in kinds if kind["required"] == ["kind"]]
    return {"anyOf": kinds + ([{"enum": short}] if short else [])}


class EncoderPart(Part):
    folder = "encoders"

    @property
    def medium(self) -> str:
        """The kind of media that it takes: image, audio or video."""
        return str(self.module.MEDIUM)

    def build(self, dtype: "torch.dtype", device: "torch.device") -> Any:
        """The frozen `Encoder` with its weights: see `finetune/model/encoders/__init__.py`."""
        return self.module.build(self.options, dtype, device)


class ProjectorPart(Part):
    folder = "projectors"

    def build(self, width_in: int, width_out: int) -> "nn.Module":
        """New weights, float32: (N, L, width_in) -> (N, L', width_out)."""
        result: nn.Module = self.module.build(width_in, width_out, self.options).float()
        return result

    def length(self, rows: int) -> int:
        """L' of L feature rows. Raises ModelError where they can't be projected."""
        return int(self.module.length(rows, self.options))


class FusionPart(Part):
    folder = "fusion"

    @property
    def trained(self) -> bool:
        """Whether it has weights."""
        return bool(self.module.TRAINED)

    @property
    def by_sample(self) -> bool:
        """Whether tokens find their media by the sample that they belong to."""
        return bool(self.module.BY_SAMPLE)

    def build(self, language_model_config: Any, media: Sequence[str]) -> "nn.Module":
        """New weights, float32."""
        result: nn.Module = self.module.build(language_model_config, tuple(media), self.options).float()
        return result

    def placeholders(self, rows: int) -> int:
        """Placeholder tokens of a segment with this many projected rows."""
        return int(self.module.placeholders(rows, self.options))


class HeadPart(Part):
    folder = "heads"

    @property
    def trained(self) -> bool:
        """Whether it has weights of its own: it then reads the LLM's last state of a question."""
        return bool(self.module.TRAINED)


class TaskPart(Part):
    folder = "tasks"

    @property
    def media(self) -> tuple[str, ...]:
        """The kinds of media that its rows carry."""
        options: Any = self.options
        return tuple(options.media)

    @property
    def heads(self) -> tuple[str, ...]:
        """Kinds of heads that can answer it, the usual one first."""
        return tuple(self.module.HEADS)

    @property
    def primary(self) -> str:
        """The metric that stands for the task, where rows have it."""
        return str(self.module.PRIMARY)

    def sample(self, row: Any) -> Any:
        """A `Row` as a `Sample`. Raises DataError."""
        return self.module.sample(row, self.options)

    def read(self, answer: Any) -> Any:
        """What an `Answer` predicts, as JSON holds it; None where it can't be read."""
        return self.module.read(answer, self.options)

    def measure(self, prediction: Any, target: Any) -> dict[str, Any]:
        """What `score` sums up of one prediction."""
        result: dict[str, Any] = self.module.measure(prediction, target, self.options)
        return result

    def score(self, measures: list[dict[str, Any]]) -> dict[str, float]:
        """{metric: value} over the measures of one or more rows."""
        result: dict[str, float] = self.module.score(measures, self.options)
        return result

    def tables(self, measures: list[dict[str, Any]]) -> dict[str, Any] | None:
        """For the report: the confusion of labels and scores per label; None for tasks without labels."""
        return self.module.tables(measures, self.options) if hasattr(self.module, "tables") else None


class FormatPart(Part):
    folder = "formats"

    @property
    def remote(self) -> bool:
        """Whether a source's path may be the Hub id of a dataset."""
        return getattr(self.module, "REMOTE", False)


class ObjectivePart(Part):
    folder = "objectives"

    @property
    def needs(self) -> Needs:
        """What it needs of each row."""
        result: Needs = getattr(self.options, "needs", self.module.NEEDS)
        return result

    @property
    def compares(self) -> bool:
        """Whether two answers to each row share a packed row."""
        return self.needs in ("pairs", "unpaired")

    @property
    def samples_answers(self) -> bool:
        """Whether answers are sampled from the model while it trains, which then learns from them."""
        return self.needs == "prompts"

    @property
    def sampled_by_vllm(self) -> bool:
        """Whether these answers come from a vLLM server."""
        return getattr(self.options, "sampler", "") == "vllm"

    @property
    def iterations(self) -> int:
        """Optimizer steps that each row is used for in an epoch."""
        return int(getattr(self.options, "iterations", 1))

    def tokens_of(self, length: int) -> int:
        """About how many tokens of a packed row a sample of this length takes."""
        options: Any = self.options
        return (
            length + options.answers * options.max_new_tokens if self.samples_answers else (1 + self.compares) * length
        )

    @property
    def reference(self) -> bool:
        """Whether it needs log-probabilities under the weights that the stage begins with."""
        return bool(self.module.REFERENCE)

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch is the sum of those of its samples, or of its compared answers."""
        return bool(getattr(self.module, "SEPARABLE", False)) and not getattr(self.options, "sft_weight", 0)

    @property
    def heads(self) -> bool:
        """Whether heads with weights learn by it."""
        return bool(self.module.HEADS)
