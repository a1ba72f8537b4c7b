"""A request turned into a table: `Could you get two bottles of milk?` -> `|milk|two bottles|`.

Plain fine-tuning does not train this skill; it is meant for adapters. The key is the set of items with their
amounts, so a scored combination was in no training text, in any order or request.
"""

import random

from load_data.skills.common import Sample, joined

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
UNITS = {  # singular, plural, and the goods sold in it
    ("bottle", "bottles"): "milk water juice wine vinegar ketchup lemonade shampoo",
    ("loaf", "loaves"): "bread",
    ("bag", "bags"): "rice flour sugar salt potatoes carrots onions apples peanuts coffee",
    ("box", "boxes"): "cereal tea matches chocolates crackers nails screws pasta",
    ("can", "cans"): "soup beans tuna corn paint soda",
    ("jar", "jars"): "honey jam mustard pickles olives",
    ("pack", "packs"): "gum batteries napkins candles pens noodles",
    ("bunch", "bunches"): "bananas grapes flowers parsley",
    ("tube", "tubes"): "toothpaste glue sunscreen",
    ("bar", "bars"): "soap butter",
    ("roll", "rolls"): "tape foil",
    ("piece", "pieces"): "cheese cake ginger",
}
GOODS = {good: unit for unit, goods in UNITS.items() for good in goods.split()}
REQUESTS = (
    "Could you get {}?", "Please buy {}.", "We need {}.", "On your way home, pick up {}, please.",
    "I would like {}.", "Can you bring {} from the shop?", "Put {} on the list.",
    "For the party on Sunday we need {}.", "Mum asked for {}.", "Don't forget {}!",
    "Order {} for the office.", "The kitchen is empty: get {} today.",
)  # fmt: skip


def make(rng: random.Random) -> Sample:
    """Draw a request for one to three things."""
    rows = []
    for good in rng.sample(sorted(GOODS), rng.choices((1, 2, 3), (1, 3, 2))[0]):
        number, (one, several) = rng.choice(NUMBERS), GOODS[good]
        rows.append((good, f"{number} {one if number == 'one' else several}"))
    spoken = [f"{amount} of {good}" for good, amount in rows]
    question = rng.choice(REQUESTS).format(joined(spoken, ", ", " and "))
    table = "".join(f"|{good}|{amount}" for good, amount in rows) + "|"
    return Sample("shopping: " + ", ".join(sorted(spoken)), question, table)
