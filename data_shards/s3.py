"""S3: each request is tried until it is answered or its time is over, and each failure has a name."""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as boto

from data_shards.direct import Take
from data_shards.s3_bucket import Bucket, Transient, code_of, content_md5, is_passing, named
from data_shards.store import (
    AlreadyExists,
    Consumer,
    Counters,
    Denied,
    Entry,
    NotFound,
    StoreError,
    Truncated,
    Unavailable,
)

T = TypeVar("T")

PART_BYTES = 16 * 2**20  # AWS advises 8 to 16 MiB a request
PARTS = 4  # of an upload or a download on their way, and in memory, at a time
SLOWEST_BYTES_S = 2**20  # a connection slower than this is given up and made again
SLOWER = 2  # times as long may what has run out of time take in the end
ATTEMPT_S = 30.0  # for an answer to begin, beside the time for its bytes; at most a quarter of all the time there is
CHECK_S = 5.0
DOWNLOADS = 5  # begun at most, of an object that others write over
URL_S = 60.0  # a signed url is used for; it is good for an hour
URLS = 1000  # are kept
REFUSED_S = 10.0  # after an answer that only the ordinary client understands


class S3:
    """One bucket. Lives on one event loop."""

    def __init__(self, bucket: str, retry_seconds: float, connections: int) -> None:
        self.retry_seconds = retry_seconds
        self.counters = Counters()
        self._bucket = Bucket(bucket, connections)
        self._direct_from = 0.0  # monotonic; before, reads go by the ordinary client
        self._urls: dict[str, tuple[str, float]] = {}  # signed ones, and until when (monotonic) they are used
        self._free = asyncio.Semaphore(connections)
        self._key_worked = False

    async def read(self, key: str, start: int | None, end: int | None, **condition: str) -> bytes:
        size = None if end is None else end - (start or 0)
        data = await self._tried(partial(self._read, key, start, end, **condition), key, size, patient=True)
        self.counters.bytes_read += len(data)
        return data

    async def feed(self, key: str, start: int, end: int, begin: Callable[[], Consumer]) -> Consumer:
        async def feed() -> Consumer:
            consumer = begin()
            if not await self._read_directly(key, start, end, consumer):
                consumer = begin()
                consumer(memoryview(await self._read(key, start, end)))
            return consumer

        fed = await self._tried(feed, key, end - start, patient=True)
        self.counters.bytes_read += end - start
        return fed

    async def _read(self, key: str, start: int | None, end: int | None, **condition: str) -> bytes:
        """By the ordinary client, which understands every answer."""
        whole = not start and end is None
        wanted = condition if whole else {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}", **condition}
        answer_s = self._answer_s(self.retry_seconds)
        async with asyncio.timeout(answer_s):
            answer = await self._bucket.call("get_object", Key=key, **wanted)
        try:
            async with asyncio.timeout(answer_s + answer["ContentLength"] / SLOWEST_BYTES_S):
                data: bytes = await answer["Body"].read()
        finally:
            answer["Body"].close()
        if not whole:
            self._check_range(key, answer.get("ContentRange"), start or 0, end)
        if len(data) != answer["ContentLength"]:
            raise Transient(f"sent {len(data)} of {answer['ContentLength']} bytes")
        return data

    async def _read_directly(self, key: str, start: int, end: int, take: Take) -> bool:
        """False when the answer takes the ordinary client, which is then asked alone for a while."""
        direct = await self._bucket.direct()
        if direct is None or time.monotonic() < self._direct_from:
            return False
        right = await direct.get(await self._signed_url(key), start, end, take)
        if not right:
            self._direct_from = time.monotonic() + REFUSED_S
            self._urls.clear()
        return right

    async def _signed_url(self, key: str) -> str:
        """The same one for a while: signing takes as long as receiving a megabyte."""
        url, until = self._urls.get(key, ("", 0.0))
        if time.monotonic() >= until:
            if len(self._urls) >= URLS:
                self._urls.clear()
            url = await self._bucket.sign(key)
            self._urls[key] = url, time.monotonic() + URL_S
        return url

    def _check_range(self, key: str, given: str | None, start: int, end: int | None) -> None:
        """`given`: the answer's Content-Range, "bytes 0-99/1000"."""
        if not given or not given.startswith(f"bytes {start}-"):
            raise Transient(f"sent {given or 'the whole object'} instead of the bytes from {start}")
        total = int(given.rpartition("/")[2])
        if end is not None and total < end:
            raise Truncated(f"{self._bucket.url(key)}: ends at byte {total}, bytes {start} to {end} were asked for")
        if given != f"bytes {start}-{(end or total) - 1}/{total}":
            raise Transient(f"sent {given} instead of the bytes {start} to {end or total}")

    async def put(self, key: str, data: bytes, create_only: bool) -> None:
        mark = secrets.token_hex(8)
        condition = {"IfNoneMatch": "*", "Metadata": {"writer": mark}} if create_only else {}
        whole = {"Key": key, "Body": data, "ContentMD5": await asyncio.to_thread(content_md5, data)}
        try:
            await self._tried(partial(self._bucket.call, "put_object", **whole, **condition), key, len(data))
        except AlreadyExists:
            if not await self._is_there(key, mark):
                raise
        self.counters.bytes_written += len(data)

    async def upload(self, local: Path, key: str) -> None:
        size = local.stat().st_size
        if size <= 2 * PART_BYTES:
            await self.put(key, await asyncio.to_thread(local.read_bytes), False)
            return
        each = max(PART_BYTES, -(-size // 10_000))  # 10,000 parts is S3's limit
        mark = secrets.token_hex(8)
        begin = partial(self._bucket.call, "create_multipart_upload", Key=key, Metadata={"writer": mark})
        whole = {"Key": key, "UploadId": (await self._tried(begin, key))["UploadId"]}
        try:
            parts = {"Parts": await _in_parts(partial(self._part, local, each, whole), range(0, size, each))}
            end = partial(self._bucket.call, "complete_multipart_upload", **whole, MultipartUpload=parts)
            try:
                await self._tried(end, key)
            except NotFound:  # no such upload
                if not await self._is_there(key, mark):
                    raise
        except BaseException:
            await asyncio.shield(self._give_back(whole))
            raise

    async def _is_there(self, key: str, mark: str) -> bool:
        """Whether a first try got through, and only its answer was lost (aiohttp, too, asks again by itself)."""
        return bool((await self._head(key)).get("Metadata", {}).get("writer") == mark)

    async def _give_back(self, whole: dict[str, str]) -> None:
        """Free what an upload in parts has left, if that can be done soon; if not, `abandon` does."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CHECK_S):
                await self._bucket.call("abort_multipart_upload", **whole)

    async def abandon(self, prefix: str) -> int:
        uploads: list[dict[str, Any]] = []
        mark: dict[str, str] = {}
        while True:
            ask = partial(self._bucket.call, "list_multipart_uploads", Prefix=prefix, **mark)
            page = await self._tried(ask, prefix.rstrip("/"))
            uploads += page.get("Uploads", [])
            if not page.get("IsTruncated"):
                break
            mark = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for upload in uploads:
            whole = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            await self._tried(partial(self._bucket.call, "abort_multipart_upload", **whole), upload["Key"])
        return len(uploads)

    async def _part(self, local: Path, size: int, whole: dict[str, str], start: int) -> dict[str, Any]:
        number, data = 1 + start // size, await asyncio.to_thread(_slice, local, start, size)
        md5 = await asyncio.to_thread(content_md5, data)
        call = partial(self._bucket.call, "upload_part", **whole, PartNumber=number, Body=data, ContentMD5=md5)
        answer = await self._tried(call, whole["Key"], PARTS * len(data))  # they share the line
        self.counters.bytes_written += len(data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def download(self, key: str, local: Path) -> None:
        for _ in range(DOWNLOADS):
            with contextlib.suppress(AlreadyExists):  # another version than the one that was begun with
                await self._download(key, local)
                return
        raise StoreError(
            f"{self._bucket.url(key)}: was written over {DOWNLOADS} times while it was read; again when that is over"
        )

    async def _download(self, key: str, local: Path) -> None:
        head = await self._head(key)
        size, same = int(head["ContentLength"]), {"IfMatch": head["ETag"]} if "ETag" in head else {}
        await asyncio.to_thread(local.write_bytes, b"")

        async def fetch(start: int) -> None:
            data = await self.read(key, start, min(start + PART_BYTES, size), **same)
            await asyncio.to_thread(_write_at, local, start, data)

        await _in_parts(fetch, range(0, size, PART_BYTES))

    async def size(self, key: str) -> int:
        return int((await self._head(key))["ContentLength"])

    async def _head(self, key: str) -> dict[str, Any]:
        return await self._tried(partial(self._asked_head, key), key, patient=True)

    async def _asked_head(self, key: str) -> Any:
        try:
            return await self._bucket.call("head_object", Key=key)
        except OSError as error:
            if not isinstance(error.__cause__, boto.ClientError) or code_of(error.__cause__) != "400":
                raise
            # No body tells the reason, such as that a token has expired. The answer to a GET has one.
            (await self._bucket.call("get_object", Key=key))["Body"].close()
            raise Transient("400, though a GET is answered") from error

    async def find(self, prefix: str, more: str | None) -> tuple[list[Entry], str | None]:
        page, more = await self._page(more, Prefix=prefix)
        return [Entry(item["Key"], item["Size"]) for item in page.get("Contents", []) if item["Key"] != prefix], more

    async def folders(self, prefix: str, more: str | None) -> tuple[list[str], str | None]:
        page, more = await self._page(more, Prefix=prefix, Delimiter="/")
        return [item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", [])], more

    async def _page(self, more: str | None, **which: str) -> tuple[dict[str, Any], str | None]:
        ask = partial(self._bucket.call, "list_objects_v2", **which, **({"ContinuationToken": more} if more else {}))
        page = await self._tried(ask, which["Prefix"].rstrip("/"), patient=True)
        return page, page["NextContinuationToken"] if page.get("IsTruncated") else None

    async def delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), 1000):  # S3's limit
            await self._tried(partial(self._delete, keys[start : start + 1000]), keys[start])

    async def _delete(self, keys: list[str]) -> None:
        names = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        for error in (await self._bucket.call("delete_objects", Delete=names)).get("Errors", []):
            code, said = error.get("Code", ""), error.get("Message")
            if is_passing(code):
                raise Transient(f"{code} of {error['Key']}")
            kind = Denied if code == "AccessDenied" else StoreError
            raise kind(f"{self._bucket.url(error['Key'])}: not deleted: {said or code}")

    async def check(self) -> None:
        ask = partial(self._bucket.call, "list_objects_v2", MaxKeys=1)
        await self._tried(ask, "", retry_seconds=min(CHECK_S, self.retry_seconds))

    async def keeps_versions(self) -> bool | None:
        try:
            answer = await self._tried(partial(self._bucket.call, "get_bucket_versioning"), "", retry_seconds=CHECK_S)
        except StoreError:
            return None  # not every key may ask, not every server knows
        return "Status" in answer  # also of a bucket that no longer makes them

    async def close(self) -> None:
        await self._bucket.close()

    async def _tried(
        self,
        call: Callable[[], Awaitable[T]],
        key: str,
        size: int | None = 0,
        *,
        patient: bool = False,
        retry_seconds: float | None = None,
    ) -> T:
        """What `call` gives, asked for again until it is there. `size`: bytes that go over the wire, for the deadline.

        None when only the answer tells how many: `call` has a deadline of its own. After a time-out the bytes are
        given more time, which does not count as the store's silence.
        `patient`: a key that has worked before and is refused now may work again (rotated, or the store is unwell).
        One that has expired is renewed in any case.
        """
        limit_s = self.retry_seconds if retry_seconds is None else retry_seconds
        start, slow_s, times = time.monotonic(), 0.0, 1
        for attempt in range(1_000_000):
            bytes_s = times * (size or 0) / SLOWEST_BYTES_S
            try:
                answer = await self._once(call, None if size is None else self._answer_s(limit_s) + bytes_s)
                self._key_worked = True
                return answer
            except Exception as error:
                known = await named(error, key, self._bucket)
                waited = time.monotonic() - start
                may_change = isinstance(known, Transient) or (
                    isinstance(known, Denied) and self._key_worked and (patient or known.expired)
                )
                if not may_change:
                    raise known from error
                if isinstance(error, TimeoutError) and times < SLOWER:
                    slow_s, times = slow_s + bytes_s, 2 * times
                pause = random.uniform(0.5, 1.5) * min(0.1 * 2 ** min(attempt, 10), 10.0)
                if waited - slow_s + pause > limit_s:
                    raise self._give_up(known, key, waited) from error
            self.counters.retries += 1
            if isinstance(known, Denied):
                await self._bucket.renew_key()
            await asyncio.sleep(pause)
        raise AssertionError  # a million pauses are over any limit

    def _answer_s(self, limit_s: float) -> float:
        return min(ATTEMPT_S, max(limit_s / 4, 1.0))

    async def _once(self, call: Callable[[], Awaitable[T]], limit_s: float | None) -> T:
        async with self._free:  # waiting for a free connection, or making a client, is not the store's fault
            await self._bucket.client()
            self.counters.requests += 1
            async with asyncio.timeout(limit_s):
                return await call()

    def _give_up(self, known: Exception, key: str, waited: float) -> StoreError:
        if isinstance(known, Denied):
            return known
        return Unavailable(
            f"{self._bucket.url(key)}: {self._bucket.host} has not answered for {waited:.0f} s ({known}); check that "
            f"it runs, and endpoint_url in the AWS profile or AWS_ENDPOINT_URL"
        )


async def _in_parts(call: Callable[[int], Awaitable[T]], starts: range) -> list[T]:
    """What `call` gives for each part's start, some at a time. The first error ends the others, and is raised."""
    gate = asyncio.Semaphore(PARTS)

    async def one(start: int) -> T:
        async with gate:
            return await call(start)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(start)) for start in starts]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def _slice(local: Path, start: int, size: int) -> bytes:
    with local.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _write_at(local: Path, start: int, data: bytes) -> None:
    with local.open("r+b") as file:
        file.seek(start)
        file.write(data)
