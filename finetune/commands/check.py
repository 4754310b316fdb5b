"""Check a recipe and its rows, without loading a model. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.common import display
from finetune.common.errors import RecipeError
from finetune.common.hub import meant_as_path
from finetune.data.rows import (
    Splits,
    SplitSummary,
    few_rows,
    read_splits,
    refuse_empty_splits,
    refuse_unfit,
    summary,
    unlearned,
)
from finetune.data.sample import Sample
from finetune.model.base.config import media_in_config
from finetune.model.trained_for import refuse_unfit_teachers
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, refuse_missing_packages
from finetune.recipe.schema import LanguageModel, Train
from finetune.training.automatic import longest_row, numbers_at_hand
from finetune.training.cache_choice import choice_at_hand
from finetune.training.lengths import Estimate, estimate, fetch_settings, settings_of
from finetune.training.missing_sampler import refuse_missing_sampler, refuse_unplain_base
from finetune.training.row_limit import refuse_too_long
from finetune.training.steps import FEW_STEPS, StageSteps, more_steps, steps_of

# Of these families transformers loads the text part of a vision-language checkpoint by itself.
TEXT_PART_LOADS = ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
# Sections of the configs of models with encoders; and any that ends in _encoder_config.
OWN_ENCODERS = {f"{name}_config" for name in ("vision", "audio", "thinker", "vq", "codec", "vlm", "encoder")}
ENCODES_BYTES = ("blt",)  # of text, in its encoder_config
UNBOUNDED = 50  # rows whose pictures are counted without a bound too


@dataclass(frozen=True, repr=False)
class CheckedRecipe:
    """`recipe`: as written; `splits`: {split: counts}; `numbers`: what a run puts in the place of `auto`, and why;
    `stages`: steps of each, () where the tokens of media aren't known; `warnings`: what makes a run a waste; `notes`:
    what its author may not expect, and what couldn't be checked.
    """

    recipe: Recipe
    splits: dict[str, SplitSummary]
    numbers: tuple[str, ...]
    stages: tuple[StageSteps, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for split, count in self.splits.items():
            if count.rows:
                lines.append(
                    f"  {split}: {count.rows:,} rows, {count.media:,} media, {count.different_answers:,} answers"
                )
        lines += [f"  {number}" for number in self.numbers]
        for stage in self.stages:
            epochs = f"{stage.epochs} epoch{'s' * (stage.epochs > 1)}"
            lines.append(
                f"  stage {stage.stage}: about {stage.steps:,} optimizer steps, {epochs} of {stage.rows:,} rows"
            )
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks())])

    def remarks(self) -> list[str]:
        """Warnings and notes, to read."""
        return [f"warning: {text}" for text in self.warnings] + [f"note: {text}" for text in self.notes]

    def __repr__(self) -> str:
        return f"{self.recipe.name}: OK\n{self}"

    def _repr_html_(self) -> str:
        return display.preformatted(repr(self))


def check(recipe: RecipeLike, overrides: Sequence[str] = ()) -> CheckedRecipe:
    """Read a recipe and its rows, and check that their media exist, that the LLM is one, that there are rows to score,
    and that the stages have steps enough. Downloads the settings and tokenizers that this takes, no weights.

    Raises RecipeError, DataError.
    """
    loaded = as_recipe(recipe, overrides)
    refuse_missing_packages(loaded)
    refuse_unfit_teachers(loaded)
    refuse_missing_sampler(loaded)
    refused, llm = fetch_settings(loaded.model), loaded.model.language_model
    why = refused.get(llm.name)
    if not why:
        refuse_unplain_base(loaded)
    notes = [
        *untrained_adapter(loaded),
        *(check_base(loaded, why) if loaded.model.base else refuse_multimodal(llm, why)),
    ]
    splits = read_splits(loaded.data, loaded.seed, loaded.media.max_bytes, loaded.file)
    refuse_empty_splits(splits, loaded)
    refuse_unfit(splits, loaded)
    warnings = [*few_rows(splits, loaded), *unlearned(splits, loaded)]
    stages: tuple[StageSteps, ...] = ()
    estimated = estimate(loaded.model, splits.train, loaded.media)
    notes += _tokens_of_media(loaded, splits.train, estimated)
    chosen = numbers_at_hand(loaded, splits.train, estimated)
    if estimated is not None and estimated.unknown:
        notes.append(
            f"steps aren't counted: how many tokens {', '.join(estimated.unknown)} has isn't known, without the "
            "encoder's config, or before it is loaded"
        )
    elif estimated is not None and chosen is not None:
        if estimated.by_characters:
            notes.append("steps are rough, tokens being estimated from characters: the LLM's tokenizer isn't at hand")
        stages = steps_of(chosen.train, splits.train, estimated.lengths)
        longest = longest_row(loaded, splits.train, estimated)
        sized = loaded.model_copy(update={"train": chosen.train})
        warnings += refuse_too_long(sized, splits.train, estimated)
        warnings += _few_steps(chosen.train, splits, estimated.lengths, longest, stages)
    if chosen is None:
        notes.append("numbers for auto are chosen when the run begins: it downloads what tells how long the rows are")
    numbers = chosen.reasons if chosen else ()
    if loaded.train.cache == "auto" and chosen is not None:
        cache = choice_at_hand(loaded.model_copy(update={"train": chosen.train}))
        numbers += (cache.reason if cache else "cache: true where the disk has room for the features, else false",)
    return CheckedRecipe(loaded, summary(splits), numbers, stages, tuple(warnings), tuple(notes))


def untrained_adapter(recipe: Recipe) -> Iterator[str]:
    """What a recipe leads to that trains no adapter."""
    if not recipe.trains_adapter:
        parts = ", ".join(dict.fromkeys(part for stage in recipe.train.stages for part in stage.trains))
        reason = "adapter is null" if recipe.adapter is None else "no stage trains the adapter"
        yield f"{reason}: the merged model is the LLM as it is, with the trained {parts}"


def _tokens_of_media(recipe: Recipe, samples: Sequence[Sample], estimated: Estimate | None) -> Iterator[str]:
    """How many tokens pictures take of a base, and would take without the recipe's bound."""
    if estimated is None or "image" not in estimated.media:
        return
    text = f"a picture takes {between(*estimated.media['image'])} tokens"
    if recipe.media.shrink_to_pixels is not None:
        unbounded = recipe.media.model_copy(update={"shrink_to_pixels": None})
        without = estimate(recipe.model, samples[:UNBOUNDED], unbounded)
        if without is not None:
            text += f", {between(*without.media['image'])} without media.shrink_to_pixels"
    yield text


