"""Make recipes/data/emoji: pictures of Noto Color Emoji with their English and Chinese names, split by concept.

    python recipes/offline/make_emoji.py [--into recipes/data/emoji] [--packages weights/.packages]

The pictures come from the font, the names and groups from emojibase (CLDR), both pinned in assets.json. The result
is kept in the repository; this script says how it came about. The same Pillow gives the same bytes.
"""

import io
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy
from dataset_files import argument_parser, empty_folder, write_picture, write_rows
from fetch import DEFAULT_FOLDER, FetchError, fetch_archive, read_member
from PIL import Image, ImageDraw, ImageFont, features

SEED = 20
SIDE = 128  # pixels
COLOURS = 64  # per picture
TEST_SHARE = 0.22
LARGEST_LABEL = 215  # pictures; a label with more is thinned by whole concepts
LARGEST_TEST_CONCEPT = 4  # pictures; larger families (arrows, books) are only trained on

ENGLISH = {
    "表情": "face", "人物": "people", "动物": "animal", "自然": "nature", "食物": "food",
    "旅行": "travel", "活动": "activity", "物品": "object", "符号": "symbol",
}  # fmt: skip
LABEL_OF_GROUP = {
    "smileys-emotion": "表情", "people-body": "人物", "animals-nature": "动物", "food-drink": "食物",
    "travel-places": "旅行", "activities": "活动", "objects": "物品", "symbols": "符号",
}  # fmt: skip
LABEL_OF_SUBGROUP = {  # where the group's name would not be what people call the picture
    "heart": "符号", "emotion": "符号", "plant-flower": "自然", "plant-other": "自然", "sky-weather": "自然",
    "place-geographic": "自然", "time": "物品", "hotel": "物品",
}  # fmt: skip

# Writing and plain shapes, clock faces, and the same person once more by gender or age.
LEFT_OUT_SUBGROUPS = {"keycap", "alphanum", "geometric"}
LEFT_OUT_NAMES = re.compile(
    r".*o’clock|.*-thirty|(old )?(wo)?man|boy|girl|prince|Mrs\. Claus|man dancing|.*m[ae]n holding hands|"
    r"person: .*|busts in silhouette|middle finger"
)
MODIFIERS = re.compile(r" (with|without|behind|of|on|in|over|and|showing|curving|pointing|not) .*|: .*")
GENDERED = re.compile(r"^1F46[89]-|-264[02]")  # code sequences that begin with man or woman, or end with such a sign
GENERIC = {"face", "person", "people", "hand", "button", "sign", "symbol", "ball", "badge"}


def read_names(archive: Path) -> list[dict]:
    """One row per emoji, leaving out flags, skin tones, variants by gender, and what is listed above."""
    messages = json.loads(read_member(archive, "package/en/messages.json"))
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    chinese = {entry["hexcode"]: entry["label"] for entry in json.loads(read_member(archive, "package/zh/data.json"))}
    rows = []
    for entry in json.loads(read_member(archive, "package/en/data.json")):
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        if group not in LABEL_OF_GROUP or subgroup in LEFT_OUT_SUBGROUPS or GENDERED.search(entry["hexcode"]):
            continue
        if LEFT_OUT_NAMES.fullmatch(entry["label"]):
            continue
        label = LABEL_OF_SUBGROUP.get(subgroup, LABEL_OF_GROUP[group])
        code = entry["hexcode"].lower()
        rows.append({
            "image": f"images/{code}.png", "label": label, "label_en": ENGLISH[label],
            "name_zh": chinese[entry["hexcode"]], "name_en": entry["label"], "subgroup": subgroup,
            "character": entry["emoji"],
        })  # fmt: skip
    return rows


def emoji_font(packages: Path) -> ImageFont.FreeTypeFont:
    """Noto Color Emoji in the one size of its bitmaps, 136x128 pixels. Raises FetchError."""
    return ImageFont.truetype(io.BytesIO(read_member(fetch_archive("noto_emoji", packages), ".ttf")), 109)


def draw_emoji(character: str, font: ImageFont.FreeTypeFont, mode: str, paper: str) -> Image.Image:
    picture = Image.new(mode, (136, 136), paper)
    ImageDraw.Draw(picture).text((0, 4), character, font=font, embedded_color=True)
    return picture


def draw(rows: list[dict], font: ImageFont.FreeTypeFont) -> list[dict]:
    """Add a picture (RGB on white, SIDE x SIDE) to each row; rows that the font lacks are dropped."""
    if not features.check("raqm"):
        raise FetchError(
            "this Pillow has no Raqm, which joins sequences such as person + rocket: use a wheel of Pillow."
        )
    missing = {draw_emoji(character, font, "RGB", "white").tobytes() for character in ("", "\U0010fffd")}
    drawn = []
    for row in rows:
        picture = draw_emoji(row["character"], font, "RGB", "white")
        if picture.tobytes() not in missing and font.getlength(row["character"]) <= picture.width:
            drawn.append(row | {"picture": picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)})
    return drawn


