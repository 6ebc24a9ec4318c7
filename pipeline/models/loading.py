"""Loading causal LMs and tokenizers, whole or not at all, and their identity (hashes). The only door to them."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tropd.pipeline.config.sections.value_types import Dtype
from tropd.pipeline.models.model_files import CONFIG, COPY_AGAIN, GENERATION_CONFIG, check_files, unreadable
from tropd.pipeline.models.runtime import DTYPES
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.models.whole_models import check_headers, check_report
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError

logger = logging.getLogger(__name__)
MAX_SHOWN_DIFFERENCES = 5
SWITCHING_ROTARY = ("dynamic", "longrope")


def load_model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory, without its weights.

    Raises:
        ConfigError: of a kind of model that is not known here, or with values that it cannot have.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the errors of the many kinds of models have no class in common
        raise _unusable(folder, error) from error


def model_without_weights(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A causal LM whose parameters have shapes and no storage (on the device ``meta``)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_model(folder: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that is not whole or whose parts do not belong together, before its weights are read.

    Raises:
        ConfigError, DataError: unreadable files, weights that are not those of the configuration, a tokenizer with more
            tokens than the model has rows for, or stop tokens that the tokenizer does not have.
    """
    check_files(folder)
    rows = check_weights(folder, trust_remote_code, _stamp(folder))
    tokens = num_tokens(tokenizer)
    if tokens > rows:
        raise ConfigError(
            f"the tokenizer in {folder} has token ids up to {tokens - 1}, its model only rows for ids up to {rows - 1}",
            hint="give the model the tokenizer that it was made with (often a token was added: remove it from "
            "tokenizer.json), or enlarge it: model.resize_token_embeddings",
        )
    stop_token_ids(load_generation_config(folder), tokenizer)


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """A value that changes whenever a file of a model does."""
    found = [
        (path.name, path.stat()) for pattern in ("*.json", "*.safetensors") for path in folder.glob(pattern)
    ]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))


@functools.cache
def check_weights(folder: Path, trust_remote_code: bool, stamp: tuple[tuple[str, int, int], ...]) -> int:
    """Compare weight files and configuration; returns the rows that input and output embeddings both have.

    Not of quantized models and those with code of their own: the form of their tensors is known only once loaded.
    """
    config = load_model_config(folder, trust_remote_code=trust_remote_code)
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or getattr(config, "quantization_config", None):
        return int(config.get_text_config().vocab_size)
    try:
        empty = model_without_weights(config)
    except Exception as error:  # as above
        raise _unusable(folder, error) from error
    check_headers(folder, empty)
    embeddings = (empty.get_input_embeddings(), empty.get_output_embeddings())
    weights = [getattr(layer, "weight", None) for layer in embeddings]
    rows = [int(weight.shape[0]) for weight in weights if weight is not None]
    return min(rows, default=int(config.get_text_config().vocab_size))


def _unusable(folder: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()).split(". ")[0]  # transformers adds advice about updates
    return ConfigError(
        f"{folder / CONFIG} describes no causal language model that can be used here: {reason}",
        hint=f"{COPY_AGAIN}; a new kind of model needs a newer transformers (pip install -U transformers), one with "
        "code of its own needs trust_remote_code = true",
    )


def load_model(folder: Path, *, dtype: Dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A causal LM in evaluation mode. Weights are read from safetensors only, never from pickle.

    Raises:
        ConfigError: its configuration is not that of a causal LM.
        DataError: a weight file is truncated, or the weights are not all those of the model (see ``whole_models``).
    """
    check_files(folder)
    check_weights(folder, trust_remote_code, _stamp(folder))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, which is checked
        )
    except SafetensorError as error:
        raise unreadable(folder, error) from error
    check_report(folder, model, report)
    return model.to(device).eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ConfigError: it has none, or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library in Rust raises Exception itself
        if (folder / CONFIG).is_file():  # which is read, too, and may be at fault
            load_model_config(folder, trust_remote_code=trust_remote_code)
        raise ConfigError(f"{folder} has no readable tokenizer: {error}", hint=COPY_AGAIN) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token")
    return tokenizer


def load_generation_config(folder: Path) -> Any:
    """The generation configuration of a model directory; without one, the settings of its ``config.json``.

    Raises:
        ConfigError: it has values that it cannot have.
    """
    name = GENERATION_CONFIG if (folder / GENERATION_CONFIG).is_file() else CONFIG
    try:
        return GenerationConfig.from_pretrained(folder, name, local_files_only=True)
    except Exception as error:  # depends on which value is wrong
        raise ConfigError(f"{folder / name} cannot be used: {error}", hint=COPY_AGAIN) from error


def stop_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config.

    Raises:
        ConfigError: one is not an id of the tokenizer.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    tokens = num_tokens(tokenizer)
    bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < tokens]
    if bad:
        raise ConfigError(
            f"eos_token_id in the {GENERATION_CONFIG} (or {CONFIG}) of {tokenizer.name_or_path} names {bad[0]!r}, which "
            f"is not a token: the tokenizer has ids 0 … {tokens - 1}",
            hint=f"correct it there; the tokenizer's own end-of-sequence token is {tokenizer.eos_token_id}",
        )
    return frozenset({int(tokenizer.eos_token_id), *ids})


def context_length(model_config: Any) -> int:
    """Longest sequence a model takes (unbounded if its config does not say), but see ``rotary_switch``."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return min(int(length) if length and length > 0 else 2**31 - 1, rotary_switch(model_config) or 2**31 - 1)


def rotary_switch(model_config: Any) -> int | None:
    """The length beyond which a model's rotary angles become others, for all of a sequence; None where they do not.

    transformers takes the angles from the longest row of a batch (scaling "dynamic" and "longrope"). A token would have
    one log-prob when it is sampled and another once its row, or one beside it, is longer.
    """
    config = model_config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = parameters.values() if all(isinstance(p, dict) for p in parameters.values()) else [parameters]
    lengths = [
        p.get("original_max_position_embeddings") or config.max_position_embeddings
        for p in sets
        if p.get("rope_type") in SWITCHING_ROTARY
    ]
    return int(min(lengths)) if lengths else None


@functools.cache
def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files and the model configuration of a directory."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{path.name}\0{content_digest(path)}\n".encode())
    return digest.hexdigest()


def check_lengths(max_length: int, longest_prompt: int, max_tokens: int, who: str = "the model") -> None:
    """Refuse a model that cannot read prompt and response.

    Raises:
        ConfigError: with the numbers.
    """
    if longest_prompt + max_tokens > max_length:
        raise ConfigError(
            f"the longest prompt ({longest_prompt} tokens) and rollout.max_tokens ({max_tokens}) make "
            f"{longest_prompt + max_tokens} tokens, but {who} takes {max_length}",
            hint=f"set rollout.max_tokens to at most {max(0, max_length - longest_prompt)}, or drop long prompts",
        )


def num_parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(math.prod(p.shape) for p in {id(p): p for p in model.parameters()}.values())


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers: modules of the classes that transformers says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
