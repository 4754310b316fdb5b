"""Make recipes/data/recommend: what shoppers did before, what they are shown now, and what they clicked. Synthetic.

    python recipes/offline/make_recommend.py [--data recipes/data] [--into recipes/data/recommend]

Products are pictures of emoji/, none is copied: paths are relative to the folder of the data. Everything drawn by
chance has a fixed seed. Shoppers to test with are other ones than those to train on, and they are shown only pictures
of the emoji's test.csv.
"""

import argparse
import csv
import random
import re
import sys
from pathlib import Path

SEED = 32
USERS = {"train": 64, "test": 18}
SHOWN = 8  # products to each user
CLICKS = 3  # of them
SHELVES = {  # subgroups of the emoji, the words for them, and how many of ten shoppers shop there most
    "food": ("food-.*|drink", "食品", 3),
    "clothing": ("clothing", "服饰", 2),
    "animal": ("animal-.*", "玩偶", 2),
    "vehicle": ("transport-(ground|air|water)", "车船", 1),
    "plant": ("plant-.*", "花草", 1),
    "games": ("sport|game", "文体", 1),
}
NO_PRODUCT = re.compile(
    "stop|light|construct|track|station|motorway|oil|fuel|seat|prints|wilted|fallen|leaf|goal|suit|chair"
)
LEVELS = {"zh": ("低", "高"), "en": ("low", "high")}
WORTH = {
    "bought": 2.4,
    "viewed": 1.2,
    "price": 1.0,
    "sales": 0.7,
    "mood": 0.4,
}  # added to the appeal of a product
SENTENCES = {
    "zh": ("买过{}和{}（{}），看过{}（{}）。预算{}。", "价格{}，销量{}。"),
    "en": ("Bought {} and {} ({}), viewed {} ({}). Budget {}.", "Price {}, sales {}."),
}
DATA = Path(__file__).resolve().parents[1] / "data"


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def products(pictures: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows of the emoji that could be sold, by shelf."""
    return {
        shelf: [p for p in pictures if re.fullmatch(groups, p["subgroup"]) and not NO_PRODUCT.search(p["name_en"])]
        for shelf, (groups, _, _) in SHELVES.items()
    }


def history(known: dict[str, list[dict[str, str]]], user: dict[str, str], draw: random.Random) -> str:
    """A sentence on what a user bought and viewed; the names are those of pictures to train on."""
    language = user["language"]
    name = f"name_{language}"
    words = {shelf: chinese if language == "zh" else shelf for shelf, (_, chinese, _) in SHELVES.items()}
    one, other = draw.sample(known[user["bought"]], 2)
    seen = draw.choice(known[user["viewed"]])
    budget = LEVELS[language][int(user["budget"])]
    said = (one[name], other[name], words[user["bought"]], seen[name], words[user["viewed"]], budget)
    return SENTENCES[language][0].format(*said)


def offers(shop: dict[str, list[dict[str, str]]], user: dict[str, str], draw: random.Random) -> list[dict[str, str]]:
    """What one user is shown: two products of the shelf bought from, two of the one viewed, the others of the rest."""
    rest = [shelf for shelf in SHELVES if shelf not in (user["bought"], user["viewed"])]
    shelves = [user["bought"]] * 2 + [user["viewed"]] * 2 + draw.sample(rest * 2, SHOWN - 4)
    taken: list[str] = []
    rows, appeals = [], []
    for shelf in shelves:
        product = draw.choice([one for one in shop[shelf] if one["image"] not in taken])
        taken.append(product["image"])
        price, sales = draw.randrange(2), draw.randrange(2)
        matches = {
            "bought": shelf == user["bought"], "viewed": shelf == user["viewed"],
            "price": price == int(user["budget"]), "sales": sales,
        }  # fmt: skip
        appeals.append(sum(WORTH[what] * matches[what] for what in matches) + draw.gauss(0, WORTH["mood"]))
        levels = LEVELS[user["language"]]
        offer = SENTENCES[user["language"]][1].format(levels[price], levels[sales])
        rows.append({
            "image": f"emoji/{product['image']}", "offer": offer, "shelf": SHELVES[shelf][1],
            "product": product[f"name_{user['language']}"],
        })  # fmt: skip
    least = sorted(appeals)[-CLICKS]
    rows = [row | {"clicked": str(int(appeal >= least))} for row, appeal in zip(rows, appeals, strict=True)]
    draw.shuffle(rows)
    return rows


def plan(pictures: dict[str, list[dict[str, str]]], split: str) -> list[dict[str, str]]:
    """The rows of a table: a user's offers follow each other."""
    draw = random.Random(f"{SEED}/{split}")
    known, shop = products(pictures["train"]), products(pictures[split])
    favourites = [shelf for shelf, (_, _, share) in SHELVES.items() for _ in range(share)]
    rows = []
    for number in range(USERS[split]):
        bought = draw.choice(favourites)
        viewed = draw.choice([shelf for shelf in SHELVES if shelf != bought])
        user = {
            "user": f"{split}-{number:02}", "language": ("zh", "en")[number % 3 == 2],
            "bought": bought, "viewed": viewed, "budget": str(draw.randrange(2)),
        }  # fmt: skip
        told = {"user": user["user"], "language": user["language"], "history": history(known, user, draw)}
        rows += [told | row for row in offers(shop, user, draw)]
    return rows


def catalog(pictures: dict[str, list[dict[str, str]]], split: str) -> list[dict[str, str]]:
    """Every product with its shelf."""
    return [
        {"image": f"emoji/{product['image']}", "shelf": SHELVES[shelf][1], "shelf_en": shelf}
        for shelf, found in products(pictures[split]).items()
        for product in found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the tables of shoppers and of products.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of emoji/")
    parser.add_argument("--into", type=Path, default=DATA / "recommend")
    chosen = parser.parse_args()
    chosen.into.mkdir(parents=True, exist_ok=True)
    pictures = {split: read_rows(chosen.data / "emoji" / f"{split}.csv") for split in USERS}
    for split in USERS:
        for name, rows in ((split, plan(pictures, split)), (f"catalog-{split}", catalog(pictures, split))):
            with (chosen.into / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(name, len(rows), "rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