def between(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _few_steps(
    train: Train, splits: Splits, lengths: Sequence[int], longest: int, stages: Sequence[StageSteps]
) -> Iterator[str]:
    few = [stage for stage in stages if stage.steps < FEW_STEPS]
    if not few:
        return
    better = more_steps(train, splits.train, lengths, longest)
    counts = steps_of(better, splits.train, lengths)
    changes = [
        f"{key}: {getattr(better, key)}"
        for key in ("tokens_per_batch", "accumulate")
        if getattr(better, key) != getattr(train, key)
    ]
    changes += [
        f"epochs: {new.epochs} in stage {new.name}"
        for old, new in zip(train.stages, better.stages, strict=True)
        if new.epochs != old.epochs
    ]
    steps = " and ".join(f"{stage.steps} of {stage.stage}" for stage in few)
    more = ", ".join(f"{count.steps} of {count.stage}" for count in counts)
    yield f"few optimizer steps to learn from ({steps}): {', '.join(changes)} would give about {more}"


def check_base(recipe: Recipe, why: str | None = None) -> Iterator[str]:
    """Yields a note where the base's config isn't available. Raises RecipeError where the model takes no media, or not
    those of the rows. `why`: the reason that the Hub gave no config.
    """
    base = recipe.model.language_model
    config = settings_of(base.name, base.revision, "config.json")
    if not config:
        yield f"the media that model.base takes aren't known: {_unread(base.name, why)}"
        return
    what, media = (config.get("architectures") or [config.get("model_type")])[0], media_in_config(config)
    if "auto_map" in config and not media:
        raise RecipeError(f"model.base.name: {base.name!r} is a {what} with its own code, which isn't run for a base")
    if not media:
        raise RecipeError(f"model.base.name: {base.name!r} is a {what} that takes no media: write it as model.llm")
    for number, source in enumerate(recipe.data):
        if foreign := [medium for medium in source.task.media if medium not in media]:
            raise RecipeError(
                f"data.{number}.task: {source.task.kind!r} reads {foreign[0]}; {base.name!r}, a {what}, takes "
                f"{' and '.join(media)}"
            )


def refuse_multimodal(llm: LanguageModel, why: str | None = None) -> Iterator[str]:
    """Notes, where the LLM's config isn't at hand. Raises RecipeError where it is that of a model with encoders of its
    own, or of one that isn't a causal LM. `why`: the Hub gives no config.
    """
    if llm.name.endswith(".gguf"):
        return
    config = settings_of(llm.name, llm.revision, "config.json")
    if not config:
        yield f"whether model.llm is a text-only LLM isn't known: {_unread(llm.name, why)}"
        return
    what = (config.get("architectures") or [config.get("model_type")])[0]
    sections = [key for key in config if key in OWN_ENCODERS or key.endswith("_encoder_config")]
    own = ["vision"] if config.get("model_type") == "fuyu" else [key.removesuffix("_config") for key in sections]
    if own and config.get("model_type") not in (*TEXT_PART_LOADS, *ENCODES_BYTES):
        inner = [config.get(key) for key in ("text_config", "llm_config", "language_config")]
        names = [part["_name_or_path"] for part in inner if isinstance(part, dict) and part.get("_name_or_path")]
        advice = f"take its text LLM, {names[0]!r}" if names else "take the text LLM that it was made from"
        advice += ", or tune it as it is, as model.base" if media_in_config(config) else ""
        raise RecipeError(
            f"model.llm.name: {llm.name!r} is a {what}, with encoders of its own ({', '.join(own)}); {advice}"
        )
    if config.get("is_encoder_decoder"):
        raise RecipeError(f"model.llm.name: {llm.name!r} is a {what}, an encoder and decoder; take a decoder-only LLM")


def _unread(name: str, why: str | None) -> str:
    """Why a model's config isn't known. `why`: the Hub gives none."""
    because = f"{name!r}: {why}" if why else f"there is no config.json of {name!r} at hand"
    return because + meant_as_path(name)
