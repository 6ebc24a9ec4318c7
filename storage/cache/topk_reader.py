"""Random access to a scores stage: spans of tokens by row, in batches, with a bound on memory.

A shard is checked against its checksum when it is first read, decoded whole, and kept in the order of use until
the bound is reached. Decoding whole shards is a choice: a shard takes tens of milliseconds, a training step
asks for spans all over the stage, and the checksum has to read the whole file anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tropd.storage.cache.shard import TopK, concatenate, read_topk
from tropd.storage.errors import DamagedShardError, DataError
from tropd.storage.stage.manifest import Manifest, check_shard

DEFAULT_MEMORY = 1 << 30


class Span(NamedTuple):
    """Tokens ``start:stop`` (to the end if None) of a row of a shard."""

    shard: str
    row: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Decoded:
    """A shard in memory. ``firsts[t]`` is where the alternatives of token t begin."""

    data: TopK
    firsts: npt.NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        arrays = (
            getattr(self.data, name)
            for name in ("offsets", "counts", "ids", "logprobs", "tail", "teacher_logprobs")
        )
        return sum(a.nbytes for a in arrays) + self.firsts.nbytes

    def span(self, span: Span) -> TopK:
        """Views, not copies."""
        data = self.data
        if not 0 <= span.row < data.num_rows:
            raise DataError(f"{span.shard} has {data.num_rows} rows, row {span.row} was asked for")
        low, high = int(data.offsets[span.row]), int(data.offsets[span.row + 1])
        first = min(low + span.start, high)
        last = high if span.stop is None else min(low + max(span.stop, span.start), high)
        kept = slice(int(self.firsts[first]), int(self.firsts[last]))
        return TopK(
            offsets=np.array([0, last - first], dtype=np.int64),
            counts=data.counts[first:last],
            ids=data.ids[kept],
            logprobs=data.logprobs[kept],
            tail=data.tail[first:last],
            teacher_logprobs=data.teacher_logprobs[first:last],
        )


class TopKReader:
    """Reads a scores stage that does not change meanwhile. Safe to use from several threads.

    Args:
        folder, manifest: the stage.
        memory: bytes of decoded shards to keep; the shard in use is kept even if it is larger.
        prefetch: decode shards named to ``prefetch`` on a background thread.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, memory: int = DEFAULT_MEMORY, prefetch: bool = False
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._memory = memory
        self._kept: OrderedDict[str, _Decoded] = OrderedDict()
        self._checked: set[str] = set()
        self._coming: dict[str, Future[_Decoded]] = {}
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "topk-prefetch") if prefetch else None
        self._places: dict[tuple[str, int], tuple[str, int]] | None = None

    def __enter__(self) -> TopKReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the background thread and forget all shards."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._kept.clear()
        self._coming.clear()

    @property
    def shards(self) -> list[str]:
        """Names of the stage's top-k shards, in order."""
        return [name for name in self._manifest.shards if name.endswith(".zarr")]

    @property
    def memory_used(self) -> int:
        with self._lock:
            return sum(shard.num_bytes for shard in self._kept.values())

    def read(self, spans: Sequence[Span]) -> TopK:
        """The spans as rows of one ``TopK``, in their order; a single span is not copied.

        Raises:
            DamagedShardError: a shard is not what its manifest says.
            DataError: a row that its shard does not have.
        """
        parts: list[TopK | None] = [None] * len(spans)
        # Shard by shard, so that a batch needs each of them once even if memory holds only one.
        for place in sorted(range(len(spans)), key=lambda i: spans[i].shard):
            parts[place] = self._shard(spans[place].shard).span(spans[place])
        found = [part for part in parts if part is not None]
        return found[0] if len(found) == 1 else concatenate(found)

    def locate(self, prompt_id: str, sample_index: int, start: int = 0, stop: int | None = None) -> Span:
        """The span of a trajectory, by the row tables of the stage.

        Raises:
            DataError: the stage has no scores for it.
        """
        if self._places is None:
            self._places = self._read_places()
        try:
            shard, row = self._places[prompt_id, sample_index]
        except KeyError:
            raise DataError(
                f"{self._folder} has no scores for prompt {prompt_id!r}, sample {sample_index}"
            ) from None
        return Span(shard, row, start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start decoding shards that will be asked for soon; failures show when they are read."""
        if self._thread is None:
            return
        with self._lock:
            for name in dict.fromkeys(names):
                if name not in self._kept and name not in self._coming:
                    self._coming[name] = self._thread.submit(self._load, name)

    def _shard(self, name: str) -> _Decoded:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            coming = self._coming.pop(name, None)
        decoded = self._load(name) if coming is None else coming.result()
        with self._lock:
            self._keep(name, decoded)
        return decoded

    def _load(self, name: str) -> _Decoded:
        shard = self._manifest.shards.get(name)
        if shard is None:
            raise DamagedShardError(
                f"{self._folder / name} is not in the manifest", hint="rerun tropd score-teacher"
            )
        if name not in self._checked:
            check_shard(self._folder, shard)
            self._checked.add(name)
        data = read_topk(self._folder / name)
        return _Decoded(data, np.concatenate([[0], np.cumsum(data.counts, dtype=np.int64)]))

    def _keep(self, name: str, decoded: _Decoded) -> None:
        self._kept[name] = decoded
        self._kept.move_to_end(name)
        used = sum(shard.num_bytes for shard in self._kept.values())
        while used > self._memory and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            used -= dropped.num_bytes

    def _read_places(self) -> dict[tuple[str, int], tuple[str, int]]:
        places: dict[tuple[str, int], tuple[str, int]] = {}
        for name in self.shards:
            table_name = Path(name).with_suffix(".parquet").name
            shard = self._manifest.shards.get(table_name)
            if shard is None:
                raise DataError(
                    f"{self._folder} has no row table {table_name}", hint="rerun tropd score-teacher"
                )
            check_shard(self._folder, shard)
            table = pq.read_table(self._folder / table_name, columns=["prompt_id", "sample_index"])
            keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
            places |= {key: (name, row) for row, key in enumerate(keys)}
        return places
