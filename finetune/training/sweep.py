"""Sweep: the same recipe with other values of some keys, trial after trial, compared on its validation rows.

The LLM, the encoders and their features are loaded once and shared by all trials, as long as no trial changes them.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.common.errors import FinetuneError, Interrupted, RecipeError, TrainingError
from finetune.common.progress import console, quiet_libraries
from finetune.common.run_folder import refuse_several_processes, write_json, write_text
from finetune.data.sources import cache_folder, limits_of, model_arguments
from finetune.evaluation import plots
from finetune.model.language_model import default_device
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Recipe
from finetune.training.samples import Shared, load_shared
from finetune.training.train import train

RANGE = re.compile(r"(?P<low>[-+0-9.eE]+)\.\.(?P<high>[-+0-9.eE]+)")


def sweep(
    recipe: Path | str,
    over: Sequence[str],
    trials: int | None = None,
    overrides: Sequence[str] = (),
    run: Path | str | None = None,
) -> dict[str, Any]:
    """Train every combination of the values in `over` ('key=v1,v2'), or with `trials` that many that
    optuna chooses, also from ranges ('key=low..high'; by powers where high is 10 times low or more). A trial that does
    worse than the median of those before it, after as many looks at the validation rows, ends there.

    Writes study.sqlite3, sweep.json, plots/sweep.png and best.yaml into the folder `run`; called again it goes on.
    Returns what sweep.json holds. Raises RecipeError for keys and values that no recipe takes.
    """
    import optuna

    quiet_libraries()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    refuse_several_processes("`finetune sweep`")
    choices = [choice(text, ranges=trials is not None) for text in over]
    first = varied(recipe, overrides, [f"{key}={values[0]}" for key, values in choices])
    if first.train.validation is None:
        raise RecipeError(f"{recipe}: trials are compared on validation rows: write train.validation, and rows for it")
    for values in corners(choices):
        varied(recipe, overrides, values)
    folder = Path(run or Path("runs") / f"{first.name}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    keep_to(folder, load_recipe(recipe, overrides), over, trials)
    lists = {key: list(values) for key, values in choices if isinstance(values, list)}
    storage = f"sqlite:///{folder / 'study.sqlite3'}"
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        load_if_exists=True,
    )
    for torn in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(torn.number, state=optuna.trial.TrialState.FAIL)  # a killed sweep left it
    together = Together()

    def one(trial: Any) -> float:
        values = [f"{key}={suggested(trial, key, value)}" for key, value in choices]
        console.print(f"trial {trial.number}: {'  '.join(values)}")
        found = load_recipe(recipe, [*overrides, *values])
        place = folder / f"trial-{trial.number:03d}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            return train_trial(trial, found, place, together)
        except Interrupted:
            raise Interrupted(f"stopped in trial {trial.number}; go on with the same command") from None
        except FinetuneError as error:
            console.print(f"trial {trial.number} failed: {error}")
            trial.set_user_attr("failed", str(error))
            raise Failed from error

    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    wanted = len(combinations) if trials is None else trials
    while (count := len(ended(study))) < wanted:
        if trials is None:
            tried = [trial.params for trial in ended(study)]
            study.enqueue_trial(next(values for values in combinations if values not in tried))
        # Going on, the same seed would draw the first values once more.
        study.sampler = optuna.samplers.TPESampler(seed=first.seed + count)
        study.optimize(one, n_trials=1, catch=(Failed,))
    return tell(folder, recipe, overrides, study)


class Failed(Exception):
    """A trial whose training broke down: the others go on."""


class Together:
    """What trials share: loaded for the first, and anew only where a trial has other parts."""

    def __init__(self) -> None:
        self.key = ""
        self.shared: Shared | None = None

    def of(self, recipe: Recipe) -> Shared | None:
        """None where a trial would change the parts themselves."""
        base_changes = recipe.adapter is not None and recipe.adapter.initialization not in ("default", "gaussian")
        if recipe.tune_encoders or base_changes:
            self.key, self.shared = "", None
            return None
        model = model_arguments(recipe)
        fixed = [model["llm"], {k: (n, o.model_dump_json()) for k, (n, o) in model["encoders"].items()}]
        key = json.dumps([*fixed, str(cache_folder(recipe)), recipe.media.model_dump()], default=str, sort_keys=True)
        if key != self.key or self.shared is None:
            self.shared = None  # let go of the old LLM before the new one is loaded
            self.shared = load_shared(
                model, cache_folder=cache_folder(recipe), limits=limits_of(recipe), seed=recipe.seed
            )
            self.key = key
        self.shared.parts = replace(self.shared.parts, projectors=dict(model["projectors"]), fusion=model["fusion"])
        return self.shared


def train_trial(trial: Any, recipe: Recipe, place: Path, together: Together) -> float:
    """The merit of the weights that the trial ends on. Raises optuna.TrialPruned."""
    import optuna

    looks = itertools.count()

    def told(merit: float) -> bool:
        trial.report(merit, next(looks))
        if trial.should_prune():
            raise optuna.TrialPruned
        return False

    shared = together.of(recipe)
    try:
        folder = train(recipe, place, shared=shared, told=told)
    except FinetuneError:
        if shared and shared.composite is None:  # broken off while it was put together
            together.shared = None
        raise
    finally:
        if shared:
            shared.give_back()
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    stages = folder.read_metrics()["train"]["stages"]
    last = list(stages.values())[-1]
    best = max(last["validation"], key=lambda look: look["merit"])
    trial.set_user_attr("scores", best["scores"])
    trial.set_user_attr("seconds", folder.read_metrics()["seconds"]["train"])
    return best["merit"]


def choice(text: str, ranges: bool) -> tuple[str, Any]:
    """('key', [values as text]), or ('key', (low, high) as text) of a range. Raises RecipeError."""
    key, equals, written = text.partition("=")
    values = [value.strip() for value in written.split(",")]
    if not equals or not key or not all(values):
        raise RecipeError(f"--over {text}: write key=value1,value2" + (", or key=low..high" if ranges else ""))
    found = RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if found is None:
        return key, list(dict.fromkeys(values))
    if not ranges:
        raise RecipeError(f"--over {text}: a range has no end of values; say how many trials with --trials")
    try:
        low, high = float(found["low"]), float(found["high"])
    except ValueError:
        raise RecipeError(f"--over {text}: {written!r} isn't a range of numbers") from None
    if not low < high:
        raise RecipeError(f"--over {text}: the low end comes first, and is smaller")
    return key, (found["low"], found["high"])


def varied(recipe: Path | str, overrides: Sequence[str], values: Sequence[str]) -> Recipe:
    """The recipe with these values. Raises RecipeError, which names them as they were given."""
    try:
        return load_recipe(recipe, [*overrides, *values])
    except RecipeError as error:
        raise RecipeError(str(error).replace("--set ", "--over ") if not overrides else str(error)) from None


def corners(choices: Sequence[tuple[str, Any]]) -> list[list[str]]:
    """Each value once, beside the first of all others: what can be found wrong before anything trains."""
    firsts = [f"{key}={values[0]}" for key, values in choices]
    return [
        [*firsts[:number], f"{key}={value}", *firsts[number + 1 :]]
        for number, (key, values) in enumerate(choices)
        for value in values
    ]


def suggested(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high = values
    if all(re.fullmatch("[-+]?[0-9]+", end) for end in values):
        return trial.suggest_int(key, int(low), int(high), log=0 < 10 * int(low) <= int(high))
    return trial.suggest_float(key, float(low), float(high), log=0 < 10 * float(low) <= float(high))


def keep_to(folder: Path, recipe: Recipe, over: Sequence[str], trials: int | None) -> None:
    """A sweep goes on only with the recipe and keys that it began with: trials of others can't be compared."""
    text = json.dumps([dump_recipe(recipe), list(over), trials is None])
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = folder / "sweep.sha256"
    if path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise TrainingError(
            f"{folder}: this sweep began with another recipe, --set or --over; go on with those, or choose another "
            "--run"
        )
    write_text(path, digest + "\n")


