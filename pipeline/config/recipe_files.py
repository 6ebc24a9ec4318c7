"""Recipes that come with tropd: whole runs and objectives, as TOML."""

from __future__ import annotations

import datetime
import tomllib
from importlib import resources

import tomlkit

from tropd.pipeline.config.problems import Origins, checked
from tropd.pipeline.config.tables import merge_settings
from tropd.pipeline.objectives.objective import Objective
from tropd.storage.errors import unknown_name
from tropd.storage.formats.toml_text import Plain


def recipe_names(kind: str = "runs") -> list[str]:
    """Names of the packaged recipes (``runs`` or ``objectives``)."""
    folder = resources.files("tropd.pipeline.config.recipes") / kind
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def recipe_text(name: str, kind: str = "runs") -> str:
    """Text of a packaged recipe.

    Raises:
        ConfigError: no recipe has that name; the message lists all.
    """
    names = recipe_names(kind)
    if name not in names:
        raise unknown_name("recipe" if kind == "runs" else "objective", name, names)
    return (resources.files("tropd.pipeline.config.recipes") / kind / f"{name}.toml").read_text(
        encoding="utf-8"
    )


def dated_recipe(text: str, date: datetime.date) -> str:
    """A recipe's text that also fixes the date that chat templates write, where it uses them."""
    document = tomlkit.parse(text)
    data = document.get("data", {})
    if data.get("chat", False) and "template_date" not in data:
        data.add("template_date", date.isoformat())
    return tomlkit.dumps(document)


def load_objective(name: str, overrides: Plain | None = None) -> Objective:
    """A named objective with some fields replaced.

    Raises:
        ConfigError: unknown name, or impossible overrides.
    """
    data = tomllib.loads(recipe_text(name, "objectives"))
    merged = merge_settings(data, overrides or {})
    return checked(Objective, merged, Origins(f"objective {name!r}", "", {}), ("objective",))
