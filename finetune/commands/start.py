"""Where the `finetune` command starts."""

import signal

from finetune.commands._importing import interrupt


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    from finetune.commands.cli import main as run

    run()
