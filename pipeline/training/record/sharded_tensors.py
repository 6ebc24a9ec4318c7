"""Tensors on disk, each process writing and reading its own part (``torch.distributed.checkpoint``, safetensors).

A folder holds ``shard-<process>-<number>.safetensors``; where each part belongs is in the file's metadata, in the form
that torch's ``HuggingFaceStorageReader`` reads and its ``consolidate_safetensors_files`` joins. So tensors may be
loaded by another number of processes than wrote them. torch's own writer in this format is not used: equal
tensors must give equal bytes, and its header has the order of a hash table.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tropd.storage.errors import DamagedShardError, DiskError

INDEX = "files.json"
"""Names of the other files."""
FILE_BYTES = 2**30
"""A file ends with the tensor that takes it beyond this: some file systems, and copying tools, dislike huge ones."""

# Alone is how a run without torchrun saves, and how every process loads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in main memory, of sharded tensors this process's part: training may continue."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    copies: Any = stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
    stager.close()
    return dict(copies)


def save_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Write the parts of all tensors; every process of ``group`` must take part, with the same names.

    Returns once every process has written its part.

    Raises:
        DiskError: some process does not see process 0's folder.
        Exception: the error of any process's writing.
    """
    with _plain_errors():
        save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, whole shapes and types of the stored tensors.

    Raises:
        DamagedShardError: a file is missing, or only part of a tensor is stored.
    """
    names = json.loads((folder / INDEX).read_text())
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise DamagedShardError(
            f"{folder} lacks {', '.join(missing)}",
            hint="put the files back, or use a checkpoint that is whole",
        )
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise DamagedShardError(
                f"{folder} has only a part of {name}", hint="use a checkpoint that is whole"
            )
        found[name] = (entry.size, entry.properties.dtype)
    return found


def load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors in place, of sharded ones this process's part.

    Raises:
        RuntimeError, ValueError: a tensor is not stored, or has another shape.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _plain_errors():
        load(dict(tensors), storage_reader=reader, no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first process's error itself, in place of torch's collection, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None


class _Writer(StorageWriter):
    """Files whose bytes depend on the tensors only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self._folder.is_dir():
            raise _apart(self._folder)
        results = []
        for number, items in enumerate(_by_file(plan.items), 1):
            name = f"shard-{plan.storage_data:05d}-{number:05d}.safetensors"
            tensors = {}
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                tensors[item.index.fqn] = tensor.contiguous()
            save_file(tensors, self._folder / name, metadata={"DCP_SHARDING_INFO": _offsets(items)})
            size = (self._folder / name).stat().st_size
            results += [WriteResult(item.index, _bytes(item), (name, size)) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In process 0: a file that another has written must be here too."""
        files = sorted({result.storage_data for part in results for result in part})
        for name, size in files:
            path = self._folder / name
            if not path.exists() or path.stat().st_size != size:
                raise _apart(path)
        (self._folder / INDEX).write_text(json.dumps([name for name, _ in files]))


def _apart(path: Path) -> DiskError:
    return DiskError(
        f"{path} was written by another process, and is not here",
        hint="keep the workspace on a file system that all machines of a run share",
    )


def _by_file(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """By name: the optimizer lists the state it has made in another order than the state it was given back."""
    batch: list[WriteItem] = []
    size = 0
    for item in sorted(items, key=lambda item: item.index.fqn):
        batch.append(item)
        size += _bytes(item)
        if size >= FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _offsets(items: list[WriteItem]) -> str:
    """Places in the whole tensors where these parts begin, as torch's reader expects it."""
    found = {}
    for item in items:
        assert item.tensor_data is not None
        found[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
    return json.dumps(found)
