"""Components put together: of a recipe's parts, or of a base."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from finetune.common.registry import kind_of
from finetune.model.base.encoder import BaseEncoder
from finetune.model.base.existing import ExistingModel
from finetune.model.bindings import TaskBinding
from finetune.model.composite import MultimodalConfig, MultimodalModel
from finetune.model.composition import Composition, SavedEncoder, SavedProjector
from finetune.model.encoders import Encoder
from finetune.recipe.parts import FusionPart, ProjectorPart


def composition_of_base(existing: ExistingModel, bindings: Mapping[str, TaskBinding]) -> Composition:
    placeholders = {name: placeholder.id for name, placeholder in existing.placeholders().items()}
    return Composition(base=True, placeholders=placeholders, bindings=dict(bindings))


def compose_base(
    encoders: Mapping[str, BaseEncoder], bindings: Mapping[str, TaskBinding] | None = None, language_model: Any = None
) -> MultimodalModel:
    """A base as the composite's LLM. `encoders`: {medium: of this base}; `language_model`: its weights, where they
    aren't those that the encoders load.
    """
    existing = next(iter(encoders.values())).existing
    composition = composition_of_base(existing, bindings or {})
    text_config = existing.model.config.get_text_config()
    config = MultimodalConfig(text_config=text_config, parts=composition.model_dump(mode="json"))
    return MultimodalModel(config, language_model or existing.model, encoders)


def compose(
    language_model: PreTrainedModel,
    *,
    encoders: Mapping[str, Encoder],
    projectors: Mapping[str, ProjectorPart],
    fusion: FusionPart,
    placeholder_ids: Mapping[str, int],
    bindings: Mapping[str, TaskBinding] | None = None,
    with_encoders: bool = True,
) -> MultimodalModel:
    """Put components together. `encoders`: {medium: a built encoder}.

    `with_encoders=False` leaves the encoders' weights out: the model then only takes features.
    Raises ModelError where a projector can't take what its encoder gives.
    """
    composition = Composition(
        encoders={name: SavedEncoder(kind=kind_of(e), settings=e.settings()) for name, e in encoders.items()},
        projectors={
            name: SavedProjector(part=part, width_in=encoders[name].width) for name, part in projectors.items()
        },
        order=tuple(projectors),
        fusion=fusion,
        placeholders=dict(placeholder_ids),
        bindings=dict(bindings or {}),
    )
    for name, encoder in encoders.items():
        if encoder.layout is not None:
            composition.placement.tokens(name, encoder.layout.rows)
    config = MultimodalConfig(text_config=language_model.config, parts=composition.model_dump(mode="json"))
    return MultimodalModel(config, language_model, encoders if with_encoders else {})
