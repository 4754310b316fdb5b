import pytest

from finetune.common.errors import RecipeError
from finetune.common.registry import FOLDERS, load_part, part_names


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_folder_is_a_part_by_its_exact_name(folder):
    names = part_names(folder)
    assert names == tuple(sorted(names)) != ()
    for name in names:
        assert load_part(folder, name).__name__ == f"finetune.{FOLDERS[folder]}.{name}"


@pytest.mark.parametrize("name", ["MLP", "mlp.py", "", "__init__", "../tasks/chat", "os", "mpl"])
def test_an_unknown_name_is_answered_with_those_there_are(name):
    with pytest.raises(RecipeError, match="There are: conv, linear, mlp") as caught:
        load_part("projectors", name)
    assert f"one file: finetune/model/projectors/{name}.py" in str(caught.value)


def test_the_nearest_name_is_offered():
    with pytest.raises(RecipeError, match="did you mean 'mlp'"):
        load_part("projectors", "mpl")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_option_is_called_kind_and_each_is_described(folder):
    for name in part_names(folder):
        for key, field in load_part(folder, name).Options.model_fields.items():
            assert key != "kind", f"{folder}/{name}.py: 'kind' is the name of the part itself"
            assert field.description, f"{folder}/{name}.py: {key}"
