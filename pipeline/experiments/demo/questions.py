"""Short questions for a small language model: many kinds, from small lists of words; some have one right answer.

Held-out questions differ in their subject, not only in their wording: no wording of one is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from tropd.storage.errors import ConfigError

# Part of the fingerprint: raise it when the same seed draws other questions.
VERSION = 2
SYSTEM, INSTRUCTION = "You are a helpful assistant.", "Answer briefly."
HELD_OUT_SHARE = 6  # one subject in six


@dataclass(frozen=True)
class DemoQuestion:
    """A question, and the word that ends a right response; None where many responses are right."""

    text: str
    answer: str | None


Conversation = list[dict[str, str]]
"""Messages of a chat."""


@dataclass(frozen=True)
class QuestionKind:
    """Questions of one kind: every wording with every subject. Subjects are pairs of words and answer."""

    wordings: tuple[str, ...]
    subjects: tuple[tuple[str, str | None], ...]


def _pairs(text: str) -> tuple[tuple[str, str | None], ...]:
    """Subjects with answers, from lines of ``subject: answer, subject: answer``."""
    found = (part.split(":") for part in " ".join(text.split()).split(", "))
    return tuple((subject.strip(), answer.strip()) for subject, answer in found)


def _open(text: str) -> tuple[tuple[str, str | None], ...]:
    """Subjects without answers, separated by commas."""
    return tuple((subject, None) for subject in " ".join(text.split()).split(", "))


CAPITALS = _pairs(
    """France: Paris, Italy: Rome, Spain: Madrid, Germany: Berlin, Japan: Tokyo, China: Beijing, Russia: Moscow,
    Egypt: Cairo, Greece: Athens, Portugal: Lisbon, Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Norway: Oslo,
    Sweden: Stockholm, Denmark: Copenhagen, Finland: Helsinki, Ireland: Dublin, Canada: Ottawa, Cuba: Havana,
    Peru: Lima, Chile: Santiago, Kenya: Nairobi, Turkey: Ankara, Iran: Tehran, Iraq: Baghdad, Thailand: Bangkok,
    Vietnam: Hanoi, Australia: Canberra, Ukraine: Kyiv, Belgium: Brussels, Switzerland: Bern, Bulgaria: Sofia,
    Romania: Bucharest, Nepal: Kathmandu, Indonesia: Jakarta"""
)
OPPOSITES = _pairs(
    """hot: cold, big: small, fast: slow, up: down, day: night, happy: sad, open: closed, light: dark, wet: dry,
    hard: soft, rich: poor, early: late, full: empty, young: old, left: right, love: hate, strong: weak, high: low,
    long: short, first: last, war: peace, true: false, loud: quiet, clean: dirty, black: white, push: pull,
    buy: sell, inside: outside, win: lose, above: below"""
)
COLORS = _pairs(
    """a banana: yellow, grass: green, the sky on a clear day: blue, snow: white, coal: black, a ripe tomato: red,
    a carrot: orange, chocolate: brown, a lemon: yellow, milk: white, a strawberry: red, a frog: green, blood: red,
    a polar bear: white, a crow: black, a cucumber: green, the sun in a drawing: yellow, a fire engine: red,
    an elephant: gray, the sea: blue, a pumpkin: orange, a flamingo: pink, salt: white, broccoli: green"""
)
CONTINENTS = _pairs(
    """Brazil: America, Nigeria: Africa, India: Asia, France: Europe, Japan: Asia, Kenya: Africa, Italy: Europe,
    China: Asia, Egypt: Africa, Germany: Europe, Canada: America, Mexico: America, Morocco: Africa, Norway: Europe,
    Thailand: Asia, Ghana: Africa, Peru: America, Poland: Europe, Korea: Asia, Ethiopia: Africa, Greece: Europe,
    Vietnam: Asia, Argentina: America, Tanzania: Africa"""
)
YOUNG = _pairs(
    """dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, pig: piglet, duck: duckling, hen: chick,
    lion: cub, bear: cub, goat: kid, frog: tadpole, kangaroo: joey, deer: fawn, goose: gosling, eagle: eaglet,
    elephant: calf, wolf: pup"""
)
NEXT = _pairs(
    """Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, Saturday: Sunday,
    Sunday: Monday, January: February, February: March, March: April, April: May, May: June, June: July, July: August,
    August: September, September: October, October: November, November: December, spring: summer, summer: autumn"""
)
YES_NO = _open(
    """ice cold, fire cold, a whale a fish, the earth round, a rose a flower, the moon a star, a spider an insect,
    a cat an animal, gold a metal, wood a metal, water wet, the sun hot, a potato a fruit, ten more than five,
    two an odd number,
    a violin an instrument, Paris a country, a bat a bird, snow warm, a square round, seven an even number, sugar sweet,
    a lemon sour, Africa a continent, honey sweet, a snake long, a penguin a bird, iron heavy"""
)
RHYMES = _open(
    """cat, moon, tree, light, day, house, rain, blue, star, cake, ring, fish, snow, bell, book, door, hand, king, song,
    train, boat, clock, mind, gold"""
)
BEGINNINGS = _open(
    """The sun rises in the, A spider has eight, The opposite of love is, Fish live in the, At night the sky is,
    Bees make, In winter it is, An apple a day keeps, Birds of a feather flock, The early bird catches the,
    Once upon a time there was, My favorite food is, When it rains I take my, The train was late because,
    Every morning she drinks, He opened the door and saw, Children love to, A good friend is someone who,
    The best thing about summer is, To bake a cake you need"""
)
LISTS = _open(
    """colors, fruits, animals, planets, cities, tools, flowers, sports, countries, vegetables, birds, languages, drinks,
    jobs, musical instruments, months, metals, rivers, trees, things in a kitchen, school subjects, insects,
    pieces of furniture, kinds of weather"""
)
SYNONYMS = _open(
    """happy, big, fast, smart, angry, tired, pretty, funny, scared, cold, quiet, strange, begin, end, help, speak, walk,
    look, rich, brave, calm, easy, hard, new"""
)


def _sums() -> tuple[tuple[str, str | None], ...]:
    plus = [(f"{a} plus {b}", str(a + b)) for a, b in combinations(range(2, 10), 2)]
    minus = [(f"{a + b} minus {b}", str(a)) for a, b in combinations(range(2, 8), 2)]
    return (*plus, *minus)


def _unsorted() -> tuple[tuple[str, str | None], ...]:
    numbers = product((12, 3, 25), (7, 31), (18, 1, 9), (40, 5))
    return tuple((", ".join(map(str, four)), None) for four in numbers)


def _triples() -> tuple[tuple[str, str | None], ...]:
    numbers = product((2, 15, 27), (8, 21), (4, 12, 30))
    return tuple((f"{a}, {b}, {c}", str(max(a, b, c))) for a, b, c in numbers)


KINDS = {
    "capital": QuestionKind(
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
        CAPITALS,
    ),
    "opposite": QuestionKind(
        (
            'What is the opposite of "{}"?',
            'Give me the opposite of the word "{}".',
            "What is the contrary of {}?",
        ),
        OPPOSITES,
    ),
    "color": QuestionKind(("What color is {}?", "Which color has {}?"), COLORS),
    "continent": QuestionKind(
        ("On which continent is {}?", "Which continent does {} belong to?"), CONTINENTS
    ),
    "young": QuestionKind(("What do you call a young {}?", "What is the name of a baby {}?"), YOUNG),
    "next": QuestionKind(("What comes right after {}?", "What follows {}?"), NEXT),
    "sum": QuestionKind(("What is {}?", "How much is {}?"), _sums()),
    "largest": QuestionKind(
        ("Which is the largest of these numbers: {}?", "Which of these numbers is the largest: {}?"),
        _triples(),
    ),
    "yes or no": QuestionKind(("Is {}?",), YES_NO),
    "rhyme": QuestionKind(('Which word rhymes with "{}"?', 'Say a word that rhymes with "{}".'), RHYMES),
    "sort": QuestionKind(
        ("Sort these numbers, the smallest first: {}", "Sort these numbers, the largest first: {}"),
        _unsorted(),
    ),
    "beginning": QuestionKind(("Finish this sentence: {} …", "Continue: {} …"), BEGINNINGS),
    "list": QuestionKind(("Name three {}.", "Name one of the {} that you know."), LISTS),
    "synonym": QuestionKind(
        ('Give a synonym of "{}".', 'Which word means nearly the same as "{}"?'), SYNONYMS
    ),
}


def all_questions(*, held_out: bool) -> Iterator[DemoQuestion]:
    """Every question of either half, kind by kind."""
    for name, kind in KINDS.items():
        for subject, answer in kind.subjects:
            digest = hashlib.blake2b(f"{name}: {subject}".encode(), digest_size=2).digest()
            if (digest[0] % HELD_OUT_SHARE == 0) == held_out:
                yield from (DemoQuestion(wording.format(subject), answer) for wording in kind.wordings)


def conversation(question: DemoQuestion) -> Conversation:
    """A question as it is asked. The model's template has a longer system message, which is left out: each token of a
    prompt costs as much as one of a response."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{question.text} {INSTRUCTION}"},
    ]


def draw_questions(seed: int, count: int, *, held_out: bool) -> list[DemoQuestion]:
    """Different questions in random order; the held-out ones have answers, so that they can be graded.

    Raises:
        ConfigError: fewer questions exist.
    """
    found = [q for q in all_questions(held_out=held_out) if q.answer is not None or not held_out]
    if count > len(found):
        half = "held-out" if held_out else "training"
        raise ConfigError(
            f"only {len(found)} {half} questions exist, not {count}",
            hint=f"lower demo.{'eval' if held_out else 'train'}_problems",
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found))
    return [found[i] for i in order[:count]]
