"""Make recipes/data/recommend: what shoppers did before, what they are shown now, and what they clicked. Synthetic.

    python recipes/offline/make_recommend.py [--data recipes/data] [--into recipes/data/recommend]

Products are pictures of emoji/, none is copied: paths are relative to the folder of the data. Everything drawn by
chance has a fixed seed. Shoppers to test with are other ones than those to train on, and they are shown only pictures
of the emoji's test.csv.
"""

import random
import re

from dataset_files import Row, argument_parser, read_rows, write_rows

SEEDS = {"train": 32, "test": 1032}  # of the test: drawn anew once the recipe was settled
USERS = {"train": 144, "test": 36}
OWN = (1, 2)  # products of the own shelf among those shown, at least and at most
SHOWN = 4  # to each user
CLICKS = 1  # of them
SHELVES = {  # subgroups of the emoji, the words for them, and how many of ten shoppers shop there
    "food": ("food-.*|drink", "食品", 4),
    "clothing": ("clothing", "服饰", 3),
    "animal": ("animal-.*", "玩偶", 2),
    "vehicle": ("transport-(ground|air|water)", "车船", 1),
}
NO_PRODUCT = re.compile(
    "stop|light|construct|track|station|motorway|oil|fuel|seat|prints|wilted|fallen|leaf|goal|suit|chair"
)
WORTH = {"own": 2.0, "sells": 1.4, "cheap": 0.9, "mood": 0.3}  # added to the appeal of a product
SENTENCES = {
    "zh": ("买过{}（{}）。", ("滞销", "热卖"), ("原价", "打折"), "{}，{}。"),
    "en": ("Bought {} ({}).", ("few sold", "bestseller"), ("full price", "sale"), "{}, {}."),
}


def products(pictures: list[Row]) -> dict[str, list[Row]]:
    """Rows of the emoji that could be sold, by shelf."""
    return {
        shelf: [p for p in pictures if re.fullmatch(groups, p["subgroup"]) and not NO_PRODUCT.search(p["name_en"])]
        for shelf, (groups, _, _) in SHELVES.items()
    }


def offers(shop: dict[str, list[Row]], user: Row, draw: random.Random) -> list[Row]:
    """What one user is shown: some products of their shelf, the others one of each other shelf, in a drawn order."""
    others = [shelf for shelf in SHELVES if shelf != user["own"]]
    own = draw.randint(*OWN)
    shelves = [user["own"]] * own + draw.sample(others, SHOWN - own)
    _, sales, prices, sentence = SENTENCES[user["language"]]
    taken = [user["bought"]]
    rows, appeals = [], []
    for shelf in shelves:
        product = draw.choice([one for one in shop[shelf] if one["image"] not in taken])
        taken.append(product["image"])
        sells, cheap = draw.randrange(2), draw.randrange(2)
        appeal = WORTH["own"] * (shelf == user["own"]) + WORTH["sells"] * sells + WORTH["cheap"] * cheap
        appeals.append(appeal + draw.gauss(0, WORTH["mood"]))
        rows.append({
            "image": f"emoji/{product['image']}", "offer": sentence.format(sales[sells], prices[cheap]),
            "shelf": SHELVES[shelf][1], "product": product[f"name_{user['language']}"],
        })  # fmt: skip
    least = sorted(appeals)[-CLICKS]
    rows = [row | {"clicked": str(int(appeal >= least))} for row, appeal in zip(rows, appeals, strict=True)]
    draw.shuffle(rows)
    return rows


def plan(pictures: dict[str, list[Row]], split: str) -> list[Row]:
    """The rows of a table: a user's offers follow each other. What they bought isn't shown again."""
    draw = random.Random(f"{SEEDS[split]}/{split}")
    shop = products(pictures[split])
    favourites = [shelf for shelf, (_, _, share) in SHELVES.items() for _ in range(share)]
    rows = []
    for number in range(USERS[split]):
        own, language = favourites[number % len(favourites)], ("zh", "en")[number % 3 == 2]
        bought = draw.choice(shop[own])
        words = bought[f"name_{language}"], SHELVES[own][1] if language == "zh" else own
        history = SENTENCES[language][0].format(*words)
        user = {"user": f"{split}-{number:02}", "language": language, "own": own, "bought": bought["image"]}
        shopper = {"user": user["user"], "language": language, "history": history}
        rows += [shopper | row for row in offers(shop, user, draw)]
    return rows


def catalog(pictures: dict[str, list[Row]], split: str) -> list[Row]:
    """Every product with its shelf."""
    return [
        {"image": f"emoji/{product['image']}", "shelf": SHELVES[shelf][1], "shelf_en": shelf}
        for shelf, on_shelf in products(pictures[split]).items()
        for product in on_shelf
    ]


def main() -> None:
    chosen = argument_parser("recommend", "Make the tables of shoppers and of products.", reads="emoji/").parse_args()
    pictures = {split: read_rows(chosen.data / "emoji" / f"{split}.csv") for split in USERS}
    for split in USERS:
        for name, rows in ((split, plan(pictures, split)), (f"catalog-{split}", catalog(pictures, split))):
            write_rows(chosen.into / f"{name}.csv", rows)
            print(name, len(rows), "rows")


if __name__ == "__main__":
    main()
