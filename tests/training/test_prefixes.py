"""What samples share, against all ways of dividing them, and rows that share it against separate ones."""

import random
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from packed import (
    OUTPUTS,
    collator_of,
    composite_with_heads,
    head_scores,
    shake,
    tokenized_sample,
    train_composite,
)
from peak_bytes import peak_bytes
from tiny import (
    FAMILIES,
    FUSIONS,
    MORE_FAMILIES,
    PLACEHOLDER,
    part,
    tiny_composite,
    tiny_encoder,
    tiny_llm,
    tiny_llm_folder,
)
from torch.nn.attention import varlen as torch_varlen
from varlen import of_2_11, varlen_attn

from finetune.model import row_plan
from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.model.imitation import Teacher
from finetune.model.language_model import load_language_model
from finetune.model.prefixes import shared_beginning
from finetune.model.row_layout import ROUNDED, RowKind, layout, likely_layout, row_kind, shares_prefixes, tolerance
from finetune.model.row_plan import RowPlan, RowSegment, by_segments
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter, Llm
from finetune.training import prefixes
from finetune.training.prefixes import sharing_of
from finetune.training.samples import TokenizedSamples
from finetune.training.train import layout_of

PICTURE = [PLACEHOLDER] * 4


def asked(picture, question, answer, before=(3, 4)):
    """A question of a picture, whose answer is learned."""
    ids = [*before, *PICTURE, *question, *answer]
    return tokenized_sample(ids, [-100] * (len(ids) - len(answer)) + list(answer), f"image {picture}")


QUESTIONS = [
    asked(1, [10, 11, 12], [20, 21]),
    asked(2, [10, 11], [22]),
    asked(1, [10, 13], [23, 24, 25]),
    asked(1, [], [26, 27]),  # learned from the prefix's last state on
    asked(2, [14, 15, 16, 17], [28, 29]),
    asked(3, [10, 11, 12], [20, 21], before=(5,)),
]
GROUPS = [[0, 2, 3], [5], [1, 4]]


def laid_out(samples, groups, kind, **options):
    return collator_of(samples, kind=kind, **options)([{"groups": groups, "filler": False}])


def token_losses(model, batch):
    """The loss of every learned token, by sample in the order of the row."""
    logits = model.label_logits(**{key: value for key, value in batch.items() if key != "shift_labels"})
    return torch.nn.functional.cross_entropy(logits, batch["shift_labels"][0], reduction="none")


def trained(model):
    attach(model, Adapter(rank=2, alpha=3.4))  # a scaling of 1.7
    shake(model)
    set_trainable(model, ["projectors", "adapter", *(["fusion"] if model.composition.fusion.trained else [])])
    return model.eval()


def composite(family="llama", fusion="prefix"):
    torch.manual_seed(0)
    return trained(tiny_composite(family, fusion=fusion))


def gradients(model, losses):
    model.zero_grad()
    (losses * torch.linspace(0.3, 1.9, len(losses))).sum().backward()  # each token weighs otherwise
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(one, other):
    assert one.keys() == other.keys() and all(float(gradient.abs().max()) > 0 for gradient in one.values())
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def apart_and_shared(model, samples, groups, **options):
    """(losses, gradients) of padded rows by the LLM's own attention, and of the row with shared prefixes."""
    padded = laid_out(samples, groups, RowKind.PADDED, **options)
    apart = token_losses(model, padded)
    expected = apart, gradients(model, apart)
    shared_row = laid_out(samples, groups, RowKind.SHARED, **options)
    assert shared_row["input_ids"].numel() < padded["attention_mask"].sum()
    with by_segments(model.causal_lm):
        shared = token_losses(model, shared_row)
        return expected, (shared, gradients(model, shared))


def assert_equal(expected, found):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert distance(expected[1], found[1]) < 1e-5


ROUTED = {"mixtral", "qwen3_moe", "gpt_oss", "phimoe"}  # with an auxiliary loss
PADDED = {"falcon": "tried", "bloom": "no positions", "mpt": "no positions", "rwkv": "the state that it keeps"} | {
    family: f"in its layers ({layers})"
    for family, layers in {"lfm2": "conv", "falcon_h1": "hybrid", "llama4_text": "chunked_attention"}.items()
}
ALL = [*FAMILIES, *MORE_FAMILIES]
EXACT = [family for family in ALL if family not in {*PADDED, "gptj"}]  # behind a prefix they are as they are alone


