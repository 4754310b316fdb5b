import copy

import pytest
import torch
from packed import batch_of, features_of, samples_of
from tiny import FAMILIES, FUSIONS, PLACEHOLDER, VOCABULARY, part, tiny_composite, tiny_encoder, tiny_llm

from finetune.common.errors import ModelError
from finetune.common.registry import load_part
from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.model.composite import MultimodalModel
from finetune.model.fusion import Projected
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter

SOUND = PLACEHOLDER + 1
IDS = torch.tensor([[5, 6, PLACEHOLDER, 7, 8, PLACEHOLDER, 9, 10]])
PICTURES = {"image": [features_of("image", "1"), features_of("image", "2")]}
families = pytest.mark.parametrize("family", FAMILIES)


def two_media(**options) -> MultimodalModel:
    """One model for pictures and sound."""
    torch.manual_seed(0)
    return compose(
        tiny_llm(),
        encoders={"image": tiny_encoder(), "audio": tiny_encoder()},
        projectors={"image": part("projectors", "linear"), "audio": part("projectors", "mlp")},
        fusion=part("fusion", "cross_attention", **(FUSIONS["cross_attention"] | options)),
        placeholder_ids={"image": PLACEHOLDER, "audio": SOUND},
    )


@torch.no_grad()
def logits(model: MultimodalModel, ids: torch.Tensor = IDS, **media) -> torch.Tensor:
    return model(ids, features=media or PICTURES).logits


@families
def test_at_strength_0_it_is_the_text_only_llm_to_the_bit(family):
    model = tiny_composite(family, fusion="cross_attention")
    bare = copy.deepcopy(model.causal_lm)
    embeddings = bare.get_input_embeddings()(IDS.masked_fill(IDS == PLACEHOLDER, 0))
    expected = bare(inputs_embeds=embeddings.masked_fill((IDS == PLACEHOLDER)[..., None], 0.0)).logits
    assert (logits(model) - expected).abs().max() > 1e-3
    model.fusion.strength["image"] = 0.0
    assert torch.equal(logits(model), expected)


@families
def test_before_training_gates_are_closed_and_only_they_learn_at_first(family):
    model = tiny_composite(family, fusion="cross_attention")
    fresh = load_part("fusion", "cross_attention")
    model.fusion.load_state_dict(
        {n: torch.zeros_like(p) if "gate" in n else p for n, p in model.fusion.state_dict().items()}
    )
    before = logits(model)
    model.fusion.strength["image"] = 0.0
    torch.testing.assert_close(before, logits(model), atol=0, rtol=0)
    model.fusion.strength["image"] = 1.0
    set_trainable(model, ["fusion"])
    model(IDS, features=PICTURES, labels=IDS.clamp(max=VOCABULARY - 1)).loss.backward()
    reached = {name for name, p in model.fusion.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in model.fusion.named_parameters() if name.endswith("gate")}
    assert fresh.Options().gate == 0.0


def test_a_token_sees_the_media_before_it_and_no_other():
    model = tiny_composite(fusion="cross_attention")
    one = logits(model)
    other = logits(model, image=[PICTURES["image"][0], features_of("image", "7")])
    assert torch.equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] - other[:, 5:]).abs().amin(-1).max() > 0
    swapped = logits(model, image=PICTURES["image"][::-1])
    assert not torch.allclose(one[:, 5:], swapped[:, 5:])


