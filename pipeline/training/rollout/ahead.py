"""Preparing a step, also ahead of time: the student's responses, and the teacher's scores of them.

A teacher elsewhere is asked while the student writes (``signal.ask_as_finished``), others when it has written.

With ``train.max_staleness = 1`` this is done for step t + 1 while step t trains, so by a student that is one update
older: the rows of step t + 1 are always those of the weights before step t, whatever takes longer. That makes such a
run as reproducible as one in which everything waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tropd.pipeline.objectives.prefix_schedule import scheduled_length
from tropd.pipeline.run.interrupt import StopRequest
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.wire.messages import ScoredItem
from tropd.pipeline.training.record.trace import Timeline
from tropd.pipeline.training.reward.rewards import rows_to_train_on, step_rewards, with_rewards
from tropd.pipeline.training.rollout.rows import (
    Row,
    RowFinished,
    RowPlan,
    plan_rows,
    roll_out,
    stored_rows,
    to_continue,
)
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.signal.ask_as_finished import AskedAsFinished, plan_requests
from tropd.pipeline.training.signal.ask_teacher import (
    TeacherData,
    ask_teacher,
    draw_regions,
    item_of,
    request_of,
    teacher_data,
)
from tropd.pipeline.training.update.gradients import StepInputs
from tropd.pipeline.training.update.soundness import check_rollouts
from tropd.storage.seeds import derive_seed


@dataclass(frozen=True)
class Prepared:
    """Everything that a step's update is a function of, besides the weights."""

    inputs: StepInputs
    prefix_limit: int
    """Scheduled length of the teacher prefix, in tokens."""
    traffic: dict[str, float]
    """Counts and seconds of requests to the teacher for this step, under the names of the metrics."""
    retries: list[int]
    """Failed attempts per teacher server."""


@dataclass(frozen=True)
class _Rolled:
    """The rows of a step, and how far the teacher is asked about them."""

    rows: list[Row]
    asked: AskedAsFinished | None
    """None: not at all."""
    traffic: dict[str, float]
    """Counts and seconds of requests before the first about these rows."""
    retries: list[int]
    """Failed attempts before it."""


@dataclass(frozen=True)
class _Pending:
    step: int
    rolled: Future[_Rolled]
    prepared: Future[Prepared]


class Preparation:
    """Prepares steps: when they are asked for, or in a thread while the one before trains."""

    def __init__(self, session: Session, timeline: Timeline, pool: ThreadPoolExecutor | None) -> None:
        self._session = session
        self._timeline = timeline
        self._pool = pool
        self._pending: _Pending | None = None
        self._asked: AskedAsFinished | None = None
        """The last that were begun."""

    def begin(self, step: int, rows: list[Row] | None = None) -> None:
        """Prepare a step in the background with the weights as they are now; nothing without staleness.

        Args:
            rows: its rows, if they are known already.
        """
        if self._pool is None or step >= self._session.run.config.train.steps:
            return
        if rows is None:
            self._refresh(step)
        rolled = self._pool.submit(lambda: self._rolled(step) if rows is None else self._known(rows))
        prepared = self._pool.submit(lambda: self._prepare(step, rolled.result()))
        self._pending = _Pending(step, rolled, prepared)

    def take(self, step: int) -> Prepared:
        """The prepared step, as soon as it is ready; nothing that was begun is left then."""
        with self._timeline.span("wait", step):
            if self._pending is not None and self._pending.step == step:
                prepared = self._pending.prepared.result()
                self._pending = None
                return prepared
            self._refresh(step)
            return self._prepare(step, self._rolled(step))

    def give_up(self) -> None:
        """Ask the teacher for nothing more."""
        if self._asked is not None:
            self._asked.give_up()

    def rows_ahead(self, step: int) -> list[Row] | None:
        """The rows of a step that was begun, as soon as they are rolled out; None if it was not.

        After this the engine is idle. The rows belong into a checkpoint: later weights would roll out others.
        """
        if self._pending is None or self._pending.step != step:
            return None
        return self._pending.rolled.result().rows

    def _refresh(self, step: int) -> None:
        with self._timeline.span("sync", step):
            self._session.rolling.refresh()

    def _known(self, rows: list[Row]) -> _Rolled:
        return _Rolled(rows, None, self._session.traffic(), self._session.retries())

    def _rolled(self, step: int) -> _Rolled:
        before = self._known([])
        if not self._session.asks_as_finished:
            return replace(before, rows=self._rows(step))
        plans = planned_rows(self._session, step)
        asked = self._asked = ask_about(self._session, self._timeline, step, plans)
        try:
            return replace(before, rows=self._rows(step, asked.finished), asked=asked)
        except BaseException:
            asked.give_up()
            raise

    def _rows(self, step: int, finished: RowFinished | None = None) -> list[Row]:
        with self._timeline.span("rollout", step):
            rows = step_rows(self._session, step, finished)
            self._session.rolling.rest()
        check_rollouts(self._session, step, rows)
        if (judge := self._session.judge) is None:
            return rows
        with self._timeline.span("reward", step):
            session, config = self._session, self._session.run.config.reward
            return with_rewards(judge, step, rows, config, session.inputs.prompts, session.aside)

    def _prepare(self, step: int, rolled: _Rolled) -> Prepared:
        with self._timeline.span("score", step):
            if rolled.asked is None and self._session.asks_as_finished:  # rows of a checkpoint
                plans = [row.plan for row in rolled.rows]
                asked = self._asked = ask_about(self._session, self._timeline, step, plans)
                written = {row.plan.seed: row for row in rolled.rows}
                for plan in self._session.aside.share(to_continue(plans)):
                    asked.finished(written[plan.seed])
                rolled = replace(rolled, asked=asked)
            return _ask(self._session, step, rolled)