@pytest.mark.parametrize("family", ALL)
def test_which_families_share_and_why_others_do_not(family):
    torch.manual_seed(0)
    model = tiny_llm(family)
    kind, why = layout(model)
    if family in EXACT:
        assert kind is (RowKind.SEGMENTS if family in ROUTED else RowKind.SHARED)
        assert ("the auxiliary loss of its routers (router_aux_loss_coef: 0.001)" in why) == (family in ROUTED)
        assert layout(model, share=False) == (RowKind.SEGMENTS, "")
    elif family == "gptj":
        assert (kind, why) == (RowKind.PACKED, "its attention is its own code")
    else:
        assert kind is RowKind.PADDED and PADDED[family] in why
    if family != "falcon":  # which only a trial shows
        assert likely_layout(model) == (kind, why)


@pytest.mark.parametrize("family", EXACT)
def test_losses_and_gradients_are_those_of_separate_rows(family):
    assert_equal(*apart_and_shared(composite(family), QUESTIONS, GROUPS))


def test_routers_learn_from_all_tokens_of_all_samples(tmp_path):
    """The auxiliary loss of a mixture of experts, in the rows that it has, against padded ones; shared rows would have
    another.
    """

    def loss(kind):
        model = composite("mixtral")
        options = {"rows": [GROUPS], "collator": collator_of(QUESTIONS, kind=kind), "save_every_n_steps": 100}
        (entry,) = train_composite(model, tmp_path / kind, **options)
        assert entry["aux_loss"] > 1
        return entry["loss"]

    padded = loss(RowKind.PADDED)
    assert loss(row_kind(composite("mixtral").causal_lm)) == pytest.approx(padded, abs=2e-6)
    assert loss(RowKind.SHARED) != pytest.approx(padded, abs=1e-5)


def test_without_an_auxiliary_loss_a_mixture_of_experts_shares():
    torch.manual_seed(0)
    assert layout(tiny_llm("mixtral", router_aux_loss_coef=0.0)) == (RowKind.SHARED, "")


def cheating(change):
    """An LLM whose embeddings are changed on the way: `change(embeddings (1, T, D), positions (1, T))`."""
    torch.manual_seed(0)
    model = tiny_llm()
    forward = model.model.forward

    def changed(inputs_embeds, position_ids, **options):
        return forward(inputs_embeds=change(inputs_embeds, position_ids), position_ids=position_ids, **options)

    model.model.forward = changed
    return model


def leaks(embeddings, positions):
    """Each branch but the first sees the token before it: of another branch, not of the prefix."""
    begins = positions == positions[0, 11] if positions.shape[1] == 22 else torch.zeros_like(positions).bool()
    return embeddings + begins[..., None] * embeddings.roll(1, 1)


def leaks_before(embeddings, positions):
    """The prefix sees the last token of the sample before it."""
    moved = torch.zeros_like(embeddings)
    if positions.shape[1] == 22:
        moved[:, 5] = embeddings[:, 4]
    return embeddings + moved


def leaks_unseen(embeddings, positions):
    """The same with a gradient and no value."""
    moved = embeddings.roll(7, 1) if positions.shape[1] == 22 else embeddings
    return embeddings + moved - moved.detach()


def blind_to_the_prefix(embeddings, positions):
    return torch.where((positions < 6)[..., None], embeddings.detach(), embeddings)


@pytest.mark.parametrize("change", [leaks, leaks_before, leaks_unseen, blind_to_the_prefix])
def test_the_trial_refuses_an_llm_that_cheats(change):
    assert row_kind(cheating(lambda embeddings, positions: embeddings)) is RowKind.SHARED
    cheat = cheating(change)
    assert not shares_prefixes(cheat)
    if change is not blind_to_the_prefix:  # samples that share nothing have what they have alone
        assert layout(cheat) == (RowKind.SEGMENTS, "tried: samples behind one prefix differ from samples alone")


def test_what_an_llm_refuses_is_padded_and_what_memory_lacks_is_raised():
    def refuses(error):
        model = cheating(lambda embeddings, positions: embeddings)
        forward = model.model.forward

        def refusing(inputs_embeds, position_ids, **options):
            if inputs_embeds.shape[1] > 7:
                raise error
            return forward(inputs_embeds=inputs_embeds, position_ids=position_ids, **options)

        model.model.forward = refusing
        return model

    assert row_kind(refuses(RuntimeError("a mask must be a tensor"))) is RowKind.PADDED
    with pytest.raises(torch.OutOfMemoryError):
        row_kind(refuses(torch.OutOfMemoryError("CUDA out of memory")))


