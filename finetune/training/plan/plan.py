"""`finetune plan`: memory by part, what makes it fit, disk, hours and money, before weights are downloaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from finetune.common.gpu import GIB, computes_bfloat16
from finetune.common.progress import quiet_libraries
from finetune.model.language_model import read_config
from finetune.recipe.load import Recipe
from finetune.training.automatic import AutoNumbers
from finetune.training.cache_choice import choice_at_hand, choose_cache
from finetune.training.plan.cards import CARDS, DEFAULT, SIZES, USABLE, Card, card_like, card_named
from finetune.training.plan.measure import Measured, measure
from finetune.training.plan.result import TIGHT, Change, Phase, Plan, status
from finetune.training.plan.rows import PlannedRows
from finetune.training.steps import Numbers, has_auto

CONTEXT = GIB // 2  # what CUDA and its libraries keep for themselves
FRAGMENTED = 0.05  # of the peak: gaps in the allocator's blocks
UTILISATION = 0.3  # of a card's dense speed that training in 4 bits with LoRA reaches
CALL = 8e-6  # seconds in which Python starts an operation: small models can't be faster than that
CONDITIONS = 4  # under which held-out rows are answered: tuned, base, blank, shuffled
CHECKPOINTS, TOKENS = "train.checkpoint_every_n_layers", "train.tokens_per_batch"


def plan(recipe: Recipe, gpu: str | None = None, *, rent: float | None = None, advise: bool = True) -> Plan:
    """Plan a run on a card, by its name in the table; None: this machine's own, or else a T4. `rent`: US$ an hour, in
    place of the table's. Without `advise` no settings are looked for that take less.

    Reads the rows, and of the models only their configs and tokenizers. Raises RecipeError for an unknown card,
    DataError, ModelError.
    """
    quiet_libraries()
    card = card_named(gpu) if gpu else own_card() or CARDS[DEFAULT]
    card = card if rent is None else replace(card, rent=rent)
    card = replace(card, memory=card.memory * (1 - share_of_vllm(recipe)))
    dtype = recipe.model.language_model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if card.bfloat16 else "float16"
    recipe = recipe.with_dtype(dtype)
    open_choice = recipe.train.cache == "auto"
    cache = choice_at_hand(recipe) if open_choice and recipe.tune_encoders else None
    recipe = cache.of(recipe) if cache else recipe
    chosen = _numbers(recipe, card)
    recipe = recipe.model_copy(update={"train": chosen.train})
    rows = PlannedRows.of(recipe)
    if open_choice and cache is None:
        cache = choose_cache(recipe, rows)
        recipe = cache.of(recipe)
    recipe, measured, why = _automatic(recipe, rows, card)
    needed = on_card(measured.phases)
    reasons = (*chosen.reasons, *([cache.reason] if cache else []), *([why] if why else []))
    return Plan(
        name=recipe.name,
        card=card,
        checkpoints=int(recipe.train.checkpoint_every_n_layers),
        checkpoints_reason=why,
        tokens_per_batch=int(recipe.train.tokens_per_batch),
        dtype=dtype,
        phases=measured.phases,
        needed=needed,
        changes=tuple(_changes(recipe, rows, measured)) if advise else (),
        memory_elsewhere=_elsewhere(recipe, measured),
        disk=_disk(recipe, measured),
        seconds=_seconds(recipe, rows, measured, card),
        notes=(*reasons, *_notes(recipe, rows, measured, card)),
    )


def share_of_vllm(recipe: Recipe) -> float:
    """Of a card's memory, which a stage leaves to the server that samples its answers."""
    options: list[Any] = [one.objective.options for one in recipe.train.stages if one.objective.sampled_by_vllm]
    return max([0.0, *(float(one.sampler_memory) for one in options)])


def _numbers(recipe: Recipe, card: Card) -> Numbers:
    """Numbers for `auto` in tokens_per_batch and epochs, with which the run isn't tight on the card."""
    if not has_auto(recipe.train):
        return Numbers(recipe.train, ())
    choice = AutoNumbers(recipe)
    chosen = choice.choose()
    if recipe.train.tokens_per_batch == "auto":
        tokens = int(chosen.train.tokens_per_batch)
        most = largest_tokens_per_batch(recipe.model_copy(update={"train": chosen.train}), tokens, card)
        chosen = choice.choose(most) if most < tokens else chosen
    return chosen