def test_what_is_added_is_attention_by_hand():
    """One block, one head at a time, one token at a time, with softmax written out."""
    options = load_part("fusion", "cross_attention").Options(every=1, heads=2, head_width=4, gate=0.3)
    config = tiny_llm(num_hidden_layers=1).config
    fusion = load_part("fusion", "cross_attention").build(config, ("image",), options)
    with torch.no_grad():
        fusion.order.zero_()
    width = config.hidden_size
    mask = torch.tensor([[False, True, False, True, False]])
    rows, hidden = torch.randn(5, width), torch.randn(1, 5, width)
    fusion(hidden, {"image": Projected(mask, rows, [2, 3])}, torch.zeros(1, 5, dtype=torch.long))
    block = fusion.blocks[0]
    got = fusion._add(block, hidden)
    own = block["image"]
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    media = rows / (rows.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    keys, values = (media @ own.key_value.weight.T).split(8, dim=-1)
    queries = normed @ own.query.weight.T
    for token, visible in enumerate((0, 2, 2, 5, 5)):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = keys[:visible, head] @ queries[0, token, head] / 4**0.5
            heads.append(scores.softmax(0) @ values[:visible, head] if visible else torch.zeros(4))
        expected = hidden[0, token] + torch.tanh(torch.tensor(0.3)) * own.out.weight @ torch.cat(heads)
        torch.testing.assert_close(got[0, token], expected, atol=1e-5, rtol=0)


def test_each_medium_has_its_own_strength():
    model, ids = two_media(), torch.tensor([[5, PLACEHOLDER, 6, SOUND, 7, 8]])
    image, sound, other = features_of("image", "1"), features_of("audio", "2"), features_of("audio", "3")
    assert not torch.allclose(
        logits(model, ids, image=[image], audio=[sound]), logits(model, ids, image=[image], audio=[other])
    )
    model.fusion.strength["audio"] = 0.0
    deaf = logits(model, ids, image=[image], audio=[sound])
    assert torch.equal(deaf, logits(model, ids, image=[image], audio=[other]))
    assert not torch.allclose(deaf, logits(model, ids, image=[other], audio=[sound]))
    from_recipe = two_media(strength={"audio": 0.0})
    assert from_recipe.fusion.strength == {"image": 1.0, "audio": 0.0}
    assert torch.equal(logits(from_recipe, ids, image=[image], audio=[sound]), deaf)
    with pytest.raises(ModelError, match="sound: no such medium; there are: image, audio"):
        two_media(strength={"sound": 1.0})


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_of_a_batch_are_those_given_alone(beams):
    model = tiny_composite(fusion="cross_attention")
    prompts = [[5, PLACEHOLDER, 6, 7], [PLACEHOLDER, 8, PLACEHOLDER, 9, 10, 11], [12, 13]]
    media = [[features_of("image", str(n)) for n in range(prompt.count(PLACEHOLDER))] for prompt in prompts]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    longest = max(map(len, prompts))
    together = model.generate(
        torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        features={"image": [one for pictures in media for one in pictures]},
        **options,
    )
    for prompt, pictures, answer in zip(prompts, media, together.tolist(), strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), features={"image": pictures}, **options)
        assert alone.tolist() == [answer]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_activation_checkpoints_give_the_same_gradients(fusion):
    model = tiny_composite(fusion=fusion)
    attach(model, Adapter(rank=2, alpha=4.0))
    set_trainable(model, ["projectors", "fusion", "adapter"])
    batch = batch_of(samples_of([9, 6, 12], load_part("fusion", fusion).placeholders(4, None)), [0, 1, 2], packed=True)
    inputs = {key: value for key, value in batch.items() if key not in {"label_rows", "shift_labels"}}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**inputs, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.causal_lm.activation_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_without_media_reaches_the_same_weights(fusion):
    """With several processes, all must have gradients for the same weights, or they wait for each other for ever."""
    model = tiny_composite(fusion=fusion)
    set_trainable(model, ["projectors", "fusion"])
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.equal(model(ids).logits, copy.deepcopy(model.causal_lm)(ids).logits)


def test_a_merged_model_adds_media_in_the_order_in_which_they_were_trained(tmp_path):
    """Blocks add one medium after the other, and the second one's attention reads what the first has added."""
    model = two_media()
    ids = torch.tensor([[5, PLACEHOLDER, SOUND, 7, 8]])
    media = {"image": PICTURES["image"][:1], "audio": PICTURES["image"][1:]}
    expected = logits(model, ids, **media)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, ids, **media), expected, atol=1e-5, rtol=0)
