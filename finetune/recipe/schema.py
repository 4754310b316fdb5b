"""The schema of a recipe: frozen sections, which functions take whole. Imports no torch.

A field's description is its documentation: `finetune schema` prints it. Fields marked with `json_schema_extra=PATH_...`
(here and in any part's `Options`) hold paths: relative ones are relative to the recipe's folder and become absolute on
reading. The marker is {"path": X}: "file", "folder", "new" for one that needn't exist, "maybe" for a name that is a Hub
id unless it looks local; where the section has a `may_be_remote` that is false, it is a file or folder that exists.
"once" is as "maybe", of what only training needs: it may be gone when the recipe of a run is read.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator, model_validator
from pydantic.config import JsonDict

from finetune.common.errors import RecipeError, given, option
from finetune.common.user_cache import user_cache
from finetune.recipe.parts import (
    EncoderPart,
    FormatPart,
    FusionPart,
    HeadPart,
    JsonSchema,
    ObjectivePart,
    ProjectorPart,
    TaskPart,
    any_kind_schema,
)
from finetune.recipe.words import problem

PATH_FILE: JsonDict = {"path": "file"}
PATH_FOLDER: JsonDict = {"path": "folder"}
PATH_NEW: JsonDict = {"path": "new"}
PATH_OR_HUB_ID: JsonDict = {"path": "maybe"}
PATH_OR_HUB_ID_TO_TRAIN: JsonDict = {"path": "once"}

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Quantize = Literal["nf4", "int8", "none"]
MediumName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
PublishedPart = Annotated[str, Field(pattern=r"^(llm|base|data|encoders\.[a-z][a-z0-9_]*)$")]
ModelPart = Annotated[str, Field(pattern=r"^(llm|base|encoders\.[a-z][a-z0-9_]*)$")]
LicenceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
HostName = Annotated[str, Field(pattern=r"^(\*\.)?[^\s/*@]+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _not_empty(path: Any) -> Any:
    if path == "":
        raise problem("got ''; write a path.")
    return path


RecipePath = Annotated[Path, Strict(False), BeforeValidator(_not_empty)]


class _Weights(Section):
    name: str = Field(
        min_length=1, description="Hub id, folder, or path of a .gguf file.", json_schema_extra=PATH_OR_HUB_ID
    )
    revision: str | None = Field(None, description="Commit (40 hex digits), branch or tag of the Hub repository.")
    quantize: Quantize = Field("nf4", description="Storage of the frozen weights: 4 bits, 8 bits, or none (16 or 32).")
    double_quantize: bool = Field(True, description="Quantize the scales of nf4 too (saves 0.4 bits per weight).")
    dtype: Dtype = Field(
        "auto",
        description="Dtype of the computation; auto: bfloat16 where the GPU has it, float16 on older GPUs, float32 on "
        "a CPU, unless a new run measures that another is at least three times as fast.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="Attention implementation; auto: by segments of the row while training (flash attention on GPUs "
        "from Ampere on, else SDPA) where that is exact, and the LLM's default otherwise.",
    )
    chat_template: RecipePath | None = Field(
        None, description="Jinja file to use in place of the tokenizer's chat template.", json_schema_extra=PATH_FILE
    )


class Llm(_Weights):
    trust_remote_code: bool = Field(
        False, description="Run code from the Hub repository; `revision` must then be a commit."
    )


class Base(_Weights):
    name: str = Field(
        min_length=1,
        description="Hub id or folder of a model of transformers that takes media.",
        json_schema_extra=PATH_OR_HUB_ID,
    )
    quantize: Quantize = Field(
        "nf4", description="Storage of the language model's frozen weights: 4 bits, 8 bits, or none (16 or 32)."
    )
    trust_remote_code: ClassVar[bool] = False


LanguageModel: TypeAlias = Llm | Base


def _named(base: Any) -> Any:
    return {"name": base} if isinstance(base, str) else base


LANGUAGE_NOUNS = {"llm": "LLM", "base": "base model"}  # by their names among published parts


class Model(Section):
    """Either `llm` with its own encoders and projectors, or a `base` that has them."""

    llm: Llm | None = Field(None, description="The frozen language model.")
    base: Annotated[Base | None, BeforeValidator(_named)] = Field(
        None,
        description="Existing model that takes media, or its name, in place of llm, encoders, projectors and fusion.",
    )
    encoders: dict[MediumName, EncoderPart] = Field({}, description="Medium -> its frozen encoder.")
    projectors: dict[MediumName, ProjectorPart] = Field({}, description="Medium -> its trained projector to the LLM.")
    fusion: FusionPart = Field("prefix", validate_default=True, description="How projected media meet the text.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.llm is None) == (self.base is None):
            raise problem("write llm, with encoders and projectors, or base, a model that takes media already.")
        return self

    @property
    def language_model(self) -> LanguageModel:
        """The settings of the LLM, or of the existing model around one."""
        settings = self.llm or self.base
        assert settings is not None
        return settings

    @property
    def language_key(self) -> str:
        """The key of these settings in a recipe."""
        return "model.base" if self.base else "model.llm"

    @property
    def language_part(self) -> str:
        """Its name among published parts."""
        return "base" if self.base else "llm"

    @property
    def language_noun(self) -> str:
        """How messages and reports call it."""
        return LANGUAGE_NOUNS[self.language_part]

    def with_language_model(self, **changes: Any) -> "Model":
        """A copy with other settings of the LLM, or of the existing model."""
        return self.model_copy(
            update={self.language_key.removeprefix("model."): self.language_model.model_copy(update=changes)}
        )


class EncoderTuning(Section):
    last_layers: int | None = Field(None, ge=1, description="Train the encoder's last n layers.")
    rank: int | None = Field(None, ge=1, le=1024, description="Rank of a LoRA on the encoder, instead of last_layers.")
    alpha: float = Field(32.0, gt=0, description="Scale of the LoRA: updates are multiplied by alpha / rank.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Modules of the encoder that get LoRA; all-linear: every linear layer."
    )


class Adapter(Section):
    rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of LoRA inputs in training.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Modules of the LLM that get LoRA; all-linear: all but the output head."
    )
    rslora: bool = Field(False, description="Multiply by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Decompose weights into magnitude and direction (DoRA).")
    initialization: str = Field("default", min_length=1, description="A value of peft's init_lora_weights.")

    @field_validator("initialization")
    @classmethod
    def _few_iterations(cls, value: str) -> str:
        if re.search(r"\d{4}", value):
            raise ValueError("at most 999 iterations")
        return value


class RowFile(Section):
    """A file, folder or dataset of rows, and how it is read."""

    path: RecipePath = Field(
        description="File or folder of rows; with format hub also the Hub id of a dataset.",
        json_schema_extra=PATH_OR_HUB_ID,
    )
    format: FormatPart | None = Field(None, description="File format of the rows; null: detected.")
    columns: dict[str, str] = Field({}, description="The task's column -> the file's column.")
    media_folder: RecipePath | None = Field(
        None,
        description="Folder that media paths in rows are relative to; null: the path, or the folder it lies in.",
        json_schema_extra=PATH_FOLDER,
    )
    outside_media_folder: bool = Field(False, description="Allow media paths outside the media folder.")
    hosts: list[HostName] = Field(
        [],
        description="Hosts that media may be downloaded from, by http or https; *.example.com: any host below it. "
        "Only a host that is written out may be in a private network.",
    )

    @property
    def may_be_remote(self) -> bool:
        return self.format is not None and self.format.remote

    @property
    def folder_of_media(self) -> Path:
        return self.media_folder or (self.path if self.path.is_dir() else self.path.parent)


class Source(RowFile):
    name: str | None = Field(
        None, pattern="^[a-z][a-z0-9_-]*$", description="Name of its scores; null: the name of its task."
    )
    task: TaskPart = Field(description="What is asked with these rows.")
    head: HeadPart = Field("language", validate_default=True, description="Output head: language, label or score.")
    split: Literal["train", "validation", "test"] = Field("train", description="What the rows are for.")
    hold_out: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="Share of the source's rows held out as test rows, by seed and content. Rows that share media or a "
        "group stay together, in a ranking those of a group.",
    )
    hold_out_validation: float = Field(
        0.0, ge=0, le=0.9, description="Share held out in the same way as validation rows, for train.validation."
    )
    group: str | None = Field(
        None, description="Column whose equal values are held out together (a patient, a customer)."
    )
    weight: float = Field(1.0, gt=0, description="Times each row is used per epoch.")
    loss_weight: float = Field(1.0, gt=0, description="Factor of the loss of these rows.")


def task_names(sources: Sequence[Source]) -> list[str]:
    """The name of each source's scores. Sources with the same task and options share one: that which one of them
    gives, or that of the task, numbered where there are several of a kind.
    """
    keys = [(source.task.kind, source.task.options.model_dump_json()) for source in sources]
    chosen = {key: source.name for key, source in zip(keys, sources, strict=True) if source.name}
    names: dict[tuple[str, str], str] = {}
    for kind, options in keys:
        if (kind, options) not in names:
            same = sum(other == kind for other, _ in names.keys() - chosen.keys())
            names[kind, options] = chosen.get((kind, options)) or (f"{kind}_{same + 1}" if same else kind)
    return [names[key] for key in keys]


def chosen_task(known: Sequence[str], task: str | None) -> str | None:
    """That of a model's tasks which is meant: the named one, or the only one; None where there is none. Raises
    RecipeError.
    """
    tasks = ", ".join(dict.fromkeys(known))
    if task is not None and task not in known:
        raise RecipeError(f"{given('task', task)}: the model was trained for {tasks or 'no task that is known'}")
    if task is None and len(set(known)) > 1:
        raise RecipeError(f"the model was trained for {tasks}: name one with {option('--task', 'task=')}")
    return task or next(iter(known), None)


class Limits(Section):
    """Bounds of a medium that is decoded."""

    max_bytes: int = Field(256 * 2**20, ge=1, description="Size of a media file, embedded or downloaded, in bytes.")
    max_pixels: int = Field(64 * 10**6, ge=1, description="Pixels of a picture or of a video frame.")
    max_seconds: float = Field(1800.0, gt=0, description="Length of a recording or video, in seconds.")
    max_frames: int = Field(256, ge=1, description="Frames taken from a video; an encoder that needs more is refused.")
    shrink_to_pixels: int | None = Field(
        None,
        ge=1024,
        description="Pixels to which larger pictures and video frames are scaled down before an encoder sees them: "
        "fewer tokens, where their number goes by the resolution; null: no bound beside the encoder's own.",
    )


class Stage(Section):
    name: str = Field(pattern="^[a-z][a-z0-9_-]*$", description="Name of the stage, unique in the recipe.")
    trains: list[str] = Field(
        min_length=1, description="What it trains: projectors, projectors.NAME, fusion, adapter, heads, encoders.NAME."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate, per optimizer step.")
    learning_rates: dict[str, float] = Field(
        {}, description="Peak rates of single parts: an entry of `trains` -> rate."
    )
    sources: list[int] | None = Field(None, min_length=1, description="Numbers of the sources it uses; null: all.")
    objective: ObjectivePart = Field(
        "next_token", validate_default=True, description="The objective that it minimises."
    )
    epochs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Passes over the training rows; auto: 1 to 30, so that all stages have about 100 optimizer steps "
        "and this one 50.",
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warmup.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, as a factor of the learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="L2 norm that gradients are clipped to.")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="Optimizer; the 8-bit ones are those of bitsandbytes."
    )


class Validation(Section):
    every_n_steps: int = Field(100, ge=1, description="Optimizer steps between two validation passes.")
    limit: int | None = Field(128, ge=1, description="Validation rows per task in a pass; null: all.")
    metric: str = Field(
        "mean",
        pattern="^(mean|[a-z][a-z0-9_-]*[.][a-z0-9_@.-]+)$",
        description="Selection score: NAME.METRIC, or mean: the mean of each task's main metric.",
    )
    patience: int | None = Field(
        None, ge=1, description="Validation passes without improvement after which a stage ends; null: never."
    )


class Train(Section):
    tokens_per_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        2048,
        description="Tokens of a packed row; auto: 2048, or fewer where an epoch of few rows would have too few "
        "optimizer steps or the GPU is too small, but never fewer than the longest row has.",
    )
    share_prefixes: bool = Field(
        True,
        description="Compute once what samples of a packed row begin with, tokens and media. The losses are the same, "
        "but that LoRA dropout is drawn once for all samples behind a beginning.",
    )
    accumulate: int = Field(1, ge=1, description="Packed rows per device per optimizer step.")
    cache: bool | Literal["auto"] = Field(
        True,
        description="Run frozen encoders once and keep their features on disk; auto: where encoders are frozen, there "
        "is more than one epoch and the disk has room.",
    )
    cache_folder: RecipePath | None = Field(
        None, description="Folder of the features; null: the user's cache.", json_schema_extra=PATH_NEW
    )
    encode_batch: int = Field(
        1, ge=1, description="Media encoded in one batch; 1: a few of many media where no feature changes by it."
    )
    workers: int = Field(
        0, ge=0, description="Data worker processes; 0: the trainer's own process, and one a core to encode many media."
    )
    checkpoint_every_n_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="Activation checkpoints at every n-th layer of the LLM: 0 none, 1 every layer; auto: as few as the "
        "GPU's free memory asks for, by the plan; on a CPU none.",
    )
    dequantize_once: bool = Field(
        False,
        description="Keep the LLM's nf4 weights as the 16 or 32 bits that they stand for while training, instead of "
        "dequantizing them in every step: 2 or 4 bytes a weight in place of about half a byte, the same losses.",
    )
    liger: bool = Field(
        False,
        description="Liger's kernels for norms, rotary positions and SwiGLU of the LLM, on an NVIDIA GPU; needs the "
        "package liger-kernel. How much they save has not been measured here.",
    )
    save_every_n_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints on disk.")
    skip_bad_rows: bool = Field(
        False,
        description="In place of stopping, leave out training rows whose media can't be read when their features are "
        "cached, listed in RUN/data/unreadable.jsonl, and rows whose loss or gradients aren't finite, listed in "
        "RUN/data/suspects.jsonl.",
    )
    track: list[Tracker] = Field(
        [], description="Where losses, rates and validation scores are shown live; tensorboard: in RUN/tensorboard."
    )
    mixing_temperature: float = Field(
        1.0,
        ge=1,
        description="Sampling of sources in proportion to rows^(1 / this): 1 by their rows, higher: more evenly.",
    )
    validation: Validation | None = Field(
        None, description="Score validation rows while training and keep each stage's best weights; null: don't."
    )
    stages: list[Stage] = Field(min_length=1, description="Stages, in order.")

    @property
    def feature_folder(self) -> Path | None:
        """Where features are kept; None where they aren't."""
        return (self.cache_folder or user_cache("features")) if self.cache else None

    @property
    def epochs(self) -> int:
        """Of all stages; numbers must be in the place of `auto`."""
        return sum(int(stage.epochs) for stage in self.stages)


