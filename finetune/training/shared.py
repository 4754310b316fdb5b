"""What several trainings of one sweep have in common."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from finetune.common.run_folder import RunFolder
from finetune.model.bindings import TaskBinding
from finetune.model.build import Components, load_components, load_llm
from finetune.model.composite import MultimodalModel
from finetune.model.features import Features
from finetune.model.language_model import dequantized
from finetune.model.run import Run
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Train


def language_model_for(settings: Train, components: Components) -> Any:
    """The LLM to train over, quantized as the recipe says. Raises ModelError."""
    language_model = load_llm(components)
    return dequantized(language_model, components.dtype) if settings.dequantize_once else language_model


@dataclass
class Shared:
    """Encoders, features, and the quantized LLM without adapter, which is loaded when a training first builds its
    model: after teachers have run. `composite`: of the training that uses them now.
    """

    components: Components
    features: Features
    settings: Train
    composite: MultimodalModel | None = None

    @cached_property
    def language_model(self) -> Any:
        """Raises ModelError."""
        return language_model_for(self.settings, self.components)

    @classmethod
    def load(cls, recipe: Recipe) -> "Shared":
        """Of trainings that change no weights of the LLM or the encoders: they would go on from each other's."""
        components = load_components(recipe.model, recipe.tune_encoders, recipe.seed)
        features = Features(components.encoders, recipe.train.feature_folder, recipe.media)
        return cls(components, features, recipe.train)

    def run(self, folder: RunFolder, recipe: Recipe, bindings: dict[str, TaskBinding]) -> Run:
        """A run over these components, with the projectors and fusion of its own recipe."""
        return Run(folder, recipe, replace(self.components, model=recipe.model), self.features, bindings)

    def release(self) -> None:
        """Take a training's adapter and fusion off the LLM."""
        if self.composite is not None:
            self.composite.fusion.detach_layers()
            if hasattr(self.composite.language_model, "peft_config"):
                self.composite.language_model.unload()
            if self.language_model.is_activation_checkpointing:
                self.language_model.activation_checkpointing_disable()
            self.language_model.requires_grad_(False)
        self.composite = None
