"""Merge: LoRA into the LLM's weights, twice (into the 16-bit LLM, and into the 4-bit one made 16-bit again), each
written to disk, read back and compared with what was trained; the closer one is kept, if it is close, and if it isn't
just the base.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from finetune.common import certificate
from finetune.common.certificate import Bounds, Certificate, Dtypes, LanguageModelFiles, Measures
from finetune.common.errors import ArtifactError, DataError, MergeRefused
from finetune.common.progress import bar, console, fresh_memory, quiet_libraries
from finetune.common.registry import load_part
from finetune.common.run_folder import RunFolder, read_json, refuse_several_processes, whole_folder
from finetune.data.media import Limits
from finetune.data.rows import Source, read_splits, some
from finetune.data.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of
from finetune.evaluation.scores import known_asks
from finetune.merging.candidates import Work, measured_on_disk, named
from finetune.merging.compare import Compared
from finetune.merging.lora_weights import LoraFile, tensor_names
from finetune.model import adapter
from finetune.model.build import load_parts
from finetune.model.features import Features
from finetune.model.language_model import resolve_dtype
from finetune.recipe.load import load_recipe

SAME = 1e-6  # nats: a merged model nearer than this to the LLM without adapter has learnt nothing
PACKAGES = ("finetune", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def merge(run: Path | str) -> Certificate:
    """Merge a trained run; writes merged/ and certificate.json. Returns the certificate.

    Raises MergeRefused where the merged model differs from what was trained, or not from the base; ArtifactError where
    the adapter is missing, damaged, or another LLM's. What was merged before is then left as it was.
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
        max_new_tokens=recipe.evaluate.max_new_tokens,
        batch=recipe.evaluate.batch,
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
    max_new_tokens: int,
    batch: int,
    rows: int,
    rows_scored: int,
    dtype: str,
    min_agreement: float,
    max_kl: float,
) -> Certificate:
    """The same from plain values. `rows` held-out rows are compared, `rows_scored` of them answered; at least
    `min_agreement` of next tokens must be equal, and the KL divergence be at most `max_kl` nats a token.
    """
    lora, base = checked_adapter(folder.adapter, model["llm"], adapter_options is not None)
    if lora is not None:  # as it was trained, whatever the recipe says by now
        adapter_options = adapter.options_of(read_json(folder.adapter / "adapter_config.json"))
    held_out = read_splits(sources, seed)[split]
    entries = some(held_out, rows, seed)
    if not entries:
        raise DataError(f"no rows in split {split!r} to compare the merged model on")
    asks = known_asks(folder.adapter, entries, sources)
    parts = load_parts(**model, seed=seed)
    answered = some(entries, rows_scored, seed) if rows_scored else []
    compared = Compared(entries, answered, sources, asks, parts, max_new_tokens=max_new_tokens, batch=batch)
    work = Work(
        folder.adapter,
        lora,
        model["llm"],
        adapter_options,
        seed,
        asks,
        parts,
        limits,
        resolve_dtype(dtype, parts.device) if dtype != "auto" else parts.dtype,
    )
    candidates = work.candidates()
    with bar("merge", 1 + 2 * len(candidates)) as step, whole_folder(folder.merged) as partial:
        trained = work.measured(compared, Features(parts.encoders, cache_folder, limits))
        step()
        found: dict[str, dict[str, Any]] = {}
        how: dict[str, str] = {}
        for number, name in enumerate(candidates):
            place, scratch = partial / f"candidate-{number}", partial / "scratch"
            how[name] = work.write(place, scratch, trained, quantized=number == 1)
            step()
            found[name] = measured_on_disk(place, scratch, compared, trained, parts, limits)
            shutil.rmtree(scratch, ignore_errors=True)
            step()
        best, why = chosen(found)
        settle(partial, candidates.index(best))
        measures = {name: Measures.model_validate(values) for name, values in found.items()}
        reference, bare = Measures.model_validate(trained.measures), Measures.model_validate(trained.base_measures)
        positions = sum(len(row) for row in trained.tokens)
        bounds = Bounds(min_agreement=min_agreement, max_kl=max_kl, min_kl_from_base=SAME if adapter_options else None)
        refuse_unless_faithful(measures[best], reference, bounds, positions)
        content = Certificate(
            format=certificate.FORMAT,
            merged_into=best,
            why=why,
            how=how[best],
            reference=work.reference,
            language_model=base,
            dtype=named(work.dtype),
            dtypes=Dtypes(**work.dtypes()),
            rows=len(entries),
            rows_held_out=len(held_out),
            rows_scored=len(answered),
            positions=positions,
            media=compared.media,
            primary={name: load_part("tasks", asks[name].task[0]).PRIMARY for name in dict.fromkeys(compared.names)},
            saved=measures[best],
            candidates=measures,
            trained=reference,
            base=bare,
            bounds=bounds,
            versions={name: version(name) for name in PACKAGES},
            sha256=certificate.file_hashes(partial),
            adapter_sha256=certificate.file_hashes(folder.adapter),
        )
        content.write(partial / certificate.NAME)
    content.write(folder.certificate)
    tell(content, folder.merged)
    return content


