"""The table of docs/models.md: ``python tests/models/table.py [MODEL_TYPE …] [--into docs/models.md]``; of other lines
than those asked for the page keeps what it has.

Each architecture has a process of its own, forked from one that has loaded everything, and a minute.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import sys
import textwrap
import warnings
from concurrent.futures import TimeoutError as Timeout
from pathlib import Path

import torch
import transformers
from architectures import architectures
from checks import Answers, check
from pebble import ProcessExpired, ProcessPool

SECONDS = 60
BEGIN, END = "<!-- table: make models -->", "<!-- end of the table -->"


def line(name: str, model_types: list[str], answers: Answers) -> str:
    """A row of the table."""
    cells = [answers.samples, answers.scores, answers.gradient, answers.lora]
    reasons = "; ".join(_short(reason) for reason in answers.reasons)
    types = ", ".join(f"`{t}`" for t in model_types)
    return f"| {name} | {types} | " + " | ".join(cells) + f" | {reasons} |"


def _short(reason: str) -> str:
    """What a cell has room for."""
    reason = re.sub(r"^student.lora is not possible with \w+", "LoRA", reason).replace("|", "\\|")
    return textwrap.shorten(reason, 160, placeholder=" …")


def answers_of(wanted: list[str]) -> dict[str, Answers]:
    """By model type, in the order given."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: dict[str, Answers] = {}
    with ProcessPool(max_workers=1, max_tasks=1, context=multiprocessing.get_context("fork")) as pool:
        for model_type in wanted:
            try:
                found[model_type] = pool.schedule(check, args=(model_type,), timeout=SECONDS).result()
            except Timeout:
                found[model_type] = Answers(*["–"] * 4, reasons=(f"not made tiny: above {SECONDS} s",))
            except ProcessExpired as error:
                found[model_type] = Answers(*["–"] * 4, reasons=(f"not made tiny: {error}",))
            print(model_type, *vars(found[model_type]).values(), sep=" | ", file=sys.stderr, flush=True)
    return found


def read(page: str) -> dict[str, str]:
    """The lines of a page's table, by the name of the architecture."""
    table = page.split(BEGIN)[1].split(END)[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows[1:]}


def written(page: str, lines: dict[str, str]) -> str:
    """The page with this table."""
    head, rest = page.split(BEGIN)
    columns = (
        "| architecture | model types | samples | scores | gradient | LoRA | why not |\n" + "|---" * 7 + "|"
    )
    version = f"transformers {transformers.__version__}, {len(lines)} architectures:"
    rows = [lines[name] for name in sorted(lines, key=str.lower)]
    return head + "\n".join([BEGIN, "", version, "", columns, *rows, "", END]) + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--into", type=Path, help="the page whose table is made anew")
    options = parser.parse_args()
    known = architectures()
    unknown = set(options.model_types) - {t for types in known.values() for t in types}
    if unknown:
        parser.error(f"transformers {transformers.__version__} knows no {', '.join(sorted(unknown))}")
    wanted = {
        name: types
        for name, types in known.items()
        if not options.model_types or set(types) & set(options.model_types)
    }
    found = answers_of([types[0] for types in wanted.values()])
    lines = {name: line(name, types, found[types[0]]) for name, types in wanted.items()}
    if options.into is None:
        print("\n".join(lines.values()))
        return
    page = options.into.read_text()
    kept = {name: row for name, row in read(page).items() if name in known}
    options.into.write_text(written(page, kept | lines))


if __name__ == "__main__":
    main()
