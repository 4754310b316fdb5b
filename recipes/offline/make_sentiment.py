"""Make recipes/data/sentiment: short posts with a picture, whose mood only text and picture together tell.

    python recipes/offline/make_sentiment.py [--into recipes/data/sentiment] [--packages weights/.packages]

The pictures are drawn from Noto Color Emoji, pinned in assets.json; the texts are built from the templates below.
Chance has a fixed seed; the same Pillow gives the same bytes. The mood of a row: negative where text or picture is
negative (praise beside a crying face is meant ironically), else positive where one of them is positive, else neutral.
"""

import itertools
import random
import sys
from pathlib import Path

from dataset_files import Row, argument_parser, empty_folder, write_picture, write_rows
from fetch import DEFAULT_FOLDER, FetchError
from make_emoji import draw_emoji, emoji_font
from PIL import Image, ImageFont

SEED = 31
SIDE = 128  # pixels
COLOURS = 48  # per picture
VARIANTS = {"train": 3, "test": 2}  # of each picture: size, place, turn and paper
PAPERS = ("white", "#fdf3dc", "#e3f1fb", "#e9f6e4", "#f6e6f3", "#ececec")
MOODS = {"positive": "正面", "neutral": "中性", "negative": "负面"}
CELLS = {  # (mood of the text, mood of the picture): rows to train on, rows to test on
    ("positive", "positive"): (48, 16), ("positive", "neutral"): (48, 16), ("neutral", "positive"): (48, 16),
    ("neutral", "neutral"): (144, 48),
    ("negative", "negative"): (28, 9), ("negative", "neutral"): (29, 10), ("neutral", "negative"): (29, 10),
    ("positive", "negative"): (29, 10), ("negative", "positive"): (29, 9),
}  # fmt: skip
PICTURES = {  # what each shows is the mood that most people would see in it; pictures of things have none
    "positive": "😀😃😄😁😆😂🤣🙂😉😊😇🥰😍🤩😘😗☺😚😙😋😛😜🤪😝🤗😌🤠🥳😎😺😸😹😻😽💘💝💖💗💓💞💕❤💛💚💙💜🧡"
    "💌👍👏🙌✌👌🙆🌹💐🎁🎉🎊🏆🥇🌈🌞🎂🎈🌻🌸🍭",
    "negative": "😒🙄😔🤒🤕🤢🤮🥵🥶😵😕😟🙁☹😦😧😨😰😥😢😭😱😖😣😞😓😩😫😤😡😠🤬👿💀💩🙀😿😾"
    "👎🙅🙍🙎🤦💔💢💥💣⛈🌧🌩🥀🚫❌🚨⚠🤧😪☠🚑🌪",
    "neutral": "😐😑😶🤔🧐🤓📖📅📎📏✏🔑🚪🛋🚌🏢🗺📦💻📱👕👖💼📄📁📊⏰🚲🪑📌✂🖨⌨🖱🧦👟🧢🎒🏠🏫🚗🚆🍚🥄🧻🔌🔋💡📻📺🧺🕯📰",
}
NEUTRAL_THINGS = {
    "zh": (
        "会议",
        "快递",
        "超市",
        "课程表",
        "地铁站",
        "图书馆",
        "充电器",
        "办公室",
        "停车场",
        "日历",
        "说明书",
        "窗帘",
    ),
    "en": ("the meeting", "the parcel", "the bus", "the library", "the office", "the manual", "the form", "the shop"),
}
THINGS = {
    "zh": ("火锅", "电影", "演唱会", "新同事", "这趟旅行", "礼物", "成绩", "咖啡", "新手机", "球赛", "周末", "这家店"),
    "en": ("the dinner", "the film", "the concert", "my new job", "the trip", "the gift", "the exam", "the coffee"),
}
SAYINGS = {  # the last two of each are only tested
    "zh": {
        "positive": ("{}太棒了", "{}真让人开心", "我好喜欢{}", "{}比想的还好", "{}非常满意", "{}值得推荐",
                     "为{}点赞", "{}好极了"),
        "negative": ("{}太差了", "{}真让人失望", "我讨厌{}", "{}比想的还糟", "{}非常不满", "{}让我很难过",
                     "{}气死我了", "{}糟透了"),
        "neutral": ("{}改在三点", "{}在二楼", "{}明天到", "看了一下{}", "{}下周开始", "{}在左边",
                    "问问{}的事", "{}换了号码"),
    },
    "en": {
        "positive": ("{} was great", "I love {}", "so happy with {}", "{} went really well", "{} made my day",
                     "very pleased with {}", "{} is wonderful", "what a success, {}"),
        "negative": ("{} was terrible", "I hate {}", "so sad about {}", "{} went really badly", "{} ruined my day",
                     "very angry about {}", "{} is awful", "what a failure, {}"),
        "neutral": ("{} is at three", "{} is on floor two", "{} comes tomorrow", "looked at {}", "{} starts next week",
                    "{} is on the left", "a question about {}", "{} has a new number"),
    },
}  # fmt: skip
ADDED = {
    "zh": ("", "今天", "刚才", "这次", "说一句，", "昨天", "朋友说"),
    "en": ("", "today ", "well, ", "again: ", "just now, ", "yesterday ", "hey, "),
}


