from dataclasses import dataclass
from typing import Any
@dataclass(frozen=True)
class Clip:
    frames: tuple[Any, ...]
    seconds: tuple[float, ...]
