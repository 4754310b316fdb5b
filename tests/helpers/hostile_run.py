"""A run whose every name, label and answer would be a script if a page took it for markup."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import yaml
from trained_runs import change_json, write_predictions

HURT = "window.hurt=1"
EVIL = (
    f"</title></style></textarea></script><script>{HURT}</script>\"'><img src=x onerror={HURT}><svg onload={HURT}>"
    f"<a href=javascript:{HURT}>{{{{ 7*7 }}}}${{x}}$"
)
EVIL_NAME = f"<svg onload={HURT}><img src=x onerror={HURT}>\"' onfocus={HURT} autofocus='.png"


def stage_of(run: Path, steps: int = 8) -> dict[str, Any]:
    """A stage of training as metrics.json has it, of so many steps."""
    stage = json.loads((run / "metrics.json").read_text())["train"]["stages"]["both"]
    curves = {key: (stage[key] * steps)[:steps] for key in ("losses", "token_accuracy")}
    return stage | curves | {"steps": steps}


def spoil_run(run: Path, folder: Path) -> Path:
    """Write it all into the run; its picture, of EVIL_NAME, in `folder`."""
    media = folder / EVIL_NAME
    PIL.Image.new("RGB", (30, 20), (200, 30, 30)).save(media, "PNG")
    rows = [
        {"task": EVIL, "row": EVIL, "media": [str(media)], "kinds": ["image"], "question": EVIL, "target": EVIL,
         "tuned": {"label": EVIL, "probabilities": {EVIL: 0.9, "b": 0.1}}, "base": EVIL, "blank": [EVIL],
         "shuffled": {"x": EVIL}, "good": 1.0},
    ]  # fmt: skip
    write_predictions(run, rows)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    task = recipe["data"][0]["task"] | {"prompt": EVIL}
    recipe["data"] = [recipe["data"][0] | {"path": f"/a/{EVIL}", "task": task, "group": EVIL}]
    recipe["train"]["stages"][0]["trains"] = [EVIL]
    recipe["model"]["encoders"]["image"]["name"] = EVIL
    recipe["model"]["llm"] |= {"name": EVIL, "revision": EVIL}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    stage = stage_of(run) | {"trained_weights": {EVIL: 3}}
    change_json(
        run / "metrics.json",
        scores={EVIL: {EVIL: {"tuned": 0.5, EVIL: 0.4}}},
        intervals={EVIL: {EVIL: {"tuned": [0.4, 0.6]}}},
        comparisons={EVIL: {EVIL: {EVIL: {"difference": 0.1}}}},
        tables={EVIL: {"confusion": {"labels": [EVIL], "counts": [[1, 2]]}, "per_label": {EVIL: {EVIL: 1.0}}}},
        train={"stages": {EVIL: stage | {"validation": [{"step": 4, "scores": {EVIL: {EVIL: 1.0}}}]}}},
        seconds={EVIL: 1.0},
    )
    (run / "data" / "check.json").write_text(
        json.dumps({"list": [{"severity": "error", "file": EVIL, "line": 3, "text": EVIL}]})
    )
    (run / "versions.json").write_text(json.dumps({EVIL: EVIL}))
    (run / "data" / "summary.json").write_text(
        json.dumps({EVIL: {"rows": 1, "media": 1, "different_answers": 1, "answers": {EVIL: 1}}})
    )
    return media
