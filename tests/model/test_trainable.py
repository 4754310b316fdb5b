import pytest
import torch
from packed import composite_with_lora
from tiny import tiny_composite

from finetune.common.errors import ModelError, TrainingError
from finetune.model.trainable import set_trainable, trained_parts


def test_set_trainable_names_what_trains():
    model = composite_with_lora()
    counts = set_trainable(model, ["projectors", "adapter"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("projectors.") or ".lora_" in name for name in trained)
    assert sum(counts.values()) == sum(p.numel() for p in trained.values())
    assert set(counts) == {"projectors.image", "adapter"}
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_what_trains_and_is_not_named_is_an_error():
    """A weight that a projector shares with the LLM would train under the wrong name."""
    model = composite_with_lora()
    model.projectors["image"][2] = torch.nn.Linear(64, 32)
    model.projectors["image"][2].weight = model.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(TrainingError, match=r"not the parts .*q_proj"):
        set_trainable(model, ["projectors"])


def test_training_an_adapter_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="no adapter is attached"):
        set_trainable(tiny_composite(), ["adapter"])


def test_an_error_names_what_the_stage_trains_and_five_parameters():
    model = composite_with_lora()
    model.projectors["image"] = model.causal_lm.model.layers[0]
    with pytest.raises(TrainingError) as caught:
        set_trainable(model, ["projectors", "fusion"])
    begin, parameters = (
        "not the parts that the recipe trains (projectors, fusion): ",
        str(caught.value).partition("): ")[2],
    )
    assert str(caught.value).startswith(begin)
    names = parameters.split(", ")
    assert len(names) == 5 and all(name.startswith("language_model.") and ".layers.0." in name for name in names)


def composite_of_all_parts():
    """Two projectors, a fusion with weights, two heads, and an encoder of which one weight is tuned."""
    model = tiny_composite(fusion="cross_attention")
    model.projectors["audio"] = torch.nn.Linear(2, 3)
    model.heads["mood"], model.heads["rate"] = torch.nn.Linear(4, 3), torch.nn.Linear(4, 1)
    model.tuned["image"] = [next(name for name, _ in model.encoders["image"].named_parameters())]
    return model


@pytest.mark.parametrize(
    ("trains", "roles"),
    [
        (["projectors"], ["projectors.image", "projectors.audio"]),
        (["projectors.audio"], ["projectors.audio"]),
        (["heads"], ["heads.mood", "heads.rate"]),
        (["fusion"], ["fusion"]),
        (["encoders"], ["encoders.image"]),
        (["encoders.image", "fusion"], ["encoders.image", "fusion"]),
    ],
)
def test_exactly_the_named_parts_train(trains, roles):
    model = composite_of_all_parts().half()
    counts = set_trainable(model, trains)
    assert list(counts) == roles
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tuned = {f"encoders.image.{name}" for name in model.tuned["image"]}
    for name, p in model.named_parameters():
        part = name.startswith(tuple(f"{role}." for role in roles))
        assert (name in trained) == (part and (name in tuned or not name.startswith("encoders."))), name
        assert p.dtype == (torch.float32 if name in trained else torch.float16)
    assert sum(counts.values()) == sum(p.numel() for p in trained.values()) > 0
    assert {id(p) for parameters in trained_parts(model, trains).values() for p in parameters} == {
        id(p) for p in trained.values()
    }


def test_what_an_earlier_stage_trained_is_frozen_again():
    model = composite_of_all_parts()
    set_trainable(model, ["projectors", "heads"])
    set_trainable(model, ["fusion"])
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"fusion"}
