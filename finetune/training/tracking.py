"""What `train.track` names: transformers' own callbacks, with one run of a tracker for each stage."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from finetune.recipe.schema import Tracker


def tensorboard_callbacks(track: Sequence[Tracker], folder: Path, first_step: int) -> list[TrainerCallback]:
    """TensorBoard's callback where it is named, for event files in `folder`. What an interrupted run has written there
    from `first_step` on is hidden.
    """
    if "tensorboard" not in track or not PartialState().is_main_process:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder), purge_step=first_step))]


def end_tracking(track: Sequence[Tracker]) -> None:
    """End wandb's run: its callback would write the next stage into it. The other callbacks do this themselves."""
    if "wandb" in track and PartialState().is_main_process:
        importlib.import_module("wandb").finish()
