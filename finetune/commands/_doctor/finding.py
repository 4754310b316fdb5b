"""What a check finds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Condition:
    """One thing about this environment. `mend`: the command or change that mends it; "" where nothing is to be done."""

    subject: str
    level: Level
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """`mend`: for the case that the check itself fails."""

    subject: str
    run: Callable[[], Iterator[Condition]]
    mend: str

    def conditions(self) -> list[Condition]:
        """What it finds; a failure of the check is one more finding, an error."""
        found: list[Condition] = []
        try:
            found += self.run()
        except Exception as error:  # a broken library raises whatever it likes
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            found.append(Condition(self.subject, "error", f"{type(error).__name__}: {text[:300]}", self.mend))
        return found
