"""Merge: LoRA into the LLM's weights, twice (into the 16-bit LLM, and into the 4-bit one made 16-bit again), each
written to disk, read back and compared with what was trained; the closer one is kept, if it is close, and if it isn't
just the base.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table

from finetune.common import certificate
from finetune.common.certificate import UNTRAINED, Bounds, Certificate, LanguageModelFiles, Measures
from finetune.common.disk import writing
from finetune.common.errors import ArtifactError, DataError, MergeRefused
from finetune.common.memory import MERGING, enough_memory
from finetune.common.progress import bar, console, fresh_memory, quiet_libraries
from finetune.common.run_folder import RunFolder, RunLike, refuse_several_processes, whole_folder
from finetune.common.version import versions
from finetune.data.metrics import main_metric
from finetune.data.rows import subset
from finetune.data.run_rows import splits_of_run
from finetune.evaluation.scores import known_bindings
from finetune.merging.candidates import MergeJob, Trained, dtype_name
from finetune.merging.compare import ComparedSamples
from finetune.merging.lora_weights import LoraFile
from finetune.model import module_names
from finetune.model.adapter import saved_adapter
from finetune.model.language_model import resolve_dtype
from finetune.model.manifest import AdapterManifest
from finetune.model.run import Run
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import LanguageModel

SAME = 1e-6  # nats: a merged model nearer than this to the base has learned nothing
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


@enough_memory("merging", MERGING)
def merge(run: RunLike) -> Certificate:
    """Merge a trained run; writes merged/ and certificate.json. Returns the certificate.

    Raises MergeRefused where the merged model differs from what was trained, or not from the base; the reason is
    then in metrics.json too. ArtifactError where the adapter is missing, damaged, or another LLM's. What was merged
    before is left as it was.
    """
    quiet_libraries()
    refuse_several_processes("`finetune merge`")
    fresh_memory()
    folder = RunFolder.open(run, needs="adapter")
    recipe = load_recipe(folder.recipe)
    llm_files = checked_adapter(folder.adapter, recipe.model.language_model)
    lora = None
    if recipe.adapter is not None:  # as it was trained, whatever the recipe says by now
        lora = LoraFile(folder.adapter)
        recipe = recipe.model_copy(update={"adapter": saved_adapter(folder.adapter)})
    held_out = splits_of_run(folder, recipe).of(recipe.evaluate.split)
    samples = subset(held_out, recipe.merge.rows, recipe.seed)
    if not samples:
        raise DataError(f"no rows in split {recipe.evaluate.split!r} to compare the merged model on")
    loaded = Run.load(folder, recipe, known_bindings(folder.adapter, samples, recipe.data))
    answered = subset(samples, recipe.merge.rows_scored, recipe.seed) if recipe.merge.rows_scored else []
    comparison = ComparedSamples(loaded, samples, answered)
    computed = loaded.components.dtype
    dtype = computed if recipe.merge.dtype == "auto" else resolve_dtype(recipe.merge.dtype, loaded.components.device)
    try:
        with writing(folder.merged, "the merged model", "merge again"), whole_folder(folder.merged) as partial:
            merged = merge_into(partial, MergeJob(loaded, lora, dtype), comparison, llm_files, len(held_out))
    except MergeRefused as refused:
        folder.update_metrics(merge={"refused": str(refused)})
        raise
    if "merge" in folder.read_metrics():
        folder.update_metrics(merge={"refused": None})
    merged.write(folder.certificate)
    show(merged, folder.merged)
    return merged


def merge_into(
    folder: Path, job: MergeJob, comparison: ComparedSamples, llm_files: LanguageModelFiles, held_out: int
) -> Certificate:
    """Write and measure every candidate, keep the best in `folder`, with its certificate. `held_out`: rows in all."""
    candidates = job.candidates
    with bar("merge", 1 + 2 * len(candidates)) as step:
        trained = job.measure_trained(comparison)
        step()
        measures: dict[str, Measures] = {}
        methods: dict[str, str] = {}
        for number, candidate in enumerate(candidates):
            place, scratch = folder / f"candidate-{number}", folder / "scratch"
            methods[candidate.name] = job.write(place, scratch, trained, candidate.quantized)
            step()
            measures[candidate.name] = job.measure(place, scratch, comparison, trained)
            shutil.rmtree(scratch, ignore_errors=True)
            step()
    best, why = chosen(measures)
    bounds = bounds_of(job.run.recipe)
    refuse_unless_faithful(measures[best], trained, bounds, job.base_is)
    keep_candidate(folder, list(measures).index(best))
    merged = Certificate(
        format=1,
        merged_into=best,
        why=why,
        how=methods[best],
        reference=job.reference,
        language_model=llm_files,
        dtype=dtype_name(job.dtype),
        dtypes=job.dtypes,
        rows=len(comparison.samples),
        rows_held_out=held_out,
        rows_scored=len(comparison.answered),
        positions=trained.positions,
        media=comparison.media,
        primary={
            task: main_metric(metric, (trained.measures.scores or {}).get(task, {}))
            for task, metric in comparison.primary.items()
        },
        saved=measures[best],
        candidates=measures,
        trained=trained.measures,
        base=trained.base_measures,
        base_is=job.base_is,
        bounds=bounds,
        versions=versions(PACKAGES),
        sha256=certificate.file_hashes(folder),
        adapter_sha256=certificate.file_hashes(job.run.folder.adapter),
    )
    merged.write(folder / certificate.NAME)
    return merged


def bounds_of(recipe: Recipe) -> Bounds:
    return Bounds(
        min_agreement=recipe.merge.min_agreement,
        max_kl=recipe.merge.max_kl,
        min_kl_from_base=SAME,
    )


def checked_adapter(folder: Path, llm: LanguageModel) -> LanguageModelFiles:
    """The LLM that the adapter was trained over: name, revision, hashes of weights that are local.
    Raises ArtifactError where files are missing or damaged, or where it was trained over another LLM than `llm`.
    """
    manifest = AdapterManifest.read(folder)
    trained = manifest.model.language_model
    local = Path(llm.name).exists()  # a folder may have moved; a name of the Hub is the same everywhere
    agrees = {
        "name": Path(llm.name).name == Path(trained.name).name if local else llm.name == trained.name,
        "quantize": llm.quantize == trained.quantize,
        "revision": local or None in (llm.revision, trained.revision) or llm.revision == trained.revision,
    }
    if different := [key for key, equal in agrees.items() if not equal]:
        commits = [f" at {(one.revision or '')[:12]}" if different == ["revision"] else "" for one in (trained, llm)]
        raise ArtifactError(
            f"{folder}: trained over the LLM {trained.name!r}{commits[0]} ({trained.quantize}), but the run's recipe "
            f"names {llm.name!r}{commits[1]} ({llm.quantize}): this adapter is another run's"
        )
    hashes = certificate.weights_hashes(llm.name)
    if changed := [file for file in manifest.llm_sha256 if local and manifest.llm_sha256[file] != hashes.get(file)]:
        file = changed[0]
        raise ArtifactError(
            f"{llm.name}: {file} isn't what the adapter was trained over (sha256 {hashes.get(file, 'none')[:12]}, then "
            f"{manifest.llm_sha256[file][:12]}): put the LLM's files back, or train again"
        )
    module_names.tensors(folder / "projectors.safetensors")
    name = Path(llm.name).name if local else llm.name
    return LanguageModelFiles(name=name, revision=trained.revision, sha256=hashes)


def chosen(measures: Mapping[str, Measures]) -> tuple[str, str]:
    """(the candidate that is kept, why)."""
    first, *others = measures
    if not others:
        return first, "it was trained as it is, unquantized: there is no other"
    best, other = sorted(measures, key=lambda name: measures[name].kl)
    if measures[first].kl <= measures[best].kl + SAME:
        best, other = first, others[0]
        if measures[other].kl <= measures[best].kl + SAME:
            return best, f"both are within {SAME:g} nats of each other, and this is what was published"
    kl, than = measures[best].kl, measures[other].kl
    return best, f"its KL divergence from what was trained is {kl:.2g} nats a token, that of {other} {than:.2g}"


def keep_candidate(folder: Path, number: int) -> None:
    """The files of a candidate become the folder's, the others' go."""
    for path in (folder / f"candidate-{number}").iterdir():
        os.replace(path, folder / path.name)
    for path in folder.glob("candidate-*"):
        shutil.rmtree(path)


def refuse_unless_faithful(saved: Measures, trained: Trained, bounds: Bounds, base_is: str) -> None:
    """Raises MergeRefused where bounds are broken."""
    advice = "Nothing was kept: serve the adapter, or use a wider merge.dtype"
    if saved.agreement < bounds.min_agreement:
        raise MergeRefused(
            f"the merged model gives another next token than what was trained on {1 - saved.agreement:.1%} of "
            f"{trained.positions} positions (KL {saved.kl:.2g}); merge.min_agreement is {bounds.min_agreement:g}. "
            f"{advice}"
        )
    if saved.kl > bounds.max_kl:
        raise MergeRefused(
            f"the merged model's next tokens are {saved.kl:.2g} nats from what was trained (KL divergence, mean of "
            f"{trained.positions} positions); merge.max_kl is {bounds.max_kl:g}. {advice}"
        )
    least = bounds.min_kl_from_base
    if least is None:
        return
    if trained.measures.kl_from_base < least or saved.kl_from_base < least:
        if base_is != UNTRAINED:
            raise MergeRefused(
                f"the merged model equals {base_is}, which has learned nothing or wasn't merged. "
                "Nothing was kept. See whether a stage of the recipe trains 'adapter', and for more than a few steps"
            )
        raise MergeRefused(
            f"the merged model equals {base_is}: no stage trains the adapter, and other parts have learned nothing. "
            "Nothing was kept. Train them for more than a few steps"
        )
    if saved.kl >= saved.kl_from_base:
        raise MergeRefused(
            f"the merged model is no nearer to what was trained (KL {saved.kl:.2g}) than to {base_is} "
            f"({saved.kl_from_base:.2g}): what was learned is lost in rounding. {advice}"
        )


def show(merged: Certificate, folder: Path) -> None:
    names, rows = certificate.comparison(merged)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row[0], justify="right")
    for number, name in enumerate(names[1:], 1):
        table.add_row(name, *(row[number] for row in rows))
    console.print(table)
    console.print(
        f"merged into {merged.merged_into}: {merged.saved.agreement:.1%} of {merged.positions} next tokens as "
        f"trained; {merged.why}; scores on {merged.rows_scored} of {merged.rows_held_out} held-out rows; {folder}"
    )
