"""A stand-in for ``fieldlab.pyz`` with the executor's command line. Its launch's ``experiment`` says what it does.

``leave``: ends well at once. ``stay``: until SIGTERM. ``stubborn``: until SIGKILL. ``crash``: dies with a traceback.
``chatty``: writes a lot, then stays. It counts its starts beside its folder, and its drains in it.
"""

import fcntl
import json
import pathlib
import signal
import sys


def run(folder: pathlib.Path) -> None:
    launch = json.loads((folder / "launch.json").read_text())
    starts = folder.parent / "starts"
    with starts.open("a") as file:
        file.write(f"{launch['epoch']}\n")
    signals = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "journal").mkdir(exist_ok=True)
        print("started", launch["deployment"], flush=True)
        kind = launch["experiment"]
        if kind == "crash":
            raise RuntimeError("boom")
        if kind == "chatty":
            print("x" * 3_000_000, flush=True)
        (folder / "up").touch()
        if kind in ("stay", "chatty"):
            signal.sigwait(signals)
        elif kind == "stubborn":
            signal.sigwait({signal.SIGUSR1})


def drain(folder: pathlib.Path) -> None:
    launch = json.loads((folder / "launch.json").read_text())
    if launch["experiment"] == "undrainable":
        sys.exit("the journal is damaged")
    with (folder.parent / "drains").open("a") as file:
        file.write(launch["director"] + "\n")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "run":
        run(pathlib.Path(rest[0]))
    elif command == "drain":
        drain(pathlib.Path(rest[0]))
    elif command == "facts":
        facts = {"name": "here", "architecture": "linux/amd64", "os": "linux", "properties": {"cpus": 2, "site": "x"}}
        print(json.dumps(facts))
    elif command == "prepare":
        environment = json.loads(rest[1])
        if "impossible" in environment["body"].get("requirements", {}).get("packages", []):
            sys.exit("no matching distribution found for impossible")
        print(json.dumps({"python": sys.executable}))
