"""Where the `finetune` command starts. Ctrl-C may come while it imports, which takes seconds: libraries that are
interrupted there catch the exception, or go on half imported.
"""

import signal

from finetune.commands._ctrl_c import interrupt


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    from finetune.commands.cli import main as run

    run()
