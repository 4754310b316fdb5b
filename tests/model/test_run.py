"""New weights of a run are those of its seed."""

import pytest
import torch
from tiny import part, tiny_recipe

import finetune
from finetune.common.run_folder import RunFolder
from finetune.model.bindings import TaskBinding
from finetune.model.heads import HeadSettings
from finetune.model.run import Run

BINDING = TaskBinding(
    task=part("tasks", "classify"), head=part("heads", "label"), settings=HeadSettings(labels=("a", "b"))
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights(seed, with_encoders): the new weights of a run with everything that can train."""
    folder = tmp_path_factory.mktemp("project")
    path = tiny_recipe(
        folder,
        tune_encoders={"image": {"rank": 2}},
        train__cache=False,
        train__stages=[{"name": "all", "trains": ["projectors", "fusion", "encoders"], "learning_rate": 1.0e-3}],
        model__fusion={"kind": "cross_attention", "every": 1, "heads": 2, "head_width": 8},
    )
    new = ("projectors.", "fusion.", "heads.")

    def weights(seed: int, with_encoders: bool = True) -> dict[str, torch.Tensor]:
        recipe = finetune.load_recipe(path, [f"seed={seed}"])
        run = Run.load(RunFolder(folder / "run"), recipe, {"colour": BINDING})
        model = run.build(with_encoders=with_encoders)
        return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(new) or ".lora_" in n}

    return weights


def test_equal_seeds_give_equal_weights_and_others_do_not(weights):
    first, same, other = weights(5), weights(5), weights(6)
    assert {name.split(".")[0] for name in first} == {"projectors", "fusion", "heads", "language_model", "encoders"}
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if tensor.ndim > 1 and tensor.any()]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_weights_do_not_depend_on_whether_the_model_holds_its_encoders(weights):
    with_encoders, without = weights(5), weights(5, with_encoders=False)
    assert without.keys() == {name for name in with_encoders if not name.startswith("encoders.")}
    assert all(torch.equal(tensor, with_encoders[name]) for name, tensor in without.items())
