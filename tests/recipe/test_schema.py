import pytest

from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.parts import ProjectorPart
from finetune.recipe.schema import schema


def test_a_recipe_can_be_built_in_python(folder):
    recipe = load_recipe("x.yaml")
    assert Recipe.model_validate(dict(recipe)) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert ProjectorPart.parse(recipe.model.projectors["image"]) is recipe.model.projectors["image"]


def test_a_recipe_cannot_be_changed(folder):
    recipe = load_recipe("x.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 8


def mismatch(value, node, root, where="recipe"):
    """The first place where a value isn't what a JSON schema says; of the keywords, those that ours uses."""
    if "$ref" in node:
        return mismatch(value, root["$defs"][node["$ref"].rpartition("/")[2]], root, where)
    if choices := node.get("anyOf"):
        mismatches = [mismatch(value, choice, root, where) for choice in choices]
        return None if None in mismatches else mismatches[0]
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        return f"{where}: not an allowed value"
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    kind = ({"object": dict, "array": list} | kinds).get(node.get("type"), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        return f"{where}: not {node['type']}"
    if isinstance(value, int | float) and not node.get("minimum", value) <= value <= node.get("maximum", value):
        return f"{where}: out of range"
    if isinstance(value, list):
        inside = [mismatch(item, node["items"], root, f"{where}[]") for item in value]
        return next((each for each in inside if each), None)
    if isinstance(value, dict):
        if missing := set(node.get("required", ())) - set(value):
            return f"{where}: {missing} missing"
        others = [*node.get("patternProperties", {}).values(), node.get("additionalProperties", {})][0]
        for key, item in value.items():
            inner = node.get("properties", {}).get(key, others)
            if inner is False:
                return f"{where}.{key}: unknown"
            if problem := mismatch(item, inner, root, f"{where}.{key}"):
                return problem
    return None


def test_the_json_schema_takes_the_dumped_recipe_and_knows_the_options_of_parts(folder):
    root = schema()
    good = load_recipe("x.yaml").model_dump(mode="json")
    assert mismatch(good, root, root) is None
    good["model"]["fusion"] = "prefix"
    assert mismatch(good, root, root) is None
    for change_one in (
        lambda recipe: recipe.update(sed=1),
        lambda recipe: recipe["model"]["projectors"]["image"].update(hiden=1),
        lambda recipe: recipe["model"]["projectors"]["image"].update(kind="mpl"),
        lambda recipe: recipe["model"]["encoders"].update(image="vision"),
        lambda recipe: recipe["adapter"].update(rank=5000),
        lambda recipe: recipe["data"][0]["task"].update(prompt=3),
    ):
        bad = load_recipe("x.yaml").model_dump(mode="json")
        change_one(bad)
        assert mismatch(bad, root, root)


def test_every_key_of_the_schema_is_described():
    root = schema()
    for title, definition in {"Recipe": root, **root["$defs"]}.items():
        for key, node in definition.get("properties", {}).items():
            assert node.get("description"), f"{title}.{key}"
