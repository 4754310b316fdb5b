"""Merge: LoRA into the LLM's weights, twice (into the 16-bit LLM, and into the 4-bit one made 16-bit again); the one
closer to what was trained is kept, if it is close, and if it isn't just the base.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import adapter
from finetune.assemble import Features, Parts, build_model, load_parts, segments_by
from finetune.data.asks import names_of
from finetune.data.collate import Collator
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.data.tokenize import answer_ends, tokenize, tokenize_prompt
from finetune.errors import DataError, MergeRefused
from finetune.language_model import resolve_dtype, without_adapter
from finetune.media import Limits
from finetune.model import MultimodalModel, compose
from finetune.parts import part_from
from finetune.progress import bar, console, fresh_memory, quiet_libraries
from finetune.recipe import load_recipe
from finetune.run_folder import RunFolder, refuse_several_processes, whole_folder, write_json
from finetune.scores import known_asks
from finetune.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of

POSITIONS = 1024  # next-token distributions kept for comparison, at most
SAME = 1e-6  # nats: a merged model nearer than this to the untrained LLM has learnt nothing


def merge(run: Path | str) -> dict[str, Any]:
    """Merge a trained run; writes merged/ and certificate.json. Returns the certificate.

    Raises MergeRefused where the merged model differs from what was trained, or not from the base.
    """
    quiet_libraries()
    refuse_several_processes("`finetune merge`")
    fresh_memory()
    folder = RunFolder.open(Path(run), needs="adapter")
    recipe = load_recipe(folder.recipe)
    return merge_plain(
        folder,
        sources=sources_of(recipe),
        model=model_arguments(recipe),
        adapter_options=adapter_options(recipe),
        seed=recipe.seed,
        cache_folder=cache_folder(recipe),
        limits=limits_of(recipe),
        split=recipe.evaluate.split,
        **recipe.merge.model_dump(),
    )


def merge_plain(
    folder: RunFolder,
    *,
    sources: Sequence[Source],
    model: Mapping[str, Any],
    adapter_options: Mapping[str, Any] | None,
    seed: int,
    cache_folder: Path | None,
    limits: Limits,
    split: str,
    rows: int,
    dtype: str,
    min_agreement: float,
) -> dict[str, Any]:
    """The same from plain values. `rows` held-out rows are compared; `min_agreement` of next tokens must be equal."""
    entries = some(read_splits(sources, seed)[split], rows, seed)
    if not entries:
        raise DataError(f"no rows in split {split!r} to compare the merged model on")
    asks, names = known_asks(folder.adapter, entries, sources), names_of(entries, sources)
    parts = load_parts(**model, seed=seed)
    merged_dtype = resolve_dtype(dtype, parts.device) if dtype != "auto" else parts.dtype
    features = Features(parts.encoders, cache_folder, limits)

    on_cpu = replace(parts, device=torch.device("cpu"))  # 16-bit weights needn't fit where 4-bit ones do

    def trained(quantize: str, parts: Parts = on_cpu, with_encoders: bool = False) -> MultimodalModel:
        llm = {**model["llm"], "quantize": quantize}
        composite = build_model(
            parts, llm=llm, adapter_options=adapter_options, seed=seed, with_encoders=with_encoders, asks=asks
        )
        adapter.load_trained(composite, folder.adapter)
        return composite

    quantized = model["llm"]["quantize"]
    candidates = {"the 16-bit LLM": lambda: into_plain(trained("none"), merged_dtype)}
    if quantized != "none":
        candidates[f"the dequantized {quantized} LLM"] = lambda: into_dequantized(trained(quantized), merged_dtype)

    with bar("merge", 1 + len(candidates) + 1) as step:
        composite = trained(quantized, parts, with_encoders=bool(parts.tuned))
        batches = list(comparison_batches(composite, parts, features, entries, names))
        for tuned in parts.tuned.values():  # in place: `parts` holds the encoders as they will be saved
            if tuned.lora is not None:
                tuned.lora.merge_and_unload()
        reference = next_tokens(composite, batches)
        base = next_tokens(composite, batches, bare=True)
        from_base = compare(base, reference)
        del composite
        step()
        compared: dict[str, dict[str, float]] = {}
        for name, build in candidates.items():
            fresh_memory()
            candidate = build()
            compared[name] = compare(next_tokens(fitting(candidate, parts.device), batches), reference)
            del candidate
            step()
        best = min(compared, key=lambda name: compared[name]["kl"])
        fresh_memory()
        with whole_folder(folder.merged) as partial:
            save_merged(candidates[best](), parts, limits, partial)
            fresh_memory()
            # What counts is what stands on disk: it is read back, sees with its own encoders, and is compared again.
            final = fitting(read_back(partial), parts.device)
            own = Features(final_encoders(final), None, limits)
            logits = next_tokens(final, comparison_batches(final, parts, own, entries, names))
            certificate: dict[str, Any] = {
                "merged_into": best,
                "why": "the smallest KL divergence from what was trained",
                "dtype": str(merged_dtype).removeprefix("torch."),
                "rows": len(entries),
                "positions": sum(len(row) for row in reference),
                "saved": compare(logits, reference),
                "candidates": compared,
                "base_from_trained": from_base,
                "saved_from_base": compare(logits, base),
                "bounds": {"min_agreement": min_agreement, "min_kl_from_base": SAME if adapter_options else None},
                "sha256": {path.name: file_hash(path) for path in sorted(partial.glob("*.safetensors"))},
            }
            del final
            refuse_unless_faithful(certificate, adapter_options is not None)
        write_json(folder.certificate, certificate)
        step()
    saved = certificate["saved"]
    console.print(
        f"merged into {best}: {saved['agreement']:.1%} of {certificate['positions']} next tokens as trained, KL "
        f"{saved['kl']:.2g} (" + ", ".join(f"{n}: {c['kl']:.2g}" for n, c in compared.items()) + f"); {folder.merged}"
    )
    return certificate


def refuse_unless_faithful(certificate: Mapping[str, Any], has_adapter: bool) -> None:
    saved, bounds = certificate["saved"], certificate["bounds"]
    if saved["agreement"] < bounds["min_agreement"]:
        raise MergeRefused(
            f"the merged model gives another next token than what was trained on {1 - saved['agreement']:.1%} of "
            f"{certificate['positions']} positions (KL {saved['kl']:.2g}); merge.min_agreement is "
            f"{bounds['min_agreement']:g}. Nothing was kept: serve the adapter, or use a wider merge.dtype"
        )
    if has_adapter and certificate["saved_from_base"]["kl"] < SAME:
        raise MergeRefused(
            "the merged model equals the untrained LLM: the adapter has learnt nothing, or wasn't merged. "
            "Nothing was kept. See whether a stage of the recipe trains 'adapter', and for more than a few steps"
        )


def into_plain(composite: MultimodalModel, dtype: torch.dtype) -> MultimodalModel:
    """LoRA into an LLM that isn't quantized."""
    if hasattr(composite.language_model, "peft_config"):
        composite.language_model = composite.language_model.merge_and_unload(safe_merge=True)
    composite.language_model = composite.language_model.to(dtype)
    return composite


