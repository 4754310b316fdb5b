"""Signals that come before the first step: while the program is imported, and while weights are loaded."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_recipe

pytestmark = pytest.mark.slow
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN = START + "from finetune.commands.start import main; main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_of_the_start_says_so(number, tmp_path, full, tried):
    """SIGTERM before the recipe is read ends it as any program."""
    recipe = tiny_recipe(tmp_path)
    delays = [0.1 + 0.2 * n for n in range(30)] if full else [0.4]
    for delay in delays:
        command = [sys.executable, "-c", MAIN, "train", str(recipe), "--run", str(tmp_path / f"run{delay}")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
        time.sleep(delay)
        process.send_signal(number)
        output = process.communicate(timeout=60)[1]
        assert process.returncode in (128 + number, -number), (delay, output)
        assert "Traceback" not in output, (delay, output)
        if process.returncode > 0:
            assert "stopped" in output, (delay, output)
    tried(f"{number.name} at {len(delays)} times of the start", "exit status tells; no traceback")
