"""Losses, scores and certificates of three tiny runs are, number by number, those of golden.json.

Where a change is meant to change them, write the file anew and say why in the commit:

    python tests/training/test_golden.py
"""

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
KINDS = ("plain", "heads", "media")  # of helpers/trained_runs.py; all compute in float32


def figures_of(run: Path) -> dict:
    metrics, certificate = (
        json.loads((run / name).read_text(encoding="utf-8")) for name in ("metrics.json", "certificate.json")
    )
    stages = metrics["train"]["stages"]
    measured = {"base": certificate["base"], "saved": certificate["saved"], **certificate["candidates"]}
    measures = ("kl", "agreement", "kl_from_base")
    return {
        "losses": {name: stage["losses"] for name, stage in stages.items()},
        "validation": {name: [one["scores"] for one in stage.get("validation", [])] for name, stage in stages.items()},
        "scores": metrics["scores"],
        "certificate": {name: {key: values[key] for key in measures} for name, values in measured.items()},
    }


def flat(value: object, path: str = "") -> dict[str, object]:
    """{'losses.tune.0': 3.2, ...}"""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: number for key, inside in items for name, number in flat(inside, f"{path}.{key}").items()}
    return {path.strip("."): value}


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_figures_are_what_they_were(kind, finished_run):
    expected, found = flat(json.loads(GOLDEN.read_text())[kind]), flat(figures_of(finished_run(kind)))
    assert found.keys() == expected.keys()
    # Losses have six decimals, scores four; a divergence of nearly nothing is nothing but rounding.
    tolerances = {"losses": 2e-6, "validation": 1.1e-4, "scores": 1.1e-4, "certificate": 1e-6}
    for name, value in expected.items():
        tolerance = tolerances[name.partition(".")[0]]
        close = None if value is None else pytest.approx(value, rel=1e-4, abs=tolerance)
        assert found[name] == close, name


if __name__ == "__main__":
    import tempfile

    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    from trained_runs import make_run

    torch.set_num_threads(1)
    figures = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            figures[kind] = figures_of(make_run(kind, Path(folder)))
    GOLDEN.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
