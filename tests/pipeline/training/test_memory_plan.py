"""The memory plan against real models: parameters, caches, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder, LeanModel
from tropd.pipeline.models.loading import num_parameters
from tropd.pipeline.objectives.extrapolation.settings import Extrapolation
from tropd.pipeline.training.memory_plan import (
    GATHERED,
    MemoryPart,
    ModelShape,
    activation_bytes,
    disk_bytes,
    kv_bytes_per_token,
    lora_parameters,
    memory_parts,
    peak_bytes,
)
from tropd.pipeline.training.update.lora import add_adapters

SCALE = Path(__file__).parents[3] / "docs" / "scale.md"
# Layers, hidden, intermediate, heads, key-value heads, head size, vocabulary, tied: from the models' config.json.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, 128, 151_936, True),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 128, 151_936, True),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151_936, True),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 128, 151_936, False),
}


def make_config(kind: str, **options: Any) -> Any:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return getattr(transformers, f"{kind}Config")(**(sizes | options))


def make(kind: str, **options: Any) -> Any:
    return getattr(transformers, f"{kind}ForCausalLM")(make_config(kind, **options))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_making_the_model(kind: str, tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    assert ModelShape.of(model.config).parameters == num_parameters(model)


def test_the_cache_is_as_large_as_it_is() -> None:
    model = make("Qwen3", head_dim=16)
    decoder = LeanDecoder(LeanModel(model), 7, Sampling())
    decoder.start([[1, 2, 3]] * 5, 3, torch.zeros(5))
    # One column is spare.
    assert decoder.cache_bytes == 5 * 7 * kv_bytes_per_token(ModelShape.of(model.config), 4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_activations_are_estimated_within_a_third(kind: str) -> None:
    model = make(kind).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(input_ids=torch.arange(256).reshape(2, 128), use_cache=False).last_hidden_state
    estimate = 256 * activation_bytes(ModelShape.of(model.config), 4, checkpointing=False)
    assert states.requires_grad
    assert 2 / 3 < sum(kept.values()) / estimate < 4 / 3


def paper_config() -> Config:
    return parse_config(
        '[runtime]\ndevice = "cuda"\n[student]\ndtype = "bfloat16"\n[objective]\nname = "tropd"\n'
        "[train]\ngradient_checkpointing = true\nmicro_batch_tokens = 16384\n",
        where="paper",
    ).config


def shape_of(name: str) -> ModelShape:
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, tied = SHAPES[name]
    return ModelShape.of(
        transformers.Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tied,
        )
    )


def table() -> list[str]:
    """The lines of docs/scale.md's table."""
    lines = []
    for name in SHAPES:
        shape = shape_of(name)
        one, eight = (memory_parts(paper_config(), shape, None, n) for n in (1, 8))
        totals = [peak_bytes(parts) / 1e9 for parts in (one, eight)]
        (kv,) = (part.bytes / 1e9 for part in eight if part.name == "KV cache of rollouts")
        lines.append(
            f"| {name} | {shape.parameters / 1e9:.2f} | {totals[0]:.0f} | {totals[1]:.0f} | {kv:.0f} |"
        )
    return lines


def test_the_documented_table_is_what_the_code_says() -> None:
    text = SCALE.read_text()
    for line in table():
        assert line in text, "\n".join(table())


def test_known_sizes_and_what_more_processes_save() -> None:
    assert shape_of("Qwen3-0.6B").parameters == pytest.approx(0.596e9, rel=0.01)
    assert shape_of("Qwen3-8B").parameters == pytest.approx(8.19e9, rel=0.01)
    config, shape = paper_config(), shape_of("Qwen3-8B")
    one, eight = ({p.name: p.bytes for p in memory_parts(config, shape, None, n)} for n in (1, 8))
    assert one["AdamW's moments"] == 8 * eight["AdamW's moments"] == 8 * shape.parameters
    assert eight["whole student for rollouts"] == 2 * shape.parameters
    teacher = config.teacher.model_copy(update={"dtype": "bfloat16"})
    here = config.model_copy(update={"teacher": teacher})
    with_teacher = {p.name: p.bytes for p in memory_parts(here, shape, shape, 1)}
    assert with_teacher["teacher"] == 2 * shape.parameters
    assert disk_bytes(config, shape)["checkpoints"] == 12 * shape.parameters * 3


