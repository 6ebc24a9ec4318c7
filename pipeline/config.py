"""The configuration of a whole run: pydantic models, TOML in and out. Field docstrings are the user docs.

Defaults are the paper's settings (arXiv 2606.01249, section 4) where it gives them. A value comes from, in
rising precedence: the default here, ``config.toml`` in the workspace, ``--set section.field=value``.

A field decides the results of the stages that read its section, unless it is marked ``Inert`` or ``Apart``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.spec import Apart, Importance, Inert, Objective, Spec
from tropd.storage.topk_encoding import Precision

Dtype = Literal["float32", "bfloat16"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]
EngineName = Literal["transformers", "vllm"]
GraderName = Literal["pattern", "math", "choice", "exact"]
Device = Literal["auto", "cpu", "cuda"]

# Every number has bounds: what is beyond them is a slip of the pen, and would fail late or never end.
MOST = 1_000_000_000
"""Most of anything that is counted: steps, prompts, problems."""
MOST_ALTERNATIVES = 1024
"""Most alternatives of a token."""
MOST_TOKENS = 1 << 30
"""Most tokens of a sequence, a batch or a queue."""
MOST_ROWS = 1 << 20
"""Most rows that are handled together, and most samples of one prompt."""
WEEK = 7 * 86_400.0
"""Longest time that anything waits, in seconds."""

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
Number = Annotated[float, Field(ge=-1e308, le=1e308)]


def _has_a_place(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("a template has {prompt} in it exactly once")
    return template


TokenId = Annotated[int, Field(ge=0, le=MOST)]
Template = Annotated[str, AfterValidator(_has_a_place)]


class RunConfig(Spec):
    """The run as a whole."""

    recipe: str = ""
    """The packaged recipe that config.toml was made from (for the record; changing it changes nothing)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Root of every random choice. The same seed and settings give the same result."""


class RuntimeConfig(Spec):
    """How this machine is used. Nothing here changes results beyond rounding."""

    device: Device = "auto"
    """Where models run: auto takes CUDA if there is one."""
    threads: int | None = Field(default=None, ge=0, le=4096)
    """Intra-op CPU threads per process; 0 leaves PyTorch's choice, usually a thread for each core. If not set: 1 for tiny
    models (weights below 64 MB), whose threads would mostly wait, spin, and slow each other down; otherwise as 0."""
    compile: bool = False
    """Compile the layers of models (torch.compile), for long runs of tiny models: they train and score in 10 to 25 % less
    time, and sample on a CPU in about 40 % less. A model of 135M parameters gains 7 % of a step on a CPU, after half a
    minute to minutes at the start of each process. Needs a C++ compiler on a CPU. A resumed run may then differ in the
    last digits. vLLM does not look at this."""


class Source(Spec):
    """Where prompts come from, for `tropd fetch`, which writes them into files of the workspace."""

    dataset: str = Field(min_length=1)
    """A name on the Hugging Face hub, a directory (a dataset's files, or what the `datasets` library has saved), or a
    file (JSON lines, a JSON array, Parquet or .csv); a relative path is inside the workspace."""
    file: str | None = None
    """File of the workspace that it is written to; data.prompts if not set."""
    domain: str = ""
    """Domain of its prompts, such as `math`: written with each of them."""
    subset: str | None = None
    """Name of the dataset's configuration, where it has several."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = "train"
    """Split of the dataset."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or with data.chat = true a list of messages. Dots lead into lists and objects, here
    and in the other columns: `conversations.0.value`."""
    answer: str | None = None
    """Column with the answer, if there is one; each record then needs it."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Only records whose column has one of these values: `{ domain = ["math"] }`."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many."""
    weight: float | None = Field(default=None, gt=0.0, le=MOST)
    """Share of the file, relative to the weights of its other sources: as many prompts are used as keep the shares. If no
    source has a weight, all prompts are."""


class DataConfig(Spec):
    """Prompts to train on and problems to evaluate on: files of records (JSON lines, a JSON array, Parquet or CSV)."""

    prompts: Apart[str] = "data/train.jsonl"
    """Training prompts. A relative path is inside the workspace."""
    evaluation: Apart[str] = "data/eval.jsonl"
    """Evaluation problems; what is to be graded needs an answer."""
    id_field: str = "id"
    """Field with a unique name of the prompt; where absent or null, the line number is used."""
    prompt_field: str = "prompt"
    """Field with the prompt: a text, or with chat = true a list of messages. As with the other fields, dots lead into
    lists and objects: `messages.1.content`."""
    answer_field: str = "answer"
    """Field with the expected answer; empty: there are none, and nothing is graded."""
    domain_field: Apart[str] = "domain"
    """Field with the domain of the prompt, where there are several."""
    sources: Apart[tuple[Source, ...]] = ()
    """Where `tropd fetch` takes the files from."""
    decontaminate: Apart[int | None] = Field(default=None, ge=1, le=10_000)
    """Leave out training prompts that share this many consecutive words with an evaluation problem (13 is usual); they
    are listed in rejects/. `tropd contamination` shows what it would do."""
    template: Template = "{prompt}"
    """Text around each prompt, with {prompt} in its place, such as an instruction to box the answer."""
    chat: bool = False
    """Wrap prompts as a user turn in the tokenizer's chat template, which lists of messages need; otherwise the text is
    used as it is."""
    template_date: Apart[datetime.date | None] = None
    """The date that a chat template tells which writes today's into prompts, as YYYY-MM-DD. `tropd init` sets it; if not
    set, the day on which such a template is first used is kept in workspace.json."""
    limit: Apart[int | None] = Field(default=None, ge=1, le=MOST)
    """Use only the first this many training prompts."""
    skip_bad: Inert[bool] = False
    """Leave out lines that cannot be used (malformed, without text, a repeated id, too long) and list them in
    rejects/; otherwise they stop the stage before any model is loaded."""


class ModelConfig(Spec):
    """A causal language model in Hugging Face format (safetensors)."""

    model: str
    """Directory (relative to the workspace, or absolute) or a name on the Hugging Face hub."""
    dtype: DtypeChoice = "auto"
    """Precision of the weights in memory; of a student in training, whose weights are float32, that of matrix
    products. Logits and log-probs are float32 in any case. auto: what earlier stages of the workspace took; in a new
    one bfloat16 on CUDA and float32 on a CPU, of which many have no instructions for bfloat16."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: leave it off unless you have read that code."""
    engine: EngineName = "transformers"
    """What samples and scores with it: `transformers`, in this process, or `vllm` (pip install "tropd[vllm]")."""

    @property
    def settled_dtype(self) -> Dtype:
        """``dtype`` of an open run, whose automatic settings are decided (see ``automatic``)."""
        if self.dtype == "auto":
            raise ValueError(f"dtype of {self.model} is not decided yet: read it from Run.config")
        return self.dtype


class ServedTeacher(ModelConfig):
    """A teacher, and the service that scores with it during training."""

    url: str | tuple[str, ...] | None = None
    """A scoring service that is already running (`tropd serve-teacher`, or vLLM's `vllm serve`), or a list of several
    with the same teacher; if not set, `tropd train` starts one on a free loopback port."""
    token_env: str = "TROPD_TEACHER_TOKEN"
    """Environment variable with the bearer token of that service."""
    timeout_seconds: float = Field(default=300.0, gt=0, le=WEEK)
    """How long the trainer keeps trying to get an answer before it stops, with everything saved."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if url is not None and not url:
            raise ValueError("no address is given; a service's address looks like http://host:port")
        for one in (url,) if isinstance(url, str) else url or ():
            parts = urlsplit(one)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"a service's address looks like http://host:port, not {one!r}")
        return url

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of running services; none if one is to be started."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()


class DomainTeacher(ServedTeacher):
    """The teacher of one domain's prompts. Fields are those of [teacher]."""

    domain: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]*$")
    """The domain, as prompts name it (data.domain_field)."""


