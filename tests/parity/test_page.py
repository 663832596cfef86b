"""docs/netunicorn.md: of every pair, both programs run, and print what stands under them."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from netunicorn.base import is_successful
from netunicorn.executor import Executor, ExecutorState

PAGE = Path(__file__).parents[2] / "docs" / "netunicorn.md"
BLOCK = re.compile(r"^```(python netunicorn|python fieldlab|text fieldlab|text)\n(.*?)^```$", re.S | re.M)


def sections():
    head, *rest = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.M)
    yield "", dict(BLOCK.findall(head))
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        blocks = dict(BLOCK.findall(text))
        if blocks:
            yield title, blocks


PRELUDE, *PAIRS = sections()


class Gateway(BaseHTTPRequestHandler):
    """netunicorn's gateway, as far as flags go, with the rules of its director (its table is a dict here)."""

    flags: dict
    lock = threading.Lock()

    def _name(self):
        return re.fullmatch(r"/api/v1/experiment/(\w+/flag/\w+)(?:/(increment|decrement))?", self.path).groups()

    def do_GET(self):
        name, _ = self._name()
        with self.lock:
            self._say(200 if name in self.flags else 404, self.flags.get(name))

    def do_POST(self):
        name, change = self._name()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with self.lock:
            if change is None:
                self.flags[name] = json.loads(body)
            else:
                row = self.flags.setdefault(name, {"text_value": None, "int_value": 0})
                row["int_value"] += 1 if change == "increment" else -1
        self._say(200, None)

    def _say(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def gateway() -> Iterator[str]:
    handler = type("Handler", (Gateway,), {"flags": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def together(*graphs):
    """Run the graphs as one experiment, an executor each; print what each last task gave, in the order of names."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    executors = [fork.Process(target=execute, args=(*one, answers)) for one in enumerate(graphs)]
    for executor in executors:
        executor.start()
    found = sorted(answers.get(timeout=60) for _ in executors)
    for executor in executors:
        executor.join()
    for name, values in found:
        if values != [None]:
            print(name, *values)


def execute(number, graph, answers):
    graph.report_results = False
    executor = Executor(str(number), os.environ["NETUNICORN_GATEWAY_ENDPOINT"], "experiment", heartbeat=False)
    executor.execution_graph, executor.state = graph, ExecutorState.EXECUTING
    executor()
    name, outcomes = list(executor.execution_graph_results.unwrap().items())[-1]
    answers.put((name, [one.unwrap() if is_successful(one) else "failed" for one in outcomes]))


def printed(kind: str, blocks: dict, names: dict) -> str:
    out = io.StringIO()
    code = PRELUDE[1][kind] + blocks[kind]
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__", **names})
    return out.getvalue()


def words(text: str) -> str:
    return text.replace("_", " ")  # steps have no spaces in their names


def test_the_page_has_a_pair_for_every_rule():
    assert len(PAIRS) == 20
    assert all({"python netunicorn", "python fieldlab", "text"} <= blocks.keys() for _, blocks in PAIRS)


@pytest.mark.parametrize(("title", "blocks"), PAIRS, ids=[title for title, _ in PAIRS])
def test_netunicorns_program_prints_what_the_page_says(title, blocks, impatient, monkeypatch):
    with gateway() as address:
        monkeypatch.setenv("NETUNICORN_GATEWAY_ENDPOINT", address)
        monkeypatch.setenv("NETUNICORN_EXPERIMENT_ID", "experiment")
        assert printed("python netunicorn", blocks, {"together": together}) == blocks["text"]


@pytest.mark.parametrize(("title", "blocks"), PAIRS, ids=[title for title, _ in PAIRS])
def test_our_program_prints_the_same(title, blocks):
    expected = blocks.get("text fieldlab", blocks["text"])
    assert words(printed("python fieldlab", blocks, {})) == words(expected)


def test_our_programs_are_shorter_by_a_fifth():
    ours, theirs = (
        sum(len(blocks[kind].split()) for _, blocks in PAIRS) for kind in ("python fieldlab", "python netunicorn")
    )
    assert ours < 0.8 * theirs, (ours, theirs)