def test_extrapolation_takes_a_copy_of_the_weights_and_another_while_it_samples() -> None:
    config, shape = paper_config(), shape_of("Qwen3-8B")
    objective = config.objective.model_copy(update={"extrapolation": Extrapolation()})
    also = config.model_copy(update={"objective": objective})
    for processes in (1, 8):
        before, after = ({p.name: p for p in memory_parts(c, shape, None, processes)} for c in (config, also))
        added = [after[name] for name in after.keys() - before.keys() if "float32" in name]
        assert {part.phase: part.bytes for part in added} == dict.fromkeys(
            ("", "rollout"), 4 * shape.parameters / processes
        )
    assert disk_bytes(also, shape)["checkpoints"] == 16 * shape.parameters * 3


def gathered(name: str, processes: int, gpu_bytes: float = 80e9) -> list[MemoryPart]:
    parts = memory_parts(paper_config(), shape_of(name), None, processes, gpu_bytes=gpu_bytes)
    return [part for part in parts if part.name == GATHERED]


def test_weights_and_gradients_are_gathered_for_a_step_where_there_is_room() -> None:
    (part,) = gathered("Qwen3-1.7B", 8)
    assert (part.bytes, part.phase) == ((2 + 4) * shape_of("Qwen3-1.7B").parameters, "train")
    assert not gathered("Qwen3-1.7B", 1)
    assert not gathered("Qwen3-8B", 8)
    assert not gathered("Qwen3-1.7B", 8, gpu_bytes=24e9)


def test_a_cpu_keeps_keys_and_values_in_float32() -> None:
    model = make("Qwen3", head_dim=16).to(torch.bfloat16)
    decoder = LeanDecoder(LeanModel(model), 7, Sampling())
    decoder.start([[1, 2, 3]] * 5, 3, torch.zeros(5))
    shape = ModelShape.of(model.config)
    text = (
        "[rollout]\nbatch_size = 5\nmax_tokens = 3\n[runtime]\ndevice = 'cpu'\n[student]\ndtype = 'bfloat16'"
    )
    (planned,) = (
        part.bytes
        for part in memory_parts(parse_config(text).config, shape, None, 1, longest_prompt=3)
        if part.name == "KV cache of rollouts"
    )
    assert planned == decoder.cache_bytes


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_adapters_are_counted_as_peft_makes_them(kind: str) -> None:
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    model = make(kind)
    shape = ModelShape.of(model.config)
    add_adapters(model, LoraSettings(rank=4), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(shape, 4) == trained


def test_adapters_take_less_than_all_weights() -> None:
    shape = ModelShape(*(10**9, 28, 2048, 6144, 16, 8, 128, 151_936))

    def total(text: str) -> float:
        short = "[runtime]\ndevice = 'cuda'\n[rollout]\nbatch_size = 1\n[student]\ndtype = 'bfloat16'\n"
        config = parse_config(short + text).config
        return peak_bytes(memory_parts(config, shape, None, 1))

    everything, adapters = total(""), total("lora = { rank = 16 }")
    # 16 bytes per parameter for training all, 2 for frozen bfloat16 weights.
    assert everything - adapters == pytest.approx(1.1 * 14e9, rel=0.05)


@pytest.mark.parametrize(("device", "planned"), [("cuda", 1), ("cpu", 0)])
def test_a_graph_of_a_decoding_step_has_memory_of_its_own(device: str, planned: int) -> None:
    runtime = f"[runtime]\ndevice = '{device}'\ncuda_graphs = true\n"
    text = f"{runtime}[rollout]\nbatch_size = 64\n[student]\ndtype = 'bfloat16'"
    shape = shape_of("Qwen3-1.7B")
    parts = memory_parts(parse_config(text).config, shape, None, 1)
    graphs = [part for part in parts if "CUDA graph" in part.name]
    assert len(graphs) == planned
    for part in graphs:
        assert part.bytes > 2 * shape.vocab * shape.hidden
        assert part.phase == "rollout"