class TeacherConfig(ServedTeacher):
    """The teacher, and the service that scores with it during training."""

    model: str = "models/teacher"
    """Directory (relative to the workspace, or absolute) or a name on the Hugging Face hub."""
    by_domain: tuple[DomainTeacher, ...] = ()
    """Other teachers for prompts of some domains. All must have the student's tokenizer."""

    @field_validator("by_domain")
    @classmethod
    def _once_each(cls, teachers: tuple[DomainTeacher, ...]) -> tuple[DomainTeacher, ...]:
        names = [teacher.domain for teacher in teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"a domain has one teacher, not several ({', '.join(names)})")
        return teachers


class LoraSettings(Spec):
    """Low-rank adapters instead of all weights: less memory for gradients and optimiser, smaller checkpoints."""

    rank: int = Field(default=32, ge=1, le=MOST_ROWS)
    """Rank of the adapters of every linear layer."""
    alpha: float = Field(default=64.0, gt=0.0, le=1e6)
    """The adapters' product is scaled by alpha / rank."""


class StudentConfig(ModelConfig):
    """The student."""

    model: str = "models/student"
    """Directory (relative to the workspace, or absolute) or a name on the Hugging Face hub."""
    lora: LoraSettings | None = None
    """Train low-rank adapters (pip install "tropd[lora]"), merged into the exported student; all weights if not set."""