class Evaluate(Section):
    split: Literal["validation", "test"] = Field("test", description="Rows that are scored.")
    limit: int | None = Field(None, ge=1, description="Most rows to score, over all tasks; null: all.")
    max_new_tokens: int = Field(64, ge=1, description="Length limit of a generated answer, in tokens.")
    batch: int = Field(16, ge=1, description="Rows generated at once.")


class Merge(Section):
    rows: int = Field(64, ge=1, description="Most held-out rows on which the merged model is compared.")
    rows_scored: int = Field(
        64, ge=0, description="Of these, rows that each model also answers, to be scored; 0: none."
    )
    dtype: Dtype = Field("auto", description="Dtype of the merged weights.")
    min_agreement: float = Field(
        0.95, ge=0, le=1, description="Least share of next tokens on which adapter and merged model agree."
    )
    max_kl: float = Field(0.1, gt=0, description="Largest KL divergence of the merged model, in nats per token.")


class Publish(Section):
    repo: str | None = Field(None, description="Hub repository, owner/name; null: none.")
    private: bool = Field(True, description="Create the repository as private.")
    license: LicenceName | None = Field(
        None,
        description="Licence of what is published, as the Hub spells it: apache-2.0; null: that of the LLM or base.",
    )
    licenses: dict[PublishedPart, str] = Field(
        {},
        description="Part (llm, base, encoders.NAME, data) -> its licence; others are read from the parts' own cards.",
    )
    hub_names: dict[ModelPart, str] = Field(
        {},
        description="Part (llm, base, encoders.NAME) that is a local folder -> Hub repository with the same weights.",
    )
    languages: list[str] = Field([], description="Languages of questions and answers: ISO 639 codes such as en, zh.")
    datasets: list[str] = Field([], description="Hub ids of further training data, for the card.")
    limits: str = Field("", description="Text for the card: what the model isn't for and wasn't tested on.")
    samples: int = Field(
        6, ge=0, le=40, description="Predictions on the card, half of them the worst, with their media; 0: none."
    )


