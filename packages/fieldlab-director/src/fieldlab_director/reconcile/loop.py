"""The loop: what is due is worked on, what is not is waited for, and whatever fails hurts its own deployment alone.

It wakes when the store says that a row wants to be looked at, when the earliest time that a row asks for has come, and
when a connector gives notice. For each deployment that is due there is one worker, which goes from job to job until
there is none. What the loop keeps in memory (who was heard of when, which executor was seen dead) it can lose: it is
found again by looking.

Several directors may share a database: each works on what it is in charge of (``charge``).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog
from fieldlab_common.accounts import Role
from fieldlab_common.course import LAUNCH_AHEAD
from fieldlab_common.errors import ConnectorError, FieldlabError
from fieldlab_common.protocol import Launch

from fieldlab_director import decide as d
from fieldlab_director.connectors.base import DrainRequest, LaunchRequest, Liveness, Observation, PrepareRequest
from fieldlab_director.connectors.fleet import Asked, ConnectorFleet
from fieldlab_director.reconcile.apply import (
    LEASE_SECONDS,
    Assignment,
    Kept,
    Outcome,
    apply,
    begin,
    begin_many,
    step_experiment,
)
from fieldlab_director.reconcile.charge import CHARGE_SECONDS, Charge
from fieldlab_director.reconcile.line import serve_line
from fieldlab_director.reconcile.watch import REFRESH_SECONDS, InfrastructureWatch, target_of
from fieldlab_director.services.identity import executor_token
from fieldlab_director.services.infrastructures import finish_detaching
from fieldlab_director.services.vault import Vault
from fieldlab_director.store import queries
from fieldlab_director.store import reconcile_queries as rq
from fieldlab_director.store.base import WORK, Store, Tx, Watch
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow, InfrastructureRow, UserRow

__all__ = ["Reconciler"]

log = structlog.get_logger("fieldlab.reconcile")

HORIZON = 60.0  # seconds: the loop looks at what is due at least so often
BATCH = 1000  # rows read at once
PARALLEL = 32  # jobs of one owner on one infrastructure under way at once; the next wait
TOGETHER = 100  # rows that are begun in one transaction
PAUSE = 1.0  # seconds after the database could not be used
SET_BACK = 5.0  # seconds: a clock that goes back by more has been set


@dataclass(frozen=True, kw_only=True)
class _Due:
    id: str
    cancel_requested: float | None


@dataclass(frozen=True, kw_only=True)
class _Agenda:
    now: float
    due: list[_Due]
    following: float
    startable: list[ExperimentRow]
    more: bool  # there are infrastructures that nobody is in charge of
    less: bool  # one that it was in charge of is detached
    leaving: bool  # some are to be detached once nothing is left on them


@dataclass(eq=False)
class _Worker:
    task: asyncio.Task[None] | None = None
    call: asyncio.Task[Any] | None = None
    job: d.Job | None = None
    again: bool = False  # it was due, or had news, while it was at work
    news: bool = False  # something was seen: it is looked at whenever it is due


class Reconciler:
    """Brings deployments to where they should be. ``url`` is the director's for executors, ``ca`` the PEM of its CA.

    ``home`` is the name of the director's data folder, for others that share the database.
    """

    def __init__(
        self,
        store: Store,
        fleet: ConnectorFleet,
        vault: Vault,
        url: str,
        *,
        home: str = "",
        ca: str | None = None,
        patience: d.Patience | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._fleet, self._vault = store, fleet, vault
        self._url, self._ca = url, ca
        self._patience = patience or d.Patience()
        self._monotonic, self._jitter = monotonic, jitter
        self._charge = Charge(home, shared=store.shared)
        self._held: frozenset[str] = frozenset()
        self._taking = asyncio.Lock()
        self._serving_since = monotonic()
        self._ahead = -d.NEVER  # what the store's clock is ahead of the one that nobody sets
        self._heard: dict[str, tuple[float | None, float, float]] = {}  # id → last_seen, heard at, looked at
        self._gone: dict[str, tuple[int, str]] = {}  # id → epoch whose executor is gone, its last lines
        self._queued: dict[str, tuple[int, str]] = {}  # id → epoch whose executor waits for its turn, what for
        self._poked: set[str] = set()
        self._faults: dict[str, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._watches: dict[str, InfrastructureWatch] = {}
        self._slots: defaultdict[tuple[str, str], asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(PARALLEL))
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._watch: Watch | None = None
        self._first_refresh = 0.0

    async def start(self) -> None:
        """Take over what is stored, and begin."""
        self._serving_since = self._monotonic()
        self._fleet.listen(self._notice)
        await self._store.write(self._charge.begin)
        await self._take()
        self._spawn(self._run())
        self._spawn(self._renew())
        self._spawn(serve_line(self._store))

    async def stop(self) -> None:
        """Let go of everything; jobs under way are broken off, and are given again by the next start."""
        tasks = [*self._tasks, *chain.from_iterable(self._watching.values())]
        tasks += [worker.task for worker in self._workers.values() if worker.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._store.write(self._charge.end)
        except FieldlabError as error:
            log.warning("others must wait for what this director had", error=str(error))

    # --- finding what is due -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        with self._store.notifier.watch(WORK) as watch:
            self._watch = watch
            while not self._store.notifier.closed:
                try:
                    wait = await self._pass()
                except FieldlabError as error:
                    log.warning("the database cannot be used", error=str(error))
                    wait = PAUSE
                    await asyncio.sleep(PAUSE)
                await watch.wait(wait)

    async def _pass(self) -> float:
        """Begin all that is due; the seconds until something is again."""
        agenda = await self._store.read(self._agenda)
        if agenda.more or agenda.less or (agenda.leaving and await self._store.write(finish_detaching)):
            await self._take()
            return 0.0
        if await self._mind_the_clock(agenda.now):
            return 0.0
        now, until = agenda.now, min(agenda.following, agenda.now + HORIZON)
        for experiment in agenda.startable:
            begins = experiment.settings.start_at
            if begins is None or begins - LAUNCH_AHEAD <= now:
                await self._store.write(lambda tx, id=experiment.id: step_experiment(tx, id))  # type: ignore[misc]
            else:
                until = min(until, begins - LAUNCH_AHEAD)
        if await self._begin_due(agenda.due):
            until = min(until, now if len(agenda.due) == BATCH else until)
        elif len(agenda.due) == BATCH:  # there is more; as none of these could be begun, one must end first
            until = now + PAUSE
        poked, self._poked = self._poked, set()
        for deployment_id in poked:
            self._work_on(deployment_id, news=True)
        return max(0.0, until - now)

    async def _begin_due(self, due: list[_Due]) -> bool:
        """Begin what is due, some rows to a transaction, so that others' come in between; whether any was begun."""
        free = []
        for row in due:
            if row.id not in self._workers:
                free.append(row.id)
            else:
                self._work_on(row.id, cancelled=row.cancel_requested is not None)
        for at in range(0, len(free), TOGETHER):
            some = free[at : at + TOGETHER]
            try:
                for given in await self._store.write(lambda tx, ids=some: begin_many(tx, ids, self._kept)):  # type: ignore[misc]
                    self._work_on(given.row.id, given=given)
            except FieldlabError:
                raise
            except Exception:  # of which of them it is not known: each is begun alone, and has its fault alone
                log.exception("deployments are begun one by one")
                for deployment_id in some:
                    self._work_on(deployment_id)
        return bool(free)

    def _agenda(self, tx: Tx) -> _Agenda:
        times = [at for at in tx.all(rq.NEXT, _look_at, now=tx.now) if at is not None]
        return _Agenda(
            now=tx.now,
            due=tx.all(rq.DUE, _Due, now=tx.now, held=sorted(self._held), limit=BATCH),
            following=min(times, default=d.NEVER),
            startable=tx.all(rq.STARTABLE, ExperimentRow),
            more=self._charge.finds_more(tx),
            less=not self._held <= self._charge.held(tx),
            leaving=bool(tx.all(rq.LEAVING, _id)),
        )

    async def _mind_the_clock(self, now: float) -> bool:
        """Whether the clock was set back: what rows wait for is too far away then, and all that are open are due."""
        was, self._ahead = self._ahead, now - self._monotonic()
        if self._ahead >= was - SET_BACK:
            return False
        log.warning("the clock was set back", by=round(was - self._ahead, 1))
        await self._store.write(lambda tx: tx.execute(rq.LOOK_AT_OPEN, now=tx.now, held=sorted(self._held)))
        return True

    def _work_on(
        self, deployment_id: str, *, cancelled: bool = False, news: bool = False, given: Assignment | None = None
    ) -> None:
        """Begin a worker, with the job that was ``given`` if one was; else the one that is there looks again."""
        worker = self._workers.get(deployment_id)
        if worker is None:
            worker = self._workers[deployment_id] = _Worker(again=given is None, news=news)
            worker.task = asyncio.create_task(self._work(deployment_id, worker, given))
            worker.task.add_done_callback(lambda _: self._finished(deployment_id, worker))
            return
        worker.again, worker.news = True, worker.news or news
        if cancelled and worker.job in (d.Job.PREPARE, d.Job.LAUNCH) and worker.call is not None:
            worker.call.cancel()  # whoever cancels does not wait for an environment that nobody will use

    def _finished(self, deployment_id: str, worker: _Worker) -> None:
        self._workers.pop(deployment_id, None)
        if worker.again and worker.news:
            self._poke(deployment_id)
        elif worker.again and self._watch is not None:
            self._watch.wake()

    def _poke(self, deployment_id: str) -> None:
        """Look at a deployment now, whenever it is due."""
        self._poked.add(deployment_id)
        if self._watch is not None:
            self._watch.wake()

    # --- one deployment ----------------------------------------------------------------------------------------------

    async def _work(self, deployment_id: str, worker: _Worker, given: Assignment | None) -> None:
        try:
            while given is not None or worker.again:
                if given is None:
                    given = await self._begin(deployment_id, worker)
                else:
                    given = await self._carry_out(given, worker)
            self._faults.pop(deployment_id, None)
        except Exception:  # a fault with one deployment, of whatever kind, must not end the loop for all others
            faults = self._faults[deployment_id] = self._faults.get(deployment_id, 0) + 1
            pause = d.backoff(faults, self._jitter())
            log.exception("a deployment is put off", deployment=deployment_id, again_in=pause)
            await asyncio.sleep(pause)
            worker.again = worker.news = True

    async def _begin(self, deployment_id: str, worker: _Worker) -> Assignment | None:
        news, worker.again, worker.news = worker.news, False, False
        return await self._store.write(lambda tx: begin(tx, deployment_id, self._kept, news=news))

    async def _carry_out(self, given: Assignment, worker: _Worker) -> Assignment | None:
        worker.job, worker.call = given.job, asyncio.create_task(self._ask(given))
        try:
            value = await worker.call
            outcome = Outcome(done=True, value=value)
        except asyncio.CancelledError:
            if not worker.call.cancelled() or _being_cancelled():
                worker.call.cancel()
                raise
            outcome = Outcome()
        except ConnectorError as error:
            failure = d.Failure(job=given.job, message=str(error), transient=error.transient, log=error.log)
            outcome = Outcome(failure=failure)
            log.warning("job failed", job=given.job.value, deployment=given.row.name, error=str(error))
        except FieldlabError as error:
            outcome = Outcome(failure=d.Failure(job=given.job, message=str(error), transient=True))
        finally:
            worker.job = worker.call = None
        if outcome.done and given.job is d.Job.STOP:
            self._gone[given.row.id] = (given.row.epoch, outcome.value)
        following = await self._store.write(lambda tx: apply(tx, given, outcome, self._kept))
        self._after(given, outcome)
        return following

    def _after(self, given: Assignment, outcome: Outcome) -> None:
        if given.job is d.Job.LAUNCH and outcome.done and given.row.infrastructure_id in self._watches:
            self._watches[given.row.infrastructure_id].wake()
        if given.job is d.Job.CLEAN_UP and outcome.done:
            self._gone.pop(given.row.id, None)
            self._queued.pop(given.row.id, None)
            self._heard.pop(given.row.id, None)

    async def _ask(self, given: Assignment) -> Any:
        row = given.row
        async with self._slots[row.infrastructure_id, given.owner_id]:
            infrastructure, connector = await self._reached(row.infrastructure_id)
            target = target_of(row.id, row.node, row.epoch, row.prepared, row.handle)
            if given.job is d.Job.PREPARE:
                request = PrepareRequest(
                    target=target,
                    environment=row.spec.environment,
                    python=row.spec.python,
                    resources=row.spec.resources,
                )
                return (await connector.call("prepare", request)).prepared
            if given.job is d.Job.LAUNCH:
                begun = self._launch(row, infrastructure)
                launch = LaunchRequest(target=target, launch=begun, resources=row.spec.resources)
                return (await connector.call("launch", launch)).handle
            if given.job is d.Job.DRAIN:
                return await connector.call(
                    "drain", DrainRequest(target=target, launch=self._launch(row, infrastructure))
                )
            if given.job is d.Job.STOP:
                return (await connector.call("stop", target)).tail
            return await connector.call("clean_up", target)

    def _launch(self, row: DeploymentRow, infrastructure: InfrastructureRow) -> Launch:
        return Launch(
            director=infrastructure.director_url or self._url,
            token=executor_token(self._vault.executor_key, row.id, row.epoch),
            experiment=row.experiment_id,
            deployment=row.id,
            epoch=row.epoch,
            ca=infrastructure.director_ca or self._ca,
        )

    # --- what is seen ------------------------------------------------------------------------------------------------

    def _kept(self, row: DeploymentRow, now: float) -> Kept:
        epoch, tail = self._gone.get(row.id, (-1, ""))
        waiting, why = self._queued.get(row.id, (-1, ""))
        seen = d.Seen(
            gone=row.epoch == epoch,
            queued=why if row.epoch == waiting else None,
            silent=self._silence(row, now),
            served=self._monotonic() - self._serving_since,
            tail=tail,
        )
        return Kept(lease=self._charge.name, seen=seen, jitter=self._jitter(), patience=self._patience)

    def _silence(self, row: DeploymentRow, now: float) -> float:
        """Seconds of this director's service in which the executor was not heard of, by the clock that never jumps."""
        at = self._monotonic()
        last_seen, heard, looked = self._heard.get(row.id, (None, self._serving_since, self._serving_since))
        if row.last_seen != last_seen:
            heard = min(at, max(looked, at - max(0.0, now - (row.last_seen or now))))
        self._heard[row.id] = (row.last_seen, heard, at)
        return at - heard

    def _found(self, epoch: int, observation: Observation) -> None:
        self._mind_queue(epoch, observation)
        if not observation.executor.gone or self._gone.get(observation.deployment, (-1, ""))[0] == epoch:
            return
        self._gone[observation.deployment] = (epoch, observation.tail)
        self._poke(observation.deployment)

    def _mind_queue(self, epoch: int, observation: Observation) -> None:
        known = self._queued.pop(observation.deployment, None)
        now = (epoch, observation.message) if observation.executor is Liveness.QUEUED else None
        if now is not None:
            self._queued[observation.deployment] = now
        if now != known:
            self._poke(observation.deployment)

    def _notice(self, infrastructure_id: str, deployment_id: str | None) -> None:
        watch = self._watches.get(infrastructure_id)
        if watch is not None:
            watch.wake()

    # --- infrastructures ---------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Take charge of what can be had, watch what is new, and leave alone what was lost to another director."""
        async with self._taking:
            known = self._held
            self._held = await self._store.write(lambda tx: self._charge.take(tx, known))
            gone = await self._store.read(lambda tx: set(tx.all(rq.DETACHED, _id)))
            for infrastructure_id in sorted(known - self._held):
                detached = infrastructure_id in gone
                log.info("an infrastructure is let go", infrastructure=infrastructure_id, detached=detached)
                self._end_watch(infrastructure_id)
                await self._fleet.drop(infrastructure_id, forget=detached)
            for infrastructure_id in sorted(self._held - known):
                self._begin_watch(infrastructure_id)
            self._first_refresh = REFRESH_SECONDS  # what is attached from now on was just listed

    def _end_watch(self, infrastructure_id: str) -> None:
        self._watches.pop(infrastructure_id, None)
        for task in self._watching.pop(infrastructure_id, ()):
            task.cancel()

    def _begin_watch(self, infrastructure_id: str) -> None:
        watch = InfrastructureWatch(infrastructure_id, self._store, self._connector, self._found, self._jitter)
        self._watches[infrastructure_id] = watch
        tasks = self._watching[infrastructure_id]
        self._spawn(watch.observe(), tasks)
        self._spawn(watch.refresh(self._first_refresh), tasks)

    async def _connector(self, infrastructure_id: str) -> Asked:
        return (await self._reached(infrastructure_id))[1]

    async def _reached(self, infrastructure_id: str) -> tuple[InfrastructureRow, Asked]:
        def read(tx: Tx) -> tuple[InfrastructureRow, bool] | None:
            row = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=infrastructure_id)
            owner = tx.one(queries.USER, UserRow, id=row.owner_id) if row is not None else None
            return (row, owner is not None and owner.role == Role.ADMIN) if row is not None else None

        found = await self._store.read(read)
        if found is None:
            raise ConnectorError("Its infrastructure is gone.", transient=False)
        row, trusted = found
        options = self._vault.open(row.options)
        return row, self._fleet.connector(row.id, row.name, row.kind, options, trusted=trusted)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(min(LEASE_SECONDS, CHARGE_SECONDS) / 3)
            try:
                if self._charge.shared:
                    await self._take()
                if any(worker.call is not None for worker in self._workers.values()):
                    await self._store.write(self._renewed)
            except FieldlabError as error:
                log.warning("leases were not renewed", error=str(error))

    def _renewed(self, tx: Tx) -> None:
        tx.execute(rq.RENEW, guard_lease=self._charge.name, lease_until=tx.now + LEASE_SECONDS)

    def _spawn(self, running: Any, tasks: set[asyncio.Task[None]] | None = None) -> None:
        tasks = self._tasks if tasks is None else tasks
        task = asyncio.create_task(running)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _look_at(look_at: float | None) -> float | None:
    return look_at


def _id(id: str) -> str:
    return id
