"""The checks in order of value, and what each needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """`benchmarks.gpu.checks.FILE`, with arguments. `seconds`: that it takes on a fast card; with less left it isn't
    begun. `needs`: steps without which it can't run; `process`: steps of this name that follow each other share a
    process, as they load the same weights; `alone`: no other process may use the GPU beside it.
    """

    name: str
    file: str
    seconds: int
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("machine",)
    process: str = ""
    alone: bool = False

    def shares_process(self, other: "Step") -> bool:
        return self == other or (self.process == other.process != "")

    @property
    def timed(self) -> tuple[int, str] | None:
        """Of a timed training: questions a picture, and the kind of the run."""
        if self.file != "training" or self.arguments[1] == "prepare":
            return None
        return int(self.arguments[0]), self.arguments[1]


def trainings(process: str, *runs: tuple[int, str, int]) -> tuple[Step, ...]:
    """One after the other in a process: questions a picture, kind and seconds of each."""
    return tuple(
        Step(
            f"k={questions} {kind.replace('peer', 'trl')}",
            "training",
            seconds,
            (str(questions), kind),
            ("weights" if kind == "prepare" else f"k={questions} prepare",),
            process,
        )
        for questions, kind, seconds in runs
    )


# Estimates for an H200, none measured: a process loads the LLM in 12 s; 8,192 tokens take 0.6 s (2.2e14 operations, at
# 4e14 a second), so that the trainings of `checks.training.PICTURES` take 6 and 5 s by ours, 6 and 18 by trl; what
# isn't a step takes 4 s, compiling 20. Compiled layers can be made plain again; Liger's kernels and trl's checkpoints
# stay, and so come last in their process.
STEPS = (
    Step("machine", "machine", 15, needs=()),
    Step("attention", "attention", 10),
    Step("rows", "rows", 12),
    Step("nf4", "nf4", 10),
    Step("float16", "float16", 12),
    Step("answers", "answers", 15),
    Step("merge", "merge", 25, alone=True),  # it fills the GPU
    Step("weights", "weights", 15, process="prepare"),
    *trainings("prepare", (5, "prepare", 18), (1, "prepare", 6)),
    *trainings("ours", (5, "ours", 21), (1, "ours", 10)),
    *trainings("trl", (5, "peer", 34), (1, "peer", 10)),
    *trainings(
        "ours, variants",
        (5, "ours-compiled", 41),
        (1, "ours-compiled", 10),
        (1, "ours-checkpointed", 12),
        (5, "ours-liger", 9),
        (1, "ours-liger", 12),
    ),
    *trainings(
        "trl, variants",
        (5, "peer-plain", 34),
        (1, "peer-plain", 10),
        (5, "peer-compiled", 42),
        (1, "peer-compiled", 10),
        (1, "peer-checkpointed", 12),
    ),
)