def _automatic(recipe: Recipe, rows: PlannedRows, card: Card) -> tuple[Recipe, Measured, str]:
    """The recipe without `auto`, what it takes, and why it has so many activation checkpoints, '' where their number is
    written: as few as keep training from being tight on the card.
    """
    if recipe.train.checkpoint_every_n_layers != "auto":
        return recipe, measure(recipe, rows, gpu=True), ""
    memory = card.memory * GIB
    tried: dict[int, Measured] = {}
    needed: dict[int, int] = {}

    def fits(every: int) -> bool:
        tried[every] = measure(recipe.with_(**{CHECKPOINTS: every}), rows, gpu=True)
        needed[every] = on_card([phase for phase in tried[every].phases if phase.name.startswith("train")])
        return not status(needed[every], memory)

    chosen = 0 if fits(0) else 1
    if chosen and fits(1):
        layers = read_config(recipe.model.language_model).get_text_config().num_hidden_layers
        each = (needed[0] - needed[1]) / layers  # about what a checkpoint saves
        likely = (n for n in range(layers, 1, -1) if not status(round(needed[0] - each * ceil(layers / n)), memory))
        chosen = next((n for n in likely if fits(n)), 1)
    return recipe.with_(**{CHECKPOINTS: chosen}), tried[chosen], _why(needed, chosen, card)


def _why(needed: Mapping[int, int], chosen: int, card: Card) -> str:
    """`needed`: {layers per activation checkpoint: bytes of the card that training takes}."""
    text = f"{CHECKPOINTS}: {chosen}, training takes {needed[chosen] / GIB:.1f} of {card.memory:.1f} GiB"
    return f"{text}, {needed[0] / GIB:.1f} without activation checkpoints" if chosen else text


def largest_tokens_per_batch(recipe: Recipe, most: int, card: Card) -> int:
    """The most tokens of a packed row with which the run isn't tight on a card: `most`, or that halved as often as it
    must be, but not below the longest sample.

    Plans once for each number. Raises DataError, ModelError.
    """
    recipe = recipe.with_dtype("bfloat16" if card.bfloat16 else "float16")
    if recipe.train.checkpoint_every_n_layers == "auto":
        recipe = recipe.with_(**{CHECKPOINTS: 1})
    rows = PlannedRows.of(recipe)
    while True:
        measured = measure(recipe.with_(**{TOKENS: most}), rows, gpu=True)
        if not status(on_card(measured.phases), card.memory * GIB) or most // 2 < max(measured.longest, 16):
            return most
        most //= 2


def on_card(phases: Sequence[Phase]) -> int:
    """Bytes of a card that the fullest of these phases takes, with CUDA's own."""
    return round(max(phase.total for phase in phases) * (1 + FRAGMENTED)) + CONTEXT


