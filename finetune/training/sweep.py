"""Sweep: the same recipe with other values of some keys, trial after trial, compared on its validation rows.

The LLM, the encoders and their features are loaded once and shared by all trials, as long as no trial changes them.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.common import display
from finetune.common.errors import RUN, FinetuneError, Interrupted, TrainingError, option
from finetune.common.progress import console, quiet_libraries
from finetune.common.run_folder import RunLike, refuse_several_processes, write_json, write_text
from finetune.data.metrics import lower_is_better
from finetune.evaluation import plots
from finetune.evaluation.results import Comparison, Metrics, Value
from finetune.evaluation.uncertainty import compare_rows
from finetune.model.language_model import default_device
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, dump_recipe
from finetune.training.shared import Shared
from finetune.training.sweep_choices import SweepChoice, read_choices
from finetune.training.train import train_in, with_measured_dtype


@dataclass(frozen=True)
class Trial:
    """`score`: the selection score of the weights it ended on, None where it isn't complete; `passes`: that of each
    validation pass.
    """

    trial: int
    state: str
    failed: str | None
    values: dict[str, Any]
    score: float | None
    scores: dict[str, dict[str, Value]]
    seconds: float | None
    passes: list[float]


@dataclass(frozen=True, repr=False)
class SweepResult:
    """What sweep.json holds. `best`: number of the best trial; `second`: of the next, None without one. `rows`: number
    of validation rows; `compared`: how good the best trial's answers are, minus the second's; both are None where rows
    have groups.
    """

    recipe: str
    folder: str
    device: str
    metric: str
    best: int
    second: int | None
    rows: int | None
    compared: Comparison | None
    trials: list[Trial]

    def __repr__(self) -> str:
        best = next(trial for trial in self.trials if trial.trial == self.best)
        values = ", ".join(f"{key}={value}" for key, value in best.values.items())
        return f"SweepResult: {len(self.trials)} trials; best {self.best}: {values}; {self.folder}/best.yaml"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows to show, the best trial first."""
        lower = lower_is_better(self.metric)  # errors are selected by their negative
        rows = []
        for trial in sorted(self.trials, key=lambda trial: (trial.score is None, -(trial.score or 0))):
            values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.values.values()]
            score = trial.state if trial.score is None else f"{-trial.score if lower else trial.score:.4f}"
            seconds = "" if trial.seconds is None else f"{trial.seconds:.0f}"
            best = " (best)" if trial.trial == self.best else ""
            rows.append([f"{trial.trial}{best}", *values, score, str(len(trial.passes)), seconds])
        return ["trial", *self.trials[0].values, self.metric + " ↓" * lower, "passes", "seconds"], rows

    def sample_size(self) -> str:
        """n, as it stands below the table; '' where rows have groups."""
        if self.rows is None:
            return ""
        return f"n = {self.rows:,} validation rows" + "; ↓ lower is better" * lower_is_better(self.metric)

    def _repr_html_(self) -> str:
        table = display.table(*self.table()) + display.line(self.sample_size())
        picture = display.picture(Path(self.folder) / "plots" / "sweep.png")
        return display.line(repr(self)) + table + picture + display.files({"best": Path(self.folder) / "best.yaml"})