def test_the_trial_refuses_positions_that_begin_anew(monkeypatch):
    """Of an LLM that counts them by itself, from where a segment begins."""
    torch.manual_seed(0)
    model = tiny_llm()
    forward = model.model.forward

    def restarting(inputs_embeds, position_ids, **options):
        plan = row_plan._current.get()
        if plan is not None:
            position_ids = torch.cat([torch.arange(segment.length) for segment in plan.segments])[None]
        return forward(inputs_embeds=inputs_embeds, position_ids=position_ids, **options)

    model.model.forward = restarting
    assert row_kind(model) is RowKind.SEGMENTS


@pytest.mark.parametrize(
    ("family", "attention", "printed"),
    [
        ("llama", "auto", ""),
        ("llama", "sdpa", "rows are packed, without shared prefixes: model.llm.attention is sdpa, not auto"),
        ("mixtral", "auto", "MixtralForCausalLM (mixtral): rows are packed, and share no prefixes: the auxiliary loss"),
        ("gptj", "auto", "GPTJForCausalLM (gptj): rows are packed under a mask, and share no prefixes: its attention"),
        ("bloom", "auto", "BloomForCausalLM (bloom): each sample has a padded row of its own: it takes no positions"),
        (
            "lfm2",
            "auto",
            "Lfm2ForCausalLM (lfm2): each sample has a padded row of its own: in its layers (conv) a sample",
        ),
    ],
)
def test_a_run_prints_how_rows_are_laid_out_and_why(family, attention, printed, capsys):
    torch.manual_seed(0)
    recipe = SimpleNamespace(
        model=SimpleNamespace(language_model=SimpleNamespace(attention=attention), language_key="model.llm", base=None),
        train=SimpleNamespace(share_prefixes=True),
    )
    kind = layout_of(SimpleNamespace(causal_lm=tiny_llm(family)), SimpleNamespace(recipe=recipe))
    assert (kind is RowKind.SHARED) == (printed == "")
    assert " ".join(capsys.readouterr().err.split()).startswith(printed)


def test_cross_attention_finds_the_media_of_a_prefix():
    samples = [replace(one, input_ids=single(one), labels=one.labels[3:]) for one in QUESTIONS]
    samples = [replace(one, media_ends=[one.media_begins[0] + 1]) for one in samples]
    assert_equal(*apart_and_shared(composite(fusion="cross_attention"), samples, GROUPS))


def single(sample):
    """Its picture as one placeholder."""
    first = sample.input_ids.index(PLACEHOLDER)
    return sample.input_ids[:first] + sample.input_ids[first + 3 :]


def test_a_medium_of_a_branch_is_the_branchs_own():
    """Two media: a shared one, then another, the same or none."""
    text = [[10, 11], [12], [13, 14, 15]]
    samples = [
        tokenized_sample(
            [3, *PICTURE, *words, *PICTURE * (second != ""), 9, 20, 21],
            [-100] * (6 + len(words) + 4 * (second != "")) + [20, 21],
            "image 1",
            *([f"image {second}"] if second else []),
            spans=[(1, 5), (5 + len(words), 9 + len(words))][: 1 + (second != "")],
        )
        for words, second in zip(text, ("2", "1", ""), strict=True)
    ]
    assert shared_beginning([sample.beginning for sample in samples]) == 5
    assert_equal(*apart_and_shared(composite(), samples, [[0, 1, 2]]))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_sliding_window_reaches_as_far_into_the_prefix_as_it_would(family):
    torch.manual_seed(0)
    model = trained(tiny_composite(family))
    for config in (model.causal_lm.config, model.config.text_config):
        config.sliding_window = 6
    expected, found = apart_and_shared(model, QUESTIONS, GROUPS)
    assert_equal(expected, found)
    model.causal_lm.config.sliding_window = 5
    with torch.no_grad():
        assert (token_losses(model, laid_out(QUESTIONS, GROUPS, RowKind.PADDED)) - expected[0]).abs().max() > 1e-3


def test_activation_checkpoints_attend_by_the_same_plan():
    model = composite()
    expected, _ = apart_and_shared(model, QUESTIONS, GROUPS)
    model.causal_lm.activation_checkpointing_enable(every_n_layers=1)
    model.train()
    with by_segments(model.causal_lm):
        losses = token_losses(model, laid_out(QUESTIONS, GROUPS, RowKind.SHARED))
        found = losses, gradients(model, losses)
    assert_equal(expected, found)


