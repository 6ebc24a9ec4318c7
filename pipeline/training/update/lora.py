"""Low-rank adapters: the student's linear layers stay as they are, and small matrices beside them are trained (peft).

Adapters are put into the model in place, so that all other code sees the model that it knows. Any model that leaves it
(the exported student, weights for another engine) is merged: W + (α/r)·B·A (Hu et al. 2021, eq. 3). Whether that can be
done with a model is tried on a few tokens before anything is trained, one layer at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.models.runtime import evaluation_mode
from tropd.storage.errors import ConfigError

_BASE = ".base_layer"
_LORA = ".lora_"
MERGED_DIFFERENCES = {torch.float32: 0.01, torch.bfloat16: 0.25}
"""Share of the adapters' change in the logits by which the merged layers may differ from them: rounding."""
TRIED_SCALE = 0.1
"""Scale of the matrices B while merging is tried: they then add about as much to a layer as it had."""


def check_peft(settings: LoraSettings | None) -> None:
    """Fail early if adapters are requested but peft is not installed.

    Raises:
        ConfigError: adapters are asked for, and peft is not installed.
    """
    if settings is not None and find_spec("peft") is None:
        raise ConfigError("student.lora needs peft, which is not installed", hint='pip install "tropd[lora]"')


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and add adapters to all layers that peft takes for linear, but not to the output layer.

    Raises:
        ConfigError: peft is not installed or cannot adapt this model, or the adapters cannot be merged into it.
    """
    check_peft(settings)
    from peft import LoraConfig, inject_adapter_in_model

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that match nothing
        torch.manual_seed(seed)  # A is random, B is 0
        with _refusing(model, "peft cannot adapt it"):
            inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    _check_names(model, shapes)
    _check_values(model)


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state of the model that the adapted one is equal to, under the names of the original."""
    state = {
        name.replace(_BASE, ""): value for name, value in model.state_dict().items() if _LORA not in name
    }
    # Layers that a model uses several times have several names.
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_delta_weight"):
            target = _target(name, module)
            state[target] = _merged(state[target], module)
    return state


def _target(name: str, adapter: Any) -> str:
    """The original's name of the parameter: a weight, or one of several of an experts' layer."""
    return f"{name}.{_parameter(adapter)}".replace(_BASE, "")


def _parameter(adapter: Any) -> str:
    return str(getattr(adapter, "parameter_name", "weight"))


def _merged(weight: Tensor, adapter: Any) -> Tensor:
    return weight + adapter.get_delta_weight("default").to(weight.dtype)


def _check_names(model: Any, shapes: Mapping[str, torch.Size]) -> None:
    """The merged state has the names and shapes of the original, and no weight is another layer's too."""
    found = {
        name.replace(_BASE, ""): value for name, value in model.state_dict().items() if _LORA not in name
    }
    if {name: value.shape for name, value in found.items()} != dict(shapes):
        raise _refusal(model, "with adapters its tensors have other names or shapes")
    owners: dict[int, set[int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_delta_weight"):
            target = _target(name, module)
            if target not in found:
                raise _refusal(model, f"it has no tensor {target}")
            owners.setdefault(found.pop(target).data_ptr(), set()).add(id(module))
    others = {value.data_ptr() for value in found.values()}
    if any(len(modules) > 1 or pointer in others for pointer, modules in owners.items()):
        raise _refusal(model, "layers with adapters share their weights with others")


def _check_values(model: Any) -> None:
    """With matrices B that are not 0, layers that are merged change the logits as adapters do."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(12, device=model.device) * 7 + 1).unsqueeze(0) % vocabulary

    def logits() -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        return found

    with _refusing(model, "it does not run with them"), torch.no_grad(), evaluation_mode(model):
        before = logits()
        with _tried_matrices(model):
            with torch.enable_grad():
                adapted = logits()
            if torch.equal(adapted, before):
                raise _refusal(model, "its forward pass does not use them")
            if not adapted.requires_grad:
                raise _refusal(model, "no gradient reaches them")
            adapted = adapted.detach()
            with _merged_layers(model):
                merged = logits()
    change, difference = float((adapted - before).abs().mean()), float((adapted - merged).abs().mean())
    if not difference <= MERGED_DIFFERENCES.get(model.dtype, MERGED_DIFFERENCES[torch.bfloat16]) * change:
        raise _refusal(
            model,
            f"once merged, they change its logits differently ({difference:.2g} of {change:.2g} on average)",
        )


@contextmanager
def _tried_matrices(model: Any) -> Iterator[None]:
    matrices = [p for name, p in model.named_parameters() if ".lora_B." in name]
    kept = [p.clone() for p in matrices]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for matrix in matrices:
            matrix.normal_(0.0, TRIED_SCALE)
    try:
        yield
    finally:
        for matrix, value in zip(matrices, kept, strict=True):
            matrix.copy_(value)


@contextmanager
def _merged_layers(model: Any) -> Iterator[None]:
    """Each layer with adapters is what it will be when they are merged. Only the one that runs takes memory."""
    outermost = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and not name.endswith(_BASE)
    ]
    for module in outermost:
        module.forward = partial(_forward_merged, module)
    try:
        yield
    finally:
        for module in outermost:
            del module.forward


def _forward_merged(adapter: Any, *inputs: Any, **options: Any) -> Any:
    base, merged = adapter.get_base_layer(), {}
    while hasattr(adapter, "base_layer"):  # of an experts' layer, one around the other
        merged[_parameter(adapter)] = _merged(getattr(base, _parameter(adapter)), adapter)
        adapter = adapter.base_layer
    return functional_call(base, merged, inputs, options)


@contextmanager
def _refusing(model: Any, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _refusal(model, f"{what} ({reason})") from error


def _refusal(model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"student.lora is not possible with {type(model).__name__}: {reason}",
        hint="remove student.lora to train all weights, or use a student that docs/models.md lists with LoRA",
    )