def head_word(name: str) -> str:
    """The noun that says what is pictured ("oncoming bus" -> "bus"), or "" where it says too little."""
    words = [word.lower().removesuffix("s") for word in MODIFIERS.sub("", name).split()]
    while words and words[-1] in GENERIC:
        words.pop()
    return words[-1] if words else ""


def similarity(rows: list[dict]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Cosines of 32x32 thumbnails: of colour (as distance from white), and of grey after taking off the mean."""

    def cosines(mode: str) -> numpy.ndarray:
        thumbnails = [row["picture"].convert(mode).resize((32, 32), Image.Resampling.BOX) for row in rows]
        vectors = 255 - numpy.stack([numpy.asarray(one, dtype=numpy.float64).ravel() for one in thumbnails])
        if mode == "L":
            vectors -= vectors.mean(axis=1, keepdims=True)
        vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors @ vectors.T

    return cosines("RGB"), cosines("L")


def drop_near_duplicates(rows: list[dict]) -> list[dict]:
    """Keep the first of pictures that look the same (0.98), or differ only in the colour of the same thing (0.965)."""
    colour, grey = similarity(rows)
    heads = [head_word(row["name_en"]) for row in rows]
    kept: list[int] = []
    for i in range(len(rows)):
        same = (colour[i, j] >= 0.98 or (heads[i] and heads[i] == heads[j] and grey[i, j] >= 0.965) for j in kept)
        if not any(same):
            kept.append(i)
    return [rows[i] for i in kept]


def concepts(rows: list[dict]) -> list[int]:
    """A number per row, equal for pictures that share a head word or look alike (0.97), directly or by a chain."""
    colour, _ = similarity(rows)
    heads = [head_word(row["name_en"]) for row in rows]
    numbers = list(range(len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            if numbers[i] != numbers[j] and ((heads[i] and heads[i] == heads[j]) or colour[i, j] >= 0.97):
                old, new = sorted((numbers[i], numbers[j]), reverse=True)
                numbers = [new if number == old else number for number in numbers]
    return numbers


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and test rows; a concept is on one side only, and each label has about TEST_SHARE of tests."""
    families: dict[int, list[dict]] = {}
    for number, row in zip(concepts(rows), rows, strict=True):
        families.setdefault(number, []).append(row)
    order = list(families.values())
    random.Random(SEED).shuffle(order)
    available = Counter(row["label"] for row in rows)
    wanted = {label: round(TEST_SHARE * min(count, LARGEST_LABEL)) for label, count in available.items()}
    test: list[dict] = []
    rest: list[list[dict]] = []
    tested: Counter[str] = Counter()
    for family in order:
        counts = Counter(row["label"] for row in family)
        if len(family) <= LARGEST_TEST_CONCEPT and all(tested[key] + counts[key] <= wanted[key] for key in counts):
            test += family
            tested += counts
        else:
            rest.append(family)
    train: list[dict] = []
    taken = Counter(tested)
    for family in sorted(rest, key=len, reverse=True):
        counts = Counter(row["label"] for row in family)
        if all(taken[key] + counts[key] <= LARGEST_LABEL for key in counts):
            train += family
            taken += counts
    return train, test


def write(rows: list[dict], file: Path) -> None:
    """A CSV in the order of the emoji standard's codes, and its pictures beside it."""
    columns = ["image", "label", "label_en", "name_zh", "name_en", "subgroup"]
    write_rows(file, sorted(rows, key=lambda row: row["image"]), columns)
    for row in rows:
        write_picture(row["picture"], file.parent / row["image"], COLOURS)


def main() -> int:
    parser = argument_parser("emoji", "Make the emoji pictures and tables.")
    parser.add_argument("--packages", type=Path, default=DEFAULT_FOLDER / ".packages", help="cache of archives")
    chosen = parser.parse_args()
    try:
        names = fetch_archive("emoji_names", chosen.packages)
        rows = drop_near_duplicates(draw(read_names(names), emoji_font(chosen.packages)))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    train, test = split(rows)
    empty_folder(chosen.into / "images")
    for name, part in (("train", train), ("test", test)):
        write(part, chosen.into / f"{name}.csv")
        counts = Counter(row["label"] for row in part)
        print(name, len(part), *(f"{label} {counts[label]}" for label in ENGLISH))
    return 0


if __name__ == "__main__":
    sys.exit(main())