def sweep(
    recipe: RecipeLike,
    over: Sequence[str],
    trials: int | None = None,
    overrides: Sequence[str] = (),
    run: RunLike | None = None,
) -> SweepResult:
    """Train every combination of the values in `over` ('key=v1,v2'), or with `trials` that many that optuna chooses,
    also from ranges ('key=low..high'; on a logarithmic scale where high is 10 times low or more). A trial that is worse
    than the median of those before it, after as many validation passes, ends there.

    Writes study.sqlite3, sweep.json, plots/sweep.png and best.yaml into the folder `run`; called again it goes on.
    Raises RecipeError for keys and values that no recipe takes.
    """
    import optuna

    quiet_libraries()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    refuse_several_processes("`finetune sweep`")
    choices, first = read_choices(recipe, over, trials, overrides)
    folder = Path(run or Path("runs") / f"{first.name}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_sweep(folder, as_recipe(recipe, overrides), over, trials)
    study = open_study(folder)
    shared = SharedParts()

    def one(trial: Any) -> float:
        values = [f"{choice.key}={suggested(trial, choice)}" for choice in choices]
        console.print(f"trial {trial.number}: {'  '.join(values)}")
        varied = as_recipe(recipe, [*overrides, *values])
        place = folder / f"trial-{trial.number:03d}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            return train_trial(trial, varied, place, shared)
        except Interrupted:
            raise Interrupted(f"stopped in trial {trial.number}; go on with the same command") from None
        except FinetuneError as error:
            console.print(f"trial {trial.number} failed: {error}")
            trial.set_user_attr("failed", str(error))
            raise Failed from error

    keys = [choice.key for choice in choices]
    combinations = [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(choice.values for choice in choices))
    ]
    while (count := len(ended(study))) < (len(combinations) if trials is None else trials):
        if trials is None:
            done = [trial.params for trial in ended(study)]
            study.enqueue_trial(next(values for values in combinations if values not in done))
        # Going on, the same seed would draw the first values once more.
        study.sampler = optuna.samplers.TPESampler(seed=first.seed + count)
        study.optimize(one, n_trials=1, catch=(Failed,))
    return finish(folder, recipe, overrides, study)


class Failed(Exception):
    """A trial whose training broke down: the others go on."""


def open_study(folder: Path) -> Any:
    import optuna

    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.sqlite3'}",
        study_name="sweep",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        load_if_exists=True,
    )
    for torn in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(torn.number, state=optuna.trial.TrialState.FAIL)  # a killed sweep left it
    return study


class SharedParts:
    """What trials share: loaded for the first, and again only where a trial has another LLM or other encoders."""

    def __init__(self) -> None:
        self.key = ""
        self.shared: Shared | None = None

    def of(self, recipe: Recipe) -> Shared | None:
        """None where a trial would change the weights that are shared."""
        base_changes = recipe.adapter is not None and recipe.adapter.initialization not in ("default", "gaussian")
        if recipe.tune_encoders or recipe.trains_base_projectors or base_changes:
            self.key, self.shared = "", None
            return None
        model = recipe.model.model_dump(mode="json", include={"llm", "base", "encoders"})
        settings = [str(recipe.train.feature_folder), recipe.train.dequantize_once]
        with_teacher = [[s.objective.dump(), s.sources] for s in recipe.train.stages if s.objective.needs == "teacher"]
        # Teachers run before the LLM is loaded.
        rows = recipe.model_dump(mode="json", include={"data"}) if with_teacher else {}
        fixed = [model, *settings, recipe.media.model_dump(), with_teacher, rows]
        key = json.dumps(fixed, sort_keys=True)
        if key != self.key or self.shared is None:
            self.shared = None  # let go of the old LLM before the new one is loaded
            self.shared = Shared.load(recipe)
            self.key = key
        return self.shared


def train_trial(trial: Any, recipe: Recipe, place: Path, parts: SharedParts) -> float:
    """The selection score of the weights that the trial ends on. Raises optuna.TrialPruned."""
    import optuna

    numbers = itertools.count()

    def prune(score: float) -> bool:
        trial.report(score, next(numbers))
        if trial.should_prune():
            raise optuna.TrialPruned
        return False

    recipe = with_measured_dtype(recipe)
    if recipe.train.cache == "auto":
        frozen = not (recipe.tune_encoders or recipe.trains_base_projectors)
        recipe = recipe.with_(**{"train.cache": frozen})  # the trials read the same features
    shared = parts.of(recipe)
    try:
        folder = train_in(place, recipe, shared=shared, on_validation=prune)
    except FinetuneError:
        if shared and shared.composite is None:  # broken off while it was put together
            parts.shared = None
        raise
    finally:
        if shared:
            shared.release()
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    metrics = Metrics.model_validate(folder.read_metrics())
    *_, last = metrics.train.stages.values()
    best = max(last.validation, key=lambda one: one.score)
    trial.set_user_attr("scores", best.scores)
    trial.set_user_attr("good", best.good)
    trial.set_user_attr("seconds", metrics.seconds["train"])
    return best.score


