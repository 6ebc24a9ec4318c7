"""A row that its teacher cannot serve is found before the first row trains."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from paper_node import NODE, paper_needs

from tropd.pipeline.config.paper_tables import load_table
from tropd.pipeline.config.schema import Config
from tropd.pipeline.experiments import dry_run
from tropd.pipeline.experiments.compare import cell_config, compare
from tropd.pipeline.experiments.row_checks import check_engines, check_table_rows
from tropd.pipeline.run.cells import Cell
from tropd.pipeline.run.run import Run, with_teacher
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.training.preflight.machine import Machine
from tropd.storage.errors import ConfigError

INFO = ServiceInfo(
    model="without entropies",
    weights="a" * 64,
    tokenizer="t" * 64,
    tokenizer_size=24,
    vocab_size=24,
    max_length=1000,
    max_request_tokens=10_000,
    max_request_bytes=100_000,
    queue_tokens=10_000,
    max_topk=24,
)


@pytest.fixture
def server() -> Iterator[str]:
    """A server that says what it gives: no entropies."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/v1/info"
            body = INFO.model_dump_json().encode() if found else json.dumps({}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def rows(run: Run) -> dict[str, Config]:
    return {name: cell_config(run, Cell(name, 0)) for name in ("opd", "eopd", "reopold")}


def test_a_server_is_asked_for_the_needs_of_every_row(tiny_run: Run, server: str) -> None:
    run = with_teacher(tiny_run, server)
    (check,) = [c for c in check_engines(run, rows(run)) if not c.holds]
    assert check.holds is False
    assert check.what.startswith("eopd: objective 'eopd' needs the teacher's entropy")
    fine = check_engines(run, {"opd": cell_config(run, Cell("opd", 0))})
    assert [c.holds for c in fine] == [True]


def test_a_dry_run_of_a_table_asks_too(tiny_run: Run, server: str) -> None:
    setting = load_table("table3", rehearse=False).settings[0]
    (label,) = [row.label for row in setting.rows if row.objective == "eopd"]
    checks = dry_run.checks_of_rows(with_teacher(tiny_run, server), setting, paper_needs(8), NODE)
    wrong = [check.what for check in checks if check.holds is False]
    assert any(what.startswith(f"{label}: objective 'eopd' needs the teacher's entropy") for what in wrong)


def test_a_comparison_is_refused_before_it_evaluates_or_trains(tiny_run: Run, server: str) -> None:
    score_teacher(tiny_run, source_stage=generate_prefixes(tiny_run).stage)
    with pytest.raises(ConfigError, match="this comparison cannot be made here"):
        compare(with_teacher(tiny_run, server), ["opd", "eopd"], 1)
    assert not (tiny_run.workspace.root / "compare").exists()


def test_a_comparison_that_does_not_fit_is_refused_at_once(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_teacher(tiny_run, source_stage=generate_prefixes(tiny_run).stage)
    small = Machine(gpus=(), memory=1e9, shared_memory=0.0, disk=1e12)
    monkeypatch.setattr(
        "tropd.pipeline.training.preflight.preflight.look_at_machine", lambda *args, **options: small
    )
    with pytest.raises(ConfigError, match=r"main memory: at most .* 1\.0 GB there"):
        compare(tiny_run, ["opd"], 1)
    assert not (tiny_run.workspace.root / "compare").exists()


def test_a_server_that_is_away_was_not_checked(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd.pipeline.experiments.row_checks.ANSWER_SECONDS", 0.2)
    run = with_teacher(tiny_run, "http://127.0.0.1:9")
    assert [c.holds for c in check_engines(run, rows(run))] == [None]


def test_an_engine_without_entropies_is_known_without_a_server(tiny_run: Run) -> None:
    configs = rows(tiny_run)
    assert [c.holds for c in check_engines(tiny_run, configs)] == [True]
    teacher = configs["eopd"].teacher.model_copy(update={"scoring_engine": "vllm"})
    configs["eopd"] = configs["eopd"].model_copy(update={"teacher": teacher})
    (check,) = check_engines(tiny_run, configs)
    assert check.holds is False
    assert check.what.startswith("eopd: the teacher scores in vLLM")
    assert "teacher.scoring_engine = 'transformers'" in check.what


def test_rows_share_a_line_where_the_answer_is_the_same() -> None:
    needs = paper_needs(8)
    guided = paper_needs(8, "objective.name=tropd")
    found = check_table_rows(needs, {"OPD": needs.config, "TrOPD": guided.config}, NODE)
    # Prefixes halve what the student writes; where vLLM has it, its share of memory stays.
    assert any(c.what.startswith("OPD: vllm.answer_seconds") for c in found)
    assert any(c.what.startswith("TrOPD: vllm.answer_seconds") for c in found)
    assert any(c.what.startswith("train: at most") for c in found)
    assert any(c.what.startswith("teacher.timeout_seconds") for c in found)
    alone = check_table_rows(needs, {"OPD": needs.config}, replace(NODE, gpus=()))
    assert all(": train" not in check.what for check in alone)