def checked_adapter(folder: Path, llm: Mapping[str, Any], has_lora: bool) -> tuple[LoraFile | None, LanguageModelFiles]:
    """The adapter's LoRA, if it has any, and what its LLM is known by: name, revision, hashes of weights that lie here.
    Raises ArtifactError where files are missing or damaged, or where it was trained over another LLM than `llm`.
    """
    content = read_json(folder / "multimodal.json")
    known, name = content.get("language_model", {}), str(llm["name"])
    here = Path(name).exists()  # a folder may have moved; a name of the Hub is the same everywhere
    same = {
        "name": Path(name).name == Path(str(known.get("name"))).name if here else name == known.get("name"),
        "quantize": llm["quantize"] == known.get("quantize"),
        "revision": here or None in (llm["revision"], known.get("revision")) or llm["revision"] == known["revision"],
    }
    if wrong := [key for key, equal in same.items() if not equal]:
        then, now = (f" at {one['revision'][:12]}" if wrong == ["revision"] else "" for one in (known, llm))
        raise ArtifactError(
            f"{folder}: trained over the LLM {known.get('name')!r}{then} ({known.get('quantize')}), but the run's "
            f"recipe names {name!r}{now} ({llm['quantize']}): this adapter is another run's"
        )
    before, found = content.get("language_model_sha256") or {}, certificate.weights_hashes(name)
    if other := [file for file in before if here and before[file] != found.get(file)]:
        raise ArtifactError(
            f"{name}: {other[0]} isn't what the adapter was trained over (sha256 {found.get(other[0], 'none')[:12]}, "
            f"then {before[other[0]][:12]}): put the LLM's files back, or train again"
        )
    tensor_names(folder / "projectors.safetensors")
    base = LanguageModelFiles(name=Path(name).name if here else name, revision=known.get("revision"), sha256=found)
    return LoraFile(folder) if has_lora else None, base


def chosen(found: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """(the candidate that is kept, why)."""
    first, *others = found
    if not others:
        return first, "the LLM was trained as it is, unquantized: there is no other"
    best, other = sorted(found, key=lambda name: found[name]["kl"])
    if found[first]["kl"] <= found[best]["kl"] + SAME:
        best, other = first, others[0]
        if found[other]["kl"] <= found[best]["kl"] + SAME:
            return best, f"both are within {SAME:g} nats of each other, and this is the LLM that was published"
    kl, than = found[best]["kl"], found[other]["kl"]
    return best, f"its KL divergence from what was trained is {kl:.2g} nats a token, that of {other} {than:.2g}"


def settle(folder: Path, best: int) -> None:
    """The files of candidate number `best` become the folder's, the other's go."""
    for path in (folder / f"candidate-{best}").iterdir():
        os.replace(path, folder / path.name)
    for path in folder.glob("candidate-*"):
        shutil.rmtree(path)


def refuse_unless_faithful(saved: Measures, trained: Measures, bounds: Bounds, positions: int) -> None:
    """Raises MergeRefused where bounds are broken."""
    advice = "Nothing was kept: serve the adapter, or use a wider merge.dtype"
    if saved.agreement < bounds.min_agreement:
        raise MergeRefused(
            f"the merged model gives another next token than what was trained on {1 - saved.agreement:.1%} of "
            f"{positions} positions (KL {saved.kl:.2g}); merge.min_agreement is {bounds.min_agreement:g}. {advice}"
        )
    if saved.kl > bounds.max_kl:
        raise MergeRefused(
            f"the merged model's next tokens are {saved.kl:.2g} nats from what was trained (KL divergence, mean of "
            f"{positions} positions); merge.max_kl is {bounds.max_kl:g}. {advice}"
        )
    least = bounds.min_kl_from_base
    if least is None:
        return
    if trained.kl_from_base < least or saved.kl_from_base < least:
        raise MergeRefused(
            "the merged model equals the untrained LLM: the adapter has learnt nothing, or wasn't merged. "
            "Nothing was kept. See whether a stage of the recipe trains 'adapter', and for more than a few steps"
        )
    if saved.kl >= saved.kl_from_base:
        raise MergeRefused(
            f"the merged model is no nearer to what was trained (KL {saved.kl:.2g}) than to the LLM without the "
            f"adapter ({saved.kl_from_base:.2g}): what the adapter has learnt is lost in rounding. {advice}"
        )


def tell(content: Certificate, folder: Path) -> None:
    names, rows = certificate.comparison(content)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(escape(row[0]), justify="right")
    for number, name in enumerate(names[1:], 1):
        table.add_row(escape(name), *(escape(row[number]) for row in rows))
    console.print(table)
    console.print(
        f"merged into {content.merged_into}: {content.saved.agreement:.1%} of {content.positions} next tokens as "
        f"trained; {content.why}; scores on {content.rows_scored} of {content.rows_held_out} held-out rows; {folder}"
    )