def into_dequantized(composite: MultimodalModel, dtype: torch.dtype) -> MultimodalModel:
    """LoRA into the LLM that it was trained over, its 4-bit (or 8-bit) weights written out.

    The base under the adapter is dequantized first and wrapped anew with an adapter that starts from nothing, so that
    initialisations that change the base (PiSSA, OLoRA) keep the base that they made.
    """
    wrapped = composite.language_model
    if not hasattr(wrapped, "peft_config"):
        composite.language_model = wrapped.dequantize(dtype=dtype).to(dtype)
        return composite
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(wrapped)
    config = wrapped.peft_config["default"]
    plain = wrapped.unload().dequantize(dtype=dtype)
    config.init_lora_weights = True
    fresh = get_peft_model(plain, config)
    report: Any = set_peft_model_state_dict(fresh, state)
    if report.unexpected_keys:
        raise MergeRefused(f"the adapter has tensors that the dequantized LLM lacks: {report.unexpected_keys[:3]}")
    composite.language_model = fresh.merge_and_unload(safe_merge=True).to(dtype)
    return composite


def save_merged(composite: MultimodalModel, parts: Parts, limits: Limits, folder: Path) -> None:
    """One self-contained folder: weights of all parts, config with the encoders' preprocessing, tokenizer."""
    language_model = composite.language_model
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(language_model.config, attribute):
            delattr(language_model.config, attribute)
    whole = compose(
        language_model,
        encoders=parts.encoders,
        projectors={name: part_from("projectors", part) for name, part in composite.config.parts["projectors"].items()},
        fusion=parts.fusion,
        placeholder_ids=composite.config.parts["placeholders"],
        asks=composite.asks,
    )
    whole.projectors.load_state_dict(composite.projectors.state_dict())
    whole.fusion.load_state_dict(composite.fusion.state_dict())
    whole.heads.load_state_dict(composite.heads.state_dict())
    whole.config.dtype = language_model.dtype
    whole.config.parts["media"] = asdict(limits)
    whole.save_pretrained(folder)
    generation = language_model.generation_config
    generation.eos_token_id = answer_ends(parts.tokenizer, generation)
    generation.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)


