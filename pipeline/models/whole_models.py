"""The check that a model is whole: each of its tensors is in the folder, in its shape, and nothing else is.

transformers fills tensors that are missing or have another shape with random numbers, and says so in a report that is
easily missed. Its report is checked here, since it knows which tensors a model renames, joins, ties, or can do without.
It comes with loaded weights; or, at the price of their headers, with a model and tensors that have shapes but no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.models.model_files import CONFIG, COPY_AGAIN, first_names, read_tensors, tensor_shapes
from tropd.storage.errors import DataError


def check_headers(folder: Path, empty: Any) -> None:
    """Compare the tensors that the weight files declare with those of the model.

    Args:
        empty: the model without storage, on the device ``meta``.

    Raises:
        DataError: they differ; see ``check_report``.
    """
    shapes = tensor_shapes(folder)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        model, report = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=state,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (RuntimeError, ValueError) as error:  # tensors that are to be joined do not fit together
        raise _not_whole(folder, empty, [f"they do not fit together: {error}"]) from error
    check_report(folder, model, report)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for pair in tied.items():
        if shapes.keys() >= set(pair) and not torch.equal(*read_tensors(folder, pair)):
            raise _tied_but_different(folder, *pair)


def check_report(folder: Path, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model that transformers has made up in part.

    Args:
        report: of ``from_pretrained`` with ``output_loading_info``.

    Raises:
        DataError: naming the first few tensors that are missing, have another shape, or do not belong to the model; or
            tensors that are tied by the configuration, and not equal in the folder.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    shapes = [
        f"{name} is {list(found)} and should be {list(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    parts = [f"{len(missing)} tensors missing ({first_names(missing)})"] if missing else []
    parts += [f"{len(shapes)} in another shape ({first_names(shapes)})"] if shapes else []
    parts += [f"{len(unexpected)} that it does not have ({first_names(unexpected)})"] if unexpected else []
    if parts:
        raise _not_whole(folder, model, parts, untied=_looks_tied(model, missing))
    if hasattr(model, "get_expanded_tied_weights_keys"):
        declared = model.get_expanded_tied_weights_keys(all_submodels=True)
        for name in declared.keys() - model.all_tied_weights_keys.keys():
            raise _tied_but_different(folder, name, declared[name])


def _not_whole(folder: Path, model: Any, parts: list[str], *, untied: bool = False) -> DataError:
    return DataError(
        f"the weights in {folder} are not those of a {type(model).__name__} as its {CONFIG} describes it: "
        + "; ".join(parts),
        hint=f'{COPY_AGAIN}; or set "tie_word_embeddings": true in its {CONFIG}, if the two were tied once'
        if untied
        else f"{COPY_AGAIN}; if it is whole, {CONFIG} is that of another model",
    )


def _looks_tied(model: Any, missing: set[str]) -> bool:
    """True if just the output layer is missing, as where it is the embeddings."""
    head = model.get_output_embeddings()
    return head is not None and missing == {n for n, p in model.named_parameters() if p is head.weight}


def _tied_but_different(folder: Path, target: str, source: str) -> DataError:
    return DataError(
        f"{CONFIG} in {folder} says that {target} and {source} are one tensor (tie_word_embeddings), but the weights "
        "hold two different ones",
        hint=f'set "tie_word_embeddings": false in that {CONFIG}, or {COPY_AGAIN}',
    )
