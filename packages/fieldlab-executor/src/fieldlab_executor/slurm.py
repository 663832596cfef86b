"""A keeper on the submit host of a Slurm cluster: its executors are jobs, which Slurm starts, sees and ends.

What else a keeper does it does where it is, in files that the whole cluster shares: environments, launch files,
journals, logs. A job is found by its name, which has the deployment and the epoch in it, so that one that was submitted
by a keeper that died over it is not submitted again; and what was submitted is noted beside the epoch's folder
(``<epoch>.job``), because Slurm forgets a job some minutes after its end (``MinJobAge``).

Slurm is asked for columns and not for JSON: that depends on how it was built, and changes with its releases. Of a node
it knows processors and memory; that its Pythons are those of the submit host is taken on trust, and found out by the
job (``_SCRIPT``), which looks for one that will do.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import shlex
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fieldlab_common import wire
from fieldlab_common.calls import Notice
from fieldlab_common.environment import Resources
from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import (
    Checked,
    KeeperOpening,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Observation,
    Observations,
    ObserveRequest,
    SlurmOpening,
)
from fieldlab_common.messages import CheckLine
from fieldlab_common.node import Availability, Node

from fieldlab_executor.cache import cache_folder
from fieldlab_executor.commands import Command
from fieldlab_executor.facts import cpu_of
from fieldlab_executor.keeper import Keeper, Place, cut, furnish, last_lines, locked_file, make_folder
from fieldlab_executor.starter import private, write_private

__all__ = ["SlurmKeeper"]

LOOK_EVERY = 0.5  # seconds between two looks at a job that is to end: Slurm tells nobody
FORCED = 15.0  # seconds that Slurm has to be done with a job that it was told to kill
FLUSH = 60  # seconds before its end at which Slurm sends SIGTERM, for the journal to be shipped
AFTER = 120.0  # seconds that a job may last beyond its walltime: that ends the executor by itself, which then ships
OVERHEAD = 128 * 2**20  # bytes of memory for the executor itself, beside what its steps may use
MOST_OUTPUT = 16 * 2**20  # bytes: a line of scontrol(1) is about one kB, and there may be thousands of nodes
NAMES_AT_ONCE = 1000  # an argument has at most 128 KiB
PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")

# States as squeue(1) has them, "JOB STATE CODES"; in all others something of the job runs.
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_ENDED |= {"REVOKED", "TIMEOUT"}
_AWAY = re.compile(r"contact|timed out|timeout|connect|temporarily|communication|shut ?down|try again", re.IGNORECASE)
_FIELD = re.compile(r"(?:^|\s)([A-Za-z_]+)=(.*?)(?=\s[A-Za-z_]+=|\s*$)")
_REASON = re.compile(r"\sReason=(.*?) \[[^][@]*@[^][]*\]")  # what an admin wrote, who and when
_NO_USE = {"DOWN", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "NOT_RESPONDING", "UNKNOWN"}

# It becomes the executor, so that this is what Slurm sends its signals to.
_SCRIPT = """\
#!/bin/sh
umask 077
export FIELDLAB_CACHE={cache}
for p in {pythons}; do
  if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$p" {words} run {folder}
  fi
