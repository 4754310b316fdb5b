"""Validation passes while a stage trains: scores every n steps, the best weights kept, an early end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from finetune.common.errors import RESUME, TrainingError, option
from finetune.common.progress import console
from finetune.common.run_folder import damage, read_json, whole_folder, write_hashes, write_json
from finetune.evaluation.results import ValidationPass
from finetune.evaluation.scores import Scores
from finetune.model.adapter import load_trained, save_trained
from finetune.model.composite import MultimodalModel
from finetune.recipe.schema import Validation
from finetune.training.tracked_answers import TrackedAnswer

OnValidation = Callable[[float], bool]  # selection score -> whether to stop the stage


class ValidationCallback(TrainerCallback):
    """`evaluate()` gives the scores of the model as it is, how good each row's answer is (see `ValidationPass`), and
    the answers that trackers show; `select(scores)` gives the selection score; `on_validation` runs after each pass.
    The first process evaluates, all act on it. Written into `folder`: validation.json, and `best/`, the weights of the
    best pass.
    """

    def __init__(
        self,
        model: MultimodalModel,
        folder: Path,
        settings: Validation,
        *,
        evaluate: Callable[[], tuple[Scores, list[float], list[TrackedAnswer]]],
        select: Callable[[Scores], float],
        on_validation: OnValidation | None = None,
    ) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        self.evaluate, self.select, self.on_validation = evaluate, select, on_validation
        self.history: list[ValidationPass] = []
        self.lost_until = -1  # the weights of passes up to this step gave way to those of a later one
        self.ended = False
        self.report: Callable[[dict[str, float]], None] = lambda scores: None  # the trainer's, while it trains
        self.show: Callable[[Sequence[TrackedAnswer], int], None] = lambda answers, step: None  # as well

    @property
    def best(self) -> ValidationPass | None:
        """The first of the best passes whose weights may be on the disk."""
        there = [one for one in self.history if one.step > self.lost_until]
        return max(there, key=lambda one: one.score, default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume(state.global_step)
        if not self.history:
            self.validate(state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or state.global_step % self.settings.every_n_steps == 0:
            self.validate(state.global_step, control)

    def validate(self, step: int, control: Any) -> None:
        shared: list[Any] = [None, False]  # the pass, and whether to stop
        if PartialState().is_main_process:
            one = self._pass(step)
            shared = [one, self.on_validation is not None and self.on_validation(one.score)]
        broadcast_object_list(shared)
        self.history.append(shared[0])
        if PartialState().is_main_process:
            self._keep(shared[0])
        if shared[1] or self.exhausted:
            self.ended = control.should_training_stop = True

    def _pass(self, step: int) -> ValidationPass:
        training = self.model.training
        self.model.eval()
        scores, good, answers = self.evaluate()
        self.model.train(training)
        self.show(answers, step)
        rounded = {name: {metric: round(v, 4) for metric, v in metrics.items()} for name, metrics in scores.items()}
        return ValidationPass(step=step, score=self.select(scores), scores=rounded, good=[round(v, 4) for v in good])

    def _keep(self, one: ValidationPass) -> None:
        is_best = self.best is one
        if is_best:
            with whole_folder(self.folder / "best") as partial:
                save_trained(self.model, partial)
                write_json(partial / "pass.json", {"step": one.step})
                write_hashes(partial)
        write_json(self.folder / "validation.json", {"passes": [each.model_dump() for each in self.history]})
        scores = {f"eval_{task}/{name}": v for task, each in one.scores.items() for name, v in each.items()}
        self.report({"eval_score": one.score, **{name: v for name, v in scores.items() if v is not None}})
        console.print(f"  step {one.step}: validation {one.score:.4f}" + " (best)" * is_best)

    @property
    def exhausted(self) -> bool:
        """Whether the last passes, as many as `patience`, were no better than the best."""
        best, patience = self.best, self.settings.patience
        return best is not None and patience is not None and sum(p.step > best.step for p in self.history) >= patience

    def resume(self, step: int) -> None:
        """Restore the passes up to a checkpoint: later ones come again, with the same scores unless the run goes on at
        another rate or without some rows. A pass before the one whose weights are on disk can't be the best any more.

        Raises TrainingError where the weights of the best of them are damaged: the stage might end on them.
        """
        path = self.folder / "validation.json"
        saved = read_json(path)["passes"] if path.is_file() else []
        self.history = [ValidationPass.model_validate(one) for one in saved if one["step"] <= step]
        if self.history and (found := damage(self.folder / "best")):
            raise TrainingError(
                f"{found}: these are the best weights so far. Remove {self.folder}, and "
                f"{option(*RESUME)} begins this stage anew"
            )
        path = self.folder / "best" / "pass.json"
        self.lost_until = min(read_json(path)["step"] - 1, step) if path.is_file() else -1

    def restore_best(self) -> int | None:
        """Put the best pass's weights into the model; its step. Call when the stage has trained."""
        best = self.best
        if best is None:
            return None
        PartialState().wait_for_everyone()
        load_trained(self.model, self.folder / "best")
        return best.step
