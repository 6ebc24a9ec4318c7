"""Facts of a machine: what nvidia-smi says, and the disk of a folder that is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd.pipeline.training.preflight.machine import Gpu, look_at_machine, parse_query


def test_the_answer_of_nvidia_smi_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 80994\nNVIDIA H100 80GB HBM3, 81559, 1200\n"
    name, mib = "NVIDIA H100 80GB HBM3", 1 << 20
    assert parse_query(text) == (Gpu(name, 81559 * mib, 80994 * mib), Gpu(name, 81559 * mib, 1200 * mib))
    with pytest.raises(ValueError):
        parse_query("No devices were found\n")


def test_the_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    machine = look_at_machine(tmp_path / "not" / "there", gpus=False)
    assert machine.disk > 0
    assert machine.memory > 1e8
    assert machine.gpus == ()
