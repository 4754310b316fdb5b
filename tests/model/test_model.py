import copy
import math
from itertools import cycle

import pytest
import torch
from packed import PICTURE, batch_of, samples_of, shake
from peft import PeftModel
from tiny import FAMILIES, FUSIONS, PLACEHOLDER, VOCABULARY, tiny_composite, tiny_encoder, tiny_llm
from trl.trainer.utils import add_fused_lm_head

from finetune.common.errors import ModelError
from finetune.model.adapter import attach, load_trained, save_trained
from finetune.model.composite import MultimodalModel
from finetune.model.row_layout import packs_exactly
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter

# No mask is made from positions in these: they train on padded rows.
PADDED = {"bloom", "falcon", "mpt", "opt"}
families = pytest.mark.parametrize("family", FAMILIES)
fusions = pytest.mark.parametrize("fusion", FUSIONS)
# Where the two hardly meet, the fusions take turns; of folders, one test takes the one turn, another test the other.
turns = pytest.mark.parametrize("family, fusion", list(zip(FAMILIES, cycle(FUSIONS))))
other_turns = pytest.mark.parametrize("family, fusion", list(zip(FAMILIES, cycle(reversed(FUSIONS)))))


def sample_losses(model: MultimodalModel, batch: dict) -> list[torch.Tensor]:
    """Mean loss of each sample, by hand: samples of a row are told apart by their positions, or stand in rows."""
    positions = batch.get("position_ids")
    arguments = {"position_ids": positions} if positions is not None else {"attention_mask": batch["attention_mask"]}
    logits = model(batch["input_ids"], features=batch["features"], use_cache=False, **arguments).logits
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    learned = batch["labels"][:, 1:] != -100
    if positions is None:
        return [losses[row][learned[row]].mean() for row in range(len(losses))]
    owner = (positions[0] == 0).cumsum(0)[1:]
    return [losses[0][(owner == number) & learned[0]].mean() for number in range(1, int(owner.max()) + 1)]


@fusions
@families
def test_text_alone_gives_the_bare_llms_logits(family, fusion):
    model = tiny_composite(family, fusion=fusion)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = copy.deepcopy(model.causal_lm)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@turns
def test_gradients_reach_the_projector_and_lora_and_nothing_else(family, fusion):
    model = tiny_composite(family, fusion=fusion)
    attach(model, Adapter(rank=2, alpha=4.0))
    shake(model)
    set_trainable(model, ["projectors", "fusion", "adapter"])
    batch = batch_of(samples_of([8], PICTURE[fusion]), [0], packed=False)
    loss = model(batch["input_ids"], features=batch["features"], labels=batch["labels"]).loss
    assert math.isfinite(loss.item())
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {
        n for n, _ in model.named_parameters() if n.startswith(("projectors.", "fusion.")) or ".lora_" in n
    }


@families
def test_the_layout_of_each_family(family):
    model = tiny_llm(family)
    assert packs_exactly(model) == (family not in PADDED)
    model.apply(model._init_weights)  # freshly initialised, a leak is small
    assert packs_exactly(model) == (family not in PADDED)


@fusions
@families
def test_a_samples_loss_is_the_one_that_it_has_alone(family, fusion):
    model = tiny_composite(family, fusion=fusion)
    samples, packed = samples_of([9, 6, 12], PICTURE[fusion]), family not in PADDED
    with torch.no_grad():
        together = sample_losses(model, batch_of(samples, [0, 1, 2], packed))
        alone = [sample_losses(model, batch_of(samples, [number], packed=False))[0] for number in range(3)]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@families
def test_no_gradient_flows_from_one_sample_to_another(family):
    model = tiny_composite(family)
    batch = batch_of(samples_of([9, 6, 12]), [0, 1, 2], packed=family not in PADDED)
    kept = {}

    def keep(module, arguments, output):
        kept["embeddings"] = output.detach().requires_grad_()
        return kept["embeddings"]

    model.fusion.register_forward_hook(keep)
    losses = sample_losses(model, batch)
    positions = batch.get("position_ids")
    for number, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, kept["embeddings"], retain_graph=True)
        own = torch.zeros(gradient.shape[:2], dtype=torch.bool)
        if positions is None:
            own[number] = True
        else:
            own[0] = (positions[0] == 0).cumsum(0) == number + 1
        assert gradient[own].abs().sum() > 0
        assert gradient[~own].abs().max() == 0


