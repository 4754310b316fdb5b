"""Make recipes/data/charts: wide bar charts, tall receipts, square ones of coloured bars, with questions and answers.

    python recipes/offline/make_charts.py [--into recipes/data/charts]

Everything is drawn here, with the typeface inside Pillow. What is drawn depends on a fixed seed only; the same Pillow
gives the same bytes.
"""

import random
from collections.abc import Callable

from dataset_files import Row, argument_parser, empty_folder, write_picture, write_rows
from PIL import Image, ImageDraw, ImageFont

SEED = 22
PICTURES = {  # of each kind
    "train": {"days": 60, "colours": 50, "receipt": 50},
    "test": {"days": 15, "colours": 12, "receipt": 13},
}
COLOURS = 32  # per picture
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = ("visitors", "calls", "parcels", "orders", "meals", "tickets")
PAINTS = {
    "red": "#c62828", "orange": "#ef7d00", "yellow": "#f2c200", "green": "#2e8b3d", "blue": "#1f5fbf",
    "purple": "#7b3fa0", "brown": "#7a4a21", "grey": "#808080",
}  # fmt: skip
SHOPS = ("Corner Shop", "Green Market", "Harbour Deli", "City Bakery", "Book Nook", "Garden Centre")
GOODS = (
    "Apples", "Bread", "Butter", "Candles", "Cheese", "Coffee", "Eggs", "Flour", "Honey", "Juice", "Milk", "Notebook",
    "Olives", "Pencils", "Rice", "Soap", "Sugar", "Tea", "Tomatoes", "Water",
)  # fmt: skip

Drawing = tuple[Image.Image, list[tuple[str, str]]]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def days(number: int, draw: random.Random) -> Drawing:
    """Wide (448x224): a bar per day of the week, its value written above it."""
    picture = Image.new("RGB", (448, 224), "white")
    pen = ImageDraw.Draw(picture)
    thing, paint = draw.choice(THINGS), draw.choice(list(PAINTS.values()))
    values = draw.sample(range(12, 80), len(DAYS))
    highest = number % len(DAYS)
    values[highest] = max(values) + draw.randrange(4, 20)
    pen.text((224, 12), f"{thing.capitalize()} in week {draw.randrange(1, 53)}", "black", font(15), anchor="mm")
    pen.line((20, 196, 432, 196), "black")
    for i, (day, value) in enumerate(zip(DAYS, values, strict=True)):
        middle = 50 + 58 * i
        height = round(150 * value / max(values))
        pen.rectangle((middle - 17, 196 - height, middle + 17, 195), paint)
        pen.text((middle, 196 - height - 8), str(value), "black", font(13), anchor="mm")
        pen.text((middle, 208), day[:3], "black", font(14), anchor="mm")
    chosen = draw.randrange(len(DAYS))
    return picture, [
        ("Which day is highest?", DAYS[highest]),
        (f"How many {thing} on {DAYS[chosen]}?", str(values[chosen])),
    ]


def colours(number: int, draw: random.Random) -> Drawing:
    """Square (336x336): bars of different colours lying one below the other, without figures."""
    picture = Image.new("RGB", (336, 336), "white")
    pen = ImageDraw.Draw(picture)
    longest = list(PAINTS)[number % len(PAINTS)]
    names = [longest, *draw.sample([name for name in PAINTS if name != longest], 4)]
    lengths = [296, *draw.sample(range(50, 250, 25), 4)]
    bars = draw.sample(list(zip(names, lengths, strict=True)), len(names))
    pen.line((20, 20, 20, 316), "black", 2)
    for i, (name, length) in enumerate(bars):
        pen.rectangle((22, 32 + 58 * i, 22 + length, 70 + 58 * i), PAINTS[name])
    shortest = min(bars, key=lambda bar: bar[1])[0]
    return picture, [("Which colour is longest?", longest), ("Which colour is shortest?", shortest)]


def receipt(number: int, draw: random.Random) -> Drawing:
    """Tall (224x448): a shop's receipt with three to eight goods, their prices and the sum."""
    picture = Image.new("RGB", (224, 448), "white")
    pen = ImageDraw.Draw(picture)
    goods = draw.sample(GOODS, 3 + number % 6)
    prices = [draw.randrange(2, 20) for _ in goods]
    pen.text((112, 30), draw.choice(SHOPS), "black", font(20), anchor="mm")
    date = f"2025-{draw.randrange(1, 13):02}-{draw.randrange(1, 29):02}"
    pen.text((112, 58), date, "black", font(14), anchor="mm")
    pen.line((16, 78, 208, 78), "black")
    for i, (name, price) in enumerate(zip(goods, prices, strict=True)):
        pen.text((20, 102 + 34 * i), name, "black", font(16), anchor="lm")
        pen.text((204, 102 + 34 * i), str(price), "black", font(16), anchor="rm")
    below = 102 + 34 * len(goods)
    pen.line((16, below - 8, 208, below - 8), "black")
    pen.text((20, below + 14), "Total", "black", font(20), anchor="lm")
    pen.text((204, below + 14), str(sum(prices)), "black", font(20), anchor="rm")
    chosen = draw.randrange(len(goods))
    return picture, [
        ("What is the total?", str(sum(prices))),
        (f"What is the price of {goods[chosen]}?", str(prices[chosen])),
    ]


KINDS: dict[str, Callable[[int, random.Random], Drawing]] = {"days": days, "colours": colours, "receipt": receipt}


def make(split: str) -> list[tuple[Image.Image, list[Row]]]:
    """Pictures with their rows."""
    made = []
    for kind, count in PICTURES[split].items():
        for number in range(count):
            file = f"images/{split}-{kind}-{number:02}.png"
            picture, pairs = KINDS[kind](number, random.Random(f"{SEED}/{file}"))
            rows = [{"image": file, "question": question, "answer": answer, "kind": kind} for question, answer in pairs]
            made.append((picture, rows))
    return made


def main() -> None:
    chosen = argument_parser("charts", "Make the charts and receipts and their tables.").parse_args()
    empty_folder(chosen.into / "images")
    for split in PICTURES:
        made = make(split)
        for picture, rows in made:
            write_picture(picture, chosen.into / rows[0]["image"], COLOURS)
        table = [row for _, rows in made for row in rows]
        write_rows(chosen.into / f"{split}.csv", table)
        print(split, len(made), "pictures", len(table), "rows")


if __name__ == "__main__":
    main()
