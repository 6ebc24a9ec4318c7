"""Every rate has its source; a file without one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd.pipeline.training.preflight.rates import GpuRates, Rate, load_rates
from tropd.storage.errors import ConfigError


def test_every_rate_is_positive_and_says_where_it_comes_from() -> None:
    rates = load_rates()
    for name in GpuRates.model_fields:
        rate: Rate = getattr(rates, name)
        assert rate.value > 0
        assert len(rate.source) > 10, name
        assert rate.unit, name


def test_another_file_is_read_and_a_bad_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    lines = [
        f"[{name}]\nvalue = 1.0\nunit = 'x'\nmeasured = true\nsource = 'a test'\n"
        for name in GpuRates.model_fields
    ]
    path.write_text("".join(lines))
    assert load_rates(path).vllm_token.value == 1.0
    path.write_text("".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"(?s)rates\.toml.*memory"):
        load_rates(path)
    with pytest.raises(ConfigError, match="missing"):
        load_rates(tmp_path / "missing.toml")
