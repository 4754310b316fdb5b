"""Hostile pictures among good rows: `data check --fix` leaves out exactly these, and training stops with a message."""

import csv
import json
import resource

import hostile_files
import pytest
from cli import cli
from tiny import tiny_dataset, tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.full]
SECONDS = 2.0
MEBIBYTES = 500


def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def test_rows_with_hostile_pictures_are_left_out_and_no_others(tmp_path, tried):
    recipe = tiny_recipe(tmp_path)
    tiny_dataset(tmp_path / "data")
    folder = tmp_path / "data" / "hostile"
    folder.mkdir()
    names = hostile_files.write("image", folder)
    table = tmp_path / "data" / "train.csv"
    with table.open(newline="") as file:
        header, *good = csv.reader(file)
    between = [[f"hostile/{name}", "red"] for name in names]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *good[:5], *between, *good[5:]])
    seconds, memory = used()
    checked = cli("data", "check", recipe, "--workers", 0, "--out", "check", "--fix", "clean", cwd=tmp_path)
    assert used()[0] - seconds < SECONDS * len(names) and used()[1] - memory < MEBIBYTES
    assert checked.returncode == 0 and "Traceback" not in checked.stderr, checked.stderr
    quarantine = (tmp_path / "clean" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["columns"]["image"] for line in quarantine] == [row[0] for row in between]
    with next((tmp_path / "clean").glob("rows-0.csv")).open(newline="") as file:
        kept = [row["label"] for row in csv.DictReader(file)]
    assert kept == [row[1] for row in good]
    refused = cli("train", recipe, "--run", "run", cwd=tmp_path)
    assert refused.returncode == 2 and "train.csv:" in refused.stderr and "Traceback" not in refused.stderr
    assert len(refused.stderr) < 20_000
    tried(f"{len(names)} hostile pictures among {len(good)} good rows", "each named, exactly these left out by --fix")
