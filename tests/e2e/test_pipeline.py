"""The whole chain through the command line: results, identities, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tropd.storage.disk.atomic import content_digest
from tropd.storage.formats.trajectories import read_trajectories


def as_json(output: str) -> Any:
    return json.loads(output[output.index("{") :])


def weights(workspace: Path) -> str:
    return content_digest(workspace / "train" / "final" / "model.safetensors")


def test_the_chain_leaves_a_report_and_a_plain_model(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished)
    found = as_json(tropd.ok("report", "-w", workspace, "--json").output)
    assert (workspace / "report" / "index.html").stat().st_size > 10_000
    for stage in ("models", "prefixes", "scores", "train", "eval"):
        assert found["stages"][stage]["state"] == "complete"
    for who in ("before", "after", "teacher"):
        for mode in ("greedy", "sampled"):
            assert 0 <= found["evaluation"][who][mode]["accuracy"] <= 1
        assert found["evaluation"][who]["distance"]["length"]["mean"] > 0
    for name in ("reverse_kl", "forward_kl", "acceptance"):
        measured = found["evaluation"]["after"]["distance"][name]
        assert 0 <= measured["interval"][0] <= measured["mean"] <= measured["interval"][1]
    training = found["training"]
    assert training["steps"] == 8
    assert sum(training["region_fraction"].values()) == pytest.approx(1)
    assert found["cache"]["tokens"] > 0
    assert found["cache"]["bytes_per_token"] > 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = workspace / "train" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model(torch.tensor([[2, 3]])).logits.shape == (1, 2, 24)
    assert AutoTokenizer.from_pretrained(final)("1+2=")["input_ids"] == [3, 12, 4, 15]


def test_the_student_is_exported_with_a_card(tropd: Any, finished: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM

    out = tmp_path / "student"
    tropd.ok("export", finished, "--to", out)
    final = finished / "train" / "final"
    assert {p.name for p in out.iterdir()} == {*(p.name for p in final.iterdir()), "README.md"}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, final))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert "student before" in card.text
    assert tropd("export", finished, "--to", out).code == 2
    assert tropd("export", finished).code == 2
    assert tropd("export", finished, "--to", tmp_path / "other", "--public").code == 2


def test_only_on_policy_tokens_are_scored_and_only_outliers_get_alternatives(
    tropd: Any, finished: Path
) -> None:
    sql = (
        "select sum(tokens_on_policy) n, sum(teacher_tokens_scored) scored, sum(teacher_topk_tokens) topk, "
        "sum(tokens_guidance) prefix, round(sum(region_fraction_outlier * (tokens_on_policy + tokens_guidance))) o "
        "from metrics"
    )
    output = tropd.ok("query", "-w", finished, sql, "--json").output
    (row,) = json.loads(output[output.index("[") :])
    assert row["scored"] == row["n"] > 0
    assert row["topk"] == row["o"] > 0
    assert row["prefix"] > 0


def test_status_verify_and_query(tropd: Any, finished: Path) -> None:
    assert "complete" in tropd.ok("status", "-w", finished).output
    assert tropd("verify", "-w", finished).code == 0
    output = tropd.ok("query", "-w", finished, "select count(*) from trajectories").output
    assert "64" in output
    assert tropd("query", "-w", finished, "select nothing from nowhere").code != 0


def test_the_cache_can_be_measured_exported_merged_and_cleaned_up(
    tropd: Any, prepared: Path, copy: Any, tmp_path: Path
) -> None:
    workspace = copy(prepared)
    found = as_json(tropd.ok("cache", "stats", "-w", workspace, "--json").output)
    assert sum(found["alternatives_histogram"].values()) == found["tokens"] > 0
    assert "kept mass" in tropd.ok("cache", "stats", "-w", workspace).output
    tropd.ok("cache", "export", "-w", workspace, tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet").num_rows == found["rows"]
    partial = copy(prepared, "scores", name="partial")
    tropd.ok("cache", "merge", "-w", partial, workspace)
    assert content_digest(partial / "scores") == content_digest(workspace / "scores")
    assert "nothing to clean up" in tropd.ok("gc", "-w", workspace).output
    tropd.ok("score-teacher", "-w", workspace, "--force")
    assert "scores.old-1" in tropd.ok("gc", "-w", workspace).output
    assert (workspace / "scores.old-1").exists()
    tropd.ok("gc", "-w", workspace, "--delete")
    assert not (workspace / "scores.old-1").exists()


@pytest.mark.slowest
def test_every_stage_works_in_bfloat16(tropd: Any, prepared: Path, copy: Any) -> None:
    """Which is what models are in unless something else is set; the other tests set float32."""
    workspace = copy(prepared, "prefixes", "scores")
    config = workspace / "config.toml"
    text = config.read_text()
    config.write_text(text.replace('"float32"', '"bfloat16"').replace("steps = 8", "steps = 3"))
    for stage in ("generate-prefixes", "score-teacher", "train", "evaluate"):
        tropd.ok(stage, "-w", workspace)
    records = [json.loads(line) for line in (workspace / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert record["teacher_topk_tokens"] > 0
        # Sampler and trainer round, but no more than that.
        assert 1e-5 < record["sampler_logprob_difference_max"] < 0.1
        assert record["importance_mean"] == pytest.approx(1.0, abs=0.01)
    tensors = load_file(workspace / "train" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_array_jobs_make_the_same_cache(tropd: Any, prepared: Path, copy: Any, tmp_path: Path) -> None:
    workspace = copy(prepared, "prefixes", "scores")
    for stage in ("generate-prefixes", "score-teacher"):
        for part in ("2/2", "1/2"):
            tropd.ok(stage, "-w", workspace, "--shards", part)
    for stage in ("prefixes", "scores"):
        assert content_digest(workspace / stage) == content_digest(prepared / stage)
    refused = tropd("score-teacher", "-w", workspace, "--shards", "3/2")
    assert refused.code == 2
    assert "1 ≤ i ≤ n" in refused.output
    assert tropd("score-teacher", "-w", workspace, "--shards", "1/2", "--executor", "ray").code == 2
    assert "OK: every file matches its manifest" in tropd.ok("cache", "verify", "-w", workspace).output
    shutil.rmtree(next((workspace / "scores").glob("*.zarr")))
    assert "is missing" in (found := tropd("cache", "verify", "-w", workspace)).output
    assert found.code == 1


def test_bad_prompts_can_be_left_out(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared, "prefixes", "scores")
    with (workspace / "data" / "train.jsonl").open("a") as stream:
        stream.write('{"prompt": \n')
    refused = tropd("generate-prefixes", "-w", workspace)
    assert refused.code == 1
    assert "line 65: not valid JSON" in refused.output
    assert "--skip-bad" in refused.output
    kept = tropd.ok("generate-prefixes", "-w", workspace, "--skip-bad")
    assert "1 bad line(s) left out" in kept.output
    assert len((workspace / "rejects" / "prompts.jsonl").read_text().splitlines()) == 1


def test_adapters_are_merged_into_the_student(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    workspace = copy(prepared)
    adapters = ["--set", "student.lora={rank=4}", "--set", f"teacher.url={teacher_url}"]
    stopped = tropd("train", "-w", workspace, *adapters, after=1.5, signal=signal.SIGINT)
    assert stopped.code in (0, 130), stopped.output
    tropd.ok("train", "-w", workspace, *adapters)
    final, start = (load_file(workspace / p / "model.safetensors") for p in ("train/final", "models/student"))
    assert final.keys() == start.keys()
    changed = {name for name, value in start.items() if not torch.equal(final[name], value)}
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)
    assert "another" not in tropd.ok("evaluate", "-w", workspace, *adapters).output


def test_every_metric_is_explained(finished: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    explained = {
        name
        for row in page.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    lines = (finished / "train" / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)} - {"step"}
    assert written - explained == set()
    # These are written only where something asks for them.
    elsewhere = {"k1_outlier", "k1_outlier_min", "k1_outlier_max", "teacher_retries", "memory_gpu_peak"}
    elsewhere |= {"exchange_seconds", "mfu_train"}
    elsewhere |= {
        name
        for name in explained
        if name.startswith(("accuracy_", "distance_")) or "reward" in name or "extrapolat" in name
    }
    assert explained - written <= elsewhere


def test_guidance_learns_from_the_cache(tropd: Any, prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    cached = ["--set", "objective={name='tropd-cached', k=5}", "--set", f"teacher.url={teacher_url}"]
    result = as_json(tropd.ok("train", "-w", workspace, *cached, "--json").output)
    assert result["teacher_tokens_scored"] == result["tokens_on_policy"]
    assert result["tokens_guidance"] > 0


def test_the_same_seed_gives_the_same_weights_with_a_local_service_too(
    tropd: Any, finished: Path, copy: Any
) -> None:
    workspace = copy(finished, "train", "eval")
    tropd.ok("train", "-w", workspace)
    assert weights(workspace) == weights(finished)


def test_another_seed_gives_other_weights(tropd: Any, finished: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(finished, "train", "eval")
    url = f"teacher.url={teacher_url}"
    tropd.ok("train", "-w", workspace, "--set", url, "--set", "objective.schedule.fraction=0.5")
    assert weights(workspace) != weights(finished)


def test_batch_sizes_change_nothing_but_rounding(
    tropd: Any, finished: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(finished, "prefixes", "scores", "train", "eval")
    small = ["--set", "prefixes.batch_size=3", "--set", "scores.batch_tokens=50"]
    tropd.ok("generate-prefixes", "-w", workspace, *small)
    for shard in sorted((finished / "prefixes").glob("*.parquet")):
        for one, other in zip(
            read_trajectories(shard), read_trajectories(workspace / "prefixes" / shard.name), strict=True
        ):
            assert one.tokens == other.tokens
            assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-5)
    shutil.rmtree(workspace / "prefixes")
    shutil.copytree(finished / "prefixes", workspace / "prefixes")
    tropd.ok("score-teacher", "-w", workspace, *small)
    cuts = [
        "--set",
        "rollout.batch_size=5",
        "--set",
        "train.micro_batch_tokens=60",
        "--set",
        f"teacher.url={teacher_url}",
    ]
    tropd.ok("train", "-w", workspace, *cuts)
    one = load_file(finished / "train" / "final" / "model.safetensors")
    other = load_file(workspace / "train" / "final" / "model.safetensors")
    start = load_file(finished / "models" / "student" / "model.safetensors")
    # AdamW turns rounding of tiny gradients into small steps: not bit-identical, but 1e-5 of the way that was gone.
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    assert moved > 0.1
    assert apart < 1e-4 * moved


def test_a_changed_field_names_itself_and_force_moves_the_old_output_aside(
    tropd: Any, finished: Path, copy: Any
) -> None:
    workspace = copy(finished)
    result = tropd("generate-prefixes", "-w", workspace, "--set", "prefixes.temperature=0.5")
    assert result.code == 1
    assert "prefixes.temperature: 1.0 → 0.5" in result.output
    assert "--force" in result.output
    tropd.ok("generate-prefixes", "-w", workspace, "--set", "prefixes.temperature=0.5", "--force")
    assert (workspace / "prefixes.old-1" / "manifest.json").exists()
    stale = tropd("score-teacher", "-w", workspace)
    assert stale.code == 1
    assert "upstream.prefixes" in stale.output


def test_a_truncated_shard_is_found_and_made_again(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished, "train", "eval")
    shard = workspace / "prefixes" / "part-00001.parquet"
    original = shard.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    verify = tropd("verify", "-w", workspace)
    assert verify.code == 1
    assert "part-00001.parquet" in verify.output
    train = tropd("train", "-w", workspace)
    assert train.code == 1
    assert "part-00001.parquet" in train.output
    tropd("verify", "-w", workspace, "--repair")
    tropd.ok("generate-prefixes", "-w", workspace)
    assert shard.read_bytes() == original
    shard.write_bytes(original[:100])  # a wrong size is noticed by the stage itself
    tropd.ok("generate-prefixes", "-w", workspace)
    assert shard.read_bytes() == original


@pytest.mark.parametrize("command", ["generate-prefixes", "train"])
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(
    tropd: Any, finished: Path, copy: Any, teacher_url: str, command: str
) -> None:
    folder = "prefixes" if command == "generate-prefixes" else "train"
    workspace = copy(finished, folder, "eval")
    argv = [
        command,
        "-w",
        workspace,
        *(["--set", f"teacher.url={teacher_url}"] if command == "train" else []),
    ]
    result = tropd(*argv, file_limit=1500 if command == "generate-prefixes" else 100_000)
    assert result.code == 1, result.output
    assert "disk" in result.output.lower() or "too large" in result.output.lower(), result.output
    tropd.ok(*argv)
    if folder == "train":
        assert weights(workspace) == weights(finished)
    else:
        assert content_digest(workspace / folder) == content_digest(finished / folder)


def test_bad_input_is_refused_before_any_work(tropd: Any, finished: Path, copy: Any, tmp_path: Path) -> None:
    workspace = copy(finished, "prefixes", "scores", "train", "eval")
    prompts = workspace / "data" / "train.jsonl"

    def refused(code: int, *words: str, argv: tuple[str, ...] = ("generate-prefixes",)) -> None:
        result = tropd(*argv, "-w", workspace)
        assert result.code == code, result.output
        for word in words:
            assert word in result.output, result.output
        assert "Traceback" not in result.output

    good = prompts.read_text()
    prompts.write_text(good.splitlines()[0] + '\n{"prompt": "1+"\n{"prompt": " "}\n')
    refused(1, "line 2", "line 3", "not valid JSON", "is empty")
    prompts.unlink()
    refused(1, "train.jsonl", "does not exist")
    prompts.write_text(good)
    assert not (workspace / "prefixes").exists()
    refused(1, "was not run", "generate-prefixes", argv=("score-teacher",))
    refused(1, "was not run", "generate-prefixes", argv=("train",))
    refused(2, "unknown field", "learning_rate", argv=("train", "--set", "train.lerning_rate=1"))
    refused(2, "unknown objective", "tropd-mask", argv=("train", "--set", "objective.name=trop"))
    (workspace / "workspace.json").write_text('{"layout": 99}')
    refused(1, "layout 99", argv=("status",))
    assert tropd("init", tmp_path / "new", "--recipe", "nope").code == 2
    assert tropd("status", "-w", tmp_path / "nowhere").code == 2
    assert tropd("no-such-command").code == 2


def test_a_teacher_with_another_tokenizer_is_refused(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished, "prefixes", "scores", "train", "eval")
    (workspace / "models" / "manifest.json").unlink()  # models of the user's own
    path = workspace / "models" / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"+": 12', '"@": 12'))
    result = tropd("generate-prefixes", "-w", workspace)
    assert result.code == 2
    assert "different tokenizers" in result.output
    assert "'+'" in result.output


def test_a_teacher_service_that_is_not_there_is_a_clear_error(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    dead = ["--set", "teacher.url=http://127.0.0.1:9", "--set", "teacher.timeout_seconds=1"]
    result = tropd("train", "-w", workspace, *dead)
    assert result.code == 1
    assert "gave no answer" in result.output


def test_offline_training_needs_no_teacher_and_refuses_anothers_scores(
    tropd: Any, prepared: Path, copy: Any
) -> None:
    workspace = copy(prepared)
    offline = ["--set", "objective={name='offline-opd'}"]
    tropd.ok("generate-rollouts", "-w", workspace)
    tropd.ok("score-teacher", "-w", workspace, "--source", "rollouts")
    result = tropd.ok("train", "-w", workspace, *offline, "--json")
    assert as_json(result.output)["teacher_tokens_scored"] == 0
    shutil.rmtree(workspace / "train")
    (workspace / "models" / "manifest.json").unlink()  # models of the user's own
    os.rename(workspace / "models" / "teacher", workspace / "models" / "other")
    shutil.copytree(workspace / "models" / "student", workspace / "models" / "teacher")
    refused = tropd("train", "-w", workspace, *offline)
    assert refused.code == 2
    assert "another teacher" in refused.output


@pytest.mark.slowest
def test_compare_is_resumed_and_pairs_its_runs(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    argv = [
        "compare",
        "-w",
        workspace,
        "--objectives",
        "opd,tropd-mask",
        "--seeds",
        "2",
        "--set",
        "train.steps=3",
    ]
    first = as_json(tropd.ok(*argv, "--json").output)
    assert [m["objective"] for m in first["methods"]] == ["opd", "tropd-mask"]
    assert first["methods"][0]["difference"] == {}
    assert set(first["methods"][1]["difference"]) == {"greedy", "sampled"}
    assert set(first["methods"][0]["distance"]) == {"reverse_kl", "forward_kl", "acceptance", "length"}
    assert first["distance_before"]["reverse_kl"]["mean"] > 0
    assert (workspace / "compare" / "index.html").exists()
    cell = workspace / "compare" / "opd" / "seed-1"
    assert "complete" in tropd.ok("status", "-w", cell).output
    shutil.rmtree(cell / "train")
    shutil.rmtree(cell / "eval")
    again = as_json(tropd.ok(*argv, "--json").output)
    for field in ("accuracy", "per_seed", "tokens_on_policy"):
        assert [m[field] for m in again["methods"]] == [m[field] for m in first["methods"]]
