"""Sources that `data check` once ran on for ever, or broke on."""

import json
import time

import pytest
from cli import cli
from tiny import tiny_recipe

pytestmark = pytest.mark.slow


def with_source(folder, **source):
    recipe = tiny_recipe(folder)
    content = json.loads(recipe.read_text())
    content["data"] = [{"task": "classify", "hold_out": 0.2, **source}]
    recipe.write_text(json.dumps(content))
    return recipe


def test_a_jsonl_that_is_called_a_table_ends(tmp_path, tried):
    row = json.dumps({"image": "data/images/train0.png", "label": "red"})
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 50))
    recipe = with_source(tmp_path, path=str(tmp_path / "rows.jsonl"), format="table", media_folder=str(tmp_path))
    checked = cli("data", "check", recipe, "--workers", 0, "--out", tmp_path / "out", cwd=tmp_path)
    assert checked.returncode == 2
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) < 10**6
    tried("`data check` of a .jsonl with format table", "ends with errors")


@pytest.mark.full
@pytest.mark.parametrize("of", ["words", "one word"])
def test_a_cell_of_a_million_characters_adds_little(of, tmp_path, tried):
    text, seconds = {"words": "ab " * 333_333, "one word": "a" * 999_999}[of], []
    recipe = with_source(tmp_path, path="rows.jsonl", media_folder=str(tmp_path))
    content = json.loads(recipe.read_text())
    content["data"][0] |= {"path": str(tmp_path / "rows.jsonl"), "task": "answer"}
    recipe.write_text(json.dumps(content))
    for question in ("what?", "what?", text):  # the first one imports
        row = {"image": "data/images/train0.png", "question": "what?", "answer": "a square"}
        rows = [row, row | {"question": question}, row | {"question": "which?"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
        begin = time.process_time()
        checked = cli("data", "check", recipe, "--workers", 0, "--out", tmp_path / "out", cwd=tmp_path)
        seconds.append(time.process_time() - begin)
        assert "Traceback" not in checked.stderr
    assert "rows.jsonl:2: " in checked.stdout and "tokens" in checked.stdout
    more = max(seconds[2] - seconds[1], 0)
    assert more < 10
    tried(f"`data check` of a cell of a million characters, {of}", f"{more:.1f} CPU s more")


def test_a_link_to_itself_is_no_such_file(tmp_path, tried):
    (tmp_path / "self").symlink_to("self")
    recipe = with_source(tmp_path, path=str(tmp_path / "self"))
    for command in (("data", "check"), ("check",), ("train",)):
        checked = cli(*command, recipe, cwd=tmp_path)
        assert checked.returncode == 2 and "no such file or folder" in checked.stderr
    tried("a source that is a link to itself", "no such file")


def test_a_recipe_of_too_many_sources_is_refused_at_once(tmp_path):
    recipe = with_source(tmp_path, path="rows.csv")
    content = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(content | {"data": content["data"] * 100_000}))
    refused = cli("data", "check", recipe, cwd=tmp_path)
    assert refused.returncode == 2 and "larger than 1 MiB" in refused.stderr
