"""American spelling in everything that people read: README, docs, recipes, pages, the Makefile.

Code spans and blocks are left aside, since they quote code. ``python tests/cli/test_spelling.py`` lists the British
spellings in the code itself, which no test refuses yet.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_docs_names import FILES, ROOT, name, text_of

# Beginnings of words, then whole words.
BRITISH = re.compile(
    r"\b(?:(?:un|re|de|pre)?(?:optimis|normalis|initialis|quantis|recognis|summaris|organis|generalis|serialis|tokenis"
    r"|vectoris|standardis|parallelis(?!m)|synchronis|randomis|specialis|utilis|visualis|penalis|regularis|materialis"
    r"|customis|capitalis|prioritis|categoris|characteris|stabilis|equalis|memoris|authoris|finalis|maximis|minimis"
    r"|factoris|localis|realis(?=e|ing))|(?:mis)?behaviour|colour|favour|flavour|neighbour|honour|labour|rumour"
    r"|(?:un)?labelled|labelling|modelled|modelling|cancelled(?!error)|cancelling|travelled|signalled|catalogue|dialogue"
    r"|analys(?:e[ds]?|ing)\b|judgement|artefact|licence|defence|offence|practis|programme[sd]?\b)\w*"
    r"|\b(?:distil|distils|fulfil|fulfils|grey|greyed|centre|centres|centred|metre|metres|towards"
    r"|learnt|spelt|whilst|amongst)\b",
    re.IGNORECASE,
)


def british(text: str) -> list[str]:
    return [match[0] for match in BRITISH.finditer(text)]


def prose_of(path: Path) -> str:
    """A file's text without its code, which has names of its own."""
    text = text_of(path)
    if path.suffix in (".md", ".ipynb"):
        text = re.sub(r"^    .*$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    return text


TEMPLATES = sorted((ROOT / "pipeline" / "report" / "page").glob("*.j2"))


@pytest.mark.parametrize("path", [*FILES, *TEMPLATES], ids=name)
def test_the_spelling_is_american(path: Path) -> None:
    assert british(prose_of(path)) == []


def test_british_words_are_found_and_american_ones_are_not() -> None:
    found = "An optimiser's renormalised behaviour, labelled grey: distil it."
    assert british(found) == ["optimiser", "renormalised", "behaviour", "labelled", "grey", "distil"]
    fine = "An optimizer's renormalized behavior, labeled gray: distill it, exercise, realistic parallelism, otherwise."
    assert british(fine) == []


if __name__ == "__main__":
    for source in sorted(
        path for top in ("cli", "pipeline", "storage") for path in (ROOT / top).rglob("*.py")
    ):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            for word in british(line):
                print(f"{name(source)}:{number}: {word}")