def texts(split: str, mood: str) -> list[Row]:
    """Texts of a mood, the two languages in turn. What is tested has other things, and in part other sayings."""
    draw = random.Random(f"{SEED}/{split}/{mood}")
    made: dict[str, list[Row]] = {}
    for language in ("zh", "en"):
        things = (NEUTRAL_THINGS if mood == "neutral" else THINGS)[language]
        sayings = SAYINGS[language][mood]
        things, sayings = (things[3:], sayings[:-2]) if split == "train" else (things[:3], sayings)
        built = [f"{a}{s.format(t)}" for a, s, t in itertools.product(ADDED[language], sayings, things)]
        draw.shuffle(built)
        made[language] = [{"text": text, "language": language} for text in built]
    return [text for pair in zip(made["zh"], made["en"], strict=False) for text in pair]


def characters() -> dict[str, dict[str, list[str]]]:
    """{split: {mood: emoji}}: a fourth of each mood is only tested."""
    sides: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for mood, written in PICTURES.items():
        order = list(written)
        random.Random(f"{SEED}/pictures/{mood}").shuffle(order)
        sides["test"][mood], sides["train"][mood] = order[: len(order) // 4], order[len(order) // 4 :]
    return sides


def picture(character: str, font: ImageFont.FreeTypeFont, draw: random.Random) -> Image.Image:
    """An emoji on paper: SIDE x SIDE, RGB."""
    drawn = draw_emoji(character, font, "RGBA", "#00000000")
    side = draw.randint(96, 126)
    drawn = drawn.resize((side, side), Image.Resampling.BICUBIC).rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC)
    paper = Image.new("RGB", (SIDE, SIDE), draw.choice(PAPERS))
    paper.paste(drawn, (draw.randint(0, SIDE - side), draw.randint(0, SIDE - side)), drawn)
    return paper


def label_of(text: str, shown: str) -> str:
    return next((mood for mood in ("negative", "positive") if mood in (text, shown)), "neutral")


def plan(split: str) -> list[Row]:
    """The rows of a table, in a drawn order. No text stands in two rows where there are enough."""
    draw = random.Random(f"{SEED}/{split}")
    words = {mood: itertools.cycle(texts(split, mood)) for mood in MOODS}
    shown = {}
    for mood, emoji in characters()[split].items():
        files = [f"images/{split}-{ord(one):x}-{i}.png" for one in emoji for i in range(VARIANTS[split])]
        draw.shuffle(files)
        shown[mood] = itertools.cycle(files)
    rows = []
    for (text, seen), counts in CELLS.items():
        for _ in range(counts[split == "test"]):
            label = label_of(text, seen)
            row = {"image": next(shown[seen]), **next(words[text]), "text_mood": text, "image_mood": seen}
            rows.append({**row, "label": MOODS[label], "label_en": label})
    draw.shuffle(rows)
    return rows


def main() -> int:
    parser = argument_parser("sentiment", "Make the posts with pictures.")
    parser.add_argument("--packages", type=Path, default=DEFAULT_FOLDER / ".packages", help="cache of archives")
    chosen = parser.parse_args()
    try:
        font = emoji_font(chosen.packages)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    empty_folder(chosen.into / "images")
    for split in VARIANTS:
        rows = plan(split)
        for file in sorted({row["image"] for row in rows}):
            character = chr(int(file.split("-")[1], 16))
            drawn = picture(character, font, random.Random(f"{SEED}/{file}"))
            write_picture(drawn, chosen.into / file, COLOURS)
        columns = ["image", "text", "label", "label_en", "text_mood", "image_mood", "language"]
        write_rows(chosen.into / f"{split}.csv", rows, columns)
        print(split, len(rows), "rows", len({row["image"] for row in rows}), "pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
