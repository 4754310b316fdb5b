"""The composite: encoders and projectors around a causal LM, parts with roles.

    media ──▶ encoders[name] ──▶ projectors[name] ─┐
                                                   ├─▶ fusion ──▶ language_model (with its own output head)
    text ───▶ token embeddings ────────────────────┘

Shapes:  B rows of a batch   T tokens of a row    D width of the LLM
         N media   S segments of a medium (tiles, frames, windows)   L rows of features of a segment   W their width
         M projected rows of all media of a kind in the batch
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finetune.common.errors import ModelError
from finetune.data.media import example
from finetune.data.sample import Values
from finetune.model.base.both_ways import BothWays, both_ways_of, with_spans
from finetune.model.base.encoder import BaseEncoder
from finetune.model.base.existing import beside_language
from finetune.model.base.generation import generate_by_own_forward, generate_from_memory
from finetune.model.base.roles import MediumRoles, roles_of
from finetune.model.bindings import TaskBinding
from finetune.model.composition import Composition, Placement
from finetune.model.encoders import Encoder, encode_all
from finetune.model.fusion import Projected
from finetune.model.fusion._deepstack import DeepStack
from finetune.model.imitation import Teacher, imitate
from finetune.model.language_model import decoder_layers
from finetune.model.module_names import is_lora
from finetune.model.row_plan import RowPlan, following
from finetune.model.teacher_distributions import TeacherDistributions

Tensors = Mapping[str, Sequence[Tensor]]  # {medium: one tensor each}
Media = Mapping[str, Sequence[Values]]  # {medium: prepared for its encoder}


class MultimodalConfig(PreTrainedConfig):
    """`text_config`: the LLM's. `parts`: a `Composition` as JSON."""

    model_type = "finetune_multimodal"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(self, text_config: Any = None, parts: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        # Only now: the base class hands its own (unset) attention implementation down to every sub-config it finds.
        self.text_config = text_config
        self.parts = parts or Composition().model_dump(mode="json")


class MultimodalModel(PreTrainedModel):
    """Embed the text, put projected media at their placeholder tokens, run the LLM, apply its own head, or one of
    `heads` to the last state of a question.
    """

    config_class = MultimodalConfig
    config: MultimodalConfig
    language_model: Any
    fusion: Any
    base_model_prefix = "backbone"  # trl's fused LM head runs this to get hidden states, not logits
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MultimodalConfig,
        language_model: nn.Module | None = None,
        encoders: Mapping[str, Encoder] | None = None,
    ) -> None:
        """From parts in memory (`compose`), or from the config alone, with weights still to be loaded."""
        super().__init__(config)
        self.composition = Composition.model_validate(config.parts)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if encoders is None:
            dtype = torch.get_default_dtype()
            encoders = {name: saved.restore(dtype) for name, saved in self.composition.encoders.items()}
        self.language_model = language_model
        own = {} if self.composition.base else encoders  # a base holds its own
        self.encoders = nn.ModuleDict({name: encoder.module for name, encoder in own.items()})
        self.encoder_parts = dict(encoders)
        width = config.text_config.hidden_size
        with torch.device(next(language_model.parameters()).device):
            self.projectors = nn.ModuleDict(
                {
                    name: saved.part.build(saved.width_in, width)
                    for name, saved in self.composition.ordered_projectors.items()
                }
            )
            self.fusion = self.composition.fusion.build(config.text_config, tuple(self.composition.ordered_projectors))
            self.heads = nn.ModuleDict(
                {
                    name: binding.head.module.build(width, binding.settings, binding.head.options).float()
                    for name, binding in self.bindings.items()
                    if binding.trained
                }
            )
        if self.composition.base and "deepstack_visual_embeds" in signature(self.decoder.forward).parameters:
            self.fusion = DeepStack()
        self.fusion.attach(decoder_layers(self.causal_lm, self.decoder))
        self.head_scores: dict[str, Tensor] = {}  # of the last `backbone` that was given `head_rows`
        self.tuned: dict[str, list[str]] = {}  # encoders that train: names of their parameters that do
        # Names of a base's parameters beside its decoder: those of encoders that may train, those that train now, by
        # their media, and all that have been trained.
        self.tuned_in_base: dict[str, list[str]] = {}
        self.live: dict[str, list[str]] = {}
        self.changed: list[str] = []
        self.encode_batch = 1
        self.encode_seconds = 0.0  # spent in `encode` so far
        self.post_init()

    def train(self, mode: bool = True) -> "MultimodalModel":
        """Frozen encoders stay in evaluation mode: their batch norms and dropout must not see that others train."""
        super().train(mode)
        self.encoders.eval()
        for name in self.outside_decoder:
            self.causal_lm.get_submodule(name).eval()
        return self

    @cached_property
    def outside_decoder(self) -> list[str]:
        """Names of a base's modules that aren't in its decoder."""
        return beside_language(self.causal_lm) if self.composition.base else []

    @cached_property
    def examples(self) -> dict[str, Values]:
        """{medium: one that is prepared for its encoder}"""
        return {name: encoder.prepare(example(name)).values for name, encoder in self.encoder_parts.items()}

    @cached_property
    def roles(self) -> dict[str, MediumRoles]:
        """{medium: the parameters of a base that its features come from}, tried."""
        return {
            name: roles_of(self.causal_lm, name, partial(encoder.encode, self.examples[name]))
            for name, encoder in self.encoder_parts.items()
        }

    def init_weights(self) -> None:
        """Parts come with their weights, or are initialised by their own builders; only ties are made here."""
        self.tie_weights(recompute_mapping=False)

    @property
    def bindings(self) -> dict[str, TaskBinding]:
        """What the model was trained for, by name."""
        return self.composition.bindings

    @property
    def causal_lm(self) -> Any:
        """The LLM itself, under PEFT's wrapper or without one."""
        language_model = self.language_model
        return language_model.get_base_model() if hasattr(language_model, "peft_config") else language_model

    def train_in_base(self, name: str, parameters: Sequence[str]) -> None:
        """Take note of parameters of a base that train, for features of the medium `name`."""
        self.live[name] = [*dict.fromkeys([*self.live.get(name, ()), *parameters])]
        self.changed = [*dict.fromkeys([*self.changed, *(one for one in parameters if not is_lora(one))])]

    @property
    def placement(self) -> Placement:
        """How media are placed in the text."""
        base = next((e.existing for e in self.encoder_parts.values() if isinstance(e, BaseEncoder)), None)
        own = self.composition.placement
        return own if base is None else replace(own, rope=base.rope, prompts_both_ways=base.prompts_both_ways)

    @property
    def decoder(self) -> Any:
        """The LLM without its output head; of a base the part that reads text and features."""
        return self.causal_lm.get_decoder() if self.composition.base else self.causal_lm.base_model

    def llm_takes(self, argument: str) -> bool:
        """Whether the LLM's `forward` has an argument of this name."""
        return argument in signature(self.causal_lm.forward).parameters

    def get_input_embeddings(self) -> Any:
        return self.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    def encode(self, name: str, media: Sequence[Values]) -> list[Tensor]:
        """Prepared media -> features, each (S, L, W). One at a time unless `encode_batch` says otherwise: then a
        medium's features don't depend on its neighbours, to the bit.
        """
        begin = perf_counter()
        trained = name in self.tuned or name in self.live
        # Frozen ones outside autocast, as for the cache, evaluation and serving: a medium gives the same features.
        device = self.get_input_embeddings().weight.device.type
        frozen = nullcontext() if trained else torch.autocast(device, enabled=False)
        with frozen, torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = encode_all(self.encoder_parts[name], media, self.encode_batch)
        self.encode_seconds += perf_counter() - begin
        return features

    def project(self, name: str, features: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Features, each (S, L, W) -> projected rows (M, D), float32, and the rows of each segment, in order."""
        if self.composition.base:  # features are projected already
            width, device = self.config.text_config.hidden_size, self.get_input_embeddings().weight.device
            rows = [one.flatten(0, -2).to(device, torch.float32) for one in features]
            if rows:
                return torch.cat(rows), [len(row) for row in rows]
            trained = [self.causal_lm.get_parameter(one) for one in self.live.get(name, ())]
            idle = sum(0.0 * p.sum() for p in trained if p.requires_grad)
            return torch.zeros(0, width, device=device) + idle, []
        projector = self.projectors[name]
        first = next(projector.parameters())
        if not features:  # an empty pass keeps the weights in the graph, so that all processes reduce the same ones
            trained = [*projector.parameters(), *(self.encoders[name].parameters() if name in self.tuned else ())]
            idle = sum(0.0 * p.sum() for p in trained if p.requires_grad)
            return first.new_zeros(0, self.config.text_config.hidden_size) + idle, []
        projected: list[Tensor] = [first] * len(features)
        lengths = [rows.shape[1] for rows in features]
        with torch.autocast(first.device.type, enabled=False):
            for length in sorted(set(lengths)):
                places = [i for i, other in enumerate(lengths) if other == length]
                segments = torch.cat([features[i] for i in places]).to(first.device, torch.float32)
                rows = projector(segments).split([len(features[i]) for i in places])
                for i, medium in zip(places, rows, strict=True):
                    projected[i] = medium
        return torch.cat([rows.flatten(0, 1) for rows in projected]), [
            rows.shape[1] for rows in projected for _ in range(len(rows))
        ]

    def embed(
        self,
        input_ids: Tensor,
        features: Tensors | None = None,
        media: Media | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) with features, or with prepared media that are encoded here -> embeddings (B, T, D).

        Where `position_ids` restart, another sample begins. Raises ModelError where placeholders and projected rows
        differ in number.
        """
        placeholder_ids = self.composition.placeholders
        names = self.projectors or placeholder_ids
        is_medium = {name: input_ids == placeholder_ids[name] for name in names}
        text = input_ids
        for mask in is_medium.values():  # placeholder ids may lie behind the LLM's table: they're never looked up
            text = text.masked_fill(mask, 0)
        projected: dict[str, Projected] = {}
        for name, mask in is_medium.items():
            encoded = list((features or {}).get(name, ()))
            if not encoded and media and media.get(name):
                encoded = self.encode(name, media[name])
            rows, lengths = self.project(name, encoded)
            expected = sum(self.composition.fusion.placeholders(length) for length in lengths)
            if expected != int(mask.sum()):
                raise ModelError(
                    f"{int(mask.sum())} {name} placeholders in the text, but the media take {expected} "
                    f"({len(rows)} projected rows)"
                )
            projected[name] = Projected(mask, rows, lengths)
        first = position_ids if position_ids is None or position_ids.ndim == 2 else position_ids[0]
        samples = torch.zeros_like(input_ids) if first is None else (first == 0).cumsum(-1)
        fused: Tensor = self.fusion(self.get_input_embeddings()(text), projected, samples)
        return fused

    def token_types(self, input_ids: Tensor, given: Tensor | None = None) -> dict[str, Tensor]:
        """An input of a base that attends both ways somewhere, for token ids (B, T): `token_type_ids` (B, T). Those of
        answers must be `given` where a base attends both ways in prompts: without, all tokens are of prompts.
        """
        if self.both_ways is None:
            return {}
        if self.both_ways is BothWays.MEDIA:
            ids = torch.tensor(list(self.composition.placeholders.values()), device=input_ids.device)
            given = torch.isin(input_ids, ids).long()
        return {"token_type_ids": torch.zeros_like(input_ids) if given is None else given}

    @property
    def reads_plainly(self) -> bool:
        """Whether the LLM needs embeddings only, at positions 0, 1, 2, ...; some bases need more."""
        return self.placement.rope is None and self.both_ways is None and not isinstance(self.fusion, DeepStack)

    @cached_property
    def both_ways(self) -> BothWays | None:
        """Where a base's attention goes both ways."""
        return both_ways_of(self.causal_lm) if self.composition.base else None

    def _planned(self, plan: RowPlan | None, types: Mapping[str, Tensor]) -> RowPlan | None:
        """The plan of a row (1, T), with the tokens of a base that attend both ways."""
        if plan is None or self.both_ways is None:
            return plan
        return with_spans(plan, self.both_ways, types["token_type_ids"])

    def backbone(
        self,
        input_ids: Tensor,
        features: Tensors | None = None,
        media: Media | None = None,
        label_rows: Tensor | None = None,
        head_rows: Mapping[str, Tensor] | None = None,
        row_plan: RowPlan | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, T, D); with `label_rows` (K,), indices into B*T, only these: (1, K, D). With `head_rows`
        {name: (K,)} the heads' scores of these, each (K, outputs), float32, are kept in `head_scores`. `row_plan`: of a
        packed row whose attention goes by segments. Other arguments: as `forward`.
        """
        embeddings = self.embed(input_ids, features, media, kwargs.get("position_ids"))
        types = self.token_types(input_ids, kwargs.pop("token_type_ids", None))
        kwargs |= types
        with following(self._planned(row_plan, types), self.causal_lm):
            outputs = self.causal_lm.base_model(inputs_embeds=embeddings, **kwargs)
        self.forget_media()
        if head_rows is not None:
            states = outputs.last_hidden_state.flatten(0, 1)
            with torch.autocast(states.device.type, enabled=False):
                self.head_scores = {name: head(states[head_rows[name]].float()) for name, head in self.heads.items()}
        if label_rows is not None:
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[label_rows][None]
        return outputs

    def forward(
        self,
        input_ids: Tensor,
        features: Tensors | None = None,
        media: Media | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        row_plan: RowPlan | None = None,
        teacher: Teacher | TeacherDistributions | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, T), features {name: N tensors (S, L, W)} or prepared media -> the LLM's own output.

        Without `attention_mask`, restarting `position_ids` (B, T) keep packed samples apart, or a `row_plan` does.
        Where a base's positions have three dimensions, these follow them: (4, B, T). `token_type_ids` (B, T): see
        `token_types`. `labels` (B, T), -100 where nothing is learned, give the mean next-token loss of samples that
        share nothing; with a `teacher`, see `imitate`.
        """
        if teacher is not None:
            student: dict[str, Any] = {
                "input_ids": input_ids,
                "features": features,
                "media": media,
                "attention_mask": attention_mask,
            }
            student |= {"position_ids": position_ids, "label_rows": kwargs["label_rows"], "row_plan": row_plan}
            student["token_type_ids"] = kwargs.get("token_type_ids")
            return imitate(self, student, teacher)
        for name in ("label_rows", "shift_labels", "head_rows"):  # of the fused head's call: only what is learned
            kwargs.pop(name, None)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        embeddings = self.embed(input_ids, features, media, position_ids)
        types = self.token_types(input_ids, kwargs.pop("token_type_ids", None))
        kwargs |= types
        with following(self._planned(row_plan, types), self.causal_lm):
            outputs = self.causal_lm(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)
        self.forget_media()
        return outputs

    def label_logits(self, label_rows: Tensor, labels: Any = None, shift_labels: Any = None, **batch: Any) -> Tensor:
        """Logits (K, vocabulary), float32, of the rows of B*T that stand before a learned token."""
        selects = self.llm_takes("logits_to_keep") and len(batch["input_ids"]) == 1
        selection: dict[str, Any] = {"logits_to_keep": label_rows} if selects else {}
        logits = self.forward(**batch, use_cache=False, **selection).logits
        selected: Tensor = (logits[0] if selects else logits.flatten(0, 1)[label_rows]).float()
        return selected

    @cached_property
    @torch.no_grad()
    def shares_memory(self) -> bool:
        """Whether the LLM's memory of a question is keys and values alone, which several answers can share: tried."""
        if not self.llm_takes("past_key_values"):
            return False
        cache = DynamicCache(config=self.causal_lm.config.get_text_config())
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.get_input_embeddings().weight.device)
        self.causal_lm(ids, past_key_values=cache, use_cache=True)
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensors | None = None,
        media: Media | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompts (B, T), padded on the left -> new tokens only (B, T'). With `past_key_values` of P tokens before the
        prompts, `attention_mask` is (B, P + T), and `position_ids` (4, B, P + T).
        """
        embeddings = self.embed(input_ids, features, media)
        kwargs |= self.token_types(input_ids, kwargs.pop("token_type_ids", None))
        if self.both_ways is BothWays.PROMPTS:
            ids = self.composition.placeholders
            mask = {"attention_mask": attention_mask}
            return generate_by_own_forward(self.language_model, ids, input_ids, embeddings, **mask, **kwargs)
        if self.composition.base and not self._generates_from_embeddings:
            return generate_from_memory(
                self.language_model, self.causal_lm, input_ids, embeddings, attention_mask, **kwargs
            )
        if known := attention_mask.shape[1] - embeddings.shape[1]:
            # The LLM's `generate` wants embeddings of all tokens, and leaves out those that the memory holds.
            embeddings = torch.cat([embeddings.new_zeros(len(embeddings), known, embeddings.shape[2]), embeddings], 1)
        tokens: Tensor = self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        self.forget_media()
        return tokens

    @cached_property
    def _generates_from_embeddings(self) -> bool:
        return "inputs_embeds" in signature(self.causal_lm.prepare_inputs_for_generation).parameters

    def forget_media(self) -> None:
        """Let go of the last batch's media, unless activation checkpoints ask for them in the backward pass."""
        if not (torch.is_grad_enabled() and self.causal_lm.is_activation_checkpointing):
            self.fusion.forget()


AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig)
