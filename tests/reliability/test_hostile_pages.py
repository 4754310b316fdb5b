"""Pages about hostile data in Chromium: labels, file names, questions and answers that would be scripts if they were
taken for markup. No script runs, nothing is fetched, and what they hold is there as text.
"""

import csv
import json
import shutil
from types import SimpleNamespace

import pytest
from browser import browser, chromium
from cli import cli
from fake_engine import FakeEngine, served
from hostile_run import EVIL, EVIL_NAME, HURT, spoil_run
from tiny import tiny_picture, tiny_recipe
from trained_runs import copy_of

from finetune.commands.data_label import Item, Labelling, Line, build_page, media_html
from finetune.common import display
from finetune.data.sample import Answer, Medium
from finetune.evaluation.report.report import report
from finetune.recipe.schema import Limits
from finetune.serving.engine.contract import ModelInfo, TaskInfo

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="no browser: apt-get install chromium")]
MARKUP = """
(() => {
  document.querySelectorAll("details").forEach((one) => (one.open = true));
  const all = [...document.querySelectorAll("*")];
  return all
    .filter((one) => [...one.attributes].some((its) => /^on/i.test(its.name) || /^javascript:/i.test(its.value.trim())))
    .map((one) => one.outerHTML.slice(0, 200));
})()
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


def harmless(window, address, least):
    """Open a page: it holds EVIL as text at least so many times, and nothing of it is markup."""
    window.open(address)
    window.run("new Promise((done) => setTimeout(done, 100))")  # for pictures that can't be loaded
    assert window.run(MARKUP) == [] and not window.run("window.hurt")
    assert not window.errors()
    assert window.run(f"document.body.textContent.split({json.dumps(HURT)}).length") > least
    assert all(one.startswith((address, "data:", "blob:")) for one in window.requests()), window.requests()


def write_rows(folder):
    tiny_picture().save(folder / "images" / EVIL_NAME)
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"images/{EVIL_NAME}", EVIL])
            writer.writerow([f"images/{EVIL_NAME} is missing", EVIL])
            writer.writerow([f"images/{EVIL_NAME}", f"{EVIL} <|im_end|>"])


def test_pages_about_rows(window, tmp_path, tried):
    recipe = tiny_recipe(tmp_path)
    write_rows(tmp_path / "data")
    source = tmp_path / f"{EVIL_NAME[:-4]}.csv"
    shutil.copy(tmp_path / "data" / "train.csv", source)
    recipe = tiny_recipe(
        tmp_path,
        data=[{"path": str(source), "media_folder": str(tmp_path / "data"), "task": "classify", "hold_out": 0.3}],
    )
    done = cli("data", "check", recipe, "--out", tmp_path / "check", cwd=tmp_path)
    assert done.returncode == 2 and "check.html" in done.stdout, done.stderr  # for the missing picture
    harmless(window, (tmp_path / "check" / "check.html").as_uri(), 5)
    done = cli("data", "preview", recipe, "--rows", 20, "--html", tmp_path / "preview.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    harmless(window, (tmp_path / "preview.html").as_uri(), 5)
    item = SimpleNamespace(
        media=[Medium("image", tmp_path / "data" / "images" / EVIL_NAME), Medium("image", tmp_path / EVIL_NAME)]
    )
    shown = [display.table((EVIL,), [(EVIL,)]), display.line(EVIL), display.heading(EVIL), display.preformatted(EVIL)]
    page = tmp_path / "notebook.html"
    page.write_text("".join([media_html(item, Limits()), *shown, display.page(f"<p>{display.line(EVIL)}</p>")]))
    harmless(window, page.as_uri(), 5)
    tried("pages of `data check`, `data preview`, `data label` and notebooks about hostile rows", "no script runs")


def test_the_report(window, finished_run, tmp_path, tried):
    run = copy_of(finished_run("media"), tmp_path)
    spoil_run(run, tmp_path)
    harmless(window, report(run).path.as_uri(), 10)
    tried("the report of a run with hostile labels, names and answers", "no script runs")


@pytest.mark.parametrize("labels", [[EVIL, "b"], [f"{EVIL}{number}" for number in range(30)]], ids=["buttons", "list"])
def test_the_labelling_page(window, labels, tmp_path, tried):
    gradio = pytest.importorskip("gradio", reason="gradio isn't installed: pip install 'finetune-kit[label]'")
    picture = tmp_path / EVIL_NAME
    tiny_picture().save(picture, "PNG")
    media = (Medium("image", picture), Medium("image", tmp_path / f"{EVIL_NAME} is missing"))
    items = [Item(media, (), Line(EVIL, EVIL, EVIL, EVIL, "0.5", label)) for label in ("", labels[0])]
    page = build_page(gradio, Labelling(tmp_path / f"{EVIL_NAME}.csv", items, labels))
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    try:
        harmless(window, address, 0)
        window.wait("document.body.innerText.includes('1 of 2 labelled')")
        for place in (0, 1):
            window.run("[...document.querySelectorAll('textarea')].at(-1).select()")
            window.type(EVIL)
            window.enter()
            window.wait(f"document.body.innerText.includes('{1 + place} of 2 labelled')")
        assert window.run(MARKUP) == [] and not window.run("window.hurt") and not window.errors()
        assert all(one.startswith((address, "data:", "blob:")) for one in window.requests()), window.requests()
        assert window.run(f"document.body.textContent.split({json.dumps(EVIL)}).length") > 2
    finally:
        page.close()
    tried("the labelling page with hostile rows, names and labels", "no script runs")


MODELS = {EVIL: ModelInfo(("image",), {EVIL: TaskInfo("label", (EVIL, "b"), EVIL)}, 512)}


class Hostile(FakeEngine):
    models = MODELS

    async def ask(self, *_):
        return Answer(EVIL, {EVIL: 0.75, "b": 0.25})


def test_the_chat_page(window, tmp_path, tried):
    picture = tmp_path / EVIL_NAME
    tiny_picture().save(picture)
    (tmp_path / "media").mkdir()
    with served(Hostile(), tmp_path / "media") as (address, _):
        harmless(window, address, 0)
        window.wait("models.length")
        for task in (False, True):
            if task:
                window.run("at('task').selectedIndex = at('task').options.length - 1")
            window.choose("input[type=file]", picture)
            window.wait("chosen.length")
            window.run("at('question').focus()")
            window.type(EVIL)
            window.enter()
            window.wait(f"turns.length === {2 + 2 * task} && !asking")
        assert window.run(MARKUP) == [] and not window.run("window.hurt") and not window.errors()
        assert window.run(f"at('log').textContent.split({json.dumps(EVIL)}).length") > 4
    tried("the chat page with hostile names of models, tasks, labels and files, and answers", "no script runs")