class VllmConfig(Spec):
    """How vLLM runs a model whose `engine` is `vllm`."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """GPUs that a model is spread over."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that vLLM takes; lower it where the student trains on the same GPU."""
    max_model_len: int | None = Field(default=None, ge=2, le=MOST_TOKENS)
    """Longest sequence, prompt included; the model's own limit if not set. Shorter takes less memory."""
    enforce_eager: bool = False
    """No CUDA graphs: slower, starts faster."""
    quantization: str | None = None
    """Quantisation method of the weights (`fp8`, `awq`, …); what the model says if not set."""
    check_every: int = Field(default=10, ge=1, le=MOST)
    """In training, steps between two checks that engine and trainer agree (besides that after the first update)."""
    max_mean_difference: float = Field(default=0.1, gt=0.0, le=100.0)
    """Training stops if their log-probs of the rollouts differ by more than this on average, in nats."""

    def room(self, longest: int) -> int:
        """Most tokens of a sequence, of a model that takes ``longest``: scoring generates one more."""
        return min(self.max_model_len or longest, longest) - 1


class PrefixesConfig(Spec):
    """Stage 1: trajectories of the teacher, from whose beginnings the student continues."""

    samples_per_prompt: int = Field(default=1, ge=1, le=MOST_ROWS)
    """Trajectories per prompt."""
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the likeliest tokens up to this mass."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Only the first this many training prompts get trajectories; on the others the student starts from the prompt."""
    keep: Literal["all", "correct"] = "all"
    """Keep all trajectories, or only those whose answer is right. The others are kept in rejects/, so that another choice
    here, or another grader, filters again and samples nothing."""
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest trajectory; rollout.max_tokens if not set."""
    batch_size: Inert[int] = Field(default=64, ge=1, le=MOST_ROWS)
    """Sequences decoded together."""
    shard_prompts: int = Field(default=512, ge=1, le=MOST_ROWS)
    """Prompts per shard: what a crash can cost."""


class ScoresConfig(Spec):
    """Stage 2: the teacher's top-k log-probs of its trajectories, cached on disk."""

    k: int = Field(default=64, ge=1, le=MOST_ALTERNATIVES)
    """At most this many alternatives per token. `tropd score-teacher` warns where they hold little of the probability."""
    mass: float = Field(default=0.999, gt=0.0, le=1.0)
    """Keep alternatives until they hold this much probability."""
    precision: Precision = "float16"
    """How log-probs are stored: `float16` (exact to 11 bits), or `q8` (about two thirds of the bytes, log-probs
    exact to about 2 %; docs/cache.md has the bounds)."""
    batch_tokens: Inert[int] = Field(default=16384, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward pass."""


class ServiceConfig(Spec):
    """The teacher-scoring service."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a bearer token in the environment."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port; 0 takes a free one."""
    batch_tokens: int = Field(default=16384, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward pass; small requests are scored together up to this."""
    queue_tokens: int = Field(default=1 << 20, ge=1, le=MOST_TOKENS)
    """Tokens that may wait; beyond this a request is answered 429 with Retry-After."""
    max_request_tokens: int = Field(default=1 << 18, ge=1, le=MOST_TOKENS)
    """Largest request, in tokens."""
    max_request_bytes: int = Field(default=64 << 20, ge=4096, le=1 << 36)
    """Largest request body."""
    max_connections: int = Field(default=512, ge=1, le=1 << 16)
    """Most open connections; beyond this those are cut that have kept the service waiting longest."""
    header_seconds: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time for the whole header of a request, and between two requests of a connection."""
    body_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Longest time for the whole body of a request."""
    answer_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Longest time in which a client reads its answer."""
    stop_seconds: float = Field(default=10.0, gt=0.0, le=3600.0)
    """How long what is queued may still be scored once the service is told to stop."""


class RolloutConfig(Spec):
    """The student's responses during training."""

    prompts_per_step: int = Field(default=128, ge=1, le=MOST_ROWS)
    """Prompts per step."""
    samples_per_prompt: int = Field(default=4, ge=1, le=MOST_ROWS)
    """Responses per prompt."""
    max_tokens: int = Field(default=8096, ge=1, le=MOST_TOKENS)
    """Longest response, teacher prefix included (the paper's number is 8,096)."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Sampling temperature. Losses are at temperature 1, and corrected for what was sampled (train.importance_clip)."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the likeliest tokens up to this mass."""
    stop_ids: Apart[tuple[TokenId, ...] | None] = Field(default=None, min_length=1)
    """Token ids that end a response, of student and teacher in all stages. If not set: a teacher's are those of its
    tokenizer and generation_config.json, the student's are its own and the teacher's."""
    batch_size: Inert[int] = Field(default=64, ge=1, le=MOST_ROWS)
    """Sequences decoded together."""

    @property
    def plain(self) -> bool:
        """Tokens are drawn from the student's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0


class TrainConfig(Spec):
    """Optimisation."""

    steps: int = Field(default=200, ge=1, le=MOST)
    """Optimiser steps."""
    learning_rate: float = Field(default=5e-6, gt=0.0, le=1000.0)
    """Peak learning rate (AdamW)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps over which the learning rate rises from 0; in a shorter run, all steps but the last."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1000.0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e12)
    """Gradients are scaled down to this norm."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """1: the student's responses for the next step are sampled and scored while this step trains, so by weights that are
    one update older. 0: strictly on-policy."""
    importance_clip: Apart[float] = Field(default=2.0, gt=0.0, le=1e9)
    """c of the weight min(π_θ/μ, c) that corrects for responses sampled from another distribution μ than the student's
    own (older weights, another engine, another temperature or top-p, or bfloat16, in which sampler and trainer round
    differently), where the objective does not set its own."""
    micro_batch_tokens: Apart[int] = Field(default=4096, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward and backward pass; gradients are accumulated over a step."""
    gradient_checkpointing: Inert[bool] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Inert[Literal["auto", "flash_attention_2", "flash_attention_3"]] = "auto"
    """How the student attends in training. auto: PyTorch's scaled dot product, where rows that share a line need a mask
    of its length squared. The others read packed rows without one; they need a CUDA GPU, the package `flash-attn` (or
    `flash_attn_3`), `student.dtype = "bfloat16"` and a single process."""
    dropout: Apart[bool] = False
    """Whether the student has the dropout that its config.json names while it trains. Off, gradients are those of the
    student that samples. On, what is dropped follows from the seed, the step, the process and the micro-batch."""
    region_gradients: Inert[bool] = False
    """Also measure the gradient norm of each region on its own (metrics grad_norm_trust, …): slower, and not
    with runtime.compile."""
    checkpoint_every: Inert[int] = Field(default=50, ge=1, le=MOST)
    """Steps between checkpoints."""
    keep_checkpoints: Inert[int] = Field(default=2, ge=1, le=MOST)
    """Newest checkpoints that are kept."""
    wandb_project: Inert[str | None] = Field(default=None, min_length=1)
    """Log metrics to this project of Weights & Biases too (pip install "tropd[wandb]")."""
    trace: Inert[bool] = False
    """Write train/trace.json: what each thread did when, for ui.perfetto.dev."""
    evaluate_every: Inert[int] = Field(default=0, ge=0, le=MOST)
    """Steps between evaluations during training, of accuracy and of the distance to the teacher; 0 is never."""
    evaluate_problems: Inert[int] = Field(default=100, ge=1, le=MOST)
    """Problems per such evaluation of accuracy, spread over all. The distance has evaluation.distance_prompts."""

    @property
    def warmup(self) -> int:
        """Steps of warm-up that there are: the last step of a short trial has the whole learning rate."""
        return min(self.warmup_steps, self.steps - 1)


class SftConfig(Spec):
    """`tropd sft`: supervised fine-tuning on the teacher's trajectories (the paper's settings, but for the steps)."""

    steps: int = Field(default=1000, ge=1, le=MOST)
    """Optimiser steps (the paper trains on 14 million samples, about 27,000 steps)."""
    prompts_per_step: int = Field(default=512, ge=1, le=MOST_ROWS)
    """Trajectories per step."""
    learning_rate: float = Field(default=5e-5, gt=0.0, le=1000.0)
    """Peak learning rate; it falls to 0 as a cosine."""
    weight_decay: float = Field(default=0.1, ge=0.0, le=1000.0)
    """AdamW's weight decay."""
    warmup_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises."""


class Benchmark(Spec):
    """One more set of problems. Fields that are not set are those of [evaluation] and [data]."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$")
    """Name in tables, and of its folder in eval/."""
    problems: str
    """JSONL file; a relative path is inside the workspace."""
    grader: GraderName | None = None
    """See evaluation.grader."""
    samples: int | None = Field(default=None, ge=1, le=MOST_ROWS)
    """Responses per problem: the n of avg@n."""
    temperature: float | None = Field(default=None, gt=0.0, le=100.0)
    """Sampling temperature."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus sampling."""
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest response."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    pass_at: tuple[Count, ...] | None = None
    """The k of pass@k."""
    id_field: str | None = None
    """Field with a unique name of the problem."""
    prompt_field: str | None = None
    """Field with the problem's text."""
    answer_field: str | None = None
    """Field with the expected answer."""
    template: Template | None = None
    """See data.template."""


