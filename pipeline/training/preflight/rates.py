"""GpuRates of a GPU, each with its unit and source, read from a TOML file; the packaged one is of an H100."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tropd.storage.errors import ConfigError

PACKAGED = "rates.toml"


class Rate(BaseModel):
    """A number, what it counts, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    unit: str
    measured: bool
    """False: an assumption."""
    source: str


class GpuRates(BaseModel):
    """GpuRates of one GPU; units are in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: Rate
    dense_training: Rate
    dense_forward: Rate
    attention_masked_training: Rate
    attention_causal: Rate
    memory_bandwidth: Rate
    vllm_token: Rate
    transformers_token: Rate
    transformers_copies: Rate
    vllm_score_token: Rate
    micro_batch_host: Rate
    step_rest: Rate
    reference_rest: Rate


def load_rates(path: Path | None = None) -> GpuRates:
    """The rates of a file, or the packaged ones.

    Raises:
        ConfigError: the file cannot be read, or has not these rates.
    """
    try:
        if path is None:
            text = (resources.files(__package__) / PACKAGED).read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        return GpuRates.model_validate(tomllib.loads(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"rates in {path or PACKAGED}: {error}") from error
