"""`arithmetic`: short word problems of one or two steps; the answer is a whole number.

Names, things and places are the entities. The numbers in a problem are drawn alike for every split: they are what is
computed with, and another problem with the same numbers does not give the answer away.
"""

import random
from collections.abc import Callable

from agentlab.tasks.builtin.making import Made, distinct, pools

CONFIG = {"name": "arithmetic", "metric": "number", "system": "Answer with the number only.", "license": "Apache-2.0"}
ENTITIES = {
    "name": pools(
        """Anna, Peter, Maria, Tom, Julia, Ahmed, Sofia, Lukas, Emma, Carlos, Nina, Oscar, Priya, Daniel, Lena,
        Ivan, Clara, Hugo, Mia, Samir""",
        "Greta, Omar, Diana, Victor, Yuki, Simon, Elif, Frank",
        "Hannah, Mateo, Ingrid, Rashid, Chloe, Dmitri, Amara, Quentin, Beatrix, Tariq, Wendy, Soren",
    ),
    "thing": pools(
        """apples, books, pencils, coins, stamps, marbles, cookies, shells, cards, tickets, eggs, candles, buttons,
        balls, flowers, stickers, chairs, oranges, keys, bottles""",
        "lemons, badges, ribbons, spoons, magnets, postcards, crayons, plates",
        "peaches, puzzles, lanterns, bracelets, pebbles, notebooks, muffins, feathers, kites, beads, envelopes, cups",
    ),
    "place": pools(
        "school, market, office, farm, library, bakery, hotel, garage, museum, station",
        "theatre, clinic, harbour, stadium",
        "warehouse, greenhouse, monastery, airport, brewery, castle",
    ),
}
Solve = Callable[[int, int, int], int]


def _add(a: int, b: int, c: int) -> int:
    return a + b


def _take(a: int, b: int, c: int) -> int:
    return a  # the problem starts with {ab} = a + b and gives b away


def _times(a: int, b: int, c: int) -> int:
    return c * b


def _times_add(a: int, b: int, c: int) -> int:
    return a + c * b


def _sum3(a: int, b: int, c: int) -> int:
    return a + b + c


TEMPLATES: dict[str, list[tuple[str, Solve]]] = {
    "train": [
        ("{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", _add),
        ("There are {a} {thing} at the {place}. {b} more arrive. How many are there?", _add),
        ("{name} had {ab} {thing} and lost {b}. How many are left?", _take),
        ("The {place} had {ab} {thing} and sold {b}. How many remain?", _take),
        ("{name} gave away {b} of {ab} {thing}. How many does {name} keep?", _take),
        ("Each box holds {b} {thing}. {name} has {c} boxes. How many {thing} are there?", _times),
        ("{name} packs {c} bags with {b} {thing} each. How many {thing} in all?", _times),
        ("{name} has {a} {thing} and gets {c} packs of {b}. How many {thing} now?", _times_add),
        ("The {place} owns {a} {thing} and orders {c} crates of {b}. How many will it own?", _times_add),
        ("{name} found {a} {thing} on Monday, {b} on Tuesday and {c} on Friday. How many in total?", _sum3),
    ],
    "dev": [
        ("{name} counted {a} {thing} in the {place} and later {b} others. What is the sum?", _add),
        ("Of {ab} {thing}, {name} broke {b}. How many are whole?", _take),
        ("A shelf in the {place} carries {b} {thing}. How many do {c} shelves carry?", _times),
        ("{name} starts with {a} {thing} and wins {b} in each of {c} games. How many at the end?", _times_add),
    ],
    "test": [
        ("Yesterday {name} collected {a} {thing}, today another {b}. How many altogether?", _add),
        ("A truck brings {b} {thing} to the {place}, where {a} were stored. How many are stored now?", _add),
        ("From a stock of {ab} {thing}, the {place} throws out {b}. What number is left over?", _take),
        ("{name} needs {b} {thing} for every table and there are {c} tables. How many {thing} are needed?", _times),
        ("After {c} weeks of making {b} {thing} a week, {name} adds {a} older ones. How many is that?", _times_add),
        ("In the {place}, {name} sees {a} red, {b} green and {c} white {thing}. How many does {name} see?", _sum3),
    ],
}


def make(split: str, count: int) -> list[Made]:
    """The items of one split."""
    return distinct(split, count, "arithmetic", _one)


def _one(rng: random.Random, pool: str, number: int) -> Made:
    template, solve = TEMPLATES[pool][number % len(TEMPLATES[pool])]
    words = {kind: rng.choice(ENTITIES[kind][pool]) for kind in ENTITIES}
    a, b, c = rng.randint(2, 60), rng.randint(2, 20), rng.randint(2, 9)
    entities = tuple(word for kind, word in words.items() if f"{{{kind}}}" in template)
    return Made(template.format(**words, a=a, b=b, c=c, ab=a + b), solve(a, b, c), template, entities, {})
