"""Imports, sizes of folders and modules, which test covers a module, and that tests use public names only.

All of it is read from the source text.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]

# A module imports from its own layer and from those below it, never from above.
LAYERS = (
    "cli",  # parse, call one function, render
    "pipeline",  # the files of the folder itself: the door for programs that use tropd as a library
    "pipeline.report",  # what a run shows
    "pipeline.experiments",  # several runs, or a run made for you
    "pipeline.training",  # stage 3
    "pipeline.stages",  # the other commands that fill one folder of the workspace
    "pipeline.teacher",  # the teacher while training
    "pipeline.run",  # the run record, opening models, identity, upstream stages, progress, interrupts
    "pipeline.problems",  # prompts, selection, decontamination, grading
    "pipeline.models",  # loading, tokenizers, output layer, engines
    "pipeline.config",  # schema, resolving, explaining, recipes
    "pipeline.objectives",  # pure functions and data
    "storage",  # files and their formats; knows no model
)

# Layers of modules that do not lie in the folder of their layer.
HOMES: dict[str, str] = {
    "tropd.pipeline.status": "pipeline.report",
    "tropd.pipeline.watching": "pipeline.report",
    "tropd.pipeline.compare": "pipeline.experiments",
    "tropd.pipeline.demo": "pipeline.experiments",
    "tropd.pipeline.doctor": "pipeline.experiments",
    "tropd.pipeline.export": "pipeline.experiments",
    "tropd.pipeline.reproduce": "pipeline.experiments",
    "tropd.pipeline.sft": "pipeline.experiments",
    "tropd.pipeline.starting": "pipeline.experiments",
    "tropd.pipeline.plan": "pipeline.training",
    "tropd.pipeline.timing": "pipeline.training",
    "tropd.pipeline.evaluation": "pipeline.stages",
    "tropd.pipeline.kept_mass": "pipeline.stages",
    "tropd.pipeline.prefixes": "pipeline.stages",
    "tropd.pipeline.ray_workers": "pipeline.stages",
    "tropd.pipeline.refilter": "pipeline.stages",
    "tropd.pipeline.scoring": "pipeline.stages",
    "tropd.pipeline.shards": "pipeline.stages",
    "tropd.pipeline.sources": "pipeline.stages",
    "tropd.pipeline.teachers": "pipeline.teacher",
    "tropd.pipeline.automatic": "pipeline.run",
    "tropd.pipeline.context": "pipeline.run",
    "tropd.pipeline.identity": "pipeline.run",
    "tropd.pipeline.progress": "pipeline.run",
    "tropd.pipeline.ray_cluster": "pipeline.run",
    "tropd.pipeline.stops": "pipeline.run",
    "tropd.pipeline.training.interrupt": "pipeline.run",
    "tropd.pipeline.decontamination": "pipeline.problems",
    "tropd.pipeline.prompts": "pipeline.problems",
    "tropd.pipeline.evaluation.answer_text": "pipeline.problems",
    "tropd.pipeline.evaluation.answer_words": "pipeline.problems",
    "tropd.pipeline.evaluation.choices": "pipeline.problems",
    "tropd.pipeline.evaluation.grading": "pipeline.problems",
    "tropd.pipeline.evaluation.math_answers": "pipeline.problems",
    "tropd.pipeline.evaluation.symbolic": "pipeline.problems",
    "tropd.pipeline.allocator": "pipeline.models",
    "tropd.pipeline.attention": "pipeline.models",
    "tropd.pipeline.engines": "pipeline.models",
    "tropd.pipeline.head": "pipeline.models",
    "tropd.pipeline.memory": "pipeline.models",
    "tropd.pipeline.model_files": "pipeline.models",
    "tropd.pipeline.models": "pipeline.models",
    "tropd.pipeline.sums": "pipeline.models",
    "tropd.pipeline.tokenizers": "pipeline.models",
    "tropd.pipeline.whole_models": "pipeline.models",
    "tropd.pipeline.guidance": "pipeline.objectives",
    "tropd.pipeline.config": "pipeline.config",
    "tropd.pipeline.config_paths": "pipeline.config",
    "tropd.pipeline.config_problems": "pipeline.config",
    "tropd.pipeline.configuration": "pipeline.config",
    "tropd.pipeline.keyword_settings": "pipeline.config",
    "tropd.pipeline.recipes": "pipeline.config",
    "tropd.pipeline.objectives.catalog": "pipeline.config",
}

# Imports that point up today. One that is gone has to be taken off the list.
UPWARDS = {
    "tropd.pipeline.evaluation.distance -> tropd.pipeline.training.logprobs",
    "tropd.pipeline.export -> tropd.pipeline.report.card",
    "tropd.pipeline.export -> tropd.pipeline.report.collect",
    "tropd.pipeline.problems.selection -> tropd.pipeline.context",
}

# Modules of which each imports the others, on some way.
CIRCLES = [{"tropd.pipeline.ray_workers", "tropd.pipeline.shards"}]

# These only read files and settings: a second instead of five, and they work where PyTorch is broken.
WITHOUT_TORCH = ("pipeline.report", "pipeline.config")
USE_TORCH = {"tropd.pipeline.report.comparison", "tropd.pipeline.report.comparison_page"}

# Sizes. None: not looked at.
MOST_ENTRIES: int | None = None  # of pipeline/
MOST_FILES: int | None = None  # Python files of a folder
MOST_LINES: int | None = None  # of a module
LONGER: set[str] = set()  # modules that may be longer

# Private names of other libraries' objects, which tests look at for want of public ones.
OF_LIBRARIES = ("_attn_implementation",)

# Where a module is tested that has no test at its own path.
COVERED_BY = {
    "tropd.cli.cache": "tests/e2e/test_pipeline.py",
    "tropd.cli.comparing": "tests/e2e/test_pipeline.py",
    "tropd.cli.data": "tests/e2e/test_docs_commands.py",
    "tropd.cli.inspection": "tests/e2e/test_pipeline.py",
    "tropd.cli.options": "tests/e2e/test_pipeline.py",
    "tropd.cli.render": "tests/cli/test_terminal.py",
    "tropd.cli.reproduction": "tests/e2e/test_reproduce.py",
    "tropd.cli.shipping": "tests/e2e/test_pipeline.py",
    "tropd.cli.stages": "tests/e2e/test_pipeline.py",
    "tropd.cli.starting": "tests/cli/test_init.py",
    "tropd.pipeline.config": "tests/pipeline/test_configuration.py",
    "tropd.pipeline.context": "tests/pipeline/test_identity.py",
    "tropd.pipeline.demo.second_process": "tests/pipeline/demo/test_prepare_resumed.py",
    "tropd.pipeline.demo.tiny_models": "tests/pipeline/demo/test_task.py",
    "tropd.pipeline.engines.base": "tests/pipeline/engines/test_transformers_engine.py",
    "tropd.pipeline.engines.model_decoder": "tests/pipeline/engines/test_decoding.py",
    "tropd.pipeline.engines.sampling": "tests/pipeline/engines/test_transformers_engine.py",
    "tropd.pipeline.engines.transformers": "tests/pipeline/engines/test_transformers_engine.py",
    "tropd.pipeline.engines.vllm": "tests/vllm/test_engine.py",
    "tropd.pipeline.evaluation.answer_text": "tests/pipeline/evaluation/test_grading.py",
    "tropd.pipeline.evaluation.answer_words": "tests/pipeline/evaluation/test_grading.py",
    "tropd.pipeline.evaluation.choices": "tests/pipeline/evaluation/test_grading.py",
    "tropd.pipeline.evaluation.distance_summary": "tests/pipeline/evaluation/test_measuring.py",
    "tropd.pipeline.evaluation.held_out": "tests/pipeline/evaluation/test_measuring.py",
    "tropd.pipeline.evaluation.math_answers": "tests/pipeline/evaluation/test_grading.py",
    "tropd.pipeline.evaluation.responses": "tests/pipeline/evaluation/test_evaluate.py",
    "tropd.pipeline.evaluation.symbolic": "tests/pipeline/evaluation/test_grading.py",
    "tropd.pipeline.evaluation.teacher_answers": "tests/pipeline/evaluation/test_measuring.py",
    "tropd.pipeline.objectives.catalog": "tests/e2e/test_docs_commands.py",
    "tropd.pipeline.objectives.estimators": "tests/pipeline/objectives/test_estimators_exact.py",
    "tropd.pipeline.objectives.loss": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.needs": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.partition": "tests/pipeline/objectives/test_estimators_exact.py",
    "tropd.pipeline.objectives.spec": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.weights": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.prefixes": "tests/pipeline/test_shards.py",
    "tropd.pipeline.problems.selection": "tests/pipeline/test_decontamination.py",
    "tropd.pipeline.progress": "tests/cli/test_terminal.py",
    "tropd.pipeline.ray_cluster": "tests/pipeline/test_shards.py",
    "tropd.pipeline.ray_workers": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.report.acceptance": "tests/pipeline/report/test_page.py",
    "tropd.pipeline.report.card": "tests/pipeline/test_export.py",
    "tropd.pipeline.report.comparison_page": "tests/pipeline/report/test_comparison.py",
    "tropd.pipeline.report.curves": "tests/pipeline/report/test_page.py",
    "tropd.pipeline.report.evaluations": "tests/pipeline/report/test_collect.py",
    "tropd.pipeline.report.headline": "tests/pipeline/report/test_verdicts.py",
    "tropd.pipeline.report.plots": "tests/pipeline/report/test_page.py",
    "tropd.pipeline.report.provenance": "tests/pipeline/report/test_collect.py",
    "tropd.pipeline.report.run_plots": "tests/pipeline/report/test_page.py",
    "tropd.pipeline.report.schema": "tests/pipeline/report/test_collect.py",
    "tropd.pipeline.report.training_verdicts": "tests/pipeline/report/test_verdicts.py",
    "tropd.pipeline.report.verdict_rules": "tests/pipeline/report/test_verdicts.py",
    "tropd.pipeline.reproduce.dry_run": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.reproduce.fetch": "tests/pipeline/test_sources.py",
    "tropd.pipeline.reproduce.run": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.reproduce.tables": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.scoring": "tests/pipeline/test_shards.py",
    "tropd.pipeline.sft": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.starting.look": "tests/pipeline/starting/test_draft.py",
    "tropd.pipeline.starting.start": "tests/pipeline/starting/test_draft.py",
    "tropd.pipeline.teacher.cluster": "tests/e2e/test_ray_serve.py",
    "tropd.pipeline.teacher.connection": "tests/pipeline/test_stops.py",
    "tropd.pipeline.teacher.dialects": "tests/pipeline/teacher/test_client.py",
    "tropd.pipeline.teacher.exchange": "tests/pipeline/teacher/test_client.py",
    "tropd.pipeline.teacher.info": "tests/pipeline/teacher/test_connections.py",
    "tropd.pipeline.teacher.ipc": "tests/pipeline/teacher/test_wire.py",
    "tropd.pipeline.teacher.self_test": "tests/pipeline/teacher/test_access.py",
    "tropd.pipeline.teacher.serve": "tests/pipeline/teacher/test_process.py",
    "tropd.pipeline.teacher.vllm_json": "tests/pipeline/teacher/test_vllm_server.py",
    "tropd.pipeline.training.agreement": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.training.batch": "tests/pipeline/training/test_step.py",
    "tropd.pipeline.training.cached": "tests/pipeline/test_padded_vocabulary.py",
    "tropd.pipeline.training.held_out": "tests/pipeline/training/test_along.py",
    "tropd.pipeline.training.inputs": "tests/pipeline/test_padded_vocabulary.py",
    "tropd.pipeline.training.interrupt": "tests/pipeline/teacher/test_replicas.py",
    "tropd.pipeline.training.output": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.training.preparation": "tests/e2e/test_training_ahead.py",
    "tropd.pipeline.training.rolling": "tests/e2e/test_training_ahead.py",
    "tropd.pipeline.training.student": "tests/pipeline/training/test_flash_attention.py",
    "tropd.pipeline.training.teacher_data": "tests/pipeline/training/test_step.py",
    "tropd.pipeline.training.world": "tests/e2e/test_distributed.py",
    "tropd.pipeline.training.journal": "tests/pipeline/training/test_along.py",
    "tropd.pipeline.training.train_stage": "tests/pipeline/training/test_loop.py",
    "tropd.storage.aside": "tests/storage/test_stage.py",
    "tropd.storage.checks": "tests/storage/test_verify.py",
    "tropd.storage.parts": "tests/pipeline/test_shards.py",
}


@dataclass(frozen=True)
class Import:
    """An import statement: who imports what, and when it is carried out."""

    importer: str
    target: str
    when: Literal["loading", "calling", "checking types"]


@cache
def modules() -> dict[str, Path]:
    """Product modules by dotted name, packages (their ``__init__.py``) among them."""
    found = {}
    for folder in ("cli", "pipeline", "storage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = ("tropd", *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """All imports of product modules, those of other libraries too."""
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def _imports_of(importer: str, path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, when: Literal["loading", "calling", "checking types"]) -> Iterator[Import]:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.Import):
                yield from (Import(importer, alias.name, when) for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                assert inner.module is not None, f"{path}:{inner.lineno}: a relative import"
                assert not inner.level, f"{path}:{inner.lineno}: a relative import"
                names = [f"{inner.module}.{alias.name}" for alias in inner.names]
                yield from (Import(importer, n if n in modules() else inner.module, when) for n in names)
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(inner, "calling" if when == "loading" else when)
            elif isinstance(inner, ast.If) and ast.unparse(inner.test) == "TYPE_CHECKING":
                yield from visit(inner, "checking types")
            else:
                yield from visit(inner, when)

    yield from visit(ast.parse(path.read_text()), "loading")


def layer_of(module: str) -> str:
    """The layer of a product module."""
    home = max((place for place in HOMES if f"{module}.".startswith(f"{place}.")), key=len, default="")
    if home:
        return HOMES[home]
    name = module.removeprefix("tropd.")
    folder = ".".join(name.split(".")[:2])
    if folder in LAYERS:
        return folder
    is_file = modules()[module].name != "__init__.py" or name in LAYERS
    top = name.split(".")[0]
    return top if top != "pipeline" or (is_file and name.count(".") <= 1) else "nowhere"


def test_every_module_lies_in_a_layer() -> None:
    nowhere = [name for name in modules() if layer_of(name) not in LAYERS]
    assert not nowhere, f"not in a folder of LAYERS: {nowhere}"
    assert not HOMES.keys() - modules().keys(), "HOMES names modules that do not exist"


def test_imports_only_point_down() -> None:
    upwards = {
        f"{found.importer} -> {found.target}"
        for found in imports()
        if found.target in modules()
        and LAYERS.index(layer_of(found.target)) < LAYERS.index(layer_of(found.importer))
    }
    assert not upwards - UPWARDS, (
        "imports that point up: move what they share down, or hand it in as an argument"
    )
    assert not UPWARDS - upwards, "these are gone: take them off UPWARDS"


def test_no_modules_import_each_other_in_a_circle() -> None:
    circles = [set(circle) for circle in _circles()]
    assert sorted(map(sorted, circles)) == sorted(map(sorted, CIRCLES))


def _circles() -> Iterator[list[str]]:
    """Sets of modules that reach each other by imports at any time (strongly connected, of two or more)."""
    targets: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.target in targets and found.target != found.importer:
            targets[found.importer].add(found.target)
    reached = {name: _reached(name, targets) for name in targets}
    left = set(targets)
    while left:
        name = min(left)
        circle = {other for other in reached[name] if name in reached[other]} | {name}
        left -= circle
        if len(circle) > 1:
            yield sorted(circle)


def _reached(start: str, targets: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        for target in targets[left.pop()] - found:
            found.add(target)
            left.append(target)
    return found


def test_reports_and_settings_are_read_without_torch() -> None:
    ways = {name: way for name in _light_modules() if (way := _way_to_torch(name))}
    shown = "\n".join(" -> ".join(way) for name, way in sorted(ways.items()) if name not in USE_TORCH)
    assert not ways.keys() - USE_TORCH, f"these load PyTorch:\n{shown}"
    assert not USE_TORCH - ways.keys(), "these no longer load PyTorch: take them off USE_TORCH"


def test_no_library_loads_torch_behind_their_backs() -> None:
    names = sorted(set(_light_modules()) - USE_TORCH)
    code = (
        f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def _light_modules() -> list[str]:
    return [name for name in modules() if layer_of(name) in WITHOUT_TORCH]


def _way_to_torch(start: str) -> list[str]:
    """The imports at load time that lead from a module to PyTorch; empty if none does."""
    ways = {start: [start]}
    left = [start]
    while left:
        name = left.pop(0)
        for target in _loaded_by(name):
            if target.split(".")[0] in ("torch", "transformers", "accelerate", "peft"):
                return [*ways[name], target]
            if target in modules() and target not in ways:
                ways[target] = [*ways[name], target]
                left.append(target)
    return []


@cache
def _loaded_by(module: str) -> tuple[str, ...]:
    """What a module loads when it is loaded: its packages, and its imports with theirs."""
    targets = [module]
    targets += [found.target for found in imports() if found.importer == module and found.when == "loading"]
    packages = [t.rsplit(".", n)[0] for t in targets if t in modules() for n in range(1, t.count("."))]
    return tuple(dict.fromkeys([*packages, *targets]))


def test_folders_are_small() -> None:
    entries = [p for p in (ROOT / "pipeline").iterdir() if p.suffix == ".py" or any(p.rglob("*.py"))]
    assert MOST_ENTRIES is None or len(entries) <= MOST_ENTRIES, f"pipeline/ has {len(entries)} entries"
    folders: dict[Path, int] = {}
    for path in modules().values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    large = {
        str(f.relative_to(ROOT)): n for f, n in folders.items() if MOST_FILES is not None and n > MOST_FILES
    }
    assert not large, f"folders of more than {MOST_FILES} Python files"


def test_modules_are_short() -> None:
    lengths = {name: path.read_text().count("\n") for name, path in modules().items()}
    long = {n: lines for n, lines in lengths.items() if MOST_LINES is not None and lines > MOST_LINES}
    assert not long.keys() - LONGER, f"modules of more than {MOST_LINES} lines: {long}"


def test_every_module_has_a_test() -> None:
    untested = {name for name in modules() if not _has_its_own_test(name)}
    assert not untested - COVERED_BY.keys(), (
        "write a test at the same path, or say in COVERED_BY which one covers it"
    )
    assert not COVERED_BY.keys() - untested, (
        "these have a test of their own, or are gone: take them off COVERED_BY"
    )
    missing = {test for test in COVERED_BY.values() if not (ROOT / test).is_file()}
    assert not missing, "COVERED_BY names tests that do not exist"


def _has_its_own_test(module: str) -> bool:
    path = modules()[module].relative_to(ROOT)
    return path.name == "__init__.py" or (ROOT / "tests" / path.parent / f"test_{path.name}").is_file()


def test_no_test_touches_what_is_private() -> None:
    """As far as the text shows whose a name is: tests of private parts would break at every change of these."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    found = [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in _private_names(path)]
    assert not found, "make it a parameter or a public name, or test what shows outside"


def _private_names(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    libraries = {"self", "cls", "super"}  # names whose private parts are not tropd's
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            libraries |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tropd"):
            libraries |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tropd"):
            yield from (f"{node.lineno} {alias.name}" for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) not in libraries:
            yield f"{node.lineno} {node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch.object")):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (f"{node.lineno} {name}" for name in names if _is_private(name.rsplit(".")[-1]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " tropd." in node.value:
            yield from (f"{node.lineno} {name}" for name in re.findall(r"(?<!\bos)(\._[a-z]\w*)", node.value))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_LIBRARIES


def _root(node: ast.expr) -> str:
    """The name that an expression begins with."""
    while not isinstance(node, ast.Name):
        inner = next((getattr(node, part) for part in ("value", "func") if hasattr(node, part)), None)
        if inner is None:
            return ""
        node = inner
    return node.id
