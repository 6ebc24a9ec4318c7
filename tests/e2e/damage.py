"""Ways to damage a file of a workspace, and what must hold when a command meets it.

A command either gives the answer that it gives of the undamaged workspace, or it says which file is damaged (as a
refusal with exit code 1 or 2, where it is not a report of what is there); and whatever else was in the workspace is
still there, in place or moved aside whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd.pipeline.report.data.collect import build_report
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import TropdError
from tropd.storage.formats.step_log import read_log
from tropd.storage.stage.manifest import read_manifest, write_manifest
from tropd.storage.verify.verify import verify_workspace
from tropd.storage.workspace import Workspace

COMMANDS = ("train", "evaluate", "report", "verify")
# Files that no command needs, and that every command may write: logs, locks, and what is made from everything else.
VOLATILE = ("logs/", "report/", "train/tensorboard/", ".")
# What ``verify`` does not promise to check: the user's own, what no stage reads, and the settings, which may be edited.
UNCHECKED = (*VOLATILE, "config.toml", "rejects/")


WRITTEN = {"train": ("train/",), "evaluate": ("eval/",)}


@dataclass(frozen=True)
class Answer:
    """What a command has done: exit code, what it said, and what it left, where that must not depend on chance."""

    code: int
    said: str
    left: Any


def files(workspace: Path) -> list[str]:
    """All files, relative; of shards that are many files of one kind, those of the first."""
    names = sorted(p.relative_to(workspace).as_posix() for p in workspace.rglob("*") if p.is_file())
    return [name for name in names if not re.search(r"part-0000[1-9]\.zarr|report/plots/", name)]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"\0"


def _torn(content: bytes) -> bytes:
    """The middle line (of a file without lines, a part of it) has lost its second half, its end included."""
    start = content.rfind(b"\n", 0, len(content) // 2) + 1
    end = content.find(b"\n", start) + 1 or len(content)
    if end - start < 4:
        return content[:start] + content[end:]
    return content[: (start + end) // 2] + content[end:]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "deleted": None,
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "flipped": _flipped,
    "torn": _torn,
}
OLDER = "older"


def damage(workspace: Path, name: str, how: str, earlier: Path) -> bool:
    """Damage a file; False if that would not change it. ``earlier`` is the workspace as it was before."""
    path = workspace / name
    if how == OLDER:
        return _make_older(workspace, name, earlier)
    change = DAMAGES[how]
    if change is None:
        path.unlink()
        return True
    content = path.read_bytes()
    path.write_bytes(change(content))
    return change(content) != content


def _make_older(workspace: Path, name: str, earlier: Path) -> bool:
    """An earlier version of a file: the one that it had, or one of its kind that is as good as that."""
    path = workspace / name
    before = path.read_bytes()
    if (earlier / name).exists() and (earlier / name).read_bytes() != before:
        shutil.copyfile(earlier / name, path)
    elif path.name == "manifest.json":
        manifest = read_manifest(path.parent)
        assert manifest is not None
        shards = dict(list(manifest.shards.items())[:1])
        write_manifest(
            path.parent, manifest.model_copy(update={"shards": shards, "complete": False, "summary": {}})
        )
    elif (other := next(_others(workspace, name), None)) is not None:
        shutil.copyfile(other, path)
    elif name == "config.toml":
        path.write_bytes(before.replace(b"learning_rate = 1e-3", b"learning_rate = 2e-3"))
    elif name.endswith(".jsonl"):
        path.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
    return path.read_bytes() != before


def _others(workspace: Path, name: str) -> Iterator[Path]:
    """Files of the same kind with another content: of the checkpoint before, another shard, model or evaluation."""
    path = workspace / name
    for pattern, other in (
        (r"step-\d+", "step-*"),
        (r"part-\d+", "part-*"),
        (r"part-[a-z]+\.", "part-*."),
        (r"models/(teacher|student)", "models/*"),
    ):
        for found in sorted(workspace.glob(re.sub(pattern, other, name))):
            if found != path and found.read_bytes() != path.read_bytes():
                yield found


def answer(workspace: Path, command: str, code: int, said: str) -> Answer:
    """What a command has answered, without times and paths."""
    said = re.sub(r"\s+", " ", said.replace(str(workspace), "W"))
    stage = None if code else read_manifest(workspace / {"train": "train", "evaluate": "eval"}[command])
    if stage is None:
        return Answer(code, said, None)
    left: dict[str, Any] = {"summary": stage.summary, "fingerprint": stage.fingerprint}
    if command == "train":
        names = [*[n for n in stage.shards if n.startswith("checkpoints/")][-1:], "final"]
        left["metrics"] = _metrics(workspace)
        left["samples"] = read_log(workspace / "train" / "samples.jsonl").whole
    else:
        names = list(stage.shards)
    left["shards"] = {name: stage.shards[name].sha256 for name in names}
    # Nothing is made from a finished run's checkpoints any more; ``verify`` reads them.
    of_use = [name for name in names if not name.startswith("checkpoints/")]
    paths = {name: workspace / stage.stage / name for name in of_use}
    left["files"] = {name: content_digest(path) for name, path in paths.items() if path.exists()}
    return Answer(code, "", left)


def read_only(workspace: Path, command: str) -> tuple[Answer, str]:
    """What ``report`` (without drawing its page) and ``verify`` answer, in this process; and what is said."""
    try:
        opened = Workspace.open(workspace)
        if command == "report":
            report = build_report(opened).model_dump(mode="json")
            return Answer(0, json.dumps(report["missing"]), _without_times(report)), str(report["missing"])
        found = verify_workspace(opened)
    except TropdError as error:
        return Answer(error.exit_code, str(error), None), str(error)
    except Exception as error:
        return Answer(1, f"internal error: {error!r}", None), f"internal error: {error!r}"
    said = "\n".join(map(str, found))
    return Answer(int(any(f.severity == "error" for f in found)), said, None), said


def _metrics(workspace: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if not k.startswith(("time_", "memory_"))}
        for record in read_log(workspace / "train" / "metrics.jsonl").whole
    ]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = ("seconds", "bytes", "time_", "memory_", "made", "rate", "per_second")
        return {k: _without_times(v) for k, v in value.items() if not any(d in k for d in dropped)}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def tree(workspace: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        p.relative_to(workspace).as_posix(): content_digest(p) for p in workspace.rglob("*") if p.is_file()
    }


def fault(
    name: str,
    command: str,
    before: dict[str, str],
    workspace: Path,
    found: Answer,
    expected: Answer,
    output: str,
) -> str:
    """What is wrong with an answer, in words; empty if it holds."""
    if "internal error" in output or "Traceback" in output:
        return "internal error"
    named = _is_named(name, output)
    if found == expected:
        kept = (
            before
            if found.code
            else {n: d for n, d in before.items() if not n.startswith(WRITTEN.get(command, ()))}
        )
        if command == "verify" and not name.startswith(UNCHECKED):
            return "verify has not seen it"
        return _lost(name, kept, workspace)
    if not named:
        return f"the answer differs, and the file is not named: code {found.code}, {_difference(found, expected)}"
    if command == "train" and found.code == 0:
        return _beyond(name, found, expected) or _lost(
            name, {n: d for n, d in before.items() if not n.startswith("train/")}, workspace
        )
    if found.code not in ((1, 2) if command in WRITTEN else (0, 1, 2)):
        return f"exit code {found.code}"
    return _lost(name, before, workspace)


def _is_named(name: str, output: str) -> bool:
    """The file, or the shard or model that it belongs to; the lines of an error may be wrapped anywhere.

    A report names a stage and what in it. An older manifest is as good as any: its stage is named as unfinished, or what
    lies beside it and is not in it.
    """
    text = re.sub(r"\s+", "", output)
    stage, _, rest = name.partition("/")
    parts = rest.split("/") if rest else []
    inside = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if not parts:
        return name in text
    if parts == ["manifest.json"] and any(f"{stage}{mark}" in text for mark in ("/", ":")):
        return True
    return any(f"{stage}/{path}" in text for path in inside if path != "checkpoints") or (
        f"{stage}:" in text and any(path in text for path in inside if path != "checkpoints")
    )


def _beyond(name: str, found: Answer, expected: Answer) -> str:
    """What a training run has lost beyond the lines of the damaged file."""
    for part in ("summary", "shards", "files", "fingerprint"):
        if found.left[part] != expected.left[part]:
            return f"{part} differ"
    for part in ("metrics", "samples"):
        more = [line for line in found.left[part] if line not in expected.left[part]]
        fewer = len(expected.left[part]) - len(found.left[part])
        if more or (fewer and name != f"train/{part}.jsonl"):
            return f"{part} differ"
    return ""


def _lost(name: str, before: dict[str, str], workspace: Path) -> str:
    after = tree(workspace)
    aside = {digest for path, digest in after.items() if path.startswith("damaged/") or ".old-" in path}
    lost = [
        path
        for path, digest in before.items()
        if path != name
        and not path.startswith(VOLATILE)
        and after.get(path) != digest
        and digest not in aside
    ]
    return f"lost: {', '.join(lost)}" if lost else ""


def _difference(found: Answer, expected: Answer) -> str:
    if isinstance(found.left, dict) and isinstance(expected.left, dict):
        return "differs in " + ", ".join(k for k in expected.left if found.left.get(k) != expected.left[k])
    return found.said[:300]
