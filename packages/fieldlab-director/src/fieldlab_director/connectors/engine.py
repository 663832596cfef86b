"""A Docker engine, as far as the connector asks it: its containers, its images, and commands in containers.

Whatever the engine says, or the line to it, becomes a ``ConnectorError`` here; what it speaks is the Docker Engine API.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiodocker
import aiohttp
from aiodocker.execs import Exec
from aiodocker.stream import Stream
from fieldlab_common.errors import ConnectorError

__all__ = ["Engine", "ExecChannel"]

CONNECT_SECONDS = 15.0
MOST_HELD = 64  # pieces of a command's output that wait to be read


class ExecChannel:
    """A ``Channel`` to a command in a container. It leaves at the end of its input, which is the end of the stream."""

    def __init__(self, command: Exec, stream: Stream) -> None:
        self._command, self._stream = command, stream
        self._held: tuple[asyncio.Queue[bytes], ...] = (asyncio.Queue(MOST_HELD), asyncio.Queue(MOST_HELD))
        self._writing: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()
        self._reading = asyncio.create_task(self._read_all())

    async def read(self) -> bytes:
        """See ``Channel``."""
        return await self._some(self._held[0])

    async def read_errors(self) -> bytes:
        """See ``Channel``."""
        return await self._some(self._held[1])

    async def _some(self, held: asyncio.Queue[bytes]) -> bytes:
        getting = asyncio.ensure_future(held.get())
        await asyncio.wait([getting, self._reading], return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        getting.cancel()
        return held.get_nowait() if not held.empty() else b""

    async def _read_all(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):  # the connection is lost, which is the end of it
            while (said := await self._stream.read_out()) is not None:
                if said.data:
                    await self._held[said.stream == 2].put(said.data)

    def write(self, data: bytes) -> None:
        """See ``Channel``."""
        task = asyncio.create_task(self._write(data))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, data: bytes) -> None:
        async with self._order:
            with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError, AssertionError):  # it is closed
                await self._stream.write_in(data)

    def end_input(self) -> None:
        """See ``Channel``."""
        self.kill()

    def kill(self) -> None:
        """See ``Channel``. An engine ends no command; this one leaves when nobody is there to ask it."""
        closing = asyncio.ensure_future(self._close())
        self._writing.add(closing)
        closing.add_done_callback(self._writing.discard)

    async def _close(self) -> None:
        self._reading.cancel()
        with contextlib.suppress(aiohttp.ClientError, OSError, AssertionError):  # it is closed
            await self._stream.close()

    async def wait(self) -> int | None:
        """See ``Channel``."""
        await asyncio.wait([self._reading])
        with contextlib.suppress(aiodocker.DockerError, aiohttp.ClientError, OSError):
            code = (await self._command.inspect())["ExitCode"]
            return None if code is None else int(code)
        return None


class Engine:
    """What is asked of an engine. Whatever it or the line to it says becomes a ``ConnectorError``."""

    def __init__(self, address: str, context: ssl.SSLContext | None) -> None:
        self.address = address
        self._context = context
        self._docker: aiodocker.Docker | None = None

    @asynccontextmanager
    async def asked(self, what: str) -> AsyncIterator[aiodocker.Docker]:
        """The engine, for a block of calls that do ``what``."""
        if self._docker is None:
            url = self.address.replace("tcp://", "https://", 1)
            timeout = aiohttp.ClientTimeout(connect=CONNECT_SECONDS)
            self._docker = aiodocker.Docker(url, ssl_context=self._context, timeout=timeout)
        try:
            yield self._docker
        except aiodocker.DockerError as error:
            if error.status == 900:  # what aiodocker makes of a connection that was refused
                raise self._away(error) from error
            transient = error.status >= 500 or error.status == 409
            raise ConnectorError(f"The engine did not {what}: {error.message}", transient=transient) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> ConnectorError:
        why = getattr(error, "message", "") or str(error) or type(error).__name__
        return ConnectorError(
            f"The Docker engine at {self.address} cannot be reached: {why}.",
            advice="Is dockerd up, and may the director use it?",
        )

    async def close(self) -> None:
        if self._docker is not None:
            await self._docker.close()

    async def info(self) -> dict[str, Any]:
        async with self.asked("say what it is") as docker:
            return dict(await docker.system.info())

    async def containers(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The containers that have these labels, whether they run or not; in one call."""
        wanted = json.dumps({"label": [f"{key}={value}" for key, value in labels.items()]})
        async with self.asked("list containers") as docker:
            return [one._container for one in await docker.containers.list(all="true", filters=wanted)]

    async def fetch_image(self, image: str) -> None:
        """Have the engine have an image."""
        async with self.asked("look for an image") as docker:
            try:
                await docker.images.inspect(image)
            except aiodocker.DockerError as error:
                if error.status != 404:
                    raise
            else:
                return
        try:
            async with self.asked("pull it") as docker:
                await docker.images.pull(image)
        except ConnectorError as error:
            raise ConnectorError(
                f"The engine has no image {image!r}, and cannot pull it. {error.message}",
                advice="Name one that it can pull: fl.Docker(image=...), or fl.Container(image=...).",
                transient=error.transient,
            ) from error

    async def make(self, name: str, body: Mapping[str, Any]) -> str:
        """A container, made; if there is one of that name, that."""
        async with self.asked("make a container") as docker:
            try:
                return (await docker.containers.create(body, name=name)).id
            except aiodocker.DockerError as error:
                if error.status != 409:
                    raise
                return (await docker.containers.get(name)).id

    async def start(self, container: str, archive: bytes) -> None:
        """Start a container, with the files of ``archive`` in it."""
        async with self.asked("start a container") as docker:
            await docker.containers.container(container).put_archive("/", archive)  # type: ignore[no-untyped-call]
            await docker.containers.container(container).start()

    async def run(self, container: str, *command: str) -> ExecChannel:
        """A command in a container that runs."""
        async with self.asked("run a command in a container") as docker:
            made = await docker.containers.container(container).exec([*command], stdin=True)
            stream = made.start(detach=False)
            await stream.__aenter__()
            return ExecChannel(made, stream)

    async def has(self, container: str, path: str) -> bool:
        """Whether a container has a small file, whether it runs or not."""
        async with self.asked("look into a container") as docker:
            try:
                with await docker.containers.container(container).get_archive(path):
                    return True
            except aiodocker.DockerError as error:
                if error.status != 404:
                    raise
                return False

    async def ending(self, container: str) -> str:
        """How a container ended, for people."""
        async with self.asked("say how a container ended") as docker:
            state: dict[str, Any] = (await docker.containers.container(container).show())["State"]
        why = "out of memory" if state.get("OOMKilled") else str(state.get("Error") or "")
        return f"The container has ended (exit {state.get('ExitCode')}{': ' + why if why else ''})."

    async def remove(self, container: str) -> None:
        """Remove a container with all that is in it, by force."""
        async with self.asked("remove a container") as docker:
            try:
                await docker.containers.container(container).delete(force=True, v=True)
            except aiodocker.DockerError as error:
                if error.status not in (404, 409):  # it is gone, or being removed
                    raise
