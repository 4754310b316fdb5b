"""What a check finds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Diagnostic:
    """One thing about this environment. `fix`: the command or change that fixes it; "" where nothing is to be done."""

    subject: str
    level: Level
    seen: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """`fix`: for the case that the check itself fails."""

    subject: str
    run: Callable[[], Iterator[Diagnostic]]
    fix: str

    def diagnostics(self) -> list[Diagnostic]:
        """What it finds; a failure of the check is one more finding, an error."""
        found: list[Diagnostic] = []
        try:
            found += self.run()
        except Exception as error:  # a broken library raises whatever it likes
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            found.append(Diagnostic(self.subject, "error", f"{type(error).__name__}: {text[:300]}", self.fix))
        return found
