"""Blobs: resumable upload, verified, and download by range, over HTTP."""

import asyncio
import errno
import hashlib
import os
import socket
import threading
import time

import pytest
from fieldlab_common.errors import ConfigurationError, NotFound, Unavailable
from fieldlab_director.store import shelves
from fieldlab_director.store.blobs import CHUNK, Blobs
from fieldlab_director.store.disk import on_disk
from fieldlab_director.store.shelves import BucketShelf, FolderShelf

LABS = ("sqlite", "s3")
DATA = os.urandom(3 * 1024 * 1024 + 17)
DIGEST = hashlib.sha256(DATA).hexdigest()


SIZE = len(DATA)


def put(http, data, offset=0, *, size=SIZE, digest=DIGEST):
    return http.put(f"/v1/blobs/{digest}", params={"offset": offset, "size": size}, content=data)


def offset_of(http, digest=DIGEST):
    return http.get(f"/v1/blobs/{digest}/status").json()["offset"]


def test_a_blob_is_complete_once_all_of_it_is_here(ada):
    assert put(ada.http, DATA).json() == {"digest": DIGEST, "offset": len(DATA), "complete": True}
    assert ada.http.get(f"/v1/blobs/{DIGEST}").content == DATA
    assert put(ada.http, DATA).json()["complete"] is True


def test_an_upload_goes_on_where_it_ended(ada):
    half = len(DATA) // 2
    assert put(ada.http, DATA[:half]).json() == {"digest": DIGEST, "offset": half, "complete": False}
    assert offset_of(ada.http) == half
    assert ada.http.get(f"/v1/blobs/{DIGEST}").status_code == 404
    assert put(ada.http, DATA[half:], half).json()["complete"] is True
    assert ada.http.get(f"/v1/blobs/{DIGEST}").content == DATA


def test_an_upload_may_begin_again_at_an_earlier_offset(ada):
    put(ada.http, b"wrong" * 1000)
    assert put(ada.http, DATA).json()["complete"] is True


def test_an_offset_beyond_what_is_here_is_refused_with_what_is(ada):
    put(ada.http, DATA[:1000])
    answer = put(ada.http, DATA[2000:], 2000)
    assert (answer.status_code, answer.json()["code"]) == (409, "blob_mismatch")
    assert answer.json()["details"]["offset"] == 1000


def test_bytes_of_another_hash_are_thrown_away(ada):
    answer = put(ada.http, b"x" * len(DATA))
    assert (answer.status_code, answer.json()["code"]) == (409, "blob_mismatch")
    assert offset_of(ada.http) == 0


def test_more_bytes_than_announced_are_refused(ada):
    answer = put(ada.http, DATA, size=100)
    assert (answer.status_code, answer.json()["code"]) == (409, "blob_mismatch")


def test_an_empty_blob_is_a_blob(ada):
    empty = hashlib.sha256(b"").hexdigest()
    assert put(ada.http, b"", size=0, digest=empty).json()["complete"] is True
    assert ada.http.get(f"/v1/blobs/{empty}").content == b""


def test_what_came_before_the_line_was_cut_is_kept(ada, lab):
    host, port = lab.url.removeprefix("http://").split(":")
    token = ada.http.headers["authorization"]
    head = f"PUT /v1/blobs/{DIGEST}?offset=0&size={len(DATA)} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(f"{head}Content-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:2_000_000])
        while not (reached := offset_of(ada.http)):
            pass  # what came is written by and by; the test's own deadline ends this
    assert put(ada.http, DATA[reached:], reached).json()["complete"] is True


