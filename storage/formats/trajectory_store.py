"""Random access to trajectories on disk, by prompt and sample."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tropd.storage.stage.manifest import Manifest, check_shard


class TrajectoryStore:
    """All trajectories of a stage in memory, as compact Arrow columns, found by prompt.

    Args:
        meta: read the further fields of trajectories too.

    Raises:
        DamagedShardError: a shard does not match its checksum.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, meta: bool = False) -> None:
        tables = []
        columns = [
            "prompt_id",
            "sample_index",
            "prompt_tokens",
            "tokens",
            "sampled_logprobs",
            "finish_reason",
            *(["meta"] if meta else []),
        ]
        self._location: list[tuple[str, int]] = []
        for shard in manifest.shards.values():
            check_shard(folder, shard)
            tables.append(pq.read_table(folder / shard.name, columns=columns))
            self._location += [(shard.name, row) for row in range(tables[-1].num_rows)]
        self._table = pa.concat_tables(tables)
        self._by_prompt: dict[str, list[int]] = defaultdict(list)
        for row, prompt_id in enumerate(self._table["prompt_id"].to_pylist()):
            self._by_prompt[prompt_id].append(row)

    def largest_id(self) -> int:
        """The largest id among the responses' tokens; -1 where there are none."""
        largest = pc.max(pc.list_flatten(self._table["tokens"])).as_py()
        return -1 if largest is None else int(largest)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def rows_of(self, prompt_id: str) -> list[int]:
        """Rows of a prompt's trajectories (none if all were filtered out)."""
        return self._by_prompt.get(prompt_id, [])

    def prompt_tokens(self, row: int) -> list[int]:
        tokens: list[int] = self._table["prompt_tokens"][row].as_py()
        return tokens

    def tokens(self, row: int) -> list[int]:
        tokens: list[int] = self._table["tokens"][row].as_py()
        return tokens

    def sampled_logprobs(self, row: int) -> list[float]:
        logprobs: list[float] = self._table["sampled_logprobs"][row].as_py()
        return logprobs

    def truncated(self, row: int) -> bool:
        return bool(self._table["finish_reason"][row].as_py() == "length")

    def name(self, row: int) -> tuple[str, int]:
        """Prompt id and sample index."""
        return self._table["prompt_id"][row].as_py(), self._table["sample_index"][row].as_py()

    def meta(self, row: int) -> dict[str, str]:
        """Further fields, where they were read."""
        return dict(self._table["meta"][row].as_py())

    def location(self, row: int) -> tuple[str, int]:
        """Shard name and row in the shard."""
        return self._location[row]
