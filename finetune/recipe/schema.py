"""The recipe: its schema, the checks that need no model, and a strict reader. Imports no torch.

A field's description is its documentation: `finetune schema` prints it. Fields marked with `json_schema_extra=PATH_...`
(here and in any part's `Options`) hold paths: relative ones are relative to the recipe's folder and become absolute on
reading. The marker is {"path": X}: "file", "folder", "new" for one that needn't exist, "maybe" for a name that is a Hub
id unless it looks local; where the section has a `may_be_remote` that is false, it is a file or folder that exists.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
)
from pydantic_core import CoreSchema, core_schema

from finetune.common.errors import RecipeError
from finetune.common.registry import PartOptions, load_part, part_names
from finetune.recipe.words import describe, problem, problem_at

PATH_FILE: dict[str, Any] = {"path": "file"}
PATH_FOLDER: dict[str, Any] = {"path": "folder"}
PATH_NEW: dict[str, Any] = {"path": "new"}
PATH_OR_HUB_ID: dict[str, Any] = {"path": "maybe"}

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
MediumName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
PublishedPart = Annotated[str, Field(pattern=r"^(llm|data|encoders\.[a-z][a-z0-9_]*)$")]
ModelPart = Annotated[str, Field(pattern=r"^(llm|encoders\.[a-z][a-z0-9_]*)$")]
LicenceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
HostName = Annotated[str, Field(pattern=r"^(\*\.)?[^\s/*@]+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Part:
    """One file of a folder of parts, with its validated options: `{kind: mlp, hidden: 2048}`, or just `mlp`."""

    kind: str
    options: PartOptions
    folder: ClassVar[str]

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
            raise problem(f"'kind' is missing: one of {kinds}.")
        if not isinstance(kind, str) or not re.fullmatch("[A-Za-z0-9_-]{1,40}", kind):
            raise problem_at(cls, below, f"got {describe(kind)}; write one of {kinds}.", kind)
        try:
            options = load_part(cls.folder, kind).Options
        except RecipeError as error:
            raise problem_at(cls, below, str(error), kind) from None
        # By JSON: strict about numbers and text, yet a list may become a tuple and text a path.
        given = json.dumps({key: option for key, option in mapping.items() if key != "kind"})
        return cls(kind, options.model_validate_json(given, strict=True))

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(cls.dump)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=written)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = []
        short = []
        for name in part_names(cls.folder):
            part = load_part(cls.folder, name)
            options = handler.resolve_ref_schema(handler(part.Options.__pydantic_core_schema__))
            required = options.get("required", [])
            if not required:
                short.append(name)
            properties = {"kind": {"const": name}, **options.get("properties", {})}
            about = {"title": name, "description": (part.__doc__ or name).strip().partition("\n")[0]}
            kinds.append({**options, **about, "properties": properties, "required": ["kind", *required]})
        return {"anyOf": kinds + ([{"enum": short}] if short else [])}


class Encoder(Part):
    folder = "encoders"


class Projector(Part):
    folder = "projectors"


class Fusion(Part):
    folder = "fusion"


class Task(Part):
    folder = "tasks"


class Head(Part):
    folder = "heads"


class Format(Part):
    folder = "formats"


def _not_empty(path: Any) -> Any:
    if path == "":
        raise problem("got ''; write a path.")
    return path


RecipePath = Annotated[Path, Strict(False), BeforeValidator(_not_empty)]


class Llm(Section):
    name: str = Field(
        min_length=1, description="Hub id, folder, or path of a .gguf file.", json_schema_extra=PATH_OR_HUB_ID
    )
    revision: str | None = Field(None, description="Commit (40 hex digits), branch or tag of the Hub repository.")
    quantize: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="How the frozen weights are kept: 4, 8, 16 bits."
    )
    double_quantize: bool = Field(True, description="Quantize the scales of nf4 too (saves 0.4 bits per weight).")
    dtype: Dtype = Field("auto", description="Numbers computed with; auto: bfloat16 where the device has it.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="Implementation; auto: the fastest that keeps packed samples apart."
    )
    chat_template: RecipePath | None = Field(
        None, description="Jinja file used instead of the tokenizer's.", json_schema_extra=PATH_FILE
    )
    trust_remote_code: bool = Field(False, description="Run code of the Hub repository; needs a commit as revision.")


class Model(Section):
    llm: Llm = Field(description="The frozen language model.")
    encoders: dict[MediumName, Encoder] = Field({}, description="Medium -> the frozen encoder that takes it.")
    projectors: dict[MediumName, Projector] = Field({}, description="Medium -> the trained projector to the LLM.")
    fusion: Fusion = Field("prefix", validate_default=True, description="How projected media meet the text.")


class EncoderTuning(Section):
    last_layers: int | None = Field(None, ge=1, description="Unfreeze the encoder's last n layers.")
    rank: int | None = Field(None, ge=1, le=1024, description="LoRA of this rank on the encoder instead.")
    alpha: float = Field(32.0, gt=0, description="Scale of the LoRA: updates are multiplied by alpha / rank.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Modules of the encoder that get LoRA; all-linear: all."
    )


class Adapter(Section):
    rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of LoRA inputs dropped in training.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Modules of the LLM that get LoRA; all-linear: all but its head."
    )
    rslora: bool = Field(False, description="Multiply by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Train magnitude and direction apart (DoRA).")
    initialization: str = Field("default", min_length=1, description="A name that peft's init_lora_weights takes.")


class Source(Section):
    name: str | None = Field(
        None, pattern="^[a-z][a-z0-9_-]*$", description="What its scores are called; null: as its task."
    )
    path: RecipePath = Field(
        description="File or folder of rows; with the format hub also the Hub id of a dataset.",
        json_schema_extra=PATH_OR_HUB_ID,
    )
    format: Format | None = Field(None, description="How the rows are written down; null: detected.")
    task: Task = Field(description="What is asked of the model with these rows.")
    head: Head = Field("language", validate_default=True, description="What its answer is read off.")
    split: Literal["train", "validation", "test"] = Field("train", description="What the rows are for.")
    hold_out: float = Field(
        0.0, ge=0, le=0.9, description="Share of the source's media held out as test rows, by seed and content hash."
    )
    hold_out_validation: float = Field(
        0.0, ge=0, le=0.9, description="Share held out likewise as validation rows, which train.validation looks at."
    )
    group: str | None = Field(
        None, description="Column whose equal rows are held out together (one patient's, one customer's)."
    )
    weight: float = Field(1.0, gt=0, description="Times each row is seen per epoch.")
    loss_weight: float = Field(1.0, gt=0, description="Factor of these rows' loss.")
    columns: dict[str, str] = Field({}, description="The task's column -> the file's.")
    media_folder: RecipePath | None = Field(
        None,
        description="Folder of the media named in the rows; null: the path, or the folder that it lies in.",
        json_schema_extra=PATH_FOLDER,
    )
    outside_media_folder: bool = Field(
        False, description="Whether rows may name media that lie elsewhere on this machine; else they are refused."
    )
    hosts: list[HostName] = Field(
        [],
        description="Hosts from which media are fetched that rows name by http or https; *.example.com: any below it, "
        "but none of a private network. Another is refused.",
    )

    @property
    def may_be_remote(self) -> bool:
        return self.format is not None and getattr(load_part(Format.folder, self.format.kind), "REMOTE", False)


class Media(Section):
    max_bytes: int = Field(256 * 2**20, ge=1, description="Bytes of a media file.")
    max_pixels: int = Field(64 * 10**6, ge=1, description="Pixels of a picture, or of a frame.")
    max_seconds: float = Field(1800.0, gt=0, description="Seconds of a recording or a video.")
    max_frames: int = Field(256, ge=1, description="Frames kept of a video; an encoder that asks for more is refused.")


class Distill(Section):
    answers: Literal["own", "given"] = Field(
        "own", description="Answers imitated: what the LLM says to the text itself, or those of the rows."
    )
    temperature: float = Field(2.0, gt=0, description="Both distributions are softened by it.")
    max_new_tokens: int = Field(32, ge=1, description="Tokens of an own answer, at most.")


class Stage(Section):
    name: str = Field(pattern="^[a-z][a-z0-9_-]*$", description="Name of the stage, distinct.")
    trains: list[str] = Field(
        min_length=1, description="What is trained: projectors, projectors.NAME, fusion, adapter, heads, encoders.NAME."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate, per optimizer step.")
    learning_rates: dict[str, float] = Field({}, description="Of single parts: what `trains` names -> its own peak.")
    sources: list[int] | None = Field(None, min_length=1, description="Numbers of the sources seen; null: all of them.")
    distill: Distill | None = Field(
        None,
        description="Imitate what the LLM says to the media's captions or transcripts, instead of the rows' answers.",
    )
    epochs: int = Field(1, ge=1, description="Passes over the training rows.")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warmup.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the stage's steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, as a factor of the learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this L2 norm.")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="The 8 bit ones need bitsandbytes."
    )


class Validation(Section):
    every_n_steps: int = Field(100, ge=1, description="Optimizer steps between two looks at the validation rows.")
    limit: int | None = Field(128, ge=1, description="Validation rows of each task looked at, at most; null: all.")
    metric: str = Field(
        "mean",
        pattern="^(mean|[a-z][a-z0-9_-]*[.][a-z0-9_@.-]+)$",
        description="What is to get better: NAME.METRIC, or mean: of each task's main metric.",
    )
    patience: int | None = Field(
        None, ge=1, description="A stage ends early after this many looks in a row that were no better; null: never."
    )


class Train(Section):
    tokens_per_batch: int = Field(2048, ge=16, description="Tokens of one packed row.")
    accumulate: int = Field(1, ge=1, description="Packed rows per device per optimizer step.")
    cache: bool = Field(True, description="Run frozen encoders once and keep their features on disk.")
    cache_folder: RecipePath | None = Field(
        None, description="Folder of features; null: the user's cache.", json_schema_extra=PATH_NEW
    )
    encode_batch: int = Field(1, ge=1, description="Media encoded at once.")
    workers: int = Field(0, ge=0, description="Data worker processes; 0: none beside the trainer.")
    checkpoint_every_n_layers: int = Field(
        0, ge=0, description="Layers per activation checkpoint: 0 none, 1 each layer."
    )
    save_every_n_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints on disk.")
    mixing_temperature: float = Field(
        1.0, ge=1, description="1: sources are seen as often as they have rows; higher: more alike, by rows^(1 / this)."
    )
    validation: Validation | None = Field(
        None, description="Score validation rows while training, and keep each stage's best weights; null: don't."
    )
    stages: list[Stage] = Field(min_length=1, description="Run in this order.")


class Evaluate(Section):
    split: Literal["validation", "test"] = Field("test", description="Rows that are scored.")
    limit: int | None = Field(None, ge=1, description="Rows scored at most, of all tasks together; null: all.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens generated at most for an answer.")
    batch: int = Field(16, ge=1, description="Rows generated at once.")


class Merge(Section):
    rows: int = Field(64, ge=1, description="Held-out rows on which the merged model is compared, at most.")
    rows_scored: int = Field(
        64, ge=0, description="Of these, rows that each model also answers, to be scored; 0: none."
    )
    dtype: Dtype = Field("auto", description="Numbers of the merged weights.")
    min_agreement: float = Field(
        0.95, ge=0, le=1, description="Share of next tokens on which adapter and merged must agree."
    )
    max_kl: float = Field(0.1, gt=0, description="KL divergence of merged from adapter, at most, in nats a token.")


class Publish(Section):
    repo: str | None = Field(None, description="Hub repository, owner/name; null: none.")
    private: bool = Field(True, description="Create the repository as private.")
    license: LicenceName | None = Field(
        None, description="Licence of what is published, as the Hub calls it: apache-2.0; null: that of the LLM."
    )
    licenses: dict[PublishedPart, str] = Field(
        {}, description="Part (llm, encoders.NAME, data) -> its licence; others are read from the parts' own cards."
    )
    hub_names: dict[ModelPart, str] = Field(
        {}, description="Part (llm, encoders.NAME) that is a folder here -> the Hub repository with the same weights."
    )
    languages: list[str] = Field([], description="Languages of questions and answers: ISO 639 codes, as en, zh.")
    datasets: list[str] = Field([], description="Hub ids of the data, beside those that are sources.")
    limits: str = Field("", description="Text for the card: what it isn't for, and what it wasn't tested on.")
    samples: int = Field(
        6, ge=0, le=40, description="Predictions on the card, half of them the worst, with their pictures; 0: none."
    )


class Recipe(Section):
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$", description="Name of the run and of its folder.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of everything drawn by chance.")
    model: Model = Field(description="The parts of the model.")
    adapter: Adapter | None = Field({}, validate_default=True, description="LoRA on the LLM; null: none.")
    tune_encoders: dict[MediumName, EncoderTuning] = Field({}, description="Encoders that don't stay frozen, and how.")
    media: Media = Field({}, validate_default=True, description="Bounds of what is decoded.")
    data: list[Source] = Field(min_length=1, description="Sources of rows.")
    train: Train = Field(description="How it is trained.")
    evaluate: Evaluate = Field({}, validate_default=True, description="How it is scored.")
    merge: Merge = Field({}, validate_default=True, description="How the merged model is made and checked.")
    publish: Publish = Field({}, validate_default=True, description="Where it is published.")


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, with the options of every part there is: for editors, and for messages."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


cached_schema = cache(schema)
