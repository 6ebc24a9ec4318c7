"""Imports, sizes of folders and modules, which test covers a module, and that tests use public names only.

All of it is read from the source text.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
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
    "pipeline.experiments",  # several runs, or a run made for you
    "pipeline.report",  # what a run shows
    "pipeline.training",  # stage 3
    "pipeline.stages",  # the other commands that fill one folder of the workspace
    "pipeline.teacher",  # the teacher while training
    "pipeline.run",  # the run record, opening models, identity, upstream stages, progress, interrupts
    "pipeline.problems",  # prompts, their rendering, decontamination, grading
    "pipeline.models",  # loading, tokenizers, output layer, engines
    "pipeline.config",  # schema, resolving, explaining, recipes
    "pipeline.objectives",  # pure functions and data
    "storage",  # files and their formats; knows no model
)

# These only read files and settings: a second instead of five, and they work where PyTorch is broken.
WITHOUT_TORCH = ("pipeline.report", "pipeline.config")
USE_TORCH = {
    "tropd.pipeline.report.comparison.comparison",
    "tropd.pipeline.report.comparison.comparison_page",
}

MOST_ENTRIES = 11  # of pipeline/
MOST_FILES = 10  # Python files of a folder, besides its __init__.py
MOST_LINES = 400  # of a module

# Private names of other libraries' objects, which tests look at for want of public ones.
OF_LIBRARIES = ("_attn_implementation", "_can_decompose", "_schema")

# Where a module is tested that has no test at its own path.
COVERED_BY = {
    "tropd.cli.commands.cache": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.comparing": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.data": "tests/e2e/test_docs_commands.py",
    "tropd.cli.commands.inspection": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.planning": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.reproduction": "tests/e2e/test_reproduce.py",
    "tropd.cli.commands.shipping": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.stages": "tests/e2e/test_pipeline.py",
    "tropd.cli.commands.starting": "tests/cli/test_init.py",
    "tropd.cli.options": "tests/e2e/test_pipeline.py",
    "tropd.cli.render": "tests/cli/test_terminal.py",
    "tropd.pipeline.config.explain": "tests/pipeline/config/test_resolve.py",
    "tropd.pipeline.config.objective_list": "tests/e2e/test_docs_commands.py",
    "tropd.pipeline.config.paper_tables": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.config.recipe_files": "tests/pipeline/config/test_resolve.py",
    "tropd.pipeline.config.schema": "tests/pipeline/config/test_resolve.py",
    "tropd.pipeline.config.sections.data_settings": "tests/pipeline/config/test_conflicts.py",
    "tropd.pipeline.config.sections.evaluation_settings": "tests/pipeline/config/test_conflicts.py",
    "tropd.pipeline.config.sections.model_settings": "tests/pipeline/config/test_conflicts.py",
    "tropd.pipeline.config.sections.training_settings": "tests/pipeline/config/test_conflicts.py",
    "tropd.pipeline.config.sections.value_types": "tests/pipeline/config/test_fields.py",
    "tropd.pipeline.config.tables": "tests/pipeline/config/test_resolve.py",
    "tropd.pipeline.experiments.demo.second_process": "tests/pipeline/experiments/demo/test_prepare_resumed.py",
    "tropd.pipeline.experiments.demo.tiny_models": "tests/pipeline/experiments/demo/test_task.py",
    "tropd.pipeline.experiments.dry_run": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.experiments.paper_data": "tests/pipeline/stages/test_fetch.py",
    "tropd.pipeline.experiments.sft": "tests/e2e/test_reproduce.py",
    "tropd.pipeline.experiments.starting.look": "tests/pipeline/experiments/starting/test_draft.py",
    "tropd.pipeline.experiments.starting.start": "tests/pipeline/experiments/starting/test_draft.py",
    "tropd.pipeline.models.directories": "tests/pipeline/models/test_loading.py",
    "tropd.pipeline.models.engines.base": "tests/pipeline/models/engines/test_transformers.py",
    "tropd.pipeline.models.engines.child.serve": "tests/pipeline/models/engines/child/test_process.py",
    "tropd.pipeline.models.engines.child.vllm_transfer": "tests/vllm/test_engine.py",
    "tropd.pipeline.models.engines.decoding_any": "tests/pipeline/models/engines/test_decoding.py",
    "tropd.pipeline.models.engines.draw": "tests/pipeline/models/engines/test_transformers.py",
    "tropd.pipeline.models.engines.vllm": "tests/vllm/test_engine.py",
    "tropd.pipeline.models.runtime": "tests/pipeline/models/test_loading.py",
    "tropd.pipeline.objectives.estimators": "tests/pipeline/objectives/test_estimators_exact.py",
    "tropd.pipeline.objectives.extrapolation.settings": "tests/pipeline/training/extrapolation/test_search.py",
    "tropd.pipeline.objectives.loss": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.needs": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.objective": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.partition_specs": "tests/pipeline/objectives/test_recipes.py",
    "tropd.pipeline.objectives.partition": "tests/pipeline/objectives/test_estimators_exact.py",
    "tropd.pipeline.objectives.rewards.advantages": "tests/pipeline/objectives/test_rewards.py",
    "tropd.pipeline.objectives.rewards.terms": "tests/pipeline/objectives/test_rewards.py",
    "tropd.pipeline.config.sections.reward_settings": "tests/pipeline/objectives/test_rewards.py",
    "tropd.pipeline.training.reward.worker": "tests/pipeline/training/reward/test_function.py",
    "tropd.pipeline.objectives.spec": "tests/pipeline/config/test_fingerprint_fields.py",
    "tropd.pipeline.objectives.token_weight_specs": "tests/pipeline/objectives/test_token_weights.py",
    "tropd.pipeline.problems.grading.answer_text": "tests/pipeline/problems/grading/test_grading.py",
    "tropd.pipeline.problems.grading.answer_words": "tests/pipeline/problems/grading/test_grading.py",
    "tropd.pipeline.problems.grading.choices": "tests/pipeline/problems/grading/test_grading.py",
    "tropd.pipeline.problems.grading.math_answers": "tests/pipeline/problems/grading/test_grading.py",
    "tropd.pipeline.problems.grading.symbolic": "tests/pipeline/problems/grading/test_grading.py",
    "tropd.pipeline.report.comparison.comparison_page": "tests/pipeline/report/comparison/test_comparison.py",
    "tropd.pipeline.report.data.acceptance": "tests/pipeline/report/page/test_page.py",
    "tropd.pipeline.report.data.evaluations": "tests/pipeline/report/data/test_collect.py",
    "tropd.pipeline.report.data.facts": "tests/pipeline/report/data/test_collect.py",
    "tropd.pipeline.report.data.provenance": "tests/pipeline/report/data/test_collect.py",
    "tropd.pipeline.report.page.card": "tests/pipeline/experiments/test_export.py",
    "tropd.pipeline.report.plots.curves": "tests/pipeline/report/page/test_page.py",
    "tropd.pipeline.report.plots.plots": "tests/pipeline/report/page/test_page.py",
    "tropd.pipeline.report.plots.run_plots": "tests/pipeline/report/page/test_page.py",
    "tropd.pipeline.report.verdicts.headline": "tests/pipeline/report/verdicts/test_verdicts.py",
    "tropd.pipeline.report.verdicts.training_verdicts": "tests/pipeline/report/verdicts/test_verdicts.py",
    "tropd.pipeline.report.verdicts.verdict_rules": "tests/pipeline/report/verdicts/test_verdicts.py",
    "tropd.pipeline.run.cells": "tests/pipeline/experiments/test_compare.py",
    "tropd.pipeline.run.interrupt": "tests/pipeline/teacher/client/test_replicas.py",
    "tropd.pipeline.run.opening": "tests/pipeline/models/test_padded_vocabulary.py",
    "tropd.pipeline.run.progress": "tests/cli/test_terminal.py",
    "tropd.pipeline.run.ray_cluster": "tests/pipeline/stages/test_shards.py",
    "tropd.pipeline.run.run": "tests/pipeline/run/test_identity.py",
    "tropd.pipeline.run.selection": "tests/pipeline/problems/test_decontaminate.py",
    "tropd.pipeline.run.upstream": "tests/pipeline/run/test_identity.py",
    "tropd.pipeline.stages.evaluation.distance_summary": "tests/pipeline/stages/evaluation/test_measuring.py",
    "tropd.pipeline.stages.evaluation.pieces": "tests/pipeline/stages/evaluation/test_evaluate.py",
    "tropd.pipeline.stages.evaluation.held_out": "tests/pipeline/stages/evaluation/test_measuring.py",
    "tropd.pipeline.stages.evaluation.responses": "tests/pipeline/stages/evaluation/test_evaluate.py",
    "tropd.pipeline.stages.evaluation.teacher_answers": "tests/pipeline/stages/evaluation/test_measuring.py",
    "tropd.pipeline.stages.prefixes": "tests/pipeline/stages/test_shards.py",
    "tropd.pipeline.stages.scores": "tests/pipeline/stages/test_shards.py",
    "tropd.pipeline.stages.shard_work": "tests/pipeline/stages/test_shards.py",
    "tropd.pipeline.stages.shards_on_ray": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.teacher.client.dialects": "tests/pipeline/teacher/client/test_client.py",
    "tropd.pipeline.teacher.client.http": "tests/pipeline/teacher/client/test_client.py",
    "tropd.pipeline.teacher.client.vllm_json": "tests/pipeline/teacher/client/test_vllm_dialect.py",
    "tropd.pipeline.teacher.connect": "tests/pipeline/models/test_stops.py",
    "tropd.pipeline.teacher.service.listen": "tests/pipeline/teacher/test_serving.py",
    "tropd.pipeline.teacher.service.running": "tests/pipeline/teacher/test_lifecycle.py",
    "tropd.pipeline.teacher.service.self_test": "tests/pipeline/teacher/service/test_access_log.py",
    "tropd.pipeline.teacher.service.serve": "tests/pipeline/teacher/test_local_service.py",
    "tropd.pipeline.teacher.service.serve_on_ray": "tests/e2e/test_ray_serve.py",
    "tropd.pipeline.teacher.wire.arrow_stream": "tests/pipeline/teacher/test_wire.py",
    "tropd.pipeline.teacher.wire.headers": "tests/pipeline/teacher/test_busy_service.py",
    "tropd.pipeline.teacher.wire.info": "tests/pipeline/teacher/service/test_connections.py",
    "tropd.pipeline.training.distance.held_out_set": "tests/pipeline/training/distance/test_along.py",
    "tropd.pipeline.training.inputs": "tests/pipeline/models/test_padded_vocabulary.py",
    "tropd.pipeline.training.preflight.stage_time": "tests/pipeline/training/preflight/test_step_time.py",
    "tropd.pipeline.training.record.final_model": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.training.record.journal": "tests/pipeline/training/distance/test_along.py",
    "tropd.pipeline.training.rollout.engine_check": "tests/e2e/test_pipeline.py",
    "tropd.pipeline.training.session": "tests/pipeline/training/test_setup.py",
    "tropd.pipeline.training.signal.ask_teacher": "tests/pipeline/training/update/test_gradients.py",
    "tropd.pipeline.training.signal.from_cache": "tests/pipeline/models/test_padded_vocabulary.py",
    "tropd.pipeline.training.signal.following_teacher": "tests/pipeline/training/test_told_teachers.py",
    "tropd.pipeline.training.train_stage": "tests/pipeline/training/test_loop.py",
    "tropd.pipeline.training.on_gpus": "tests/e2e/test_gpus.py",
    "tropd.pipeline.training.update.forward": "tests/pipeline/training/update/test_gradients.py",
    "tropd.pipeline.training.update.micro_batches": "tests/pipeline/training/update/test_gradients.py",
    "tropd.pipeline.training.world": "tests/e2e/test_distributed.py",
    "tropd.storage.disk.aside": "tests/storage/stage/test_stage.py",
    "tropd.storage.formats.samples_file": "tests/pipeline/training/record/test_acceptance_samples.py",
    "tropd.storage.formats.trajectory_store": "tests/pipeline/training/rollout/test_rows.py",
    "tropd.storage.disk.log_tail": "tests/pipeline/run/processes/test_together.py",
    "tropd.storage.arrays": "tests/pipeline/objectives/test_recipes.py",
    "tropd.storage.stage.job_parts": "tests/pipeline/stages/test_shards.py",
    "tropd.storage.verify.checks": "tests/storage/verify/test_verify.py",
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


def test_imports_only_point_down() -> None:
    upwards = {
        f"{found.importer} -> {found.target}"
        for found in imports()
        if found.target in modules()
        and LAYERS.index(layer_of(found.target)) < LAYERS.index(layer_of(found.importer))
    }
    assert not upwards, "imports that point up: move what they share down, or hand it in as an argument"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert list(_circles()) == []


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
    ways = [way for name in _light_modules() if (way := _way_to_torch(name))]
    assert not ways, "these load PyTorch:\n" + "\n".join(" -> ".join(way) for way in ways)


def test_no_library_loads_torch_behind_their_backs() -> None:
    names = sorted(_light_modules())
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
    assert len(entries) <= MOST_ENTRIES, f"pipeline/ has {len(entries)} entries"
    folders = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    large = {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_FILES}
    assert not large, f"folders of more than {MOST_FILES} Python files"


def test_modules_are_short() -> None:
    lengths = {name: path.read_text().count("\n") for name, path in modules().items()}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


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