def suggested(trial: Any, choice: SweepChoice) -> str | int | float:
    """The value that optuna chooses."""
    value: str | int | float
    if not choice.is_range:
        value = trial.suggest_categorical(choice.key, choice.values)
        return value
    low, high = choice.values
    logarithmic = 0 < 10 * float(low) <= float(high)
    if all(re.fullmatch("[-+]?[0-9]+", end) for end in choice.values):
        value = trial.suggest_int(choice.key, int(low), int(high), log=logarithmic)
        return value
    value = trial.suggest_float(choice.key, float(low), float(high), log=logarithmic)
    return value


def refuse_other_sweep(folder: Path, recipe: Recipe, over: Sequence[str], trials: int | None) -> None:
    """A sweep goes on only with the recipe and keys that it began with: trials of others can't be compared. Raises
    TrainingError.
    """
    text = json.dumps([dump_recipe(recipe), list(over), trials is None])
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = folder / "sweep.sha256"
    if path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise TrainingError(
            f"{folder}: this sweep began with another recipe, {option('--set or --over', 'overrides= or over=')}; go "
            f"on with those, or choose another {option(*RUN)}"
        )
    write_text(path, digest + "\n")


def ended(study: Any) -> list[Any]:
    """Trials that came to an end by themselves: complete, pruned, or failed; not those that were interrupted."""
    return [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED") or "failed" in t.user_attrs]


def finish(folder: Path, recipe: RecipeLike, overrides: Sequence[str], study: Any) -> SweepResult:
    """Write sweep.json, a plot, and the best recipe. Raises TrainingError where no trial is complete."""
    trials = [
        Trial(
            trial=trial.number,
            state=trial.state.name.lower(),
            failed=trial.user_attrs.get("failed"),
            values=trial.params,
            score=trial.value if trial.state.name == "COMPLETE" else None,
            scores=trial.user_attrs.get("scores", {}),
            seconds=trial.user_attrs.get("seconds"),
            passes=[trial.intermediate_values[step] for step in sorted(trial.intermediate_values)],
        )
        for trial in ended(study)
    ]
    complete = [(trial, trial.score) for trial in trials if trial.score is not None]
    if not complete:
        raise TrainingError(
            f"{folder}: none of {len(trials)} trials is complete: each failed or was pruned, see the lines above"
        )
    (best, _), *others = sorted(complete, key=lambda pair: -pair[1])
    second = others[0][0].trial if others else None
    good = {trial.number: trial.user_attrs.get("good") for trial in study.trials}
    first = as_recipe(recipe, overrides)
    metric = first.train.validation.metric if first.train.validation else "mean"
    same = second is not None and good[best.trial] and len(good[best.trial]) == len(good[second] or [])
    result = SweepResult(
        recipe=first.name if isinstance(recipe, Recipe) else str(recipe),
        folder=str(folder),
        device=default_device().type,
        metric=metric,
        best=best.trial,
        second=second,
        rows=len(good[best.trial] or []) or None,
        compared=compare_rows(good[best.trial], good[second], first.seed) if same else None,
        trials=trials,
    )
    write_json(folder / "sweep.json", asdict(result))
    values = [f"{key}={value}" for key, value in best.values.items()]
    write_text(folder / "best.yaml", dump_recipe(as_recipe(recipe, [*overrides, *values])))
    plots.sweep([(trial.values, score) for trial, score in complete], metric, folder / "plots" / "sweep.png")
    return result
