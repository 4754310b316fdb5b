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
from inspect import signature
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finetune.common.errors import ModelError
from finetune.common.registry import load_part, part_from
from finetune.data.sample import Layout
from finetune.model.asks import Ask
from finetune.model.fusion import Projected
from finetune.model.language_model import decoder_layers, without_adapter

PLACEHOLDERS = {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"}


class MultimodalConfig(PreTrainedConfig):
    """`text_config`: the LLM's. `parts`: {"encoders": {name: {kind, settings}}, "projectors": {name: {kind, options,
    width_in}}, "fusion": {kind, options}, "placeholders": {name: token id}, "asks": {name: an `Ask`, saved}}, and in
    merged folders "media": the bounds of what is decoded.
    """

    model_type = "finetune_multimodal"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(self, text_config: Any = None, parts: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        # Only now: the base class hands its own (unset) attention implementation down to every sub-config it finds.
        self.text_config = text_config
        self.parts = parts or {"encoders": {}, "projectors": {}, "fusion": {}, "placeholders": {}, "asks": {}}


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
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        """From parts in memory (`compose`), or from the config alone, with weights still to be loaded."""
        super().__init__(config)
        parts = config.parts
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if encoders is None:
            encoders = {
                name: load_part("encoders", part["kind"]).restore(part["settings"], torch.get_default_dtype())
                for name, part in parts["encoders"].items()
            }
        self.language_model = language_model
        self.encoders = nn.ModuleDict({name: encoder.module for name, encoder in encoders.items()})
        self.encoder_parts = dict(encoders)
        width = config.text_config.hidden_size
        self.projectors = nn.ModuleDict()
        for name, part in parts["projectors"].items():
            kind, options = part_from("projectors", part)
            with torch.device(next(language_model.parameters()).device):
                self.projectors[name] = load_part("projectors", kind).build(part["width_in"], width, options).float()
        kind, options = part_from("fusion", parts["fusion"])
        with torch.device(next(language_model.parameters()).device):
            self.fusion = (
                load_part("fusion", kind).build(config.text_config, tuple(parts["projectors"]), options).float()
            )
        self.fusion.attach(decoder_layers(self.causal_lm))
        self.asks = {name: Ask.restore(saved) for name, saved in parts.get("asks", {}).items()}
        self.heads = nn.ModuleDict()
        for name, ask in self.asks.items():
            if ask.trained:
                with torch.device(next(language_model.parameters()).device):
                    head = load_part("heads", ask.head[0]).build(width, ask.settings, ask.head[1])
                self.heads[name] = head.float()
        self.head_scores: dict[str, Tensor] = {}  # of the last `backbone` that was given `head_rows`
        self.tuned: dict[str, list[str]] = {}  # encoders that train: names of their parameters that do
        self._shares_memory: bool | None = None
        self.encode_batch = 1
        self.encode_seconds = 0.0  # spent in `encode` so far
        self.post_init()

    def train(self, mode: bool = True) -> "MultimodalModel":
        """Frozen encoders stay in evaluation mode: their batch norms and dropout must not see that others train."""
        super().train(mode)
        self.encoders.eval()
        return self

    def init_weights(self) -> None:
        """Parts come with their weights, or are initialised by their own builders; only ties are made here."""
        self.tie_weights(recompute_mapping=False)

    @property
    def causal_lm(self) -> Any:
        """The LLM itself, under PEFT's wrapper or without one."""
        language_model = self.language_model
        return language_model.get_base_model() if hasattr(language_model, "peft_config") else language_model

    def get_input_embeddings(self) -> Any:
        return self.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    def encode(self, name: str, media: Sequence[Tensor]) -> list[Tensor]:
        """Prepared media -> features, each (S, L, W). One at a time unless `encode_batch` says otherwise: then a
        medium's features don't depend on its neighbours, to the bit.
        """
        begin = perf_counter()
        trained = name in self.tuned
        # Frozen ones outside autocast, as for the cache, evaluation and serving: a medium gives the same features.
        device = next(self.encoders[name].parameters()).device.type
        frozen = nullcontext() if trained else torch.autocast(device, enabled=False)
        with frozen, torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = encode_all(self.encoder_parts[name], media, self.encode_batch)
        if features and features[0].is_cuda:
            torch.cuda.synchronize(features[0].device)
        self.encode_seconds += perf_counter() - begin
        return features

    def project(self, name: str, features: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Features, each (S, L, W) -> projected rows (M, D), float32, and the rows of each segment, in order."""
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
                for i, found in zip(places, rows, strict=True):
                    projected[i] = found
        return torch.cat([rows.flatten(0, 1) for rows in projected]), [
            rows.shape[1] for rows in projected for _ in range(len(rows))
        ]

    def embed(
        self,
        input_ids: Tensor,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) with features, or with prepared media that are encoded here -> embeddings (B, T, D).

        Where `position_ids` restart, another sample begins. Raises ModelError where placeholders and projected rows
        differ in number.
        """
        placeholder_ids = self.config.parts["placeholders"]
        is_medium = {name: input_ids == placeholder_ids[name] for name in self.projectors}
        text = input_ids
        for mask in is_medium.values():  # placeholder ids may lie behind the LLM's table: they're never looked up
            text = text.masked_fill(mask, 0)
        kind, options = part_from("fusion", self.config.parts["fusion"])
        projected: dict[str, Projected] = {}
        for name, mask in is_medium.items():
            found = list((features or {}).get(name, ()))
            if not found and media and media.get(name):
                found = self.encode(name, media[name])
            rows, lengths = self.project(name, found)
            expected = sum(load_part("fusion", kind).placeholders(length, options) for length in lengths)
            if expected != int(mask.sum()):
                raise ModelError(
                    f"{int(mask.sum())} {name} placeholders in the text, but the media take {expected} "
                    f"({len(rows)} projected rows)"
                )
            projected[name] = Projected(mask, rows, lengths)
        samples = torch.zeros_like(input_ids) if position_ids is None else (position_ids == 0).cumsum(-1)
        return self.fusion(self.get_input_embeddings()(text), projected, samples)

    def backbone(
        self,
        input_ids: Tensor,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        label_rows: Tensor | None = None,
        head_rows: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, T, D); with `label_rows` (K,), indices into B*T, only these: (1, K, D). With `head_rows`
        {name: (K,)} the heads' scores of these, each (K, outputs), float32, are kept in `head_scores`.
        """
        embeddings = self.embed(input_ids, features, media, kwargs.get("position_ids"))
        outputs = self.causal_lm.base_model(inputs_embeds=embeddings, **kwargs)
        self._forget()
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
        features: Mapping[str, Sequence[Tensor]] | None = None,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        teacher: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, T), features {name: N tensors (S, L, W)} or prepared media -> the LLM's own output.

        Without `attention_mask`, restarting `position_ids` keep packed samples apart. `labels` (B, T), -100 where
        nothing is learnt, give the mean next-token loss; with a `teacher`, see `imitate`.
        """
        if teacher is not None:
            student = {"input_ids": input_ids, "features": features, "media": media, "attention_mask": attention_mask}
            kept = {"position_ids": position_ids, "label_rows": kwargs["label_rows"]}
            return self.imitate(student | kept, teacher, temperature)
        for name in ("label_rows", "shift_labels", "head_rows"):  # of the fused head's call: only what is learnt
            kwargs.pop(name, None)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        embeddings = self.embed(input_ids, features, media, position_ids)
        outputs = self.causal_lm(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)
        self._forget()
        return outputs

    def imitate(self, student: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float) -> dict[str, Tensor]:
        """How far the LLM that is given media is from the LLM that is given their text, where the answers stand.

        `student`, `teacher`: keywords of `forward`, with as many `label_rows` (K,) each; the teacher without adapter.
        Returns `loss`, the KL divergence of next-token distributions softened by `temperature`, summed over K
        (Ultravox, https://github.com/fixie-ai/ultravox), and `agreement`: on how many of K the most likely tokens are
        equal.
        """
        training = self.training
        with torch.no_grad(), without_adapter(self.language_model):
            wanted = self.eval()._label_logits(**teacher)
        given = self.train(training)._label_logits(**student)
        loss = functional.kl_div(
            (given / temperature).log_softmax(-1),
            (wanted / temperature).log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        return {"loss": loss, "agreement": (given.argmax(-1) == wanted.argmax(-1)).sum()}

    def _label_logits(self, label_rows: Tensor, labels: Any = None, shift_labels: Any = None, **batch: Any) -> Tensor:
        """Logits (K, vocabulary), float32, of the rows of B*T that stand before a learnt token."""
        keep = "logits_to_keep" in signature(self.causal_lm.forward).parameters and len(batch["input_ids"]) == 1
        only: dict[str, Any] = {"logits_to_keep": label_rows} if keep else {}
        logits = self.forward(**batch, use_cache=False, **only).logits
        return (logits[0] if keep else logits.flatten(0, 1)[label_rows]).float()

    @torch.no_grad()
    def head_outputs(self, name: str, input_ids: Tensor, attention_mask: Tensor, features: Any = None) -> Tensor:
        """Questions (B, T), padded on the left -> what head `name` makes of their last states (B, outputs)."""
        last = torch.arange(1, len(input_ids) + 1, device=input_ids.device) * input_ids.shape[1] - 1
        rows = {other: last if other == name else last[:0] for other in self.heads}
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        self.backbone(
            input_ids,
            features,
            None,
            attention_mask=attention_mask,
            head_rows=rows,
            use_cache=False,
            **self._at(positions),
        )
        return self.head_scores[name]

    @torch.no_grad()
    def answer_log_probabilities(
        self, input_ids: Tensor, attention_mask: Tensor, answers: Sequence[Sequence[int]], features: Any = None
    ) -> Tensor:
        """How likely each of A answers, as token ids, follows each question (B, T), padded on the left: (B, A), nats.

        The question is read once, and its keys and values are shared by all answers; LLMs with another memory than keys
        and values (Mamba, RWKV, hybrids) take one question, and read it once an answer.
        """
        if not self.shares_memory():
            if len(input_ids) > 1:
                raise ModelError("this LLM remembers a question otherwise than by keys and values: ask one at a time")
            return self._answers_in_full(input_ids[0], answers, features)
        device, count, batch = input_ids.device, len(answers), len(input_ids)
        longest = max(len(answer) for answer in answers)
        longest += longest == input_ids.shape[1]  # fusions tell new tokens from the question by their number
        ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=device)
        real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=device)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.causal_lm.config.get_text_config())
        first = self.causal_lm(
            inputs_embeds=self.embed(input_ids, features),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **self._at(positions),
            **({"logits_to_keep": 1} if "logits_to_keep" in signature(self.causal_lm.forward).parameters else {}),
        ).logits[:, -1:]
        cache.batch_repeat_interleave(count)
        following = positions[:, -1:].repeat_interleave(count, 0) + 1 + torch.arange(longest, device=device)
        logits = self.causal_lm(
            inputs_embeds=self.get_input_embeddings()(ids).repeat(batch, 1, 1),
            attention_mask=torch.cat([attention_mask.repeat_interleave(count, 0), real.repeat(batch, 1)], 1),
            past_key_values=cache,
            use_cache=True,
            **self._at(following),
        ).logits
        self._forget()
        logits = torch.cat([first.repeat_interleave(count, 0), logits[:, :-1]], 1).float()
        told = logits.log_softmax(-1).gather(-1, ids.repeat(batch, 1)[..., None])[..., 0]
        return (told * real.repeat(batch, 1)).sum(-1).view(batch, count)

    @torch.no_grad()
    def shares_memory(self) -> bool:
        """Whether what the LLM remembers of a question are keys and values alone, which several answers can share."""
        if self._shares_memory is None:
            self._shares_memory = self._tried_sharing()
        return self._shares_memory

    def _tried_sharing(self) -> bool:
        if "past_key_values" not in signature(self.causal_lm.forward).parameters:
            return False
        cache = DynamicCache(config=self.causal_lm.config.get_text_config())
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.get_input_embeddings().weight.device)
        self.causal_lm(ids, past_key_values=cache, use_cache=True)
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)

    def _answers_in_full(self, question: Tensor, answers: Sequence[Sequence[int]], features: Any) -> Tensor:
        """Of one question (T,), read once for each of A answers -> (1, A)."""
        told = []
        for answer in answers:
            tokens = torch.tensor(answer, device=question.device)
            whole = torch.cat([question, tokens])[None]
            logits = self.forward(whole, features, attention_mask=torch.ones_like(whole), use_cache=False).logits
            chances = logits[0, len(question) - 1 : -1].float().log_softmax(-1)
            told.append(chances.gather(-1, tokens[:, None]).sum())
        return torch.stack(told)[None]

    def _at(self, position_ids: Tensor) -> dict[str, Any]:
        """Position ids for LLMs that take them: others (ALiBi) tell positions from the mask."""
        return {"position_ids": position_ids} if "position_ids" in signature(self.causal_lm.forward).parameters else {}

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompts (B, T), padded on the left -> new tokens only (B, T')."""
        embeddings = self.embed(input_ids, features, media)
        tokens = self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        self._forget()
        return tokens

    def _forget(self) -> None:
        # In the backward pass activation checkpoints ask for this batch's media once more.
        if not (torch.is_grad_enabled() and self.causal_lm.is_activation_checkpointing):
            self.fusion.forget()


def encode_all(encoder: Any, media: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Prepared media -> features, each (S, L, W), in their order; up to `batch` of the same shape at once."""
    features: list[Tensor] = []
    start = 0
    while start < len(media):
        end = start + 1
        while end < min(start + batch, len(media)) and media[end].shape == media[start].shape:
            end += 1
        features.extend(encoder.encode(torch.stack(list(media[start:end]))))
        start = end
    return features


def segments_of(config: MultimodalConfig, name: str, layout: Layout) -> list[tuple[str, int]]:
    """(mark, placeholder tokens) of each segment of a medium: known before the model runs."""
    count = placeholder_count(config, name, layout.rows)
    return [(mark, count) for mark in layout.marks]


def placeholder_count(config: MultimodalConfig, name: str, rows: int) -> int:
    """Placeholder tokens for a segment of `rows` rows of features of encoder `name`."""
    projector, projector_options = part_from("projectors", config.parts["projectors"][name])
    fusion, fusion_options = part_from("fusion", config.parts["fusion"])
    try:
        rows = load_part("projectors", projector).length(rows, projector_options)
    except ModelError as error:
        raise ModelError(f"model.projectors.{name}: {error}") from None
    return load_part("fusion", fusion).placeholders(rows, fusion_options)


def compose(
    language_model: PreTrainedModel,
    *,
    encoders: Mapping[str, tuple[str, Any]],
    projectors: Mapping[str, tuple[str, Any]],
    fusion: tuple[str, Any],
    placeholder_ids: Mapping[str, int],
    asks: Mapping[str, Ask] | None = None,
    with_encoders: bool = True,
) -> MultimodalModel:
    """Put parts together. `encoders`: {name: (kind, Encoder)}; `projectors`, `fusion`: (kind, Options).

    `with_encoders=False` leaves the encoders' weights out: then only features are taken.
    Raises ModelError where a projector can't take what its encoder gives.
    """
    config = MultimodalConfig(
        text_config=language_model.config,
        parts={
            "encoders": {name: {"kind": kind, "settings": e.settings()} for name, (kind, e) in encoders.items()},
            "projectors": {
                name: {"kind": kind, "options": options.model_dump(), "width_in": encoders[name][1].width}
                for name, (kind, options) in projectors.items()
            },
            "fusion": {"kind": fusion[0], "options": fusion[1].model_dump()},
            "placeholders": dict(placeholder_ids),
            "asks": {name: ask.save() for name, ask in (asks or {}).items()},
        },
    )
    for name, (_, encoder) in encoders.items():
        if encoder.layout is not None:
            placeholder_count(config, name, encoder.layout.rows)
    kept = {name: encoder for name, (_, encoder) in encoders.items()} if with_encoders else {}
    return MultimodalModel(config, language_model, kept)


AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig)
