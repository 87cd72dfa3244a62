"""What a store can do, tried on objects of our own that are gone afterwards: put, ranges, conditions, parts, speed."""

import email.utils
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from data_shards.errors import UserError, one_line
from data_shards.index import Manifest
from data_shards.store import AlreadyExists, Store
from jobs.doctor import Finding

TRY_S = 5.0  # how long a store that does not answer is asked again
OBJECT_BYTES = 8 * 2**20
READS = 16  # at the same time, as a rank's reader does
SPEED_S = 1.0  # for them, as far as one tells
PART_BYTES = 5 * 2**20  # S3's least, but for the last part
CLOCKS_S = 5.0  # between this clock and the store's; S3 refuses at 15 minutes, logs of ranks are merged by clock


def look_at_store(url: str) -> Iterator[Finding]:
    """url: a folder in the store."""
    store = Store(url, retry_seconds=TRY_S, connections=READS)
    try:
        store.check()
    except UserError as error:
        yield Finding("store", False, str(error))
        return
    folder = store.at(f".farseer-doctor-{secrets.token_hex(8)}")
    try:
        yield from _objects(url, folder)
        if url.startswith("s3://"):
            yield from _s3(folder.url)
    except UserError as error:
        yield Finding("store", False, str(error))
    finally:
        folder.delete(["object", "once"])
        store.close()


def put_and_get(store: Store) -> None:
    """Put an object, read it, delete it, with this process's keys: one may be there that can only read.

    Raises UserError.
    """
    name, data = f".check-{secrets.token_hex(8)}", secrets.token_bytes(1000)
    store.put(name, data)
    if store.get(name) != data:
        raise UserError(f"{store.url}/{name}: what was put is not what is read; check what serves the store")
    store.delete([name])


def look_at_shards(urls: Sequence[str]) -> Iterator[Finding]:
    """Read only."""
    for url in urls:
        try:
            store = Store(url, retry_seconds=TRY_S)
            store.check()
            manifest = Manifest.load(store)
        except UserError as error:
            yield Finding("shards", False, str(error))
        else:
            yield Finding("shards", True, f"{url}: {manifest.samples:,} samples")


def _objects(url: str, folder: Store) -> Iterator[Finding]:
    data = secrets.token_bytes(OBJECT_BYTES)
    begun = time.monotonic()
    folder.put("object", data)
    up = time.monotonic() - begun
    begun = time.monotonic()
    right = folder.get("object", 1000, 1064) == data[1000:1064]
    answer = time.monotonic() - begun
    says = f"{url}: put, and bytes 1000 to 1064 read in {1000 * answer:.0f} ms"
    yield Finding(
        "store", right, says if right else f"{url}: a range gave other bytes; check what stands before the store"
    )
    yield Finding("store speed", True, f"{_speed(up)} up, {_speed(_read_all(folder))} down ({READS} connections)")
    folder.put("once", b"first", create_only=True)
    try:
        folder.put("once", b"second", create_only=True)
        says = f"{url}: takes a conditional put twice: two jobs of one run could both write; take a newer server"
        yield Finding("conditions", False, says)
    except AlreadyExists:
        yield Finding("conditions", True, "of two conditional puts (If-None-Match) the second is refused")


def _read_all(folder: Store) -> float:
    """Seconds for the object's size, of reads at the same time."""
    begun = time.monotonic()
    folder.get("object")
    alone = time.monotonic() - begun
    reads = max(1, min(READS, int(READS * SPEED_S / max(alone * READS, 1e-9))))
    begun = time.monotonic()
    for waiting in [folder.submit(folder.read("object")) for _ in range(reads)]:
        waiting.result()
    return (time.monotonic() - begun) / reads


def _speed(seconds: float) -> str:
    return f"{OBJECT_BYTES / 1e6 / max(seconds, 1e-9):,.0f} MB/s"


def _s3(url: str) -> Iterator[Finding]:
    """What Store does not offer: the parts of an upload one by one, and the clock."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = _client()
    whole: dict[str, str] = {"Bucket": bucket, "Key": f"{key}/parts"}
    try:
        whole["UploadId"] = client.call_s3("create_multipart_upload", **whole)["UploadId"]
        client.call_s3("upload_part", **whole, PartNumber=1, Body=secrets.token_bytes(PART_BYTES))
        client.call_s3("abort_multipart_upload", **whole)
        left = client.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=whole["Key"]).get("Uploads", [])
    except Exception as error:  # noqa: BLE001 - s3fs and botocore have many; each is what the store says
        yield Finding("multipart", False, f"{url}: {one_line(error)}; large checkpoints need it")
    else:
        says = "an upload in parts is begun, aborted, and gone"
        stays = "an aborted upload stays; a lifecycle rule (AbortIncompleteMultipartUpload) removes such"
        yield Finding("multipart", not left, stays if left else says)
    ahead = ahead_of_store_s(url, client)
    near = ahead is not None and abs(ahead) <= CLOCKS_S
    says = "the store does not say its time" if ahead is None else f"{ahead:+.1f} s from the store's"
    yield Finding("clock", None if ahead is None else near, says if near else f"{says}; start chrony or ntpd")


def ahead_of_store_s(url: str, client: Any = None) -> float | None:
    """Seconds that this machine's clock is ahead of the store's, which tells whole seconds; None if it does not."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    try:
        client = client or _client()
        client.call_s3("head_bucket", Bucket=bucket)  # connects
        begun = time.time()
        answer = client.call_s3("head_bucket", Bucket=bucket)
        ended = time.time()
        told = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    except Exception:  # noqa: BLE001 - botocore has many, and what is wrong with the store itself was seen before
        return None
    theirs = email.utils.parsedate_to_datetime(told).timestamp()
    here = (begun + ended) / 2
    return 0.0 if theirs <= here <= theirs + 1 else here - theirs if here < theirs else here - theirs - 1


def _client() -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"retries": {"total_max_attempts": 2}, "connect_timeout": TRY_S, "read_timeout": 2 * TRY_S},
    )
