from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import CHATML, fresh_tokenizer
from tokenizers import processors

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message, Sample
from finetune.model.language_model import PLAIN_TEMPLATE
from finetune.model.tokenize import (
    IGNORED,
    add_placeholders,
    answer_ends,
    answer_tokens,
    tokenize,
    tokenize_prompt,
)

PICTURE, OTHER = Medium("image", Path("a.png")), Medium("image", Path("b.png"))
LENGTHS = {PICTURE: 4, OTHER: 7}


def segments(medium: Medium) -> list[tuple[str, int]]:
    return [("", LENGTHS[medium])]


CONVERSATIONS = {
    "one turn": (("user", PICTURE, "What is this?"), ("assistant", "a red square")),
    "text only": (("user", "What?"), ("assistant", "red")),
    "system": (("system", "Be short."), ("user", PICTURE, "What?"), ("assistant", "red")),
    "two turns": (
        ("user", PICTURE, "What?"),
        ("assistant", "a red square"),
        ("user", "And ", OTHER, " this?"),
        ("assistant", "blue\nand  two lines é ☃"),
    ),
    "answer with spaces": (("user", "What?"), ("assistant", "  red ")),
}


@pytest.fixture
def tokenizer():
    return fresh_tokenizer()


@pytest.fixture
def placeholders(tokenizer):
    return add_placeholders(tokenizer, ["image"], {"image": "<|image|>"})


def sample_of(*turns) -> Sample:
    return Sample(tuple(Message(role, tuple(content)) for role, *content in turns), "rows.csv:3")


def turns_of(sample: Sample) -> list[dict]:
    text = {PICTURE: "<|image|>", OTHER: "<|image|>"}
    return [{"role": m.role, "content": "".join(text.get(p, p) for p in m.content)} for m in sample.messages]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learned_is_what_the_template_marks_as_generated(name, tokenizer, placeholders):
    sample = sample_of(*CONVERSATIONS[name])
    tokens = tokenize(sample, tokenizer, placeholders, segments)
    oracle = tokenizer.apply_chat_template(
        turns_of(sample), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    # The oracle has one placeholder a medium: ours are folded back.
    media, folded = iter(sample.media), []
    position = 0
    while position < len(tokens.input_ids):
        token, label = tokens.input_ids[position], tokens.labels[position]
        count = LENGTHS[next(media)] if token == placeholders["image"].id else 1
        assert tokens.input_ids[position : position + count] == [token] * count
        assert count == 1 or tokens.labels[position : position + count] == [-100] * count
        folded.append((token, label))
        position += count
    assert [token for token, _ in folded] == oracle["input_ids"]
    marked = zip(oracle["input_ids"], oracle["assistant_masks"], strict=True)
    assert [label for _, label in folded] == [token if learned else -100 for token, learned in marked]
    assert tokens.media == sample.media
    assert len(tokens.input_ids) == len(oracle["input_ids"]) + sum(LENGTHS[medium] - 1 for medium in sample.media)


def test_the_answer_and_its_end_are_learned_and_nothing_else(tokenizer, placeholders):
    tokens = tokenize(sample_of(*CONVERSATIONS["one turn"]), tokenizer, placeholders, segments)
    assert tokenizer.decode([label for label in tokens.labels if label != -100]) == "a red square<|im_end|>"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_the_beginning_of_the_whole(name, tokenizer, placeholders):
    sample = sample_of(*CONVERSATIONS[name])
    whole = tokenize(sample, tokenizer, placeholders, segments)
    prompt = tokenize_prompt(sample.question, tokenizer, placeholders, segments)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.labels[len(prompt.input_ids)] != -100


def test_a_tokenizer_without_template_learns_the_same_way(tokenizer, placeholders):
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokens = tokenize(sample_of(*CONVERSATIONS["two turns"]), tokenizer, placeholders, segments)
    learned = tokenizer.decode([label for label in tokens.labels if label != -100])
    assert learned == "a red square<|im_end|>blue\nand  two lines é ☃<|im_end|>"


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_refused_by_its_row_although_its_turn_ends(empty, tokenizer, placeholders):
    with pytest.raises(DataError, match=r"rows.csv:3: turn 1, the assistant's, is empty"):
        tokenize(sample_of(("user", "What?"), ("assistant", empty)), tokenizer, placeholders, segments)


def test_a_template_that_drops_the_answer_is_refused(tokenizer, placeholders):
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"rows.csv:3: no token would be learned"):
        tokenize(sample_of(("user", "What?"), ("assistant", "red")), tokenizer, placeholders, segments)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_text_that_spells_a_placeholder_is_text(role, tokenizer, placeholders):
    turns = [("user", PICTURE, "What?"), ("assistant", "red")]
    turns.insert(0 if role == "system" else 1, (role, "see <|image|>"))
    tokens = tokenize(sample_of(*turns, ("assistant", "x")), tokenizer, placeholders, segments)
    begin, end = tokens.media_begins[0], tokens.media_ends[0]
    image = placeholders["image"].id
    assert image not in tokens.input_ids[:begin] + tokens.input_ids[end:] and image in tokens.input_ids[begin:end]
    assert tokenizer.decode(tokens.input_ids).count("see <|image|>") == 1


