"""answer, caption, chat, transcribe and vqa: what is asked, what is learned, and what counts as right."""

import pytest
from task_rows import Asked

from finetune.common.errors import DataError, MissingColumn
from finetune.data.sample import Answer


def test_a_question_has_its_text_before_it_and_the_prompt_behind(tmp_path):
    asked = Asked("answer", tmp_path, text="page", prompt="一个词。")
    assert asked.question(page="P. 3", question="几只猫？", answer="2") == "P. 3\n几只猫？\n一个词。"
    assert asked.sample(page="P. 3", question="Q", answer=2).answer == "2"
    nothing = Asked("answer", tmp_path, media=[], question="")
    with pytest.raises(DataError, match=r"rows.csv:2: the question is empty"):
        nothing.sample(answer="2")


def test_captions_may_be_several(tmp_path):
    asked = Asked("caption", tmp_path, references="more")
    sample = asked.sample(caption="a red cat", more='["a cat", "the red cat"]')
    assert sample.answer == "a red cat" and sample.target == ["a red cat", "a cat", "the red cat"]
    assert sample.media[0].text == "a red cat"
    assert asked.sample(caption=["一只猫", "猫"], more=["红猫"]).target == ["一只猫", "猫", "红猫"]
    assert asked.sample(caption="[blurry] a cat", more="x").answer == "[blurry] a cat"
    scores = asked.scores((sample, "a cat"), (sample, "the cat"))
    assert scores["exact_match"] == 0.5
    assert scores["token_f1"] == pytest.approx((1 + 4 / 5) / 2)  # of 'the red cat'
    for wrong in ([], ["a", None], "", None):
        with pytest.raises(DataError, match=r"rows.csv:2: column 'more'"):
            asked.sample(caption="a red cat", more=wrong)


def test_error_rates_are_of_all_rows_together(tmp_path):
    asked = Asked("transcribe", tmp_path, media=["image"])
    long, short = asked.sample(text="今天天气很好，我们出去走走吧。"), asked.sample(text="Yes.")
    scores = asked.scores((long, "今天天气很好我们出去走吧"), (short, "no"))
    assert list(scores) == ["character_error_rate", "exact_match"]  # of Chinese there is no rate by word
    assert scores["character_error_rate"] == pytest.approx((1 + 3) / (13 + 3))
    english = asked.sample(text="The cat sat on the mat.")
    scores = asked.scores((english, "the cat sat on a mat"), (short, "no"))
    assert scores["word_error_rate"] == pytest.approx((1 + 1) / (6 + 1))
    assert scores["character_error_rate"] == pytest.approx((3 + 3) / (17 + 3))
    assert scores["exact_match"] == 0.0 and asked.scores((short, "yes"))["exact_match"] == 1.0
    assert [asked.row(short, Answer(text))["good"] for text in ("YES", "yet", "no " * 9)] == [
        1.0,
        pytest.approx(2 / 3),
        0.0,
    ]
    assert asked.scores((asked.sample(text="?!"), "what")) == {"exact_match": 0.0}


def test_the_commonest_answer_is_learned_and_all_are_scored(tmp_path):
    asked = Asked("vqa", tmp_path)
    answers = ["2"] * 3 + ["two"] * 4 + ["three"] * 2 + ["a few"]
    sample = asked.sample(question="How many?", answers=answers)
    assert sample.answer == "2" and sample.target == answers
    scores = asked.scores((sample, "Two."), (sample, "3"), (sample, "few"), (sample, "dog"))
    assert scores["vqa_accuracy"] == pytest.approx((1 + 0.6 + 0.3 + 0) / 4) and scores["exact_match"] == 0.25
    assert asked.sample(question="几只？", answers="两只; 两只；一只").target == ["两只", "两只", "一只"]
    one = Asked("vqa", tmp_path, separator="").sample(question="Q", answers="a; b")
    assert one.target == ["a; b"]
    with pytest.raises(DataError, match=r"rows.csv:2: column 'answers'"):
        asked.sample(question="Q", answers=" ;")


def test_conversations_keep_their_media_in_place(tmp_path):
    asked = Asked("chat", tmp_path)
    content = [{"type": "text", "text": "看："}, {"type": "image", "image": "a.png"}]
    sample = asked.sample(messages=[{"role": "user", "content": content}, {"role": "assistant", "content": "一只猫"}])
    assert sample.question[0].content[0] == "看：" and sample.media == (sample.question[0].content[1],)
    assert asked.scores((sample, "一只猫"), (sample, "两只猫"))["token_f1"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("kind", ["answer", "caption", "classify", "extract", "ground", "rank", "score", "vqa"])
def test_several_columns_of_text_stand_in_their_order_each_on_its_own_line(kind, tmp_path):
    answers = {"answer": "1", "answers": "1", "caption": "a", "label": "x", "boxes": [1, 2, 3, 4], "score": 1}
    own = {"fields": {"n": "number"}} if kind == "extract" else {}
    asked = Asked(kind, tmp_path, text=["title", "body"], **own)
    rows = answers | {"relevance": 1, "json": {"n": 1}, "group": "g", "question": "Which?"}
    rows |= {"title": "Shoes", "body": "Red, size 42"}
    assert asked.question(**rows).strip().startswith("Shoes\nRed, size 42\n")
    with pytest.raises(MissingColumn, match="body"):
        asked.sample(**{name: value for name, value in rows.items() if name != "body"})