class HarnessTask(Spec):
    """A task of lm-eval (pip install "tropd[bench]"), which runs it in a process of its own."""

    name: Apart[str] = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$")
    """Name in tables."""
    task: str = Field(min_length=1)
    """Its name in lm-eval, such as `gpqa_diamond_cot_zeroshot`, `mmlu_redux_generative` or `ifeval`."""
    folder: Apart[str | None] = None
    """Folder with task files of your own; a relative path is inside the workspace."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Examples in the prompt; what the task says if not set."""
    batch_size: int = Field(default=8, ge=1, le=MOST_ROWS)
    """Problems at once, where vLLM does not decide that itself."""
    generation: dict[str, bool | Whole | Number | str] = Field(default_factory=dict)
    """Settings of generation: `{ do_sample = true, temperature = 0.6, max_gen_toks = 8096 }`."""
    runs_code: bool = False
    """The task runs code that the model wrote. It then runs without network; where that is not possible, not at all."""


class EvaluationConfig(Spec):
    """Accuracy on held-out problems, and distance to the teacher: before, after, and the teacher's own."""

    samples: int = Field(default=1, ge=1, le=MOST_ROWS)
    """Sampled responses per problem (greedy decoding is always evaluated too)."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Temperature of sampled responses."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the likeliest tokens up to this mass."""
    max_tokens: Apart[int | None] = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest response; rollout.max_tokens if not set."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    distance_prompts: Apart[int] = Field(default=64, ge=0, le=MOST)
    """Prompts, spread over all problems, on which the distance between student and teacher is measured: reverse and
    forward KL, acceptance and lengths. These need no answer; what has none is not graded. 0: no distance."""
    batch_size: Inert[int] = Field(default=128, ge=1, le=MOST_ROWS)
    """Sequences decoded together."""
    grader: GraderName = "math"
    """What is the answer, and when it is right: `pattern` (answer_pattern's group equals it as text), `math` (boxed,
    after ####, stated, or the last number; equal as mathematics), `choice` (the declared letter A to J; an expected
    index counts from 0), `exact` (all of the response). What thinking holds, or the length cut off, is no answer."""
    grading_seconds: Inert[float] = Field(default=5.0, gt=0.0, le=3600.0)
    """Longest time that the comparison of one mathematical answer may take; then it is wrong."""
    answer_pattern: str = r"#\s*([^\s#]+)\s*$"
    """Regular expression whose first group is the answer in a response, for the grader `pattern`."""
    pass_at: Inert[tuple[Count, ...]] = ()
    """The k of pass@k that are reported; each at most `samples`."""
    benchmarks: Apart[tuple[Benchmark, ...]] = ()
    """More sets of problems, each with settings of its own (avg@n and pass@k, no greedy decoding)."""
    harness: Apart[tuple[HarnessTask, ...]] = ()
    """Tasks of lm-eval, for what it has and we do not."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if not groups:
            raise ValueError("the pattern needs a group, as in '#(.*)', which is the answer")
        return pattern


class DemoConfig(Spec):
    """The embedded tasks and their models; only `tropd prepare` reads this."""

    enabled: Inert[bool] = False
    """Whether `tropd prepare` makes the models and problems of this run."""
    models: Apart[Literal["tiny", "smollm2"]] = "tiny"
    """`tiny`: two tiny models, trained on the spot, and arithmetic; `smollm2`: SmolLM2-135M-Instruct from the package
    registry, a student cut out of it, and short questions. Of what is below, it takes the numbers of problems only."""
    train_problems: Apart[int] = Field(default=2000, ge=1, le=MOST)
    """Training problems written to data.prompts."""
    eval_problems: Apart[int] = Field(default=500, ge=1, le=MOST)
    """Held-out problems written to data.evaluation, disjoint from all others."""
    min_operations: int = Field(default=3, ge=1, le=1000)
    """Fewest operations of a problem, and of those that the student was taught."""
    max_operations: int = Field(default=5, ge=1, le=1000)
    """Most operations of a problem, and of those that the student was taught."""
    train_max_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Most operations of a training prompt; max_operations (which the student was taught) if not set."""
    eval_min_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Fewest operations of a held-out problem; min_operations if not set."""
    eval_max_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Most operations of a held-out problem; max_operations if not set."""
    teacher_steps: int = Field(default=800, ge=1, le=MOST)
    """Supervised steps of the teacher."""
    student_steps: int = Field(default=1000, ge=1, le=MOST)
    """Supervised steps of the student on clean chains."""
    spoil_steps: int = Field(default=120, ge=0, le=MOST)
    """Steps that spoil the student afterwards, so that there is something to distil."""
    spoil: Literal["noisy", "terse"] = "noisy"
    """`noisy`: wrong intermediate results and some terse answers (mild); `terse`: another format (mismatch)."""

    @model_validator(mode="after")
    def _ordered(self) -> DemoConfig:
        most_train = "max_operations" if self.train_max_operations is None else "train_max_operations"
        fewest_eval = "min_operations" if self.eval_min_operations is None else "eval_min_operations"
        most_eval = "max_operations" if self.eval_max_operations is None else "eval_max_operations"
        ranges = (
            ("min_operations", "max_operations"),
            ("min_operations", most_train),
            (fewest_eval, most_eval),
        )
        for low, high in ranges:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)})")
        return self