def test_a_template_that_rewrites_history_is_refused(tokenizer, placeholders):
    tokenizer.chat_template = CHATML.replace(
        "{% generation %}{{ message['content'] +",
        "{% generation %}{{ (message['content'] if loop.last else message['content'][2:]) +",
    )
    tokenize(sample_of(*CONVERSATIONS["one turn"]), tokenizer, placeholders, segments)
    with pytest.raises(DataError, match=r"rows.csv:3: the chat template renders turn 1 otherwise"):
        tokenize(sample_of(*CONVERSATIONS["two turns"]), tokenizer, placeholders, segments)


def test_a_template_that_drops_media_is_refused(tokenizer, placeholders):
    tokenizer.chat_template = CHATML.replace("message['content'] +", "message['content'].replace('<|image|>', '') +")
    with pytest.raises(DataError, match=r"rows.csv:3: 1 media, but the chat template kept another number"):
        tokenize(sample_of(*CONVERSATIONS["one turn"]), tokenizer, placeholders, segments)


def test_a_template_that_raises_is_a_data_error(tokenizer, placeholders):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows.csv:3: .*roles must alternate"):
        tokenize(sample_of(*CONVERSATIONS["one turn"]), tokenizer, placeholders, segments)


def test_media_without_an_encoder_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"rows.csv:3: holds image, but this model takes text only"):
        tokenize(sample_of(*CONVERSATIONS["one turn"]), tokenizer, {}, segments)
    others = add_placeholders(tokenizer, ["audio", "video"], {"audio": "<|audio|>", "video": "<|video|>"})
    with pytest.raises(DataError, match=r"prompt: holds image, but this model takes audio, video"):
        tokenize_prompt(sample_of(*CONVERSATIONS["one turn"]).question, tokenizer, others, segments)


def test_a_placeholder_is_one_special_token(tokenizer, placeholders):
    assert tokenizer("a<|image|>b", add_special_tokens=False)["input_ids"].count(placeholders["image"].id) == 1
    assert tokenizer.decode([placeholders["image"].id], skip_special_tokens=True) == ""
    assert add_placeholders(tokenizer, ["image"], {"image": "<|image|>"}) == placeholders  # once, not twice


THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and ANSWERS %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("answers", ["true", "false"], ids=["as Qwen3", "in the prompt alone"])
def test_an_empty_thought_is_never_learnt(answers):
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = THINKING.replace("ANSWERS", answers)
    turns = (Message("user", ("What is this?",)), Message("assistant", ("blue",)))
    tokens = tokenize(Sample(turns, "rows.csv:2"), tokenizer, {}, segments)
    learned = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    assert learned == "blue<|im_end|>"
    prompt = tokenize_prompt(turns[:1], tokenizer, {}, segments)
    assert tokens.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_segments_stand_one_after_the_other_each_behind_its_mark(tokenizer, placeholders):
    """A clip of two frames: what it becomes is what writing the marks and placeholders by hand would give."""
    sample = sample_of(("user", "Look: ", PICTURE, "What?"), ("assistant", "red"))
    tokens = tokenize(sample, tokenizer, placeholders, lambda medium: [("0.0s ", 2), ("1.5s ", 3)])
    whole = tokenize(sample, tokenizer, placeholders, lambda medium: [("", 1)])
    place = whole.input_ids.index(placeholders["image"].id)
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    shown = [*plain("0.0s "), *[placeholders["image"].id] * 2, *plain("1.5s "), *[placeholders["image"].id] * 3]
    assert tokens.input_ids == [*whole.input_ids[:place], *shown, *whole.input_ids[place + 1 :]]
    assert tokens.labels == [*whole.labels[:place], *[-100] * len(shown), *whole.labels[place + 1 :]]