@other_turns
def test_the_fused_loss_is_the_ordinary_loss(family, fusion):
    model = tiny_composite(family, fusion=fusion)
    batch = batch_of(samples_of([9, 6, 12], PICTURE[fusion]), [0, 2, 1], packed=family not in PADDED)
    plain = {key: value for key, value in batch.items() if key not in {"label_rows", "shift_labels"}}
    expected = model(**plain, use_cache=False).loss
    add_fused_lm_head(model)
    assert len(batch["label_rows"]) == (batch["labels"] != -100).sum()
    torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, expected, atol=1e-5, rtol=0)


@turns
def test_what_was_trained_comes_back_from_its_folder(family, fusion, tmp_path):
    torch.manual_seed(1)
    model = tiny_composite(family, fusion=fusion)
    other = copy.deepcopy(model)
    for composite in (model, other):
        attach(composite, Adapter(rank=2, alpha=4.0))
    shake(model)
    with torch.no_grad():
        for parameter in model.projectors.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_trained(model, tmp_path)
    batch = batch_of(samples_of([8], PICTURE[fusion]), [0], packed=False)
    call = {"input_ids": batch["input_ids"], "features": batch["features"]}
    expected = model(**call).logits
    assert (other(**call).logits - expected).abs().max() > 1e-3
    load_trained(other, tmp_path)
    assert torch.equal(other(**call).logits, expected)
    # The folder is an ordinary PEFT adapter of the bare LLM.
    plain = PeftModel.from_pretrained(copy.deepcopy(model.language_model).unload(), tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.slow
@other_turns
def test_a_merged_model_is_read_back_from_its_folder_alone(family, fusion, tmp_path):
    model = tiny_composite(family, fusion=fusion)
    attach(model, Adapter(rank=2, alpha=4.0))
    shake(model)
    pictures = {"image": [torch.randn(1, 3, 32, 32)]}
    ids = batch_of(samples_of([8], PICTURE[fusion]), [0], packed=False)["input_ids"]
    trained = model(ids, media=pictures).logits
    model.language_model = model.language_model.merge_and_unload()
    torch.testing.assert_close(model(ids, media=pictures).logits, trained, atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path)
    again, report = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(again.eval()(ids, media=pictures).logits, model(ids, media=pictures).logits)


@fusions
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2", "mpt", "cohere"])
def test_generation_is_the_most_likely_token_step_by_step(family, fusion):
    model = tiny_composite(family, fusion=fusion)
    batch = batch_of(samples_of([6], PICTURE[fusion]), [0], packed=False)
    ids, features = batch["input_ids"], batch["features"]
    got = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        features=features,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    for _ in range(6):
        ids = torch.cat([ids, model(ids, features=features, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert got.tolist() == ids[:, -6:].tolist()


def test_a_picture_is_worth_its_features():
    model = tiny_composite()
    pictures = [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    ids = torch.cat([batch_of(samples_of([5]), [0], packed=False)["input_ids"]] * 2, 1)
    features = [model.encoder_parts["image"].encode(picture[None])[0] for picture in pictures]
    expected = model(ids, features={"image": features}).logits
    assert torch.equal(model(ids, media={"image": pictures}).logits, expected)
    assert not torch.allclose(model(ids, media={"image": pictures[::-1]}).logits, expected)


def test_projected_rows_stand_at_their_placeholders_in_order():
    model = tiny_composite()
    features = [torch.randn(1, 16, 16), torch.randn(1, 16, 16)]
    ids = torch.tensor([[5, *[PLACEHOLDER] * 4, 6], [*[PLACEHOLDER] * 4, 7, 8]])
    embeddings = model.embed(ids, {"image": features})
    for row, (start, rows) in enumerate(zip((1, 0), features, strict=True)):
        torch.testing.assert_close(embeddings[row, start : start + 4], model.projectors["image"](rows)[0])
    assert torch.equal(embeddings[1, 4:], model.get_input_embeddings()(torch.tensor([7, 8])))


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_pictures_than_placeholders_is_an_error(count):
    ids = torch.tensor([[5, *[PLACEHOLDER] * 4, 6]])
    with pytest.raises(ModelError, match=f"4 image placeholders in the text, but the media take {4 * count}"):
        tiny_composite()(ids, features={"image": [torch.randn(1, 16, 16)] * count})


def test_a_projector_that_cannot_take_the_encoders_rows_is_refused_when_composed():
    with pytest.raises(ModelError, match="pixel_shuffle: 17 rows"):
        tiny_composite(encoder=tiny_encoder("clip", tokens="all"))