class Config(Spec):
    """Everything that a run depends on."""

    run: Apart[RunConfig] = RunConfig()
    runtime: Inert[RuntimeConfig] = RuntimeConfig()
    data: DataConfig = DataConfig()
    teacher: Apart[TeacherConfig] = TeacherConfig()
    student: Apart[StudentConfig] = StudentConfig()
    prefixes: PrefixesConfig = PrefixesConfig()
    scores: ScoresConfig = ScoresConfig()
    service: Inert[ServiceConfig] = ServiceConfig()
    vllm: Apart[VllmConfig] = VllmConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: Objective
    sft: Apart[SftConfig] = SftConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    demo: DemoConfig = DemoConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if reasons := list(_conflicts(self)):
            raise ValueError("\n".join(reasons))
        return self

    @property
    def training_objective(self) -> Objective:
        """The objective, with the correction for rollouts from another distribution."""
        objective = self.objective
        if not self.rollouts_differ or objective.importance.clip is not None:
            return objective
        return objective.model_copy(update={"importance": Importance(clip=self.train.importance_clip)})

    @property
    def rollouts_differ(self) -> bool:
        """Whether the student samples its responses from another distribution than the one that is trained.

        In bfloat16 it does: what is rounded depends on the order of sums, so on the shapes of batches, and log-probs of
        sampler and trainer are some hundredths apart. Stored responses are no samples of this run: an objective that
        trains on them says itself how it weighs them.
        """
        if self.objective.rollouts != "student":
            return False
        student = self.student
        exact = student.engine == "transformers" and student.dtype != "bfloat16"
        return not exact or not self.rollout.plain or self.train.max_staleness > 0

    @property
    def prefix_max_tokens(self) -> int:
        return self.prefixes.max_tokens or self.rollout.max_tokens

    @property
    def evaluation_max_tokens(self) -> int:
        return self.evaluation.max_tokens or self.rollout.max_tokens

    @property
    def evaluation_sets(self) -> dict[str, EvaluationConfig]:
        """Settings of each set of problems by name; that of [evaluation] itself has an empty name."""
        sets = {"": self.evaluation.model_copy(update={"benchmarks": (), "harness": ()})}
        for benchmark in self.evaluation.benchmarks:
            own = {n: v for n, v in benchmark if v is not None and n in EvaluationConfig.model_fields}
            sets[benchmark.name] = sets[""].model_copy(update=own)
        return sets

    @property
    def problem_files(self) -> dict[str, DataConfig]:
        """Where the problems of each of these sets are, as ``evaluation``, and how they are read."""
        files = {"": self.data}
        for benchmark in self.evaluation.benchmarks:
            own = {
                n: v for n, v in benchmark if v is not None and n in DataConfig.model_fields and n != "limit"
            }
            files[benchmark.name] = self.data.model_copy(update=own | {"evaluation": benchmark.problems})
        return files


