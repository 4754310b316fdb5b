"""Make recipes/data/m6: captions, questions, matches and sentences to complete, on pictures and names of emoji/.

    python recipes/offline/make_m6.py [--data recipes/data] [--into recipes/data/m6]

No picture is copied: paths are relative to the folder of the data. What is asked of which picture is drawn by a fixed
seed. Rows to train on come from the emoji's train.csv only, rows to test on from its test.csv only.
"""

import random

from dataset_files import Row, argument_parser, read_rows, write_rows

SEED = 34
ROWS = {"train": 360, "test": 100}
ENGLISH = 4  # every fourth row
LONGEST = {"zh": 5, "en": 18}  # characters of a name; longer ones describe
LEFT_OUT = {"符号", "表情"}  # groups whose names people wouldn't give
SENTENCES = {  # caption, question, beginning of a sentence
    "zh": ("{label}：{name}", "图片里是{one}还是{other}？", "{name}属于"),
    "en": ("{label}: {name}", "Is it {one} or {other}?", "{name} belongs to"),
}
COLUMNS = ("image", "caption", "question", "answer", "text", "match", "beginning", "end", "language")


def chosen_pictures(pictures: list[Row], count: int, draw: random.Random) -> list[Row]:
    """Pictures in a drawn order, each with its language, and its name and group in that language."""
    chosen: list[Row] = []
    for picture in draw.sample(pictures, len(pictures)):
        language = "en" if len(chosen) % ENGLISH == 0 else "zh"
        name = picture[f"name_{language}"]
        if picture["label"] not in LEFT_OUT and len(name) <= LONGEST[language]:
            label = picture["label" if language == "zh" else "label_en"]
            chosen.append({"image": f"emoji/{picture['image']}", "language": language, "name": name, "label": label})
    return chosen[:count]


def mismatched(pictures: list[Row], draw: random.Random) -> list[str]:
    """For each picture the name of another one, of another group and in the same language; each name once."""
    while True:
        names = []
        left = list(pictures)
        for picture in pictures:
            fit = [p for p in left if p["language"] == picture["language"] and p["label"] != picture["label"]]
            if not fit:
                break
            names.append(draw.choice(fit))
            left.remove(names[-1])
        else:
            return [other["name"] for other in names]


def plan(pictures: list[Row], split: str) -> list[Row]:
    """The rows of a table: every other picture has a name that isn't its own in `text`."""
    draw = random.Random(f"{SEED}/{split}")
    chosen = chosen_pictures(pictures, ROWS[split], draw)
    labels = {language: sorted({p["label"] for p in chosen if p["language"] == language}) for language in SENTENCES}
    wrong = draw.sample(range(len(chosen)), len(chosen) // 2)
    texts = dict(zip(wrong, mismatched([chosen[i] for i in wrong], draw), strict=True))
    rows = []
    for number, picture in enumerate(chosen):
        caption, question, beginning = SENTENCES[picture["language"]]
        other = draw.choice([label for label in labels[picture["language"]] if label != picture["label"]])
        one, two = draw.sample([picture["label"], other], 2)
        rows.append({
            "image": picture["image"], "caption": caption.format(**picture),
            "question": question.format(one=one, other=two), "answer": picture["label"],
            "text": texts.get(number, picture["name"]), "match": "否" if number in texts else "是",
            "beginning": beginning.format(**picture), "end": picture["label"], "language": picture["language"],
        })  # fmt: skip
    return rows


def main() -> None:
    chosen = argument_parser("m6", "Make the tables of four tasks.", reads="emoji/").parse_args()
    for split in ROWS:
        rows = plan(read_rows(chosen.data / "emoji" / f"{split}.csv"), split)
        write_rows(chosen.into / f"{split}.csv", rows, COLUMNS)
        print(split, len(rows), "rows")


if __name__ == "__main__":
    main()