def own_card() -> Card | None:
    """This machine's first GPU, without the memory that other processes hold; its speed is that of the table's card
    with a like name, or else of the default's.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    like = card_like(properties.name, total / GIB) or CARDS[DEFAULT]
    # CUDA's own of this process, and of the run that waits for its plan, isn't others'.
    memory = min(total, free + 2 * CONTEXT) / GIB
    return replace(like, name=properties.name, memory=memory, bfloat16=computes_bfloat16())


def _changes(recipe: Recipe, rows: PlannedRows, measured: Measured) -> Iterator[Change]:
    """Settings that take less, added one after the other for as long as a card of the table is too small. Each is
    planned again, and kept only if it takes less than what came before.
    """
    keys: dict[str, Any] = {}
    needed = on_card(measured.phases)
    tried: set[str] = set()
    while needed > SIZES[0] * USABLE * GIB * TIGHT:
        step = next((s for s in _steps(recipe, measured) if str(sorted(s)) not in tried), None)
        if step is None:
            return
        changed = recipe.with_(**step)
        if set(step) != {TOKENS, "train.accumulate"} and set(step) != {"evaluate.batch"}:
            tried.add(str(sorted(step)))
        again = measure(changed, rows, gpu=True)
        if on_card(again.phases) >= needed:
            tried.add(str(sorted(step)))
            continue
        recipe, measured, needed = changed, again, on_card(again.phases)
        keys = {**keys, **step}
        yield Change(keys, needed)


def _steps(recipe: Recipe, measured: Measured) -> Iterator[dict[str, Any]]:
    """What could make the fullest phase smaller, in the order of what it costs."""
    train, fullest = recipe.train, max(measured.phases, key=lambda phase: phase.total).name
    if fullest.startswith("encode") and train.encode_batch > 1:
        yield {"train.encode_batch": 1}
    if fullest == "evaluate" and recipe.evaluate.batch > 1:
        yield {"evaluate.batch": max(recipe.evaluate.batch // 4, 1)}
    if train.dequantize_once:
        yield {"train.dequantize_once": False}
    if fullest.startswith("train") and train.checkpoint_every_n_layers != 1:
        yield {CHECKPOINTS: 1}
    if recipe.model.language_model.quantize != "nf4":
        yield {f"{recipe.model.language_key}.quantize": "nf4"}
    if fullest.startswith("train"):
        if any(stage.optimizer == "adamw_torch" for stage in train.stages):
            yield {f"train.stages.{n}.optimizer": "paged_adamw_8bit" for n in range(len(train.stages))}
        half = int(train.tokens_per_batch) // 2
        if half >= measured.longest:
            yield {TOKENS: half, "train.accumulate": 2 * train.accumulate}


def _elsewhere(recipe: Recipe, measured: Measured) -> dict[str, int]:
    """Bytes that later commands take, of the card or of memory: the merged LLM in 16 bits, with one answer's keys and
    values; a merge goes through the LLM's weights file by file.
    """
    largest_file = min(measured.weights_16bit, 5 * 10**9)
    answer = measured.kv_token * (measured.longest + recipe.evaluate.max_new_tokens)
    return {"merge, in memory": largest_file, "serve, on a card": measured.weights_16bit + answer + CONTEXT}


def _disk(recipe: Recipe, measured: Measured) -> dict[str, int]:
    stages = len(recipe.train.stages)
    return {
        "feature cache": sum(measured.features.values()),
        # The newest of a stage replaces the one before once it is whole; finished ones hold weights alone.
        "checkpoints": 2 * measured.checkpoint + (stages - 1) * measured.trained,
        "adapter": measured.trained,
        # Two candidates are compared where the LLM was trained in 4 bits; one is kept.
        "merged model": measured.weights_16bit * (2 if recipe.model.language_model.quantize == "nf4" else 1),
    }


def _seconds(recipe: Recipe, rows: PlannedRows, measured: Measured, card: Card) -> dict[str, float]:
    """Of each phase: its operations at `UTILISATION` of the card's speed, or the time that starting them takes where
    that is longer; answers are written at the speed of the card's memory.
    """
    seconds: dict[str, float] = {}
    for phase in measured.phases:
        what, _, name = phase.name.partition(" ")
        computing = phase.flops / (card.tflops * 1e12 * UTILISATION)
        starting = phase.calls * CALL
        if what == "encode":
            seconds[phase.name] = max(computing, starting) * rows.media[name]
        elif what == "train":
            work = measured.stages[name]
            seconds[phase.name] = max(computing * work.tokens / work.fullest, starting * work.rows)
        else:
            tokens = -(-rows.held_out // recipe.evaluate.batch) * recipe.evaluate.max_new_tokens
            read = phase.parts["language_model"] / (card.bandwidth * 1e9)  # all weights, for each token
            token = max(read, starting * recipe.evaluate.batch)
            seconds[phase.name] = CONDITIONS * (computing * rows.held_out + tokens * token)
    return seconds


def _notes(recipe: Recipe, rows: PlannedRows, measured: Measured, card: Card) -> tuple[str, ...]:
    notes = [
        f"{CONTEXT / GIB:.1f} GiB are added for CUDA, and {FRAGMENTED:.0%} for gaps in its allocator",
        f"hours are at {UTILISATION:.0%} of the card's dense speed ({card.tflops:.0f} TFLOPS in 16 bits)",
    ]
    if share := share_of_vllm(recipe):
        notes.append(f"vLLM has {share:.0%} of the card beside this: {card.memory:.1f} GiB are what it leaves")
    if len(rows.training) < rows.count:
        notes.append(f"{len(rows.training)} of {rows.count:,} training rows were tokenized")
    if measured.layout.why:
        notes.append(f"rows were planned as {measured.layout.kind} ones: of this LLM, {measured.layout.why}")
    if recipe.model.language_model.attention not in ("auto", "sdpa", "eager"):
        notes.append(f"{recipe.model.language_model.attention} was planned as torch's own fused attention")
    return tuple(notes)