def to_plain(spec: Spec) -> dict[str, Any]:
    """A specification as plain nested dicts, lists and scalars."""
    return spec.model_dump(mode="json")


def _conflicts(config: Config) -> Iterator[str]:
    """A line for each reason to refuse settings of several sections: why, and what to set instead.

    Only what follows from the settings alone; what depends on files, models or the machine is refused by the stages.
    """
    yield from _length_conflicts(config)
    yield from _teacher_conflicts(config)
    yield from _training_conflicts(config)
    yield from _evaluation_conflicts(config)
    yield from _problem_conflicts(config)


def _length_conflicts(config: Config) -> Iterator[str]:
    longest = config.rollout.max_tokens
    if config.prefix_max_tokens > longest:
        yield (
            f"prefixes.max_tokens ({config.prefix_max_tokens}) is above rollout.max_tokens ({longest}): the student "
            "could not continue such a prefix; lower prefixes.max_tokens"
        )
    room = config.vllm.max_model_len
    if room is None or "vllm" not in (config.teacher.engine, config.student.engine):
        return
    for name, most in {
        "rollout.max_tokens": longest,
        "evaluation.max_tokens": config.evaluation_max_tokens,
    }.items():
        if most >= config.vllm.room(room):
            yield (
                f"{name} ({most}) leaves no token for a prompt in vllm.max_model_len ({room}), of which one is for "
                f"scoring: lower {name}, or raise vllm.max_model_len"
            )


