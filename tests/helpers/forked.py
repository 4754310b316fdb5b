"""`python -m MODULE ARGUMENTS` in a fork of this process: its pipes, signals and exit status are real, only the seconds
that imports take are spared.
"""

import gc
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from subprocess import Popen
from typing import Any, NoReturn


def popen(command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Popen:
    """What `subprocess.Popen` gives."""

    def instead_of_exec() -> NoReturn:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # among them the pipe by which Popen waits for exec
        become(command, env)

    return Popen(command, preexec_fn=instead_of_exec, **options)


def become(command: Sequence[str], env: Mapping[str, str] | None = None) -> NoReturn:
    """What `os.exec` does, in a process that was forked."""
    executable, option, module, *sys.argv[1:] = command
    assert (executable, option) == (sys.executable, "-m")
    os.environ.update(env or {})
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate(("r", "w", "w")))
    gc.enable()
    status = 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
