"""What is printed as it is: lines aren't broken, [brackets] and :words: are no markup."""

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


def plain_console(**options: Any) -> Console:
    """`options`: of rich's Console. In a notebook lines go to stdout as text, which wraps: rich's own HTML cuts them at
    the right, and stderr looks like an error.
    """
    if IN_NOTEBOOK:
        options |= {"stderr": False, "force_jupyter": False, "width": NOTEBOOK_COLUMNS}
    return PlainConsole(highlight=False, markup=False, emoji=False, soft_wrap=True, **options)
