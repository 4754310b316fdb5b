"""Families that take videos: rows with a clip are those of the base's own forward. Needs torchvision, as transformers'
video processors do.
"""

from importlib.util import find_spec

import pytest
import torch
from families import ZOO, family_folder
from families.recipes import base_settings

from finetune.model.build import build_model, load_components
from finetune.model.row_layout import RowKind
from finetune.recipe.schema import Model
from finetune.training.base_trial import base_row_kind

PADDED = {"minicpm_v"}  # whose LLM has linear attention


@pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers reads videos with torchvision")
@pytest.mark.parametrize("name", [name for name, family in ZOO.items() if "video" in family.media])
def test_rows_with_a_clip_are_exact(name, tmp_path):
    settings = Model.model_validate({"base": base_settings(ZOO[name], family_folder(name, tmp_path / "base"))})
    components = load_components(settings, {}, 0, torch.device("cpu"))
    assert "video" in components.encoders
    model = build_model(components, None, seed=0, bindings={}, with_encoders=True)
    kind, _ = base_row_kind(model, components, [("video",)], share=True, segments=True)
    assert kind is (RowKind.PADDED if name in PADDED else RowKind.SHARED)
