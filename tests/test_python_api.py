"""The Python API as its page shows it: each public function takes paths and objects, and returns what shows itself."""

import contextlib
import dataclasses
import inspect
import io
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from media_files import picture as picture_file
from tiny import tiny_dataset, tiny_llm_folder, tiny_picture, tiny_vision_folder

import finetune
from finetune.commands.init import Choices
from finetune.common.errors import ArtifactError, MediaError, RecipeError, TrainingError, options_as_flags
from finetune.common.progress import quiet_libraries

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
FUNCTIONS = {name: value for name in finetune.__all__ if inspect.isfunction(value := getattr(finetune, name))}
PUBLIC = {
    finetune.DescribeOptions,
    finetune.PairOptions,
    finetune.PredictOptions,
    finetune.Recipe,
    finetune.RunFolder,
    finetune.SplitPlan,
    Choices,
}
PLAIN = {
    "chat": "the answer's text",
    "schema": "a JSON schema",
    "serve": "nothing, when it ends",
}


def classes_in(annotation: object) -> set[type]:
    inner = {found for argument in typing.get_args(annotation) for found in classes_in(argument)}
    return inner | ({annotation} if inspect.isclass(annotation) else set())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict:
    """The names that the page defines, with its warnings and output."""
    folder = tmp_path_factory.mktemp("page")
    tiny_llm_folder(folder / "weights" / "llm")
    tiny_vision_folder(folder / "weights" / "encoder")
    tiny_dataset(folder / "data")
    program = "\n".join(
        re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
    names: dict = {"folder": folder}
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(record=True) as warned,
    ):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        warnings.simplefilter("default")  # in place of pytest's own filters
        torch.manual_seed(0)
        exec(compile(program, str(PAGE), "exec"), names)
    return names | {"warned": [f"{one.filename}: {one.message}" for one in warned], "printed": printed.getvalue()}


@pytest.fixture
def here(page, monkeypatch) -> Path:
    """Its folder, as the working directory."""
    monkeypatch.chdir(page["folder"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(page["folder"] / "cache"))
    return page["folder"]


def test_the_page_runs_and_its_objects_say_what_they_are(here, page):
    assert page["recipe"].train.stages[0].epochs == 2 and page["recipe"].train.tokens_per_batch == 256
    assert page["recipe"] == finetune.load_recipe(page["folder"] / "shelf.yaml")
    assert "runs/shelf: there is a run here already: resume=True goes on with it" in page["printed"]
    assert "95% CI" in page["printed"] and "n = 8" in page["printed"]
    assert repr(page["run"]).startswith("RunFolder('runs/shelf'): recipe, adapter, metrics")
    assert "classify: accuracy 0." in repr(page["result"]) and "95% CI" in repr(page["result"])
    assert "media: image; tasks: classify" in repr(page["assistant"])
    assert page["warned"] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_documented_and_its_types_are_public(name):
    function = FUNCTIONS[name]
    hints = typing.get_type_hints(function)
    assert function.__doc__ and hints.keys() == {*inspect.signature(function).parameters, "return"}
    result = hints.pop("return")
    ours = {one for hint in hints.values() for one in classes_in(hint) if one.__module__.startswith("finetune.")}
    assert ours <= PUBLIC
    if name not in PLAIN:
        assert callable(result._repr_html_) and result.__doc__


def test_recipes_are_given_as_a_path_or_an_object(here, page):
    as_object, as_text = finetune.check(page["recipe"]), finetune.check("shelf.yaml")
    assert as_object == dataclasses.replace(finetune.check(Path("shelf.yaml")), recipe=page["recipe"])
    assert as_text.splits["train"].rows == 12
    for recipe in (page["recipe"], "shelf.yaml"):
        found = finetune.data_check(recipe, out="checked", workers=0)
        assert found.errors == 0 and "<table>" in found._repr_html_()
        assert len(finetune.data_preview(recipe, rows=2)) == 2
        labels = finetune.data_label(recipe, out="labels.csv")
        assert labels.rows == 20 and "20 rows" in labels._repr_html_()
        with pytest.raises(RecipeError, match=r"^(shelf|shelf\.yaml): trials are compared on validation rows"):
            finetune.sweep(recipe, ["seed=1,2"])
    with pytest.raises(RecipeError, match=r"recipe: a int; give the path of a YAML file, or a finetune.Recipe"):
        finetune.train(3)


def test_runs_are_given_as_a_path_or_an_object(here, page):
    finetune.merge(page["run"])
    for run in (page["run"], "runs/shelf", Path("runs/shelf")):
        assert repr(finetune.load(run)) == repr(page["assistant"])
        report = finetune.report(run)
        assert report.path == Path("runs/shelf/report.html") and "<iframe srcdoc=" in report._repr_html_()
        with pytest.raises(ArtifactError, match="exists already"):
            finetune.export_run(run, "transformers", here / "data")
        assert finetune.push(run, "shelf", merged=True, dry_run=True).folder.is_dir()
    with pytest.raises(ArtifactError, match=r"run: a int; give a run folder's path, or a finetune.RunFolder"):
        finetune.evaluate(3)


def test_results_show_tables_plots_and_paths(here, page):
    scores = page["result"]._repr_html_()
    tuned = page["result"].scores["classify"]["accuracy"]["tuned"]
    assert f"<td>{tuned:.3f} (" in scores and "classify, n = 8" in scores and "runs/shelf/predictions.jsonl" in scores
    assert "data:image/png;base64," in scores and "data:image/png;base64," in page["run"]._repr_html_()
    certificate = finetune.merge(page["run"])
    assert "next tokens as trained" in repr(certificate) and "<table>" in certificate._repr_html_()
    shown = page["assistant"]._repr_html_()
    assert "media: image" in shown and ">vision<" in shown and ">task classify<" in shown
    assert "nothing yet" in repr(page["pushed"]) and "licences:" in page["pushed"]._repr_html_()
    assert "quickstart" in repr(finetune.recipes()) and "<table>" in finetune.recipes()._repr_html_()
    with pytest.raises(dataclasses.FrozenInstanceError):
        page["result"].metrics = None


def test_warnings_of_the_user_s_code_are_not_silenced():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        quiet_libraries()
        warnings.warn_explicit("ours", FutureWarning, "peft.py", 1, module="peft.tuners.lora")
        warnings.warn_explicit("theirs", FutureWarning, "notebook.py", 1, module="peftless")
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(one.message) for one in warned] == ["theirs", "mine"]


