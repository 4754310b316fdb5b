"""A model with all that answering needs: `finetune.load(folder)` gives one, `.answer("What is this?", image=...)`."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from finetune import adapter
from finetune.assemble import build_model, encode_one, load_parts
from finetune.data.sample import Medium, Message
from finetune.data.tokenize import Placeholder, answer_ends, tokenize_prompt
from finetune.errors import ArtifactError, DataError
from finetune.language_model import default_device, load_tokenizer
from finetune.media import decode
from finetune.model import PLACEHOLDERS, MultimodalModel, placeholder_count
from finetune.parts import part_from
from finetune.run_folder import read_json


class Assistant:
    """`encoders`: {name: Encoder}. `features(medium)` gives (L, W); by default it is computed now."""

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: Any,
        placeholders: Mapping[str, Placeholder],
        encoders: Mapping[str, Any],
        features: Callable[[Medium], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.placeholders = placeholders
        self.encoders = encoders
        self.features = features or self._encode

    def answer(self, prompt: str, *, image: Path | str | None = None, max_new_tokens: int = 64) -> str:
        """One question, about one picture or none, answered greedily."""
        content: tuple[str | Medium, ...] = (prompt,)
        if image is not None:
            content = (Medium("image", Path(image)), prompt)
        return self.answers([(Message("user", content),)], max_new_tokens=max_new_tokens)[0]

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        features: Callable[[Medium], Tensor] | None = None,
    ) -> list[str]:
        """Conversations that end on the user's turn -> the assistant's next turns, greedily, as one batch."""
        prompts = [
            tokenize_prompt(messages, self.tokenizer, self.placeholders, self._length) for messages in conversations
        ]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        device = self.model.get_input_embeddings().weight.device
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor(
            [[pad] * n + p.input_ids for n, p in zip(padding, prompts, strict=True)], device=device
        )
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        media: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            for medium in prompt.media:
                media.setdefault(medium.kind, []).append((features or self.features)(medium))
        tokens = self.model.generate(
            input_ids,
            attention_mask=mask,
            features=media,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=answer_ends(self.tokenizer, self.model.causal_lm.generation_config),
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _length(self, medium: Medium) -> int:
        return placeholder_count(self.model.config, medium.kind, self.encoders[medium.kind].length(medium))

    def _encode(self, medium: Medium) -> Tensor:
        if medium.kind not in self.encoders:
            raise DataError(f"this model takes {', '.join(self.encoders) or 'text only'}, not {medium.kind}")
        encoder = self.encoders[medium.kind]
        return encode_one(encoder, encoder.prepare(decode(medium.kind, medium.path)))


def load(folder: Path | str, device: torch.device | None = None, trust_remote_code: bool = False) -> Assistant:
    """Rebuild a model from a merged folder, an adapter folder, or a run (its merged model if there is one).

    `trust_remote_code` lets an adapter's LLM run code of its Hub repository: the adapter can't ask for it by itself,
    and must name a commit. Raises ArtifactError for a folder that is none of these, or whose files don't fit.
    """
    path = Path(folder)
    candidates = [path / "merged", path / "adapter", path]
    for candidate in candidates:
        if (candidate / "multimodal.json").is_file():
            return load_adapter(candidate, device, trust_remote_code)
        if (candidate / "config.json").is_file():
            return load_merged(candidate, device)
    raise ArtifactError(f"{path}: no merged model, no adapter and no run that has got that far")


def load_merged(folder: Path, device: torch.device | None = None) -> Assistant:
    """A folder that `merge` wrote: needs nothing but itself."""
    device = device or default_device()
    loaded: Any = MultimodalModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, report = loaded
    wrong = {
        key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
    }
    if wrong:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    model = model.to(device).eval()
    if (folder / "generation_config.json").is_file():
        model.language_model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    ids = model.config.parts["placeholders"]
    placeholders = {name: Placeholder(PLACEHOLDERS[name], ids[name]) for name in ids}
    return Assistant(model, tokenizer, placeholders, model.encoder_parts)


def load_adapter(folder: Path, device: torch.device | None = None, trust_remote_code: bool = False) -> Assistant:
    """An adapter folder: the LLM and the encoders are fetched by the names in it."""
    content = read_json(folder / "multimodal.json")
    if content.get("format") != adapter.FORMAT:
        raise ArtifactError(f"{folder}: format {content.get('format')} of another version of finetune; this reads 1")
    device = device or default_device()
    llm = {
        **content["language_model"],
        "attention": "auto",
        "chat_template": None,
        "trust_remote_code": trust_remote_code,
    }
    if trust_remote_code and not re.fullmatch("[0-9a-f]{40}", llm["revision"] or ""):
        raise ArtifactError(f"{folder}: names no commit of {llm['name']!r}, so its code isn't run")

    parts = load_parts(
        llm=llm,
        encoders={name: part_from("encoders", part) for name, part in content["encoders"].items()},
        projectors={name: part_from("projectors", part) for name, part in content["projectors"].items()},
        fusion=part_from("fusion", content["fusion"]),
        device=device,
    )
    parts.tokenizer = load_tokenizer(str(folder))
    lora = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    model = build_model(
        parts,
        llm=llm,
        adapter_options=adapter.options_of(lora) if lora else None,
        seed=content["seed"],
        with_encoders=False,
    )
    adapter.load_trained(model, folder)
    return Assistant(model, parts.tokenizer, parts.placeholders, {name: e for name, (_, e) in parts.encoders.items()})
