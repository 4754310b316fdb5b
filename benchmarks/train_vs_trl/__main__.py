"""The command line. This process imports no torch: each run has a process of its own."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_vs_trl import __doc__ as about
from benchmarks.train_vs_trl.options import Options
from benchmarks.train_vs_trl.workload import ROOT, names, workload

OURS = ("ours", "ours-checkpointed", "ours-compiled", "ours-liger")
RUNS = (*OURS, "peer", "peer-compact", "peer-turns", "peer-steps", "peer-checkpointed", "peer-compiled", "peer-plain")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_vs_trl",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workload", choices=names())
    parser.add_argument("--questions", type=int, default=5, choices=range(1, 11), help="a picture (default: 5)")
    parser.add_argument("--pictures", type=int, help="default: the workload's")
    parser.add_argument("--pixels", type=int, help="side of the pictures (default: the workload's, or 128)")
    parser.add_argument("--epochs", type=int, help="default: the workload's")
    parser.add_argument("--tokens-per-batch", type=int, help="of our rows (default: the workload's)")
    parser.add_argument(
        "--peer-tokens",
        type=int,
        help="that trl computes at once (default: those of our rows; on a cpu all of a step)",
    )
    parser.add_argument("--parts", choices=("quickstart", "toy", "large"), default="quickstart", help="weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--workers", type=int, help="of the peer's data loader (default: 0 on a cpu, 2 on cuda)")
    parser.add_argument("--quantize", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="in which runs alternate (default: 3)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="of each round (default: ours, peer, and variants)")
    parser.add_argument("--once", nargs="*", choices=RUNS, help="runs of the first round alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parsed = parser.parse_args(arguments)
    chosen, on_cpu = workload(parsed.workload), parsed.device == "cpu"
    for name in ("pictures", "epochs", "tokens_per_batch", "pixels"):
        setattr(parsed, name, getattr(parsed, name) or getattr(chosen, name))
    if parsed.peer_tokens is None and not on_cpu:
        parsed.peer_tokens = parsed.tokens_per_batch
    if parsed.workers is None:
        parsed.workers = 0 if on_cpu else 2
    if parsed.runs is None:
        parsed.runs = ["ours", "peer", *(["peer-compact"] if on_cpu and chosen.variants else []), *chosen.runs]
    if parsed.once is None:
        parsed.once = [*([] if chosen.reward else ["peer-steps"]), "peer-checkpointed"]
    return parsed


def main() -> None:
    if sys.argv[1] == "--process":
        in_this_process(*sys.argv[2:])
        return
    parsed = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="train_vs_trl_") as name:
        options = Options(
            folder=Path(name),
            **{key: value for key, value in vars(parsed).items() if key in Options.__dataclass_fields__},
        )
        options.save()
        facts = in_a_process(options, "prepare")
        runs = []
        for number in range(parsed.rounds):
            for kind in [*parsed.runs, *(parsed.once if not number else [])]:
                print(f"round {number + 1} of {parsed.rounds}: {kind}", file=sys.stderr, flush=True)
                runs.append({"kind": kind, "round": number, **in_a_process(options, kind)})
    from benchmarks.train_vs_trl.report import compared, machine, show, summary

    comparison = compared(runs)
    show(options, facts, runs, comparison)
    if parsed.json:
        found: dict[str, Any] = {"options": vars(parsed), "machine": machine(options, facts), "facts": facts}
        found |= {**summary(comparison), "by_peer": comparison, "runs": runs}
        parsed.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def in_a_process(options: Options, process: str) -> dict[str, Any]:
    """What a fresh process finds. Its messages are shown where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "benchmarks.train_vs_trl", "--process", process, str(options.folder)]
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    if options.device == "cpu":
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\n{process} failed with exit status {done.returncode}")
    found: dict[str, Any] = json.loads((options.folder / f"{process}.json").read_text(encoding="utf-8"))
    return found


def in_this_process(process: str, folder: str) -> None:
    options = Options.load(Path(folder))
    if process == "prepare":
        from benchmarks.train_vs_trl.prepare import write_all

        found = write_all(options)
    else:
        from benchmarks.train_vs_trl import ours, peer
        from benchmarks.train_vs_trl.measure import matmul_peak

        found = (ours if process.startswith("ours") else peer).train(options, process)
        found["matmul_peak"] = matmul_peak()
    (options.folder / f"{process}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