def test_a_kernel_that_is_not_used_is_not_advertised():
    """bitsandbytes asks for `kernels` as it is imported, which any module of the package may do first."""
    code = "import logging, finetune; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('pip install kernels')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_changed_recipe_is_checked_like_the_command_line_s(here, page):
    recipe = page["recipe"]
    for change in ("train.tokens_per_batch=2", "train.tokens_per_bach=512", "train.stages.0.trains=[heads]", "seed"):
        with pytest.raises(RecipeError) as in_python:
            recipe.with_(change)
        with options_as_flags(), pytest.raises(RecipeError) as by_flag:
            finetune.load_recipe("shelf.yaml", [change])
        assert "--set" in str(by_flag.value) and "--set" not in str(in_python.value)
        assert str(by_flag.value).replace("--set ", "") == str(in_python.value)
    with pytest.raises(RecipeError, match=r"train\.tokens_per_batch: got '512'; write an integer of at least 16"):
        recipe.with_(**{"train.tokens_per_batch": "512"})
    with pytest.raises(RecipeError, match=r"^Recipe: model: write llm, with encoders and projectors, or base"):
        finetune.Recipe(**{**dict(recipe), "model": {}})
    assert recipe.with_(seed=3).seed == 3 and recipe.seed == 0
    assert finetune.Recipe(**dict(recipe)) == recipe and finetune.Recipe.read(recipe.save("again.yaml")) == recipe
    assert "tokens_per_batch: 256" in repr(recipe) and "tokens_per_batch: 256" in recipe._repr_html_()


def test_errors_name_the_parameter_in_python_and_the_flag_on_the_command_line(here, page):
    with pytest.raises(TrainingError, match="overwrite=True removes it"):
        finetune.train("shelf.yaml")
    with options_as_flags(), pytest.raises(TrainingError, match="--overwrite removes it"):
        finetune.train("shelf.yaml")


def test_pictures_of_all_forms_give_the_answer_of_their_file(here, page):
    path = Path("data/images/test1.png")
    image = PIL.Image.open(path)
    forms = [path, str(path), path.read_bytes(), image, image.convert("RGBA"), np.asarray(image)]
    assistant = page["assistant"]

    def features(form: object) -> torch.Tensor:
        seen = []
        original = assistant.model.generate
        assistant.model.generate = lambda ids, mask, features, **options: (
            seen.append(features["image"]) or original(ids, mask, features, **options)
        )
        try:
            assistant.answer("Which shelf?", image=form, max_new_tokens=1)
        finally:
            del assistant.model.generate
        return torch.stack(list(seen[0]))

    expected = features(path)
    for form in forms:
        torch.testing.assert_close(features(form), expected)
    torch.testing.assert_close(features([image, path]), torch.cat([expected, expected]))
    probabilities = assistant.answer("Which shelf?", image=image, task="classify", max_new_tokens=1)
    assert probabilities == assistant.answer("Which shelf?", image=path, max_new_tokens=1)
    assert finetune.chat(page["run"], "Which shelf?", np.asarray(image), max_new_tokens=1) == probabilities


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (np.zeros((4, 4), np.uint8), r"image 1: an array \(4, 4\) of uint8; give a path"),
        (np.zeros((4, 4, 3)), r"image 1: an array \(4, 4, 3\) of float64"),
        ({"path": "x.png"}, "image 1: a dict; give"),
        (tiny_picture(size=(9_000, 9_000)), "9000x9000 pixels; at most 64,000,000 are decoded"),
        (picture_file()[:60], "image"),
        (b"", "image.*empty, 0 bytes"),
    ],
)
def test_what_is_no_picture_or_is_out_of_bounds_is_refused(form, words, page):
    with pytest.raises(MediaError, match=words):
        page["assistant"].answer("Which shelf?", image=form)
