"""Run as a script: `attended.py OWNER COMMAND...` runs a command in the process group that it leads, and ends the group
when the process OWNER is gone, also where that was killed: no engine outlives the run that started it.
"""

import os
import signal
import subprocess
import sys
import time

LOOK_SECONDS = 0.5
STOP_SECONDS = 10.0


def main(owner: int, command: list[str]) -> int:
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the group: the command ends by it, and with it this
    while os.getppid() == owner:
        try:
            return process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)  # workers that outlive the command, and this process
    return 1


if __name__ == "__main__":
    status = main(int(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
