"""Looks at validation rows while a stage trains: scores every n steps, the best weights kept, an early end."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from finetune.common.progress import console
from finetune.common.run_folder import read_json, whole_folder, write_json
from finetune.model import adapter
from finetune.model.composite import MultimodalModel

Scores = dict[str, dict[str, float]]


class Validation(TrainerCallback):
    """`look()` gives the scores of the model as it is, `merit(scores)` a number that is better when higher. The first
    process looks, all hear what follows from it. Kept in `folder`: validation.json, and `best/`, the weights of the
    best look.
    """

    def __init__(
        self,
        model: MultimodalModel,
        folder: Path,
        *,
        look: Callable[[], Scores],
        merit: Callable[[Scores], float],
        every_n_steps: int,
        patience: int | None,
        told: Callable[[float], bool] | None = None,
    ) -> None:
        """`told(merit)` is asked after each look whether to end here."""
        self.model, self.folder, self.look, self.merit = model, folder, look, merit
        self.every_n_steps, self.patience, self.told = every_n_steps, patience, told
        self.history: list[dict[str, Any]] = []
        self.ended = False

    @property
    def best(self) -> dict[str, Any] | None:
        """The first of the best looks."""
        return max(self.history, key=lambda entry: entry["merit"], default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume(state.global_step)
        if not self.history:
            self._look(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or state.global_step % self.every_n_steps == 0:
            self._look(state, control)

    def _look(self, state: Any, control: Any) -> None:
        entry: list[Any] = [None, False]
        if PartialState().is_main_process:
            training = self.model.training
            self.model.eval()
            found = self.look()
            self.model.train(training)
            scores = {name: {metric: round(value, 4) for metric, value in one.items()} for name, one in found.items()}
            entry = [{"step": state.global_step, "merit": self.merit(found), "scores": scores}, False]
            if self.told is not None:
                entry[1] = self.told(entry[0]["merit"])
        broadcast_object_list(entry)
        self.history.append(entry[0])
        best = self.best
        if PartialState().is_main_process:
            if best is entry[0]:
                with whole_folder(self.folder / "best") as partial:
                    adapter.save_trained(self.model, partial)
            write_json(self.folder / "validation.json", {"looks": self.history})
            console.print(
                f"  step {state.global_step}: validation {entry[0]['merit']:.4f}" + " (best)" * (best is entry[0])
            )
        if entry[1] or self.exhausted:
            self.ended = control.should_training_stop = True

    @property
    def exhausted(self) -> bool:
        """Whether the last looks, as many as `patience`, were no better than the best."""
        best = self.best
        return best is not None and self.patience is not None and self._since(best) >= self.patience

    def _since(self, best: Mapping[str, Any]) -> int:
        return sum(one["step"] > best["step"] for one in self.history)

    def resume(self, step: int) -> None:
        """Take up the looks up to a checkpoint: later ones come again, and come out the same."""
        path = self.folder / "validation.json"
        seen = read_json(path)["looks"] if path.is_file() else []
        self.history = [entry for entry in seen if entry["step"] <= step]

    def restore_best(self) -> int | None:
        """Put the best look's weights into the model; its step. Call when the stage has trained."""
        best = self.best
        if best is None:
            return None
        PartialState().wait_for_everyone()
        adapter.load_trained(self.model, self.folder / "best")
        return best["step"]