def ended(study: Any) -> list[Any]:
    """Trials that came to an end by themselves: complete, given up, or failed; not those that were interrupted."""
    return [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED") or "failed" in t.user_attrs]


def tell(folder: Path, recipe: Path | str, overrides: Sequence[str], study: Any) -> dict[str, Any]:
    """What came out, on disk: sweep.json, a plot, and the best recipe."""
    rows: list[dict[str, Any]] = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "failed": trial.user_attrs.get("failed"),
            "values": trial.params,
            "merit": trial.value if trial.state.name == "COMPLETE" else None,
            "scores": trial.user_attrs.get("scores", {}),
            "seconds": trial.user_attrs.get("seconds"),
            "looks": [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)],
        }
        for trial in ended(study)
    ]
    complete = [row for row in rows if row["merit"] is not None]
    if not complete:
        raise TrainingError(
            f"{folder}: none of {len(rows)} trials is complete: each failed or was given up, as said above"
        )
    best = max(complete, key=lambda row: row["merit"])
    result: dict[str, Any] = {
        "recipe": str(recipe),
        "folder": str(folder),
        "device": default_device().type,
        "metric": load_recipe(recipe, overrides).train.validation.metric,  # type: ignore[union-attr]
        "best": best["trial"],
        "trials": rows,
    }
    write_json(folder / "sweep.json", result)
    values = [f"{key}={value}" for key, value in best["values"].items()]
    write_text(folder / "best.yaml", dump_recipe(load_recipe(recipe, [*overrides, *values])))
    plots.sweep([(trial["values"], trial["merit"]) for trial in complete], folder / "plots" / "sweep.png")
    return result