done
echo "There is no Python 3.11 or newer on $(uname -n); tried were:" {pythons} >&2
exit 1
"""


@dataclass(frozen=True)
class _Job:
    """A job, as Slurm lists it."""

    id: str
    state: str
    reason: str

    @property
    def liveness(self) -> Liveness:
        if self.state in _QUEUED:
            return Liveness.QUEUED
        return Liveness.DEAD if self.state in _ENDED else Liveness.ALIVE


class SlurmKeeper(Keeper):
    """The executors that are jobs of one cluster, with their folders below one folder that it shares."""

    observe_every = 5.0

    def __init__(self, opening: KeeperOpening, slurm: SlurmOpening, notice: Notice, command: list[str]) -> None:
        super().__init__(opening, notice, command)
        self._slurm = slurm

    async def check(self, request: Nothing) -> Checked:
        """Try what a keeper needs, and whether Slurm answers."""
        checked = await super().check(request)
        slurm = CheckLine(what="Slurm", said="It answers.", needed=True)
        try:
            found = len((await self.nodes(request)).nodes)
            slurm = replace(slurm, said=f"It answers, and has {found} nodes for this infrastructure.", ok=found > 0)
            if not found:
                said = f"Slurm has no node in partition {self._slurm.partition!r}."
                slurm = replace(slurm, said=said, advice="sinfo lists the partitions.")
        except ConnectorError as error:
            slurm = replace(slurm, ok=False, said=error.message, advice=error.advice)
        return replace(checked, lines=(*checked.lines, slurm))

    async def nodes(self, request: Nothing) -> Listed:
        """The cluster's nodes, or its partitions, as Slurm knows them."""
        door = await self._facts()
        partitions = _records(await self._ask("scontrol", "show", "partitions", "--oneliner"))
        wanted = self._slurm.partition or next(
            (p["PartitionName"] for p in partitions if p.get("Default") == "YES"), ""
        )
        if self._slurm.nodes == "partitions":
            only = self._slurm.partition
            return Listed(nodes=tuple(_partition(p, door) for p in partitions if only in ("", p["PartitionName"])))
        hosts = _records(await self._ask("scontrol", "show", "nodes", "--oneliner"))
        return Listed(nodes=tuple(_host(h, door) for h in hosts if not wanted or wanted in _several(h, "Partitions")))

    async def launch(self, request: LaunchRequest) -> Launched:
        """Submit the executor, unless this epoch was submitted before."""
        place = self._place(request.target)
        async with self._locks[request.target.deployment]:
            await asyncio.to_thread(make_folder, place.root)
            with await asyncio.to_thread(locked_file, place.root / "launching"):
                if not await asyncio.to_thread(_was_submitted, place):
                    job = (await self._jobs([place])).get(_name(place))
                    id = job.id if job is not None else await self._submit(place, request)
                    await asyncio.to_thread(write_private, _noted(place), id.encode())
        return Launched(handle={"folder": str(place.folder)})

    async def observe(self, request: ObserveRequest) -> Observations:
        """Ask Slurm, once for all."""
        places = [(target.deployment, self._place(target)) for target in request.targets]
        jobs = await self._jobs([place for _, place in places])
        return Observations(
            observations=tuple(
                await asyncio.to_thread(lambda: [_seen(one, place, jobs.get(_name(place))) for one, place in places])
            )
        )

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Nothing: executors are not started here."""

    async def _jobs(self, places: Sequence[Place]) -> dict[str, _Job]:
        """The jobs of these epochs that Slurm still knows, by name; of several of a name one that has not ended."""
        found: dict[str, _Job] = {}
        for first in range(0, len(places), NAMES_AT_ONCE):
            names = ",".join(_name(place) for place in places[first : first + NAMES_AT_ONCE])
            asked = ("--me", "--noheader", "--states=all", f"--name={names}", "--format=%i|%j|%T|%r")
            for line in (await self._ask("squeue", *asked)).splitlines():
                id, name, state, reason = line.split("|", 3)
                if name not in found or found[name].liveness is Liveness.DEAD:
                    found[name] = _Job(id, state, reason)
        return found

    async def _submit(self, place: Place, request: LaunchRequest) -> str:
        """Have Slurm start the executor of an epoch; the job's number."""
        own, *words = self._command.words
        script = _SCRIPT.format(
            cache=shlex.quote(str(cache_folder())),
            pythons=shlex.join([*self._slurm.pythons, own, *PYTHONS]),
            words=shlex.join(words),
            folder=shlex.quote(str(place.folder)),
        )
        await asyncio.to_thread(_write, place, wire.dumps(request.launch), script)
        arguments = [*self._place_arguments(request.target.node), *_limits(request.resources), *_common(place)]
        said = await self._ask("sbatch", *arguments, str(place.folder / "job.sh"))
        id = said.strip().partition(";")[0]
        if not id.isdecimal():
            raise ConnectorError(f"sbatch answered {said[:200]!r}, which is no job.")
        return id

    def _place_arguments(self, node: str) -> list[str]:
        """Where a job for a node runs, and on whose account."""
        given = {"partition": self._slurm.partition, "nodelist": node}
        if self._slurm.nodes == "partitions":
            given = {"partition": node}
        for name in ("account", "qos", "constraint", "reservation"):
            given[name] = getattr(self._slurm, name)
        return [f"--{name}={value}" for name, value in given.items() if value]

    async def _end(self, place: Place, *ways: tuple[int | None, float]) -> None:
        """End the job of an epoch: by ``ways``, as a keeper does; one that waits is taken out of the queue at once."""
        for number, seconds in ways:
            job = (await self._jobs([place])).get(_name(place))
            if job is None or job.liveness is Liveness.DEAD:
                return
            if job.liveness is Liveness.QUEUED:
                await self._cancel(job.id)
            elif number is not None:
                whom = "--batch" if number == signal.SIGTERM else "--full"  # the executor ends its steps by itself
                await self._cancel(whom, f"--signal={number}", job.id)
            if await self._has_ended(place, FORCED if number == signal.SIGKILL else seconds):
                return
        raise ConnectorError(f"Slurm has not ended the job {_name(place)}.")

    async def _cancel(self, *arguments: str) -> None:
        """Have Slurm end a job; that it refuses may mean that the job has ended meanwhile, which is seen next."""
        with contextlib.suppress(ConnectorError):
            await self._ask("scancel", *arguments)

    async def _has_ended(self, place: Place, seconds: float) -> bool:
        """Whether the job of an epoch is over within ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            job = (await self._jobs([place])).get(_name(place))
            if job is None or job.liveness is Liveness.DEAD:
                return True
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(LOOK_EVERY)

    async def _ask(self, program: str, *arguments: str) -> str:
        """What one of Slurm's programs prints.

        Raises:
            ConnectorError: it says that it cannot; for a passing reason if the controller does not answer.
        """
        path = str(Path(self._slurm.programs) / program) if self._slurm.programs else program
        said = await Command([path], MOST_OUTPUT).run(*arguments)
        if said.code == 0:
            return said.output
        if _AWAY.search(said.errors):
            raise ConnectorError(f"Slurm's controller does not answer: {said.tail}")
        raise ConnectorError(f"{program} refuses: {said.tail}", transient=False)


# --- what is asked for -----------------------------------------------------------------------------------------------


def _name(place: Place) -> str:
    return f"fieldlab-{place.root.parent.name}-{place.root.name}-{place.epoch}"


def _limits(resources: Resources) -> Iterable[str]:
    """What a deployment may use, as sbatch(1) takes it: whole processors, mebibytes and minutes."""
    memory, walltime = resources.memory_bytes, resources.walltime_seconds
    if resources.cpus is not None:
        yield f"--cpus-per-task={math.ceil(resources.cpus)}"
    if memory is not None:
        yield f"--mem={math.ceil((memory + OVERHEAD) / 2**20)}M"
    if walltime is not None:
        yield f"--time={math.ceil((walltime + AFTER) / 60)}"


def _common(place: Place) -> list[str]:
    """What is asked for every job. Claims keep two executors apart anyway, but one that Slurm starts again is none."""
    log = str(place.log).replace("%", "%%")
    return [
        "--parsable",
        f"--job-name={_name(place)}",
        f"--comment=fieldlab deployment {place.root.name}, epoch {place.epoch}",
        "--nodes=1",
        "--ntasks=1",
        "--no-requeue",
        f"--signal=B:TERM@{FLUSH}",
        f"--output={log}",
        "--open-mode=append",
        f"--chdir={place.folder}",
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def _noted(place: Place) -> Path:
    return place.root / f"{place.epoch}.job"


def _was_submitted(place: Place) -> bool:
    return _noted(place).exists() or (place.folder / "journal").exists()


def _write(place: Place, launch: bytes, script: str) -> None:
    furnish(place, launch)
    write_private(place.folder / "job.sh", script.encode())
    open(place.log, "ab", opener=private).close()  # Slurm would make it as its own umask says


def _seen(deployment: str, place: Place, job: _Job | None) -> Observation:
    if job is not None:
        executor = job.liveness
    else:
        executor = Liveness.DEAD if _was_submitted(place) else Liveness.ABSENT
    cut(place.log)
    return Observation(
        deployment=deployment,
        executor=executor,
        tail=last_lines(place.log) if executor is Liveness.DEAD else "",
        message=f"Slurm's job {job.id} waits: {job.reason}." if job and executor is Liveness.QUEUED else "",
    )


# --- what Slurm says -------------------------------------------------------------------------------------------------


def _records(output: str) -> list[dict[str, str]]:
    """The records of ``scontrol show --oneliner``. What people wrote into a reason has no fields in it."""
    found = []
    for line in output.splitlines():
        fields = {name: value.strip() for name, value in _FIELD.findall(_REASON.sub("", line))}
        if reason := _REASON.search(line):
            fields["Reason"] = reason[1]
        if fields.keys() & {"NodeName", "PartitionName"}:
            found.append({name: value for name, value in fields.items() if value != "(null)"})
    return found


def _several(record: Mapping[str, str], field: str) -> list[str]:
    return [one for one in record.get(field, "").split(",") if one]


def _host(record: Mapping[str, str], door: Node) -> Node:
    """A node of the cluster; ``door`` is the submit host, whose software it is taken to have."""
    known = {
        "hostname": record.get("NodeHostName"),
        "kernel": next(iter(record.get("OS", "").split()[1:2]), None),
        "cpus": int(record.get("CPUTot", 0)) or None,
        "memory": int(record.get("RealMemory", 0)) * 2**20 or None,
        "partitions": _several(record, "Partitions"),
        "features": _several(record, "ActiveFeatures"),
        "gres": record.get("Gres"),
        "root": door.properties.get("root"),
    }
    availability, reason = _availability(record.get("State", ""), record.get("Reason", ""))
    return replace(
        door,
        name=record["NodeName"],
        architecture=f"linux/{cpu_of(record['Arch'])}" if "Arch" in record else door.architecture,
        os="linux",
        availability=availability,
        reason=reason,
        properties={name: value for name, value in known.items() if value not in (None, [])},
    )


def _partition(record: Mapping[str, str], door: Node) -> Node:
    """A partition, as a node on which as many deployments can be as it has machines."""
    state, machines = record.get("State", "UP"), int(record.get("TotalNodes", 1))
    return replace(
        door,
        name=record["PartitionName"],
        os="linux",
        availability=Availability.AVAILABLE if state == "UP" else Availability.DISABLED,
        reason="" if state == "UP" else f"Slurm says that the partition is {state}.",
        slots=max(1, machines),
        properties={"machines": machines},
    )


def _availability(state: str, reason: str) -> tuple[Availability, str]:
    """Whether Slurm would start a job there. ``state`` is like ``IDLE+DRAIN``; a star: the node does not answer."""
    flags = set(re.findall(r"[A-Z_]+", state))
    why = f"Slurm says {state}{': ' + reason if reason else ''}"
    if flags & _NO_USE or "*" in state:
        return Availability.OFFLINE, why
    if flags & {"DRAIN", "DRAINED", "DRAINING"}:
        return Availability.DISABLED, why
    return Availability.AVAILABLE, ""
