"""Every command with its arguments and options is on record: a change of one is a decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.main import get_command

from tropd.cli.main import app
from tropd.storage.workspace import STAGES

RECORD = Path(__file__).with_name("commands.txt")


def test_commands_and_options_are_those_on_record(on_record: Callable[[Path, list[str]], None]) -> None:
    on_record(RECORD, list(command_lines(get_command(app), "tropd")))


def test_a_command_fills_every_stage() -> None:
    commands = get_command(app).commands
    for stage in STAGES:
        name, *options = stage.command.split()
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {option for option in options if option.startswith("-")} <= known


def command_lines(command: Any, name: str) -> Iterator[str]:
    """A command's name, a line for each parameter, and then the same of the commands inside."""
    yield name
    kinds = get_type_hints(command.callback) if command.callback else {}
    for parameter in command.params:
        yield f"    {_parameter(parameter, kinds[parameter.name])}"
    for inner in sorted(getattr(command, "commands", {})):
        yield ""
        yield from command_lines(command.commands[inner], f"{name} {inner}")


def _parameter(parameter: Any, kind: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    words = [", ".join(names), _kind(kind)]
    if parameter.min is not None or parameter.max is not None:
        words.append(f"[{parameter.min}, {'…' if parameter.max is None else parameter.max}]")
    if parameter.required:
        words.append("required")
    elif parameter.default is not None:
        words.append(f"= {parameter.default}")
    return " ".join([*words, "hidden"] if parameter.hidden else words)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if arguments := get_args(annotation):
        shown = [_kind(argument) for argument in arguments if argument is not type(None)]
        return f"{shown[0]}…" if get_origin(annotation) is list else "|".join(shown)
    return str(annotation.__name__)