def learnt_of(tokenizer, *turns) -> str:
    tokens = tokenize(sample_of(*turns), tokenizer, {}, segments)
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def test_a_token_that_closes_a_whole_conversation_is_not_learnt(tokenizer):
    """As Phi-3's template does: what it adds at the very end is no part of a turn."""
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    turns = (("user", "What?"), ("assistant", "a red square"), ("user", "And this?"), ("assistant", "blue"))
    assert learnt_of(tokenizer, *turns[:2], *turns[2:]) == "a red square<|im_end|>blue<|im_end|>\n<|endoftext|>"


def test_where_no_token_ends_a_turn_its_line_break_does(tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    assert learnt_of(tokenizer, ("user", "What?"), ("assistant", "red"), ("user", "And?"), ("assistant", "b")) == (
        "red\nb\n"
    )


def test_a_first_token_alone_is_nothing_to_learn(tokenizer):
    """No state comes before it that could predict it."""
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    assert learnt_of(tokenizer, ("user", "What?"), ("assistant", "red square")) == "red square"
    with pytest.raises(DataError, match="no token would be learned from this row"):
        learnt_of(tokenizer, ("user", "What?"), ("assistant", "x"))


def test_what_is_learned_of_an_answer_are_its_tokens_and_the_end(tokenizer):
    assert tokenizer.decode(answer_tokens("a red square", tokenizer)) == "a red square<|im_end|>"


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        (None, ["<|im_end|>"]),
        (0, ["<|endoftext|>", "<|im_end|>"]),
        ([0, 1], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    ],
)
def test_an_answer_ends_where_the_template_the_tokenizer_or_the_llm_end_it(config, ends, tokenizer):
    for eos_token in ("<|im_end|>", None):
        tokenizer.eos_token = eos_token
        found = answer_ends(tokenizer, SimpleNamespace(eos_token_id=config))
        assert found == sorted(found) and tokenizer.convert_ids_to_tokens(found) == ends


def test_an_ordinary_token_at_the_end_of_a_turn_ends_no_answer(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' . ' }}{% endfor %}"
    assert answer_ends(tokenizer, SimpleNamespace(eos_token_id=None)) == [tokenizer.eos_token_id]


def test_a_row_is_named_where_a_prompt_is_refused(tokenizer, placeholders):
    with pytest.raises(DataError, match=r"^table:7: holds image, but this model takes text only"):
        tokenize_prompt([Message("user", (PICTURE,))], tokenizer, {}, segments, "table:7")
    prompt = tokenize_prompt(sample_of(*CONVERSATIONS["one turn"]).question, tokenizer, placeholders, segments)
    assert set(prompt.labels) == {IGNORED} and len(prompt.labels) == len(prompt.input_ids)
    assert prompt.media == (PICTURE,) and tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")


def test_a_placeholder_may_be_any_text_and_stays_whole(tokenizer):
    found = add_placeholders(tokenizer, ["audio"], {"audio": " ~a~ ", "image": "unused"})
    assert list(found) == ["audio"] and found["audio"].token == " ~a~ "
    assert tokenizer("x ~a~ y", add_special_tokens=False)["input_ids"].count(found["audio"].id) == 1
    assert tokenizer.convert_tokens_to_ids(" ~a~ ") == found["audio"].id


def test_the_template_alone_says_where_special_tokens_stand(tokenizer, placeholders):
    """A tokenizer that begins each text with one: the template, and marks of segments, would have it twice."""
    sample = sample_of(*CONVERSATIONS["one turn"])

    def ids():
        whole = tokenize(sample, tokenizer, placeholders, lambda medium: [("0.0s ", 2)])
        return whole, tokenize_prompt(sample.question, tokenizer, placeholders, lambda medium: [("0.0s ", 2)])

    before = ids()
    special = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[special]
    )
    assert tokenizer("a")["input_ids"][0] == special[1] and ids() == before