def test_nf4_weights_share_as_well(tmp_path):
    folder = tiny_llm_folder(tmp_path / "llm")
    model = compose(
        load_language_model(Llm(name=str(folder), quantize="nf4"), torch.float32),
        encoders={"image": tiny_encoder()},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", "prefix", **FUSIONS["prefix"]),
        placeholder_ids={"image": PLACEHOLDER},
    )
    assert row_kind(model.causal_lm) is RowKind.SHARED
    assert_equal(*apart_and_shared(trained(model), QUESTIONS, GROUPS))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batch: replace_plan(batch, lambda s, before: RowSegment(s.begin, s.end)),
        lambda batch: replace_plan(batch, lambda s, before: RowSegment(s.begin, s.end, before.begin, before.end)),
        lambda batch: {**batch, "position_ids": restarted(batch)},
    ],
    ids=["no prefix", "the branch before as prefix", "positions restart"],
)
def test_a_wrong_plan_would_show(wrong):
    model = composite()
    padded = token_losses(model, laid_out(QUESTIONS, GROUPS, RowKind.PADDED))
    with by_segments(model.causal_lm):
        assert (token_losses(model, wrong(laid_out(QUESTIONS, GROUPS, RowKind.SHARED))) - padded).abs().max() > 0.01


def replace_plan(batch, change):
    segments = batch["row_plan"].segments
    before = (segments[0], *segments)
    changed = (change(s, b) if s.prefix else s for s, b in zip(segments, before, strict=False))
    return {**batch, "row_plan": RowPlan(tuple(changed))}


def restarted(batch):
    return torch.cat([torch.arange(segment.length) for segment in batch["row_plan"].segments])[None]


def test_heads_read_behind_a_prefix_what_they_read_alone():
    model = composite_with_heads()
    questions = [asked(1, words, []) for words in ([10, 11], [10, 12, 13], [14])] + [asked(2, [15], [])]
    samples = [
        replace(one, labels=[-100] * len(one.labels), head="price", target=[float(number)], group="g", loss_weight=1.5)
        for number, one in enumerate(questions)
    ]
    groups = [[0, 2, 1], [3]]
    apart = laid_out(samples, groups, RowKind.PADDED, heads=OUTPUTS)
    shared = laid_out(samples, groups, RowKind.SHARED, heads=OUTPUTS)
    assert shared["input_ids"].numel() < apart["attention_mask"].sum() and shared["items"] == apart["items"] == 4
    expected = dict(head_scores(model, apart))["price"]
    with by_segments(model.causal_lm):
        found = dict(head_scores(model, shared))["price"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared["heads"]["price"]["targets"], apart["heads"]["price"]["targets"])


