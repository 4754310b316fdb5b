"""What a command that a signal has ended says: the command that goes on with it."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetune.commands import _importing
from finetune.commands._importing import interrupt
from finetune.common.errors import Interrupted
from finetune.common.run_folder import RunFolder
from finetune.common.signals import SIGNALS, write_from_handler


@contextmanager
def how_to_go_on(verb: str, recipe: Path, overrides: Sequence[str], run: RunFolder) -> Iterator[None]:
    """Where Ctrl-C, SIGTERM or SIGHUP ends the block, or a training in it: raises Interrupted with the command that
    goes on, once there is a run.
    """

    def advice() -> str:
        if not run.recipe.is_file():
            return ""
        sets = [word for assignment in overrides for word in ("--set", assignment)]
        command = _command([verb, str(recipe), *sets, "--run", str(run.path), "--resume"])
        return f"\nto go on{_launched()}:\n  {command}"

    _importing.advice.append(advice)
    try:
        with _as_ctrl_c() as received:
            yield
    except Interrupted as stopped:
        message, number = str(stopped), stopped.signal_number
    except KeyboardInterrupt:
        message, number = "stopped", _number(received)
    else:
        return
    finally:
        _importing.advice.remove(advice)
    raise Interrupted(message + advice(), number, run.path)


@contextmanager
def how_to_begin_again(why: str, run: RunFolder | None = None) -> Iterator[None]:
    """Where Ctrl-C, SIGTERM or SIGHUP ends the block: raises Interrupted with the command that was given, which begins
    again. `why`: when what it makes is written.
    """
    with _as_ctrl_c() as received:
        try:
            yield
        except KeyboardInterrupt:
            message = f"stopped; {why}\nto begin again:\n  {_command(sys.argv[1:])}"
            raise Interrupted(message, _number(received), run.path if run else None) from None


def _number(received: Sequence[int]) -> int:
    return received[0] if received else int(signal.SIGINT)


def _command(words: Sequence[str]) -> str:
    program = ["finetune" if shutil.which("finetune") == sys.argv[0] else sys.argv[0]]
    if Path(sys.argv[0]).name != "finetune":
        program = [sys.executable, "-m", "finetune.commands.cli"]
    return shlex.join([*program, *words])


def _launched() -> str:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f", launched for {processes} processes as before" if processes > 1 else ""


@contextmanager
def _as_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does. Gives the signals received. Stages, which end by a checkpoint,
    have handlers of their own.
    """
    process, received = os.getpid(), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        write_from_handler(f"{signal.Signals(number).name}: stopping")  # also finds out whether the terminal is there
        interrupt(number, frame)

    before = {number: signal.getsignal(number) for number in SIGNALS if number != signal.SIGINT}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
