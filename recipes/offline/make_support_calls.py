"""Make recipes/data/support-calls: what a customer says, the line of the shop's records, and the reply to both.

    python recipes/offline/make_support_calls.py [--data recipes/data] [--into recipes/data/support-calls]

Calls in Mandarin are those of calls/, none is copied: paths are relative to the folder of the data. Calls in English
are spoken here by the same synthesiser. Orders are invented. Everything drawn by chance has a fixed seed; the same
espeak-ng, SciPy and PyAV give the same bytes. Voices to test with never occur in training.
"""

import itertools
import random
import sys
from pathlib import Path

from dataset_files import Row, argument_parser, empty_folder, read_rows, write_rows
from make_calls import LINES, PHRASES, THINGS, VOICES, has_synthesiser, send, speak, write_audio

SEED = 35
ROWS = {"train": (288, 96), "test": (96, 32)}  # in Mandarin, in English
ENGLISH_THINGS = ("headphones", "phone", "shoes", "jacket", "kettle", "lamp", "bag", "watch")
REQUESTS = {  # in English, two for each intent
    "退货": ("I want to return my {}", "my {} should go back to you"),
    "换货": ("I want to exchange my {}", "please swap my {} for another"),
    "退款": ("I want the money back for my {}", "please refund my {}"),
    "查件": ("where is my {}", "my {} has not arrived"),
    "维修": ("my {} is broken, please repair it", "please fix my {}"),
    "发票": ("I need an invoice for my {}", "the invoice for my {} is missing"),
    "取消": ("please cancel the order of my {}", "I don't want my {} any more"),
    "改址": ("please change the address for my {}", "the address for my {} is wrong"),
}
ORDERS = {  # number, whether the customer has a gold card, whether the parcel has arrived
    "zh": ("订单{}，{}会员，{}。", ("普通", "金卡"), ("未发货", "已签收")),
    "en": ("Order {}, {} member, {}.", ("basic", "gold"), ("not sent", "delivered")),
}
OPENINGS = {"zh": ("好的，", "金卡优先，"), "en": ("OK, ", "Gold first, ")}
REPLIES = {  # before it is sent, after it has arrived
    "zh": {
        "退货": ("{}未发出，直接退款。", "{}可以退货，请寄回。"),
        "换货": ("{}未发出，马上更换。", "{}可以换货，请寄回。"),
        "退款": ("{}的钱马上退。", "{}寄回后退款。"),
        "查件": ("{}明天发出。", "{}已经签收。"),
        "维修": ("{}发出前会检查。", "{}请寄来维修。"),
        "发票": ("{}的发票随货寄出。", "{}的发票发到邮箱。"),
        "取消": ("{}的订单已取消。", "{}已签收，不能取消。"),
        "改址": ("{}的地址已修改。", "{}已签收，不能改址。"),
    },
    "en": {
        "退货": ("{} not sent, money back.", "{} can be returned."),
        "换货": ("{} not sent, changed now.", "{} can be exchanged."),
        "退款": ("{} refunded now.", "{} refunded when back."),
        "查件": ("{} sent tomorrow.", "{} already delivered."),
        "维修": ("{} checked before sending.", "{} goes to repair."),
        "发票": ("{} invoice in the parcel.", "{} invoice by mail."),
        "取消": ("{} order cancelled.", "{} can't be cancelled."),
        "改址": ("{} address changed.", "{} address is too late."),
    },
}  # fmt: skip


def mandarin(calls: list[Row], count: int, draw: random.Random) -> list[Row]:
    """Recordings of calls/, every intent equally often."""
    chosen: list[Row] = []
    for intent in PHRASES:
        candidates = [call for call in calls if call["intent"] == intent]
        chosen += draw.sample(candidates, count // len(PHRASES))
    return [
        {"audio": f"calls/{c['audio']}", "language": "zh"} | {key: c[key] for key in ("text", "intent", "thing")}
        for c in chosen
    ]


def english(split: str, count: int, draw: random.Random) -> list[Row]:
    """Recordings to be made, every intent equally often, things, requests, voices and lines in turn."""
    voices = itertools.cycle(itertools.product(LINES, VOICES[split]))
    requests = list(itertools.product(THINGS, (0, 1)))
    rows = []
    for intent in PHRASES:
        for (thing, which), (line, voice) in zip(draw.sample(requests, count // len(PHRASES)), voices, strict=False):
            word = ENGLISH_THINGS[THINGS.index(thing)]
            number = f"{split}-{len(rows):03}"
            rows.append({
                "audio": f"support-calls/audio/{number}.ogg", "language": "en",
                "text": REQUESTS[intent][which].format(word),
                "intent": intent, "thing": thing, "voice": voice, "line": line,
            })  # fmt: skip
    return rows


def plan(calls: list[Row], split: str) -> list[Row]:
    """The rows of a table, `voice` and `line` added to those that are still to be spoken."""
    draw = random.Random(f"{SEED}/{split}")
    rows = mandarin(calls, ROWS[split][0], draw) + english(split, ROWS[split][1], draw)
    orders = draw.sample(range(1000, 5000) if split == "train" else range(5000, 10000), len(rows))
    draw.shuffle(rows)
    made = []
    for row, order in zip(rows, orders, strict=True):
        language, (gold, arrived) = row["language"], (draw.randrange(2), draw.randrange(2))
        written, levels, states = ORDERS[language]
        thing = row["thing"] if language == "zh" else ENGLISH_THINGS[THINGS.index(row["thing"])]
        reply = OPENINGS[language][gold] + REPLIES[language][row["intent"]][arrived].format(thing)
        made.append(row | {"record": written.format(order, levels[gold], states[arrived]), "reply": reply})
    return made


def main() -> int:
    description = "Make the English calls, and the tables of calls with orders."
    chosen = argument_parser("support-calls", description, reads="calls/").parse_args()
    if not has_synthesiser():
        return 1
    empty_folder(chosen.into / "audio")
    columns = ["audio", "record", "intent", "reply", "text", "thing", "language"]
    for split in ROWS:
        rows = plan(read_rows(chosen.data / "calls" / f"{split}.csv"), split)
        for row in rows:
            if "voice" in row:
                draw = random.Random(f"{SEED}/{row['audio']}")
                samples = send(speak(row["text"], row["voice"], draw, "en-us"), row["line"], draw)
                write_audio(samples, chosen.into / "audio" / Path(row["audio"]).name)
        write_rows(chosen.into / f"{split}.csv", rows, columns)
        print(split, len(rows), "rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
