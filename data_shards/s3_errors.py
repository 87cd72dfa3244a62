"""What S3, botocore or the wire say, in words: which error of the store it is, or that it may pass by itself."""

from typing import Any

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from data_shards.s3_bucket import Bucket
from data_shards.store import AlreadyExists, Denied, NotFound, StoreError, Truncated

_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # at 400, unlike the other refusals of a key
_TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted", "BadDigest"}
_TRANSIENT_CODES |= {"InternalError", "ServiceUnavailable"}  # of one object of a deletion, which itself is answered 200
_TRANSIENT = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.CredentialRetrievalError,
    ResponseParserError,  # a proxy's page in place of an answer
    aiohttp.ClientError,
    OSError,
)


class Transient(Exception):
    """An answer that may be another one next time; the text says what it was."""


async def named(error: Exception, key: str, bucket: Bucket) -> Exception:
    """What went wrong: a StoreError, or Transient when it may be otherwise next time. Anything else stays."""
    if isinstance(error, StoreError | Transient):
        return error
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        return Denied(f"{bucket.url(key)}: {error}; set AWS_PROFILE to a profile with keys (and its files' places)")
    origin = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(origin, boto.ClientError):
        return await _answer(origin, key, bucket)
    if isinstance(error, TimeoutError):
        return Transient("time-out")
    if isinstance(error, _TRANSIENT):
        return Transient(_short(error))
    if isinstance(error, boto.BotoCoreError | ValueError):
        return StoreError(f"{bucket.url(key)}: {_short(error)}")
    return error


async def _answer(error: Any, key: str, bucket: Bucket) -> Exception:
    code = code_of(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreError(f"{bucket.url('')}: no such bucket at {bucket.host}{await bucket.others()}")
    if is_passing(code) or status in (408, 429) or (status >= 500 and status != 501):
        return Transient(f"{status} {code}")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExists(f"{bucket.url(key)}: is there already")
    if status == 404:
        return NotFound(f"{bucket.url(key)}: no such object at {bucket.host}")
    if code == "InvalidRange" or status == 416:
        return Truncated(f"{bucket.url(key)}: ends before the bytes that were asked for")
    if code in _EXPIRED or status in (401, 403):
        hint = "; renew it where it comes from and start again" if code in _EXPIRED else ""
        whose = await bucket.key_id()
        denied = Denied(f"{bucket.url(key)}: access denied at {bucket.host} for {whose} ({code}){hint}")
        denied.expired = code in _EXPIRED
        return denied
    return StoreError(f"{bucket.url(key)}: {bucket.host} answers {status} {code}: {_short(error)}")


def code_of(error: Any) -> str:
    """Of an answer, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_passing(code: str) -> bool:
    """Whether the same request may be answered next time."""
    return code in _TRANSIENT_CODES or "Throttl" in code  # services behind S3 spell it in several ways, at 400


def _short(error: BaseException) -> str:
    error = getattr(error, "kwargs", {}).get("error", error)  # botocore's wrappers repeat the url, with its query
    return " ".join(str(error).split()) or type(error).__name__
