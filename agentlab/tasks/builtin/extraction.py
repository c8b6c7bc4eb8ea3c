"""`extraction`: the named fields out of a short text, as JSON; every value is written in the text as it goes in."""

import random
import string
from typing import Any

from agentlab.tasks.builtin.making import Made, distinct, integers, pools

CONFIG = {
    "name": "extraction",
    "metric": "json",
    "system": "Answer with a JSON object that has exactly the given fields.",
    "license": "Apache-2.0",
}
ENTITIES = {
    "person": pools(
        """Anna, Peter, Maria, Tom, Julia, Ahmed, Sofia, Lukas, Emma, Carlos, Nina, Oscar, Priya, Daniel, Lena,
        Ivan, Clara, Hugo, Mia, Samir""",
        "Greta, Omar, Diana, Victor, Yuki, Simon, Elif, Frank",
        "Hannah, Mateo, Ingrid, Rashid, Chloe, Dmitri, Amara, Quentin, Beatrix, Tariq, Wendy, Soren",
    ),
    "city": pools(
        """Lisbon, Oslo, Cairo, Madrid, Boston, Prague, Dublin, Athens, Mumbai, Seoul, Denver, Vienna, Lagos, Hanoi,
        Quito, Geneva, Riga, Tunis, Bogota, Manila""",
        "Nairobi, Berlin, Toronto, Krakow, Lyon, Santiago, Dallas, Bristol",
        "Kyoto, Helsinki, Chicago, Naples, Lima, Sydney, Warsaw, Antwerp, Dakar, Portland, Munich, Glasgow",
    ),
    "item": pools(
        """desk lamps, red chairs, laptops, coffee mugs, garden hoses, headphones, tents, winter coats, bike
        helmets, printers, blue shirts, backpacks, tea pots, umbrellas, wall clocks, yoga mats""",
        "frying pans, door locks, sunglasses, guitars, sleeping bags, white boards",
        "toasters, climbing ropes, picture frames, microscopes, leather boots, power banks, violins, bath towels",
    ),
    "topic": pools(
        """budget, hiring, the roadmap, safety, the website, training, sales, the new office, travel rules, quality,
        the newsletter, insurance, the audit, parking, summer plans, software licenses""",
        "the reorganisation, recycling, data backups, the anniversary, overtime, branding",
        "the merger, customer complaints, warehouse space, energy costs, the charity gala, patents, pensions",
    ),
    "day": pools("Monday, Tuesday, Thursday, Saturday", "Wednesday", "Friday, Sunday"),
    "quantity": integers(1, 99),
    "hour": integers(7, 22),
    "age": integers(18, 80),
}
NUMBERS = ("quantity", "hour", "age")
TEMPLATES = {
    "train": [
        "{person} from {city} ordered {quantity} {item}.",
        "Please ship {quantity} {item} to {person} in {city}.",
        "We received an order by {person}: {quantity} {item}.",
        "In {city}, {quantity} {item} were sold.",
        "{person} will talk about {topic} on {day} at {hour}.",
        "Meeting about {topic}: {day}, {hour} o'clock, in {city}.",
        "On {day} {person} meets us in {city}.",
        "{person}, {age} years old, lives in {city}.",
        "{person} is {age} and works on {topic}.",
        "Our {city} team, led by {person}, takes care of {topic}.",
    ],
    "dev": [
        "{quantity} {item} go out to {person}, who lives in {city}.",
        "Reminder: {person} presents {topic}, {day} at {hour}.",
        "At the age of {age}, {person} moved to {city}.",
        "The {city} shop wants {quantity} {item}.",
    ],
    "test": [
        "A customer called {person} would like {quantity} {item} delivered to {city}.",
        "{day} at {hour} is reserved for {topic}; {person} has the floor.",
        "Born and raised in {city}, {person} just turned {age}.",
        "The invoice of {person} lists {quantity} {item}.",
        "For the discussion of {topic}, come to {city} on {day}.",
        "Stock check: {city} still has {quantity} {item}.",
    ],
}


def make(split: str, count: int) -> list[Made]:
    """The items of one split."""
    return distinct(split, count, "extraction", _one)


def _one(rng: random.Random, pool: str, number: int) -> Made:
    template = TEMPLATES[pool][number % len(TEMPLATES[pool])]
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    words = {name: rng.choice(ENTITIES[name][pool]) for name in fields}
    rng.shuffle(fields)
    answer: dict[str, Any] = {name: int(words[name]) if name in NUMBERS else words[name] for name in fields}
    prompt = f"{template.format(**words)}\nFields: {', '.join(fields)}"
    return Made(prompt, answer, template, tuple(words.values()))
