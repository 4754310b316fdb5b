"""What a run that a signal has ended says: the command that goes on with it."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetune.common.errors import Interrupted
from finetune.common.run_folder import RunFolder


@contextmanager
def how_to_go_on(verb: str, recipe: Path, overrides: Sequence[str], run: RunFolder) -> Iterator[None]:
    """Where Ctrl-C or SIGTERM ends the block, or a training in it: raises Interrupted with the command that goes on,
    once there is a run.
    """
    try:
        with _sigterm_as_ctrl_c() as received:
            yield
    except Interrupted as stopped:
        message, number = str(stopped), stopped.signal_number
    except KeyboardInterrupt:
        message, number = "stopped", received[0] if received else int(signal.SIGINT)
    else:
        return
    if run.recipe.is_file():
        message += f"\nto go on{_launched()}:\n  {_command(verb, recipe, overrides, run)}"
    raise Interrupted(message, number, run.path)


def _command(verb: str, recipe: Path, overrides: Sequence[str], run: RunFolder) -> str:
    program = ["finetune" if shutil.which("finetune") == sys.argv[0] else sys.argv[0]]
    if Path(sys.argv[0]).name != "finetune":
        program = [sys.executable, "-m", "finetune.commands.cli"]
    sets = [word for assignment in overrides for word in ("--set", assignment)]
    return shlex.join([*program, verb, str(recipe), *sets, "--run", str(run.path), "--resume"])


def _launched() -> str:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f", launched for {processes} processes as before" if processes > 1 else ""


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[list[int]]:
    """Gives the signals received. Stages, which end by a checkpoint, have handlers of their own."""
    process, received = os.getpid(), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
