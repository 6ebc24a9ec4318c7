"""The form of every stored file is on record, and so are values that are the same on every machine.

What a model has computed differs in its last bits from processor to processor: tests/digests.py compares it on one.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RECORD = Path(__file__).with_name("stored.txt")
STAGES = ("data", "models", "prefixes", "scores", "train", "eval")
THEIRS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of transformers, which has its own versions of them."""


def test_stored_files_have_the_form_on_record(
    finished: Path, on_record: Callable[[Path, list[str]], None]
) -> None:
    on_record(RECORD, list(stored_lines(finished)))


def stored_lines(workspace: Path) -> Iterator[str]:
    """Path of each stored file, and below it its fields with their types, and what no processor decides."""
    seen: dict[tuple[str, ...], str] = {}
    for stage in STAGES:
        for path in sorted(p for p in (workspace / stage).rglob("*") if p.is_file()):
            name = path.relative_to(workspace)
            if any(part.startswith(".") or part == "tensorboard" for part in name.parts):
                continue
            form = tuple(_form(path))
            yield str(name)
            yield from (f"    {line}" for line in ([f"as {seen[form]}"] if form and form in seen else form))
            seen.setdefault(form, str(name))


def _form(path: Path) -> Iterator[str]:
    if path.name in THEIRS or "/c/" in str(path):  # a chunk of Zarr
        return
    if path.name == "manifest.json":
        yield from _manifest(json.loads(path.read_text()))
    elif path.name == "zarr.json":
        yield from _array(json.loads(path.read_text()))
    elif path.suffix == ".parquet":
        yield from _columns(pq.read_schema(path))
    elif path.suffix == ".safetensors":
        yield from _tensors(path)
    elif path.suffix == ".jsonl" and path.parent.name == "data":
        yield f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    elif path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        yield " ".join(dict.fromkeys(key for record in records for key in record))
    elif path.suffix == ".json":
        yield " ".join(json.loads(path.read_text()))
    else:
        raise AssertionError(f"{path}: say here what its form is")


def _manifest(manifest: dict[str, Any]) -> Iterator[str]:
    yield " ".join(manifest)
    computed = (".weights", "upstream.", ".distance_teacher")
    for name, value in manifest["fields"].items():
        yield f"fields.{name} = {'…' if any(part in name for part in computed) else json.dumps(value)}"
    for name, shard in manifest["shards"].items():
        yield f"shards.{name}: {' '.join(shard)}"
    yield f"summary: {' '.join(manifest['summary'])}"


def _array(array: dict[str, Any]) -> Iterator[str]:
    """Of an array its type and codecs, but no sizes: there are as many elements as the teacher has written."""
    if array["node_type"] == "group":
        yield f"attributes: {json.dumps(array['attributes'])}"
        return
    yield f"{array['data_type']}, fill {array['fill_value']}"
    yield re.sub(r'"chunk_shape": \[\d+\], ', "", json.dumps(array["codecs"]))


def _columns(schema: pa.Schema) -> Iterator[str]:
    yield from (f"{field.name}: {field.type}" for field in schema)
    metadata = schema.metadata or {}
    yield from (f"{key.decode()} = {metadata[key].decode()}" for key in sorted(metadata))


def _tensors(path: Path) -> Iterator[str]:
    """Names and types of tensors, those of all layers as one."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    names = {re.sub("[0-9]+", "N", name): tensor.get("dtype") for name, tensor in header.items()}
    yield from (f"{name}: {dtype}" for name, dtype in sorted(names.items()) if dtype)