def _teacher_conflicts(config: Config) -> Iterator[str]:
    objective = config.objective
    needs = teacher_needs(objective)
    cached = needs.cached_topk or (objective.rollouts == "stored" and needs.topk != "none")
    if cached and objective.k > config.scores.k:
        yield (
            f"objective.k ({objective.k}) is above scores.k ({config.scores.k}): the cache, which is learned from, does "
            "not hold that many alternatives; lower objective.k, or raise scores.k"
        )
    if objective.rollouts == "stored" and objective.importance.clip is not None and not config.rollout.plain:
        yield (
            "objective.importance.clip with stored rollouts needs rollout.temperature = 1 and rollout.top_p = 1: "
            "stored log-probs are those at temperature 1"
        )
    if objective.rollouts != "student":
        return
    started = [teacher for teacher in (config.teacher, *config.teacher.by_domain) if not teacher.urls]
    if needs.entropy and any(teacher.engine == "vllm" for teacher in started):
        yield (
            "objective.partition.rule = 'teacher_entropy' needs the teacher's full-vocabulary entropy, which vLLM does "
            "not give: set teacher.engine = 'transformers' (in teacher.by_domain too), or another "
            "objective.partition.rule"
        )
    if started and config.service.max_request_tokens <= config.rollout.max_tokens:
        yield (
            f"service.max_request_tokens ({config.service.max_request_tokens}) is too low for a prompt and a response of "
            f"rollout.max_tokens ({config.rollout.max_tokens}): raise service.max_request_tokens"
        )