def test_pupil_and_teacher_share_what_each_begins_with():
    samples = []
    for question, answer in (([10, 11], [20, 21]), ([10, 12], [22]), ([13], [23, 24])):
        one = asked(1, question, answer)
        read = [3, 4, 50, 51, *question]
        teacher = {"teacher_input_ids": read + answer, "teacher_labels": [-100] * len(read) + answer}
        samples.append(replace(one, **teacher))
    model = composite()
    results = []
    for kind in (RowKind.PADDED, RowKind.SHARED):
        batch = laid_out(samples, [[0, 2, 1]], kind)
        with by_segments(model.causal_lm) if kind is RowKind.SHARED else nullcontext():
            outputs = model(**{**batch, "teacher": Teacher(batch["teacher"], 2.0)})
            outputs["loss"].backward()
        results.append(
            (outputs["loss"].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        )
        model.zero_grad()
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert distance(results[0][1], results[1][1]) < 1e-5
    assert batch["teacher"]["input_ids"].shape[1] == 4 + sum(len(one.teacher_input_ids) - 4 for one in samples)


def test_a_mask_for_all_tokens_is_never_made(monkeypatch):
    made = []
    visible = row_plan._visible_to
    monkeypatch.setattr(row_plan, "_visible_to", lambda *args: made.append(visible(*args)) or made[-1])
    model = composite()
    batch = laid_out(QUESTIONS, GROUPS, RowKind.SHARED)
    with by_segments(model.causal_lm), torch.no_grad():
        token_losses(model, batch)
    longest = max(len(sample.input_ids) for sample in QUESTIONS)
    assert made and max(mask.shape[1] for mask in made if mask is not None) <= longest < batch["input_ids"].shape[1]


@pytest.mark.parametrize("kernel", [varlen_attn, of_2_11], ids=["", "PyTorch 2.11"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", ""])
def test_one_kernel_for_all_segments_is_given_the_same(kernel, shared, mixed):
    """A GPU's kernel for sequences of many lengths, replaced by one that loops over them: results and gradients."""
    torch.manual_seed(0)
    first = RowSegment(0, 5)
    plan = RowPlan((first, RowSegment(5, 8, 0, 5), RowSegment(8, 12, 0, 5), RowSegment(12, 19)))
    if not shared:
        plan = RowPlan((first, RowSegment(5, 12), RowSegment(12, 19)))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    config = SimpleNamespace(_attn_implementation=row_plan.NAME)
    config.get_text_config = lambda: config
    shapes = ((1, 4, 19, 8), (1, 2, 19, 8), (1, 2, 19, 8))
    dtypes = (torch.float32, torch.bfloat16, torch.float32) if mixed else (torch.bfloat16,) * 3
    inputs = [
        torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    for window in (None, 3, 6):
        with row_plan.following(plan, SimpleNamespace(config=config)):
            mask = row_plan._mask(device=None, local_size=window)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = row_plan.at_once(*inputs, plan, window, 0.3, kernel)
            expected, _ = row_plan._attend(module, *inputs, mask, scaling=0.3)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        weights = torch.randn_like(found)
        for one, other in zip(
            *(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_the_kernel_of_the_installed_pytorch_takes_these_arguments():
    installed = signature(torch_varlen.varlen_attn).parameters
    own = signature(varlen_attn).parameters
    assert list(own)[:7] == list(installed)[:7] and own.keys() <= installed.keys()


@pytest.mark.parametrize(
    "capability, dtype, widths, fits",
    [
        ((8, 0), torch.bfloat16, (64, 64), True),
        ((8, 6), torch.bfloat16, (256, 256), True),
        ((7, 5), torch.float16, (64, 64), False),
        ((9, 0), torch.float32, (64, 64), False),
        ((9, 0), torch.float16, (64, 128), False),
        ((9, 0), torch.float16, (60, 60), False),
        ((9, 0), torch.float16, (208, 208), False),
        ((9, 0), torch.float16, (512, 512), False),
    ],
)
def test_which_gpus_and_shapes_take_one_kernel(capability, dtype, widths, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    row_plan.varlen_kernel.cache_clear()
    query, value = (
        SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, heads, 19, width))
        for heads, width in zip((4, 2), widths, strict=True)  # fewer heads of keys and values than of queries
    )
    assert row_plan._has_flash_kernel(query, value) is fits
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    row_plan.varlen_kernel.cache_clear()
    assert not row_plan._has_flash_kernel(query, value)
    row_plan.varlen_kernel.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "repeated"),
    [
        ((7, 5), torch.float16, 2, True),
        ((7, 5), torch.float16, 4, False),
        ((8, 0), torch.bfloat16, 2, False),
        ((8, 0), torch.float32, 2, True),
        ((8, 0), torch.float32, 4, False),
    ],
)
def test_where_fused_attention_takes_no_groups_heads_are_repeated(capability, dtype, heads, repeated, monkeypatch):
    """Which transformers does where there is a mask. On the CPU, as a T4 and an Ampere GPU would have it."""
    called = []

    def sdpa(module, query, key, value, mask, dropout, scaling, is_causal):
        called.append((mask is not None, is_causal))
        return query.transpose(1, 2), None

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(row_plan, "_is_gpu", lambda device: True)
    monkeypatch.setattr(row_plan, "varlen_kernel", lambda: None)
    monkeypatch.setattr(row_plan, "sdpa_attention_forward", sdpa)
    mask = row_plan._PlanAsMask(RowPlan((RowSegment(0, 5), RowSegment(5, 8, 0, 5))), None, torch.device("cpu"))
    query, key = (torch.ones(1, count, 8, 16, dtype=dtype) for count in (4, heads))
    row_plan._attend(None, query, key, key, mask)
    assert called == [(repeated, not repeated), (True, False)]


def round_by_length(llm: torch.nn.Module) -> None:
    """Round outputs of linear layers, in bfloat16, otherwise where other numbers of rows are computed at once: as GPUs
    do, which have several kernels for a product.
    """

    def other_rounding(module, inputs, output):
        generator = torch.Generator().manual_seed(output.numel() + module.number)
        last_digit = torch.randint(-1, 2, output.shape, generator=generator) * 2.0**-8
        return (output.float() * (1 + last_digit)).to(output.dtype)

    for number, module in enumerate(one for one in llm.modules() if isinstance(one, torch.nn.Linear)):
        module.number = number
        module.register_forward_hook(other_rounding)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt", "gpt_oss", "falcon", "bloom"])
def test_rounding_by_length_changes_no_layout(family):
    """In a deep LLM it is more than any bound that is fixed."""
    torch.manual_seed(0)
    llm = tiny_llm(family, num_hidden_layers=20) if family == "qwen2" else tiny_llm(family)
    exact = row_kind(llm)
    llm.bfloat16()
    assert tolerance(llm) == ROUNDED
    round_by_length(llm)
    assert row_kind(llm) is exact
    if family == "qwen2":
        assert exact is RowKind.SHARED and tolerance(llm) > 2 * ROUNDED


def test_groups_are_those_of_equal_tokens_and_media(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 6)
    sharing = sharing_of(TokenizedSamples.of(QUESTIONS))
    assert [sharing.group[number] for number in (0, 2, 3)] == [sharing.group[0]] * 3
    assert sharing.group[1] == sharing.group[4] != sharing.group[0]
    assert sharing.saved == [6, 6, 6, 6, 6, 0]
    assert sharing_of(TokenizedSamples.of(QUESTIONS), media_in_prefix=True).saved == sharing.saved


def test_finding_groups_needs_little_more_memory_than_the_tokens_do():
    count, tokens = 20_000, 200
    one = TokenizedSamples.of([asked(0, [10], [20], before=range(tokens))])
    samples = TokenizedSamples(one.table.take([0] * count))
    assert peak_bytes(lambda: sharing_of(samples)) < 1.5 * 4 * tokens * count + 12 * 2**20


def test_text_alone_is_no_prefix_where_media_must_stand_in_it():
    samples = TokenizedSamples.of([asked(number, [10], [20], before=range(30, 50)) for number in range(4)])
    assert sharing_of(samples).saved == [20] * 4
    assert sharing_of(samples, media_in_prefix=True).saved == [0] * 4


@pytest.mark.parametrize("shared, rest, saved", [(16, 20, 16), (15, 20, 0), (16, 300, 0)])
def test_a_small_saving_is_left_alone(shared, rest, saved):
    before = [3] * shared
    samples = [asked(number, [number + 5] * rest, [20], before=before) for number in range(4)]
    assert sharing_of(TokenizedSamples.of(samples)).saved == [saved] * 4


@pytest.mark.parametrize("seed", range(20))
def test_no_division_into_groups_saves_more(seed, monkeypatch):
    """Against all divisions of a few short samples into groups that share what their members begin with."""
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 1)
    generator = random.Random(seed)
    samples = []
    for _ in range(6):
        ids = [generator.choice([5, 6]) for _ in range(generator.randint(3, 9))]
        samples.append(tokenized_sample([*ids, 9], [*[-100] * len(ids), 9]))
    sharing = sharing_of(TokenizedSamples.of(samples))
    groups = {}
    for number, group in enumerate(sharing.group):
        groups.setdefault(group, []).append(number)
    lengths = [len(sample.input_ids) for sample in samples]
    found = sum(lengths) - sum(sharing.tokens(group, lengths) for group in groups.values())
    best = max(
        sum(shared_beginning([samples[n].beginning for n in group]) * (len(group) - 1) for group in division)
        for division in divisions(list(range(6)))
    )
    assert best - 0.1 * sum(lengths) <= found <= best
    for group in groups.values():
        assert (
            sharing.saved[group[0]] <= shared_beginning([samples[number].beginning for number in group])
            or len(group) == 1
        )


def divisions(items):
    if not items:
        yield []
        return
    first, *others = items
    for division in divisions(others):
        yield [[first], *division]
        for place in range(len(division)):
            yield [*division[:place], [first, *division[place]], *division[place + 1 :]]


def test_a_shared_row_holds_each_medium_once_and_each_label():
    batch = laid_out(QUESTIONS, GROUPS, RowKind.SHARED, read=lambda medium: medium.key)
    assert batch["features"] == {"image": ["1", "3", "2"]}
    assert batch["shift_labels"].tolist() == [[20, 21, 23, 24, 25, 26, 27, 20, 21, 22, 28, 29]]
    assert batch["label_rows"][5] == 5  # the prefix's last state
    assert (batch["labels"] != -100).sum() == 12
