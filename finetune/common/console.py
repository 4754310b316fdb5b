"""What is printed as it is: lines aren't broken, [brackets] and :words: are no markup."""

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """`options`: of rich's Console."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, **options)