def _training_conflicts(config: Config) -> Iterator[str]:
    train = config.train
    if train.dropout and config.student.engine != "transformers":
        yield (
            f"train.dropout and student.engine = {config.student.engine!r} exclude each other: the engine's log-probs "
            "are compared with the trainer's, which would be those of another network each time; set train.dropout = "
            "false, or student.engine = 'transformers'"
        )
    if train.region_gradients and config.runtime.compile:
        yield (
            "train.region_gradients and runtime.compile exclude each other: compiled backward passes can be gone through "
            "only once; set train.region_gradients = false, or runtime.compile = false"
        )
    if train.attention != "auto":
        for name, value, wanted in (
            ("student.dtype", config.student.dtype, "bfloat16"),
            ("runtime.device", config.runtime.device, "cuda"),
        ):
            if value not in ("auto", wanted):
                yield (
                    f"train.attention = {train.attention!r} excludes {name} = {value!r}: set {name} = {wanted!r}, or "
                    "train.attention = 'auto'"
                )


def _evaluation_conflicts(config: Config) -> Iterator[str]:
    names = [b.name for b in config.evaluation.benchmarks] + [t.name for t in config.evaluation.harness]
    if len(set(names)) < len(names):
        yield (
            f"evaluation.benchmarks, evaluation.harness: names are not unique ({', '.join(names)}); set one of them to "
            "another name"
        )
    if "eval" in names:
        yield (
            "evaluation.benchmarks, evaluation.harness: 'eval' is how results name the problems of [evaluation] itself; "
            "set another name"
        )
    for name, part in config.evaluation_sets.items():
        owner = f"evaluation.benchmarks, {name!r}" if name else "evaluation.pass_at"
        if (most := max(part.pass_at, default=0)) > part.samples:
            yield (
                f"{owner}: pass@{most} needs samples = {most}, there are {part.samples} (evaluation.samples, or those of "
                "the benchmark): raise samples, or lower pass_at"
            )
        if name and not config.problem_files[name].answer_field:
            yield (
                f"{owner} has no answers to be graded by, since data.answer_field is empty: set data.answer_field, or "
                "that of the benchmark"
            )
    if not config.data.answer_field and not config.evaluation.distance_prompts:
        yield (
            "evaluation.distance_prompts = 0 and an empty data.answer_field leave nothing to evaluate: set "
            "data.answer_field, or leave evaluation.distance_prompts out"
        )


def _problem_conflicts(config: Config) -> Iterator[str]:
    data, demo = config.data, config.demo
    if config.prefixes.keep == "correct" and not data.answer_field:
        yield (
            "prefixes.keep = 'correct' needs answers, and data.answer_field is empty: set data.answer_field, or "
            "prefixes.keep = 'all'"
        )
    for column, field in (("answer", "answer_field"), ("domain", "domain_field")):
        if not getattr(data, field) and any(getattr(source, column) for source in data.sources):
            yield (
                f"data.sources names {column}, and data.{field}, the field that it is written to, is empty: "
                f"set data.{field}"
            )
    if not demo.enabled:
        return
    if demo.models == "smollm2" and not data.chat:
        yield "demo.models = 'smollm2' has conversations as prompts, which need a chat template: set data.chat = true"
    if data.prompt_field != "prompt" or data.answer_field not in ("answer", ""):
        yield (
            "demo.enabled = true writes problems with the fields prompt and answer: leave data.prompt_field and "
            "data.answer_field out"
        )
