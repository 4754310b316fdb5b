"""The command line. This process imports no torch: each check has a process of its own."""

import argparse
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.gpu import __doc__ as about
from benchmarks.gpu.checks import Skipped
from benchmarks.gpu.report import append, report
from benchmarks.gpu.run import Outcome, run_all, write_outcome
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS, Step


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="everything as small as in tests")
    parser.add_argument("--seconds", type=float, default=480, help="in all (default: 480)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks whose names begin so, with what they need")
    parser.add_argument("--append", action="store_true", help="append the table to benchmarks/RESULTS.md")
    return parser.parse_args(arguments)


def chosen(names: list[str] | None) -> list[Step]:
    """Steps whose names begin with one of these, and what they need. Raises SystemExit for a name that none has."""
    if names is None:
        return list(STEPS)
    unknown = [name for name in names if not any(step.name.startswith(name) for step in STEPS)]
    if unknown:
        raise SystemExit(f"no check is called {unknown[0]!r}; there are: {', '.join(step.name for step in STEPS)}")
    wanted = {step.name for step in STEPS if step.name.startswith(tuple(names))}
    for step in reversed(STEPS):
        wanted |= set(step.needs) if step.name in wanted else set()
    return [step for step in STEPS if step.name in wanted]


def main() -> int:
    if sys.argv[1:2] == ["--process"]:
        return in_this_process(sys.argv[2], Path(sys.argv[3]))
    parsed = parse(sys.argv[1:])
    steps = chosen(parsed.only)
    with tempfile.TemporaryDirectory(prefix="gpu_checks_") as name:
        setting = Setting(Path(name), parsed.device, parsed.toy)
        setting.save()
        outcomes = []
        for outcome in run_all(setting, steps, parsed.seconds):
            print(outcome.line(), flush=True)
            outcomes.append(outcome)
        text = report(setting, outcomes)
    print(f"\n{text}")
    if parsed.append:
        append(text)
    return int(any(outcome.result == "fail" for outcome in outcomes))


def in_this_process(name: str, folder: Path) -> int:
    """Import what a step needs; then do each step whose name is a line of stdin, and leave its outcome in `folder`."""
    steps, setting = {step.name: step for step in STEPS}, Setting.load(folder)
    module_of(steps[name])
    for line in sys.stdin:
        step = steps[line.strip()]
        write_outcome(folder, perform(step, setting, module_of(step)))
    return 0


def module_of(step: Step) -> ModuleType | Exception:
    """The check's, or why it can't be imported."""
    try:
        return import_module(f"benchmarks.gpu.checks.{step.file}")
    except Exception as error:  # reported when its turn comes
        traceback.print_exc()
        return error


def perform(step: Step, setting: Setting, module: ModuleType | Exception) -> Outcome:
    """`module`: see `module_of`."""
    try:
        if isinstance(module, Exception):
            raise module
        return Outcome(step.name, "pass", module.check(setting, *step.arguments))
    except Skipped as reason:
        return Outcome(step.name, "skip", str(reason))
    except Exception as error:
        traceback.print_exc()
        return Outcome(step.name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")


if __name__ == "__main__":
    sys.exit(main())
