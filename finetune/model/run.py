"""What training, evaluation, merging and publishing of one run have in common, made in one place."""

from dataclasses import dataclass
from typing import Any

from finetune.common.errors import ModelError
from finetune.common.run_folder import RunFolder
from finetune.data.sample import Sample
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding
from finetune.model.build import Components, build_model, load_components
from finetune.model.composite import MultimodalModel
from finetune.model.composition import Segments
from finetune.model.features import Features
from finetune.model.tokenize import Tokens, tokenize, tokenize_prompt
from finetune.recipe.load import Recipe


def refuse_foreign_media(recipe: Recipe, components: Components) -> None:
    """Raises ModelError where rows have media that the base doesn't take: before its weights are read."""
    for number, source in enumerate(recipe.data if components.base else ()):
        if foreign := [medium for medium in source.task.media if medium not in components.encoders]:
            raise ModelError(
                f"model.base: {recipe.model.language_model.name!r} takes {' and '.join(components.encoders)}, and "
                f"data.{number} has {foreign[0]}: take another base, or leave these rows out"
            )


@dataclass
class Run:
    folder: RunFolder
    recipe: Recipe
    components: Components
    features: Features
    bindings: dict[str, TaskBinding]

    @classmethod
    def load(cls, folder: RunFolder, recipe: Recipe, bindings: dict[str, TaskBinding]) -> "Run":
        """Load tokenizer and encoders; not yet the LLM."""
        components = load_components(recipe.model, recipe.tune_encoders, recipe.seed)
        refuse_foreign_media(recipe, components)
        features = Features(components.encoders, recipe.train.feature_folder, recipe.media)
        return cls(folder, recipe, components, features, bindings)

    def build(self, *, with_encoders: bool, language_model: Any = None) -> MultimodalModel:
        """The composite with new weights, over the LLM as the recipe names it, or over `language_model`."""
        return build_model(
            self.components,
            self.recipe.adapter,
            seed=self.recipe.seed,
            bindings=self.bindings,
            with_encoders=with_encoders,
            language_model=language_model,
        )

    def tokens(self, sample: Sample, whole: bool = True, segments: Segments | None = None) -> Tokens:
        """A sample's conversation, or but its question. `segments`: of media, by default as this run's model places
        them. Raises DataError.
        """
        tokenizer, placeholders = self.components.tokenizer, self.components.placeholders
        segments = segments or self.components.placement.segments_by(self.features.layout)
        if whole:
            return tokenize(sample, tokenizer, placeholders, segments)
        return tokenize_prompt(sample.question, tokenizer, placeholders, segments, sample.where)

    @property
    def weighted(self) -> bool:
        """Whether losses are weighted: by heads with weights of their own, or by a source's loss weight."""
        trained = any(binding.trained for binding in self.bindings.values())
        return trained or any(source.loss_weight != 1 for source in self.recipe.data)

    def assistant(self, model: MultimodalModel) -> Assistant:
        components = self.components
        return Assistant(model, components.tokenizer, components.placeholders, components.encoders, self.recipe.media)
