"""Loading causal LMs and tokenizers, their identity (hashes), and whether two of them fit together."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tropd.pipeline.allocator import keep_freed_memory
from tropd.pipeline.attention import FLOAT32_SDPA
from tropd.pipeline.config import Device, Dtype, ModelConfig, RuntimeConfig
from tropd.storage.atomic import content_digest
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.workspace import Workspace

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHOWN_DIFFERENCES = 5
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def configure_runtime(runtime: RuntimeConfig) -> torch.device:
    """Set the thread count, pick the device, and on a CPU keep freed memory.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = pick_device(runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device is 'cuda', but PyTorch sees no CUDA device",
            hint='install a CUDA build of PyTorch, or set runtime.device = "cpu"',
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def model_directory(workspace: Workspace, config: ModelConfig, role: str) -> Path:
    """The local folder of a model; a hub name is downloaded (safetensors and tokenizer files only).

    Raises:
        ConfigError: nothing there, no weights, or weights only in a pickle format.
    """
    folder = workspace.resolve(config.model)
    if not folder.exists():
        if _is_hub_name(config.model):
            return _download(config.model, role)
        raise ConfigError(
            f"{role}.model = {config.model!r}: {folder} does not exist",
            hint="tropd prepare makes the demo models; otherwise give a model directory or a hub name",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{role}.model: {folder} has no config.json, so it is not a Hugging Face model")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{role}.model: {folder} has no *.safetensors weights",
            hint="convert the model: model.save_pretrained(path) of transformers writes safetensors",
        )
    return folder


def model_is_here(workspace: Workspace, config: ModelConfig) -> bool:
    """Whether ``model_directory`` would find the model without downloading it."""
    return workspace.resolve(config.model).exists() or (
        _is_hub_name(config.model) and _downloaded(config.model)
    )


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "models/"))


def _downloaded(name: str) -> bool:
    from huggingface_hub import snapshot_download  # only where a hub model is used
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return False
    return any(folder.glob("*.safetensors"))


def _download(name: str, role: str) -> Path:
    from huggingface_hub import snapshot_download  # only where a hub model is used

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        raise ConfigError(
            f"{role}.model = {name!r} cannot be fetched from the Hugging Face hub: {error}"
        ) from error


def load_model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory, without its weights."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def load_model(folder: Path, *, dtype: Dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A causal LM in evaluation mode. Weights are read from safetensors only, never from pickle.

    Raises:
        DataError: a weight file is truncated or otherwise not one.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except SafetensorError as error:
        raise DataError(
            f"the weights in {folder} cannot be read: {error}",
            hint="copy or download the model again; rerunning a stage makes its own output again",
        ) from error
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
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no readable tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token")
    return tokenizer


def load_generation_config(folder: Path) -> Any:
    """The generation configuration of a model directory; None where there is none."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def stop_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config."""
    ids: set[int] = {int(tokenizer.eos_token_id)}
    configured = getattr(generation_config, "eos_token_id", None)
    if isinstance(configured, int):
        ids.add(configured)
    elif configured:
        ids.update(int(i) for i in configured)
    return frozenset(ids)


def context_length(model_config: Any) -> int:
    """Longest sequence a model takes (unbounded if its config does not say)."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else 2**31 - 1


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


@contextmanager
def evaluation_mode(model: Any) -> Iterator[Any]:
    """Switch a model to evaluation mode and back."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def masked_attention(model: Any) -> Iterator[None]:
    """Attention that takes any mask, as a cache and padded rows need; in training the model may have another."""
    own = model.config._attn_implementation
    if own in ("sdpa", "eager", FLOAT32_SDPA):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in ``dtype`` over float32 weights; nothing where ``dtype`` is None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def num_parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(math.prod(p.shape) for p in {id(p): p for p in model.parameters()}.values())


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers: modules of the classes that transformers says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
