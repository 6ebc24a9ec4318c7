"""Contents of a model's folder, read without its weights: configuration files, names, shapes and places of tensors.

transformers and vLLM read different files where some are left over or missing. Here both would read the same, or
the folder is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tropd.storage.errors import ConfigError, DataError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MOST_NAMES = 3
COPY_AGAIN = "copy or download the model again"


def check_files(folder: Path) -> None:
    """Refuse a folder with unreadable configuration files, or without weights that stand apart from other files.

    Raises:
        ConfigError, DataError: naming the file and the fix.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{folder} has no {CONFIG}, so it is not a Hugging Face model",
            hint="name the folder that model.save_pretrained has written, or a hub name",
        )
    read_object(folder / CONFIG)
    if (folder / GENERATION_CONFIG).is_file():
        read_object(folder / GENERATION_CONFIG)
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"{folder} holds an adapter ({ADAPTER}), which some engines would add to the weights and others would not",
            hint="merge it (merge_and_unload of peft, then save_pretrained), or move its files elsewhere",
        )
    weight_files(folder)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file whose content must be an object.

    Raises:
        DataError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint=COPY_AGAIN) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a JSON object", hint=COPY_AGAIN)
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names.

    Files under other names (such as the ``consolidated.safetensors`` of some authors) are not read.

    Raises:
        ConfigError: none exist, or it is not clear which they are.
        DataError: a file is missing.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file() and not whole.is_file():
        found = first_names([path.name for path in folder.glob("*.safetensors")])
        raise ConfigError(
            f"{folder} has no *.safetensors weights: neither {WEIGHTS} nor {INDEX}"
            + (f", only {found}" if found else ""),
            hint="convert the model: model.save_pretrained(path) of transformers writes safetensors"
            if not found
            else COPY_AGAIN,
        )
    names = _indexed(index) if index.is_file() else [WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: {first_names(missing)}",
            hint=f"{COPY_AGAIN}; an interrupted download resumes where it stopped",
        )
    if left_over := {path.name for path in folder.glob("model*.safetensors")} - set(names):
        raise ConfigError(
            f"{folder} holds weight files that "
            + (f"{INDEX} does not name" if index.is_file() else f"are not read beside {WEIGHTS}")
            + f": {first_names(left_over)}",
            hint=f"remove them; or if they are the model, remove {WEIGHTS} or {INDEX}, and copy what is missing",
        )
    return [folder / name for name in names]


def check_for_vllm(folder: Path) -> None:
    """Refuse files that only vLLM would read: without an index, it takes every ``*.safetensors`` for weights.

    Raises:
        ConfigError: naming them.
    """
    files = weight_files(folder)
    if not (folder / INDEX).is_file() and (others := set(folder.glob("*.safetensors")) - set(files)):
        raise ConfigError(
            f"vLLM would read {first_names(path.name for path in others)} in {folder} as weights, beside {WEIGHTS}",
            hint="move it elsewhere",
        )


def _indexed(index: Path) -> list[str]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise DataError(f"{index} names no files: its weight_map is not an object of names", hint=COPY_AGAIN)
    return sorted(set(places.values()))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, from the headers of the weight files.

    Raises:
        DataError: a file is truncated or otherwise not one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise unreadable(folder, error) from error
    return shapes


def read_tensors(folder: Path, names: tuple[str, ...]) -> list[Any]:
    """Some tensors of a folder, in this order."""
    found: dict[str, Any] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    return [found[name] for name in names]


def unreadable(folder: Path, error: Exception) -> DataError:
    """The error for weights that are not safetensors."""
    return DataError(
        f"the weights in {folder} cannot be read: {error}",
        hint=f"{COPY_AGAIN}; rerunning a stage makes its own output again",
    )


def first_names(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - MOST_NAMES
    return ", ".join(ordered[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
