"""The engine on transformers: decoding, and scoring of given tokens. It proves itself at first use (see ``proof``)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tropd.pipeline.models.engines import base, proof
from tropd.pipeline.models.engines.base import Generation, Sampling, SequenceScores, TopkWhere, everywhere
from tropd.pipeline.models.engines.decoding import Decoder, batch_sizes, decode
from tropd.pipeline.models.engines.decoding_any import ModelDecoder
from tropd.pipeline.models.engines.graphs.known import graphs_for
from tropd.pipeline.models.engines.lean import compiled
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder, LeanModel, is_lean
from tropd.pipeline.models.engines.residual import float32_stream, takes_float32_stream
from tropd.pipeline.models.engines.scoring import batches_of, right_pad, score_states, topk_of
from tropd.pipeline.models.loading import context_length
from tropd.pipeline.models.output.output_layer import SplitModel, split_model
from tropd.pipeline.models.runtime import (
    Side,
    autocast,
    evaluation_mode,
    masked_attention,
    padded_rows,
    to_device,
    to_host,
)
from tropd.storage.arrays import Floats32
from tropd.storage.errors import ConfigError


@dataclass(frozen=True)
class _Options:
    """What ``score`` is asked for."""

    k: int
    entropy: bool
    topk_where: TopkWhere
    vocab_limit: int | None
    chosen: Sequence[base.IdTable] | None
    overlap: bool


class TransformersEngine:
    """Samples from and scores with a causal LM in this process.

    It shares the model's weights with its trainer, and switches it to evaluation mode while it works.

    Args:
        model: a causal LM of transformers.
        stop_ids: tokens that end a response.
        batch_size: rows decoded together.
        batch_tokens: tokens, padding included, per pass over given ones: to score, and to read prompts.
        num_tokens: ids that the tokenizer has; all rows of the output layer if None.
        autocast: lower precision for matrix products, where the weights are kept in float32 for training.
        compiles: compile the model's layers and, where the model is one that ``lean_decoder`` knows, its decoding step.
        graphs: on a GPU, decode with CUDA graphs (see ``token_graph``) where they prove right.
        lean: decode without the model's modules (see ``lean_decoder``), or with them; None: without, if equal.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Collection[int],
        *,
        batch_size: int = 64,
        batch_tokens: int = 16384,
        num_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        compiles: bool = False,
        graphs: bool = False,
        lean: bool | None = None,
    ) -> None:
        self.model = model
        self._autocast = autocast
        self._split = split_model(model, num_tokens)
        self._stop_ids = sorted(stop_ids)
        self._compiles = compiles
        self._lean = lean
        self.graphs = graphs_for(model) if graphs else None
        """Those of its decoding steps, if it makes any."""
        self._has_scored = False
        self._has_generated = False
        self._prepared: set[Sampling] = set()
        if compiles:
            compiled.check_compiler()
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens

    @functools.cached_property
    def is_lean(self) -> bool:
        """True if it decodes without the model's modules; found out at first use, which takes a copy of the weights."""
        if self._lean is not None:
            return self._lean
        with masked_attention(self.model):
            return is_lean(self.model)

    @property
    def vocab_size(self) -> int:
        return self._split.limit or int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int:
        return context_length(self.model.config)

    @contextmanager
    def _inference(self, precision: torch.dtype | None, side: Side) -> Iterator[None]:
        with (
            torch.inference_mode(),
            masked_attention(self.model),
            padded_rows(self.model, side),
            evaluation_mode(self.model),
            autocast(self.model.device, precision),
        ):
            yield

    @functools.cached_property
    def _streams_float32(self) -> bool:
        """Where autocast is asked for, weights are float32, and hidden states with them."""
        return self._autocast is None and takes_float32_stream(self.model)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with (
            self._inference(self._autocast, "right"),
            float32_stream(self.model) if self._streams_float32 else nullcontext(),
        ):
            yield

    # ------------------------------------------------------------------------------------ generate

    def prepare(self, sampling: Sampling) -> None:
        """Compile now the passes that ``generate`` will use, where compiling is on."""
        if self._compiles and self.is_lean and sampling not in self._prepared:
            with self._inference(None, "left"):
                compiled.compile_choice(self._lean_model(), sampling)
            self._prepared.add(sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: base.Finished | None = None,
    ) -> list[Generation]:
        """See ``Engine.generate``. Rows are sorted by length, so that little is padded.

        Raises:
            ConfigError: at the first call, the model cannot be decoded right.
        """
        self._check_sequences(prompts, [1] * len(prompts))
        if prompts and not self._has_generated:
            self._prove_decoding(prompts, sampling)
            self._has_generated = True
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
        room = self.max_length  # looked up in the model's configuration, which is slow
        limits = [min(m, room - len(p)) for m, p in zip(max_tokens, prompts, strict=True)]
        order = sorted((i for i, m in enumerate(limits) if m), key=lambda i: (len(prompts[i]), -limits[i]))
        if len(order) > 1 and self._batch_size > 1:
            self.prepare(sampling)
        # Rows that are not in the order have no room for a token.
        results = [Generation([], [], "length")] * len(prompts)
        with self._inference(None if self.is_lean else self._autocast, "left"), self._stance():
            weights = self._lean_model() if self.is_lean else None
            left = iter(order)
            for size in batch_sizes(len(order), self._batch_size, self.model.device):
                rows = list(itertools.islice(left, size))
                generations = decode(
                    self._decoder(weights, max(len(prompts[i]) + limits[i] for i in rows), sampling),
                    [prompts[i] for i in rows],
                    seeds=[seeds[i] for i in rows],
                    limits=[limits[i] for i in rows],
                    stop_ids=stop_ids,
                    device=self.model.device,
                    finished=base.of_batch(finished, rows),
                )
                for i, generation in zip(rows, generations, strict=True):
                    results[i] = generation
        return results

    def _stance(self) -> AbstractContextManager[Any]:
        """A model's own decoding is not compiled: its cache grows at every step."""
        if self._compiles and not self.is_lean:
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
        return nullcontext()

    def _lean_model(self) -> LeanModel:
        weights = LeanModel(self.model, self._autocast, self._split.limit)
        return weights if self._compiles else weights.pack()

    def _decoder(self, weights: LeanModel | None, longest: int, sampling: Sampling) -> Decoder:
        if weights is None:
            return ModelDecoder(self.model, self._split, longest, sampling, self._batch_tokens, self.graphs)
        forward = compiled.choose_compiled if self._compiles else None
        return LeanDecoder(weights, longest, sampling, forward, self._batch_tokens)

    # --------------------------------------------------------------------------------------- score

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
        """See ``Engine.score``. Only the scored positions go through the output layer.

        Raises:
            ConfigError: at the first call, the model cannot be scored right.
        """
        self._get_ready_to_score(sequences, starts)
        options = _Options(k, entropy, topk_where, vocab_limit, chosen, overlap)
        results: list[SequenceScores | None] = [None] * len(sequences)
        with self._scoring():
            for batch in batches_of(sequences, self._batch_tokens):
                scored = self._score_batch(sequences, starts, batch, options)
                for i, scores in zip(batch, scored, strict=True):
                    results[i] = scores
        return [r for r in results if r is not None]

    def _score_batch(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        batch: Sequence[int],
        options: _Options,
    ) -> list[SequenceScores]:
        device = self.model.device
        targets, states = self._states([sequences[i] for i in batch], [starts[i] for i in batch])
        vocab_limit = options.vocab_limit
        k = min(options.k, self.vocab_size, self.vocab_size if vocab_limit is None else vocab_limit)
        at_once = k if options.topk_where is everywhere else 0
        given = None if options.chosen is None else np.concatenate([options.chosen[i] for i in batch])
        found = score_states(
            self._split,
            states,
            targets,
            k=at_once,
            entropy=options.entropy,
            limit=vocab_limit,
            chosen=None if given is None else to_device(given, device).long(),
            overlap=options.overlap,
        )
        counts = [len(sequences[i]) - starts[i] for i in batch]
        bounds = np.concatenate([[0], np.cumsum(counts)])
        measured = [x for x in (found.token_logprobs, found.entropies) if x is not None]
        if at_once or not k:
            measured += [found.top_ids, found.top_logprobs]
        token_logprobs, *others = to_host(*measured)
        entropy_np = others.pop(0) if options.entropy else None
        places: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        for r, i in enumerate(batch):
            low, high = bounds[r], bounds[r + 1]
            if k == 0:
                places.append(np.zeros(0, dtype=np.int64))
                continue
            part = None if entropy_np is None else entropy_np[low:high]
            places.append(np.flatnonzero(options.topk_where(i, token_logprobs[low:high], part)))
        if k and not at_once:
            # The output layer runs again, but only for these.
            picks = to_device(np.concatenate([p + bounds[r] for r, p in enumerate(places)]), device)
            others = to_host(*topk_of(self._split, states[picks], found.norms[picks], k=k, limit=vocab_limit))
        ids_np, logprobs_np = others[0].astype(np.int32), others[1]
        first = np.concatenate([[0], np.cumsum([len(p) for p in places])])
        by_id = None if found.chosen is None else found.chosen.to_host()
        return [
            SequenceScores(
                token_logprobs=token_logprobs[bounds[r] : bounds[r + 1]],
                entropy=None if entropy_np is None else entropy_np[bounds[r] : bounds[r + 1]],
                topk_positions=places[r],
                topk_ids=ids_np[first[r] : first[r + 1]],
                topk_logprobs=logprobs_np[first[r] : first[r + 1]],
                chosen=None if by_id is None else by_id.part(bounds[r], bounds[r + 1]),
            )
            for r in range(len(batch))
        ]

    @contextmanager
    def states(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens ``[n]`` of all ``sequence[start:]``, and the hidden states ``[n, H]`` that predict them.

        One pass for all of them. While the block runs, ``split`` gives logits in the engine's precision.

        Raises:
            ValueError: as ``score``.
            ConfigError: at the first call, the model cannot be scored right.
        """
        self._get_ready_to_score(sequences, starts)
        with self._scoring():
            yield self._states(sequences, starts)

    @property
    def split(self) -> SplitModel:
        """The model as backbone and output layer."""
        return self._split

    def _states(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = right_pad(sequences, max(map(len, sequences)), self.model.device)
        hidden = self._split.hidden(input_ids=ids, attention_mask=mask)
        spans = [(row, start, len(sequences[row])) for row, start in enumerate(starts)]
        # The hidden state at position t predicts token t + 1.
        targets = torch.cat([ids[row, start:end] for row, start, end in spans])
        return targets, torch.cat([hidden[row, start - 1 : end - 1] for row, start, end in spans])

    def _get_ready_to_score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        self._check_sequences(sequences, starts)
        if self._compiles and not self._has_scored:
            compiled.compile_layers(self.model)
        if sequences and not self._has_scored:
            self._has_scored = True
            self._prove_scores(sequences)

    # --------------------------------------------------------------------------------------- proof

    def _prove_decoding(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if self.graphs is not None:
            try:
                with self.graphs.short():
                    self._prove_tokens(prompts, sampling, proof.TOKENS_OF_GRAPHS)
            except ConfigError as error:  # the model may decode right without
                self.graphs.give_up(error)
        if self.graphs is None or not self.graphs.works:
            self._prove_tokens(prompts, sampling, [proof.NEW_TOKENS] * 3)

    def _prove_tokens(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, counts: Sequence[int]
    ) -> None:
        rows = proof.few(prompts, self.max_length - max(counts))
        # Greedy, but compiled code is made for a way of sampling.
        how = sampling if self._compiles else Sampling(0.0)
        name = type(self.model).__name__
        plain = proof.plain_logprobs(self.model, self._autocast, self._split.limit)
        with proof.refusing(name):
            for prompts in (rows, rows[:1]):  # with padding, and without
                drawn = self._continue(prompts, how, range(len(prompts)), counts[: len(prompts)], ())
                tokens, logprobs = [g.tokens for g in drawn], [g.logprobs for g in drawn]
                proof.check_decoding(name, prompts, tokens, logprobs, plain, self._tolerance)

    def _prove_scores(self, sequences: Sequence[Sequence[int]]) -> None:
        def scored(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Floats32]:
            return [scores.token_logprobs for scores in self.score(rows, starts)]

        name = type(self.model).__name__
        plain = proof.plain_logprobs(self.model, self._autocast, self._split.limit)
        with proof.refusing(name):
            rows = proof.few(sequences, self.max_length)
            proof.require_equal_scores(name, rows, scored, plain, self._tolerance)

    @property
    def _tolerance(self) -> float:
        return proof.tolerance(self._autocast or self.model.dtype)

    def _check_sequences(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        longest, vocab_size = self.max_length, self.vocab_size
        for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if not 1 <= start <= len(sequence):
                raise ValueError(f"sequence {number}: start {start} is outside 1 … {len(sequence)}")
            if len(sequence) > longest:
                raise ValueError(f"sequence {number}: {len(sequence)} tokens, the model takes {longest}")
            if min(sequence) < 0 or max(sequence) >= vocab_size:
                raise ValueError(f"sequence {number}: a token id is outside 0 … {vocab_size - 1}")
