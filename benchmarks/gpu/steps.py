"""The checks in order of value, and what each needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A process: `benchmarks.gpu.checks.FILE`, with arguments. `seconds`: that it takes on a fast card; with less left
    it isn't begun. `needs`: steps without which it can't run; `alone`: no other process may use the GPU beside it.
    """

    name: str
    file: str
    seconds: int
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("machine",)
    alone: bool = False

    @property
    def timed(self) -> tuple[int, str] | None:
        """Of a timed training: questions a picture, and the kind of the run."""
        if self.file != "training" or self.arguments[1] == "prepare":
            return None
        return int(self.arguments[0]), self.arguments[1]


def training(questions: int, kind: str, seconds: int) -> Step:
    prepared = f"k={questions} prepare"
    needs = ("weights",) if kind == "prepare" else (prepared,)
    shown = kind.replace("peer", "trl")
    return Step(f"k={questions} {shown}", "training", seconds, (str(questions), kind), needs)


STEPS = (
    Step("machine", "machine", 20, needs=()),
    Step("attention", "attention", 15),
    Step("rows", "rows", 10),
    Step("nf4", "nf4", 10),
    Step("float16", "float16", 10),
    Step("answers", "answers", 15),
    Step("merge", "merge", 30, alone=True),  # it fills the GPU
    Step("weights", "weights", 20),
    *(training(5, kind, seconds) for kind, seconds in (("prepare", 20), ("ours", 20), ("peer", 35))),
    *(training(1, kind, seconds) for kind, seconds in (("prepare", 20), ("ours", 30), ("peer", 30))),
    *(training(1, kind, 45) for kind in ("ours-compiled", "peer-compiled", "ours-liger", "peer-plain")),
    *(training(5, kind, 45) for kind in ("ours-compiled", "peer-compiled", "ours-liger", "peer-plain")),
    *(training(1, kind, 45) for kind in ("ours-checkpointed", "peer-checkpointed")),
)
