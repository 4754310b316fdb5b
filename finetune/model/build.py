"""From the sections of a recipe to the model in memory: the same for training, evaluation and merging."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from transformers import set_seed

from finetune.data.media import example
from finetune.model import adapter as adapters
from finetune.model.base.encoder import BaseEncoder
from finetune.model.base.existing import ExistingModel
from finetune.model.base.roles import tuned_names
from finetune.model.bindings import TaskBinding
from finetune.model.compose import compose, compose_base
from finetune.model.composite import MultimodalModel
from finetune.model.composition import PLACEHOLDERS, Placement
from finetune.model.encoders import Encoder
from finetune.model.language_model import default_device, load_language_model, load_tokenizer, resolve_dtype
from finetune.model.tokenize import Placeholder, add_placeholders
from finetune.model.tuned_encoder import TunedEncoder, tune_encoder
from finetune.recipe.schema import Adapter, EncoderTuning, Model, Quantize


@dataclass
class Components:
    """What a composite is made of, before the LLM is loaded. `encoders`: {medium: a built encoder}."""

    model: Model
    tokenizer: Any
    placeholders: dict[str, Placeholder]
    encoders: dict[str, Encoder]
    dtype: torch.dtype
    device: torch.device
    tuned: dict[str, TunedEncoder]
    base: ExistingModel | None = None
    tuning: Mapping[str, EncoderTuning] = field(default_factory=dict)  # of a base's encoders

    @property
    def placement(self) -> Placement:
        rope, both_ways = (self.base.rope, self.base.prompts_both_ways) if self.base else (None, False)
        return Placement(self.model.projectors, self.model.fusion, rope, both_ways)

    def compose(
        self, language_model: Any, bindings: Mapping[str, TaskBinding], with_encoders: bool = True
    ) -> MultimodalModel:
        """See `finetune.model.compose.compose`."""
        if self.base is not None:
            encoders = {name: one for name, one in self.encoders.items() if isinstance(one, BaseEncoder)}
            return compose_base(encoders, bindings, language_model)
        return compose(
            language_model,
            encoders=self.encoders,
            projectors=self.model.projectors,
            fusion=self.model.fusion,
            placeholder_ids={name: placeholder.id for name, placeholder in self.placeholders.items()},
            bindings=bindings,
            with_encoders=with_encoders,
        )


def load_components(
    model: Model, tune_encoders: Mapping[str, EncoderTuning], seed: int, device: torch.device | None = None
) -> Components:
    """Load tokenizer and encoders. The same seed gives the same new weights."""
    device = device or default_device()
    dtype = resolve_dtype(model.language_model.dtype, device)
    if model.base is not None:
        base = ExistingModel.load(model.base, dtype, device)
        of_base: dict[str, Encoder] = {name: BaseEncoder(base, name) for name in base.media}
        return Components(model, base.tokenizer, base.placeholders(), of_base, dtype, device, {}, base, tune_encoders)
    tokenizer = load_tokenizer(
        model.language_model.name,
        revision=model.language_model.revision,
        chat_template=model.language_model.chat_template,
        trust_remote_code=model.language_model.trust_remote_code,
    )
    encoders = {name: part.build(dtype, device) for name, part in model.encoders.items()}
    set_seed(seed)
    tuned = {name: tune_encoder(encoders[name], example(name), tuning) for name, tuning in tune_encoders.items()}
    placeholders = add_placeholders(tokenizer, sorted(encoders), PLACEHOLDERS)
    return Components(model, tokenizer, placeholders, encoders, dtype, device, tuned)


def with_base_reloaded(components: Components, quantize: Quantize, device: torch.device) -> Components:
    """The same components over a base that is loaded another time."""
    assert components.base is not None
    base = components.base.reloaded(quantize, device)
    encoders: dict[str, Encoder] = {name: BaseEncoder(base, name) for name in base.media}
    return replace(components, base=base, encoders=encoders, device=device)


def load_llm(components: Components) -> Any:
    """The LLM, quantized as the recipe says."""
    if components.base is not None:
        return components.base.model
    return load_language_model(components.model.language_model, components.dtype, components.device)


def build_model(
    components: Components,
    adapter: Adapter | None,
    *,
    seed: int,
    bindings: Mapping[str, TaskBinding],
    with_encoders: bool,
    language_model: Any = None,
) -> MultimodalModel:
    """Load the LLM, or take `language_model`, and put everything together. The same seed gives the same new weights."""
    language_model = language_model or load_llm(components)
    set_seed(seed)
    model = components.compose(language_model, bindings, with_encoders)
    if with_encoders:
        model.tuned = {name: tuned.names for name, tuned in components.tuned.items()}
    tuning = components.tuning
    if adapter is not None or any(tuned.rank for tuned in tuning.values()):
        adapters.attach(model, adapter, tuning)
    model.tuned_in_base = {name: tuned_names(model.causal_lm, name, tuned) for name, tuned in tuning.items()}
    result: MultimodalModel = model.eval()
    return result