def read_back(folder: Path) -> MultimodalModel:
    model: Any = MultimodalModel.from_pretrained(folder, dtype="auto")
    return model.eval()


def final_encoders(final: MultimodalModel) -> dict[str, tuple[str, Any]]:
    """{name: (kind, Encoder)} of a model that was read back."""
    return {name: (final.config.parts["encoders"][name]["kind"], e) for name, e in final.encoder_parts.items()}


def fitting(composite: MultimodalModel, device: torch.device) -> MultimodalModel:
    """The model on the accelerator if it fits there, else on the CPU, where comparing takes longer."""
    try:
        return composite.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        console.print("the 16-bit model doesn't fit the GPU: compared on the CPU")
        moved = composite.to("cpu")  # type: ignore[arg-type]
        fresh_memory()
        return moved


def comparison_batches(
    composite: MultimodalModel,
    parts: Parts,
    features: Features,
    entries: Sequence[Entry],
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Held-out rows as they are trained, one by one, with the positions that predict the answer. `names`: of the scores
    of each; where a head with weights answers, it is the batch's `head`.
    """
    segments = segments_by(composite.config, features.layout)
    for entry, name in zip(entries, names, strict=True):
        head = name in composite.heads
        tokens = (
            tokenize_prompt(entry.sample.question, parts.tokenizer, parts.placeholders, segments, entry.sample.where)
            if head
            else tokenize(entry.sample, parts.tokenizer, parts.placeholders, segments)
        )
        sample = {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "media_kinds": [medium.kind for medium in tokens.media],
            "media_keys": [features.key(medium) for medium in tokens.media],
        }
        batch = Collator([sample], features.features, field="features", packed=False)([{"samples": [0]}])
        batch["label_rows"] = batch["label_rows"][: max(1, POSITIONS // len(entries))]
        batch["head"] = name if head else None
        yield batch


@torch.no_grad()
def next_tokens(composite: MultimodalModel, batches: Iterable[Mapping[str, Any]], bare: bool = False) -> list[Tensor]:
    """Log-probabilities of the next token where the answer stands, a row (positions, vocabulary) in float32 each; of a
    head with weights see `head_logits`.
    `bare`: without the adapter.
    """
    device = composite.get_input_embeddings().weight.device
    found = []
    with without_adapter(composite.language_model) if bare else nullcontext():
        for batch in batches:
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            if batch["head"]:
                scores = composite.head_outputs(batch["head"], ids, mask, batch["features"])
                logits = head_logits(scores, composite.asks[batch["head"]].settings)
            else:
                logits = composite(ids, features=batch["features"], attention_mask=mask).logits
                logits = logits[0, batch["label_rows"].to(device)]
            found.append(logits.float().log_softmax(-1).cpu())
    return found


def head_logits(scores: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """A head's scores (1, outputs) as logits of a choice: among its labels; of several labels, whether each is right
    (outputs, 2); of a number, which it is, give or take a tenth of the training rows' deviation, (1, places).
    """
    if "labels" not in settings:
        places = torch.arange(-8, 8.05, 0.1, device=scores.device)
        return -((scores.clamp(-8, 8) - places) ** 2) / (2 * 0.1**2)
    return torch.stack([scores[0], torch.zeros_like(scores[0])], 1) if settings["several"] else scores


def compare(got: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """KL(reference || got) in nats per token, share of equal most likely tokens, and the largest difference of a
    log-probability, among tokens that the reference gives at least one in ten thousand.
    """
    divergences, agreements, largest = [], [], 0.0
    for ours, theirs in zip(got, reference, strict=True):
        width = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, :width], theirs[:, :width]
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        agreements.append((ours.argmax(-1) == theirs.argmax(-1)).float())
        likely = theirs > torch.log(torch.tensor(1e-4))
        largest = max(largest, float((ours - theirs)[likely].abs().max()))
    return {
        "kl": float(torch.cat(divergences).mean().clamp(min=0)),
        "agreement": float(torch.cat(agreements).mean()),
        "largest_logit_difference": largest,
    }


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
