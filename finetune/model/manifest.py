"""`multimodal.json`, the manifest of an adapter folder. Imports no torch."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import damaged, read_json
from finetune.model.bindings import TaskBinding
from finetune.recipe.schema import EncoderTuning, Limits, Model, Section

FORMAT = 1
MANIFEST = "multimodal.json"


class ModuleShapes(Section, strict=False):
    """The modules of an LLM that have LoRA."""

    llm_class: str = Field(description="Its class in transformers.")
    shapes: dict[str, tuple[int, int]] = Field(description="Module -> features in, features out.")


class AdapterManifest(Section, strict=False):
    """`multimodal.json`: what an adapter folder was trained for, and what it takes to rebuild the model."""

    format: int = Field(FORMAT, description="Version of the folder's layout.")
    model: Model = Field(description="LLM, encoders, projectors and fusion, by the commits that were loaded.")
    llm_sha256: dict[str, str] = Field({}, description="File -> sha256 of the LLM's weights, where it is a folder.")
    tune_encoders: dict[str, EncoderTuning] = Field({}, description="Encoders that were trained.")
    placeholders: dict[str, int] = Field({}, description="Medium -> id of its placeholder token.")
    bindings: dict[str, TaskBinding] = Field({}, description="Name -> task binding.")
    media: Limits = Field(Limits(), description="Bounds of what is decoded.")
    seed: int = Field(0, description="Seed of new weights: tuned encoders and some adapters are drawn from it.")
    modules: ModuleShapes = Field(description="The LLM's modules that have LoRA.")

    @classmethod
    def read(cls, folder: Path) -> "AdapterManifest":
        """Raises ArtifactError where the file is missing, damaged, or of another format."""
        path = folder / MANIFEST
        content = read_json(path)
        if isinstance(content, dict):
            refuse_format(folder, content.get("format"), FORMAT, "train")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise damaged(path, error, "pull the model again, or train again") from None

    @model_validator(mode="after")
    def _media_agree(self) -> Self:
        """An encoder, a projector and a placeholder for each medium."""
        if (
            self.model.base is None
            and not self.model.encoders.keys() == self.model.projectors.keys() == self.placeholders.keys()
        ):
            raise ValueError("encoders, projectors and placeholders are for different media")
        return self


def refuse_format(folder: Path, format: Any, readable: int, verb: str) -> None:
    """Raises ArtifactError for a format that this version doesn't read; `verb` writes the folder again."""
    if format == readable:
        return
    newer = isinstance(format, int) and format > readable
    advice = "install a newer finetune" if newer else f"{verb} again"
    raise ArtifactError(f"{folder}: format {format}; this finetune reads {readable}: {advice}")