@pytest.mark.parametrize(
    ("asked", "begin", "end"), [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=5-99999999", 5, None)]
)
def test_a_range_is_what_was_asked_for(ada, asked, begin, end):
    put(ada.http, DATA)
    answer = ada.http.get(f"/v1/blobs/{DIGEST}", headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[begin:end]
    assert answer.headers["content-range"] == f"bytes {begin}-{begin + len(answer.content) - 1}/{len(DATA)}"


def test_bytes_that_are_lost_are_an_error_and_no_answer_that_is_cut(ada, lab):
    put(ada.http, DATA)
    asyncio.run(lab.desk.blobs.shelf.remove(DIGEST))
    answer = ada.http.get(f"/v1/blobs/{DIGEST}")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "same --blobs" in answer.json()["detail"] + answer.json().get("advice", "")


def test_a_range_beyond_the_end_is_not_satisfiable(ada):
    put(ada.http, DATA)
    answer = ada.http.get(f"/v1/blobs/{DIGEST}", headers={"Range": f"bytes={len(DATA)}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


def test_what_is_no_digest_is_refused(ada):
    answer = put(ada.http, b"", size=0, digest="..")
    assert answer.status_code in (404, 405, 422)
    assert put(ada.http, b"", size=0, digest="A" * 64).json()["code"] == "invalid_request"


def test_the_missing_ones_are_told_in_order_and_once(ada):
    digest = ada.put(b"here")
    wanted = ["b" * 64, digest, "a" * 64, "b" * 64]
    assert ada.http.post("/v1/blobs/missing", json={"digests": wanted}).json() == {"digests": ["b" * 64, "a" * 64]}


def test_what_is_done_with_an_open_file_is_done_to_its_end_however_often_its_reader_goes():
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        begun.set()
        may_end.wait(30)
        ended.set()

    async def test():
        reading = asyncio.create_task(on_disk(work))
        assert await asyncio.to_thread(begun.wait, 30)
        for _ in range(5):
            reading.cancel()
            await asyncio.wait({reading}, timeout=0)
        assert not reading.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert ended.is_set()

    try:
        asyncio.run(test())
    finally:
        may_end.set()


def test_a_disk_that_fills_while_a_blob_arrives_is_said_and_the_rest_can_follow(tmp_path, monkeypatch):
    data = bytes(range(256)) * 4096 * 3  # three chunks, written one behind the other
    digest = hashlib.sha256(data).hexdigest()
    blobs = Blobs(FolderShelf(tmp_path / "complete"), tmp_path / "partial", most=1 << 30, reserve=0, patience=1.0)
    write = os.write

    def full(file, chunk):
        if os.fstat(file).st_size >= CHUNK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, chunk)

    async def send(offset):
        async def body():
            for begin in range(offset, len(data), CHUNK):
                yield data[begin : begin + CHUNK]

        return await blobs.write("user-1", digest, offset, len(data), body())

    async def run():
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(Unavailable, match="is full"):
            await send(0)
        monkeypatch.setattr(os, "write", write)
        kept = blobs.offset("user-1", digest)
        assert kept == CHUNK
        assert await send(kept) == len(data)
        return b"".join([chunk async for chunk in blobs.shelf.read(digest, 0, len(data))])

    assert asyncio.run(run()) == data


def shelf_of(kind, request, tmp_path):
    if kind == "folder":
        return FolderShelf(tmp_path / "shelf")
    url, endpoint = request.getfixturevalue("s3").make()
    return BucketShelf(url, endpoint=endpoint)


@pytest.fixture(params=["folder", "s3"])
def blobs(request, tmp_path):
    shelf = shelf_of(request.param, request, tmp_path)
    return Blobs(shelf, tmp_path / "partial", most=1 << 30, reserve=0, patience=20.0)


async def sent(*parts):
    for part in parts:
        yield part


async def read(shelf, digest, start=0, end=1 << 30):
    return b"".join([chunk async for chunk in shelf.read(digest, start, end)])


LARGE = os.urandom(1024 * 1024) * 19  # three pieces of a bucket
LARGE_DIGEST = hashlib.sha256(LARGE).hexdigest()


def test_a_large_blob_comes_back_as_it_was_whole_and_in_ranges(blobs):
    async def scenario():
        assert await blobs.write("u", LARGE_DIGEST, 0, len(LARGE), sent(LARGE)) == len(LARGE)
        assert await read(blobs.shelf, LARGE_DIGEST, 0, len(LARGE)) == LARGE
        assert await read(blobs.shelf, LARGE_DIGEST, 8_000_000, 18_000_000) == LARGE[8_000_000:18_000_000]
        assert blobs.offset("u", LARGE_DIGEST) == 0

    asyncio.run(scenario())


def test_an_upload_goes_on_after_a_restart_of_the_director(blobs, tmp_path):
    async def scenario():
        half = len(LARGE) // 2
        await blobs.write("u", LARGE_DIGEST, 0, len(LARGE), sent(LARGE[:half]))
        anew = Blobs(blobs.shelf, tmp_path / "partial", most=1 << 30, reserve=0, patience=1.0)
        assert anew.offset("u", LARGE_DIGEST) == half
        await anew.write("u", LARGE_DIGEST, half, len(LARGE), sent(LARGE[half:]))
        assert await read(anew.shelf, LARGE_DIGEST, 0, len(LARGE)) == LARGE

    asyncio.run(scenario())


def test_who_sends_what_another_request_has_just_completed_need_not_send_it_again(blobs):
    async def scenario():
        both = [blobs.write("u", LARGE_DIGEST, 0, len(LARGE), sent(LARGE)) for _ in range(2)]
        assert await asyncio.gather(*both) == [len(LARGE)] * 2

    asyncio.run(scenario())


def test_what_the_shelf_does_not_take_now_is_kept_for_the_next_try(blobs, monkeypatch):
    async def refuse(path, digest):
        raise Unavailable("the shelf is full")

    async def scenario():
        with monkeypatch.context() as patch:
            patch.setattr(blobs.shelf, "adopt", refuse)
            with pytest.raises(Unavailable, match="full"):
                await blobs.write("u", DIGEST, 0, SIZE, sent(DATA))
        assert blobs.offset("u", DIGEST) == SIZE
        assert await blobs.write("u", DIGEST, SIZE, SIZE, sent()) == SIZE
        assert await read(blobs.shelf, DIGEST, 0, SIZE) == DATA

    asyncio.run(scenario())


def test_a_blob_that_was_removed_is_not_there_and_may_be_removed_again(blobs):
    async def scenario():
        await blobs.write("u", DIGEST, 0, SIZE, sent(DATA))
        for _ in range(2):
            await blobs.shelf.remove(DIGEST)
        with pytest.raises(NotFound):
            await read(blobs.shelf, DIGEST, 0, SIZE)

    asyncio.run(scenario())


def test_old_blobs_are_listed_and_young_ones_are_not(blobs):
    async def scenario():
        await blobs.write("u", DIGEST, 0, SIZE, sent(DATA))
        young = [one async for page in blobs.shelf.older(time.time() - 3600) for one in page]
        old = [one async for page in blobs.shelf.older(time.time() + 3600) for one in page]
        assert (young, old) == ([], [DIGEST])

    asyncio.run(scenario())


def test_an_upload_that_nobody_goes_on_with_is_thrown_away(blobs):
    async def scenario():
        await blobs.write("u", DIGEST, 0, SIZE, sent(DATA[:1000]))
        assert await blobs.expire(time.time() - 3600) == 0
        assert blobs.offset("u", DIGEST) == 1000
        assert await blobs.expire(time.time() + 3600) == 1
        assert blobs.offset("u", DIGEST) == 0

    asyncio.run(scenario())


def test_a_bucket_that_is_not_there_is_said_when_the_director_starts(s3):
    shelf = BucketShelf("s3://there-is-none/x", endpoint=s3.endpoint)
    with pytest.raises(ConfigurationError, match="there-is-none"):
        asyncio.run(shelf.check())


@pytest.mark.parametrize("url", ["gs://bucket", "/a/folder", "s3://"])
def test_what_is_no_bucket_is_refused(url):
    with pytest.raises(ConfigurationError, match="no place for blobs"):
        BucketShelf(url)


def test_a_bucket_that_goes_away_is_unavailable_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "RETRY_SECONDS", 0.1)
    shelf = BucketShelf("s3://bucket", endpoint="http://127.0.0.1:1")
    blobs = Blobs(shelf, tmp_path, most=1 << 30, reserve=0, patience=1.0)

    async def scenario():
        with pytest.raises(Unavailable, match="cannot be reached"):
            await blobs.write("u", DIGEST, 0, SIZE, sent(DATA))
        with pytest.raises(Unavailable, match="cannot be reached"):
            await read(shelf, DIGEST, 0, SIZE)
        return blobs.offset("u", DIGEST)

    assert asyncio.run(scenario()) == SIZE
