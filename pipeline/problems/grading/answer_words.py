"""Words around the mathematics of an answer: units and their names, and words that say something of their own."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNITS = {
    name: unit
    for unit, names in {
        "cm": "cm centimeter centimetre",
        "mm": "mm millimeter millimetre",
        "km": "km kilometer kilometre",
        "m": "m meter metre",
        "inch": "inch inche",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "kg": "kg kilogram",
        "g": "g gram",
        "mg": "mg milligram",
        "lb": "lb lbs pound",
        "oz": "oz ounce",
        "l": "l L liter litre",
        "ml": "ml milliliter millilitre",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "yr year",
        "mph": "mph",
        "kmh": "kmh kph",
        "dollar": "dollar USD usd buck",
        "cent": "cent",
        "euro": "euro EUR",
        "sterling": "sterling GBP",
        "degree": "degree deg",
        "unit": "unit",
        "n": "N newton",
        "j": "J joule",
        "k": "K kelvin",
        "w": "W watt",
        "v": "V volt",
        "a": "A ampere amp",
        "hz": "Hz hz hertz",
        "pa": "Pa pascal",
        "ev": "eV",
        "erg": "erg",
        "c": "C",
        "f": "F",
    }.items()
    for name in names.split()
}
"""Names of units, and how they are compared; other words are taken as they are, in the singular."""
LETTER_UNITS = frozenset("ACFJKLNVWghms")
SHORT_WORDS = _words(
    "of is in to at an he it or no if so we by on as me my up us go be do am pm mm cm km kg mg ml ft oz lb hr mi yd "
    "hz kw ms ns Hz Pa eV"
)
"""Two letters that are no product of two variables."""
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SILENT = _words(
    "the a an is are was were be there it that this so thus about approximately approx roughly exactly around only "
    "total equal equals to of in all we get have has final answer value result"
)
"""Words that say nothing about which number it is."""
DECISIVE = _words(
    "not no never neither nor none without or than least most over under above below between minus negative plus "
    "divided squared cubed half halve double root factorial mod modulo except either if unless when whenever zero one "
    "two three four five six seven eight nine ten eleven twelve"
)
"""Words that state mathematics, or take back a statement."""