@contextmanager
def open_preparation(session: Session, timeline: Timeline, stop: StopRequest) -> Iterator[Preparation]:
    """Prepare steps while the block runs; work under way at its end is given up."""
    if not session.ahead:
        preparation = Preparation(session, timeline, None)
        try:
            yield preparation
        finally:
            preparation.give_up()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="preparation") as pool:
        preparation = Preparation(session, timeline, pool)
        try:
            yield preparation
        finally:
            preparation.give_up()
            # The thread may be waiting for a teacher that is away.
            stop.end()
            session.rolling.close()
            pool.shutdown(wait=False, cancel_futures=True)


def prefix_limit(session: Session, step: int) -> int:
    """Scheduled length of the teacher prefix at a step, in tokens."""
    config = session.run.config
    return scheduled_length(
        config.objective.schedule,
        step=step,
        total_steps=config.train.steps,
        max_tokens=config.rollout.max_tokens,
    )


def planned_rows(session: Session, step: int) -> list[RowPlan]:
    """The rows of a step before the student writes."""
    config = session.run.config
    return plan_rows(
        step,
        prompts=session.inputs.prompts,
        store=session.inputs.store,
        schedule=config.objective.schedule,
        limit=prefix_limit(session, step),
        rollout=config.rollout,
        seed=config.run.seed,
        continued=config.objective.rollouts != "teacher",
    )


def ask_about(session: Session, timeline: Timeline, step: int, plans: Sequence[RowPlan]) -> AskedAsFinished:
    """Ask about the rows that this process continues, of those planned for a step, as it gets them."""
    config = session.run.config
    clients = {name: client for name, client in session.scorers.items() if isinstance(client, TeacherClient)}
    servers = {name: len(client.replicas) for name, client in clients.items()}

    def ask(teacher: str, rows: list[Row]) -> list[ScoredItem]:
        items = [item_of(row) for row in rows]
        request = request_of(items, config.objective, session.needs, session.vocab_limit)
        with timeline.span("ask", step):
            return list(clients[teacher].score_some(request).items)

    requests = plan_requests(
        session.aside.share(to_continue(plans)),
        teacher_of=session.teacher_of_plan,
        servers=servers,
        max_tokens=config.rollout.max_tokens,
        pass_tokens=config.service.batch_tokens,
    )
    return AskedAsFinished(requests, servers, ask)


def step_rows(session: Session, step: int, finished: RowFinished | None = None) -> list[Row]:
    """The step's rows: rolled out now, or read from disk where the objective trains on stored rollouts.

    Args:
        finished: see ``roll_out``.
    """
    config = session.run.config
    if session.inputs.stored is not None:
        return stored_rows(
            step,
            prompts=session.inputs.prompts,
            store=session.inputs.stored,
            rollout=config.rollout,
            seed=config.run.seed,
        )
    return roll_out(
        planned_rows(session, step),
        session.rolling.engine,
        config.rollout,
        session.aside,
        choose=session.choose_ids,
        finished=finished,
    )


def _ask(session: Session, step: int, rolled: _Rolled) -> Prepared:
    config = session.run.config
    objective = config.training_objective
    rows = rolled.rows if session.judge is None else rows_to_train_on(rolled.rows)
    rewards = None if session.judge is None else step_rewards(rows, config.reward.correct_from)
    teacher = _teacher_data(session, rows, rolled.asked)
    traffic = session.aside.total({k: v - rolled.traffic[k] for k, v in session.traffic().items()})
    inputs = StepInputs(
        rows=rows,
        teacher=teacher,
        regions=draw_regions(objective, rows, teacher, rewards),
        guidance_topk=session.guidance_topk(rows),
        reference_logprobs=session.reference_logprobs(rows),
        progress=step / config.train.steps,
        dropout_seed=derive_seed(config.run.seed, "dropout", step) if config.train.dropout else None,
        rewards=rewards,
        rows_without_reward=len(rolled.rows) - len(rows),
    )
    retries = [now - before for now, before in zip(session.retries(), rolled.retries, strict=True)]
    return Prepared(inputs, prefix_limit(session, step), traffic, retries)


def _teacher_data(session: Session, rows: list[Row], asked: AskedAsFinished | None) -> TeacherData:
    if asked is not None:
        answers: dict[int, ScoredItem] = {}
        for each in session.aside.gather(asked.answers()):
            answers |= each
        written = [row for row in rows if row.tokens]
        items = [item_of(row) for row in written]
        return teacher_data(items, [answers[row.plan.seed] for row in written], session.needs)
    if session.inputs.stored is not None and session.inputs.cached is not None:
        return session.inputs.cached.responses(rows, session.inputs.stored, session.run.config.objective.k)
    if not session.scorers:
        return TeacherData.unasked(sum(len(row.tokens) for row in rows))
    return ask_teacher(
        session.scorers,
        rows,
        session.run.config.objective,
        session.needs,
        session.vocab_limit,
        session.aside,
        teacher_of=session.teacher_of,
    )