class RecipeSections(Section):
    """What a recipe holds. `finetune.recipe.load.Recipe` is one whose paths and conflicts are checked too."""

    model_config = ConfigDict(title="Recipe")

    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$", description="Name of the run and of its folder.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of all random numbers.")
    model: Model = Field(description="The parts of the model.")
    adapter: Adapter | None = Field({}, validate_default=True, description="LoRA on the LLM; null: none.")
    tune_encoders: dict[MediumName, EncoderTuning] = Field({}, description="Encoders that train, and how.")
    media: Limits = Field({}, validate_default=True, description="Bounds of what is decoded.")
    data: list[Source] = Field(min_length=1, description="Sources of rows.")
    train: Train = Field(description="How the model is trained.")
    evaluate: Evaluate = Field({}, validate_default=True, description="How the model is scored.")
    merge: Merge = Field({}, validate_default=True, description="How the merged model is made and checked.")
    publish: Publish = Field({}, validate_default=True, description="Where and how the model is published.")

    def with_dtype(self, dtype: str) -> Self:
        """A copy in which the LLM, or the existing model, computes in this dtype."""
        return self.model_copy(update={"model": self.model.with_language_model(dtype=dtype)})

    @property
    def trains_adapter(self) -> bool:
        """Whether a stage trains LoRA on the LLM."""
        return self.adapter is not None and any("adapter" in stage.trains for stage in self.train.stages)

    @property
    def trains_base_projectors(self) -> bool:
        """Whether a stage trains projectors of an existing model."""
        trained = (target for stage in self.train.stages for target in stage.trains)
        return self.model.base is not None and any(target.partition(".")[0] == "projectors" for target in trained)


@cache
def outline() -> JsonSchema:
    """JSON schema of a recipe for messages, with {"part": folder} where it has a part: `explain` reads the kinds that a
    recipe names, and no other part's file.
    """
    return RecipeSections.model_json_schema()


def schema() -> JsonSchema:
    """JSON schema of a recipe with the options of every part there is, for editors."""
    definitions: JsonSchema = {}

    def with_parts(node: Any) -> Any:
        if isinstance(node, list):
            return [with_parts(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "part" in node:
            beside = {key: value for key, value in node.items() if key != "part"}
            return any_kind_schema(node["part"], definitions) | beside
        return {key: with_parts(value) for key, value in node.items()}

    root = with_parts(outline())
    root["$defs"] |= definitions
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}
