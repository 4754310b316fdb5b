"""What is printed as it is: lines aren't broken, [brackets] and :words: are no markup."""

import errno
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.common.errors import escaped

IN_NOTEBOOK = Console().is_jupyter
NOTEBOOK_COLUMNS = 115


class PlainConsole(Console):
    """What is printed as text, in tables too, may come from files: characters that command a terminal are escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


class Stderr:
    """sys.stderr, whichever it is by then. What a terminal that has been closed no longer takes is dropped: its signal
    comes a moment later.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # rich would write past this
            raise AttributeError(name)
        return getattr(getattr(sys.stderr, "rich_proxied_file", sys.stderr), name)

    def write(self, text: str) -> None:
        self._unless_closed("write", text)

    def flush(self) -> None:
        self._unless_closed("flush")

    def _unless_closed(self, name: str, *arguments: str) -> None:
        try:
            self.__getattr__(name)(*arguments)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


def plain_console(**options: Any) -> Console:
    """`options`: of rich's Console. In a notebook lines go to stdout as text, which wraps: rich's own HTML cuts them at
    the right, and stderr looks like an error.
    """
    if IN_NOTEBOOK:
        options |= {"stderr": False, "force_jupyter": False, "width": NOTEBOOK_COLUMNS}
    elif options.pop("stderr", False):
        options["file"] = Stderr()
    return PlainConsole(highlight=False, markup=False, emoji=False, soft_wrap=True, **options)
