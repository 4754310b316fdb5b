"""A resumed run is the uninterrupted one: from every step on, all that a checkpoint holds (adapter, projectors, heads,
optimizer, scheduler, random states, log) is equal to the bit, and each step learns from the same batches.
"""

import shutil
from itertools import product

import pytest
from resumed import PROJECTS, Cell, begun_steps, differs, trained

pytestmark = pytest.mark.slow
CELLS = [Cell(*one) for one in product((0, 2), (True, False), (1, 2))]
ALL_CELLS = ("two_media", "mixed_tasks")
SHARE = {("two_media", Cell()), ("mixed_tasks", Cell(2, False)), ("distilled", Cell(processes=2))}


def cases():
    for name in PROJECTS:
        for cell in CELLS if name in ALL_CELLS else (Cell(), Cell(2, False), Cell(processes=2)):
            marks = [] if (name, cell) in SHARE else [pytest.mark.full]
            yield pytest.param(name, cell, marks=marks, id=f"{name}, {cell}")


@pytest.mark.parametrize(("name", "cell"), cases())
def test_from_every_step_a_run_goes_on_as_if_nothing_had_been(name, cell, tmp_path, full, tried):
    recipe = PROJECTS[name](tmp_path, epochs=3 * cell.processes if full else 1)
    kept = tmp_path / "kept"
    trained(recipe, tmp_path / "run", cell, kept, whole=True)
    steps = begun_steps(kept)
    assert len(steps) >= (12 if full else 3) and {step.partition("-")[0] for step in steps} == {"align", "tune"}
    rows = [(kept / f"rows-{rank}").read_text().splitlines() for rank in range(cell.processes)]
    # What a kill after the last step of a stage leaves is taken up at the change to the next.
    places = (1, 2, 3, 4) if full else (2,)
    few = [steps[place * (len(steps) - 1) // 4] for place in places]
    chosen = steps if full and cell.processes == 1 else few
    for step in chosen:
        run, again = tmp_path / f"after-{step}", tmp_path / f"kept-{step}"
        shutil.copytree(kept / step, run)
        trained(recipe, run, cell, again)
        rest = steps[steps.index(step) + 1 :]
        assert begun_steps(again) == rest, step
        for later in rest:
            stage, number = later.split("-")
            whole = kept / later / "checkpoints" / stage / f"checkpoint-{number}"
            assert differs(whole, again / later) is None, (step, later, differs(whole, again / later))
        for rank, lines in enumerate(rows):
            path = again / f"rows-{rank}"
            own = path.read_text().splitlines() if path.is_file() else []
            assert own == lines[len(lines) - len(own) :] and bool(own) == bool(rest), step
        assert differs(tmp_path / "run" / "adapter", run / "adapter") is None, step
        shutil.rmtree(run)
        shutil.rmtree(again)
    tried(f"{name}, {cell}: resumed from each of {len(chosen)} steps", "every later state and batch equal to the bit")
