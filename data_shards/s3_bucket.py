"""A bucket through s3fs: its client, made at the first use, and what S3, botocore or the wire say, in words.

s3fs and botocore would try again by themselves; that is off, so that one place (data_shards.s3) decides how often and
how long. Keys and endpoint come from the AWS chain.
"""

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import s3fs
from aiobotocore.credentials import AioCredentials
from aiobotocore.session import AioSession
from botocore import exceptions as boto
from botocore.httpsession import get_cert_path
from botocore.parsers import ResponseParserError
from botocore.utils import get_environ_proxies

from data_shards.direct import Direct
from data_shards.errors import one_line
from data_shards.store import AlreadyExists, Denied, NotFound, StoreError, Truncated

KEY_S = 60.0  # for what gives a key: a credential_process may wait for somebody to type
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


class Bucket:
    """Lives on one event loop."""

    def __init__(self, name: str, connections: int) -> None:
        self.name = name
        self._connections = connections
        self._client: s3fs.S3FileSystem | None = None
        self._signer: s3fs.S3FileSystem | None = None
        self._direct: Direct | None = None
        self._connecting = asyncio.Lock()

    async def call(self, method: str, **parameters: Any) -> Any:
        """botocore's answer to a request, asked for once."""
        client = await self.client()
        return await client._call_s3(method, Bucket=self.name, **parameters)

    async def direct(self) -> Direct | None:
        """The shorter way for reads; None where a proxy stands between."""
        await self.client()
        return self._direct

    async def sign(self, key: str) -> str:
        """A url to read an object by, good for an hour."""
        client = await self.client()
        async with self._connecting:
            if self._signer is None:
                self._signer = await self._in_own_region(client)
        url: str = await self._signer.s3.generate_presigned_url("get_object", Params={"Bucket": self.name, "Key": key})
        return url

    async def _in_own_region(self, client: "s3fs.S3FileSystem") -> "s3fs.S3FileSystem":
        """The client, or one for the bucket's region: AWS leads a call there, but refuses a url signed for another."""
        if not str(client.s3.meta.endpoint_url).endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return client
        try:
            answer = await client.s3.head_bucket(Bucket=self.name)
        except boto.ClientError as error:
            answer = error.response
        region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if region in (None, client.s3.meta.region_name):
            return client
        signer = _unconnected(self._connections, client.session, region)
        await signer.set_session()
        return signer

    async def client(self) -> "s3fs.S3FileSystem":
        async with self._connecting:
            if self._client is None:
                client = _unconnected(self._connections, AioSession())
                async with self._in_time():
                    await client.set_session()
                client.s3.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
                self._client, self._direct = client, _direct(client)
        return self._client

    async def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        client, signer = self._client, self._signer
        self._client = self._signer = None
        if client is not None:
            await client._s3creator.__aexit__(None, None, None)
        if signer is not None and signer is not client:
            await signer._s3creator.__aexit__(None, None, None)

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}" if key else f"s3://{self.name}"

    @property
    def host(self) -> str:
        return str(self._client.s3.meta.endpoint_url) if self._client is not None else "S3"

    async def others(self) -> str:
        """Which buckets there are at its host, as the end of a sentence."""
        client = await self.client()
        try:
            names = [bucket["Name"] for bucket in (await client.s3.list_buckets())["Buckets"]]
        except Exception:  # noqa: BLE001  # it may be forbidden; the sentence is right without it
            return ""
        return f"; it has: {', '.join(names[:20])}" if names else "; it has none"

    async def renew_key(self) -> None:
        """Take the key that the profile's files hold by now. What a role or SSO gives, botocore renews itself."""
        held = await (await self.client()).session.get_credentials()
        with contextlib.suppress(boto.BotoCoreError, Denied):  # the files may be half written
            async with self._in_time():
                found = await AioSession().get_credentials()
            if type(held) is type(found) is AioCredentials:
                held.access_key, held.secret_key, held.token = found.access_key, found.secret_key, found.token

    async def key_id(self) -> str:
        """Which key, so that its owner knows it and nobody else learns it."""
        session = (await self.client()).session
        found = await session.get_credentials()
        if found is None:
            return "no key; set AWS_PROFILE"
        source = "the environment" if found.method == "env" else f"profile {session.profile or 'default'}"
        try:
            async with self._in_time():
                key = await found.get_frozen_credentials()  # those that expire have no other way to it
        except (boto.BotoCoreError, boto.ClientError) as error:  # of a role that is refused, say
            return f"no key from {source}: {one_line(error)}"
        return f"key id {key.access_key[:4]}.. from {source}"

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(KEY_S):
                yield
        except TimeoutError as error:
            raise Denied(
                f"{self.url('')}: no key after {KEY_S:.0f} s; look at what gives it (credential_process of the AWS "
                f"profile, or its role's service)"
            ) from error


def _unconnected(connections: int, session: AioSession, region: str | None = None) -> "s3fs.S3FileSystem":
    client = s3fs.S3FileSystem(
        asynchronous=True,
        loop=asyncio.get_running_loop(),
        skip_instance_cache=True,
        use_listings_cache=False,
        session=session,
        client_kwargs={"region_name": region},
        config_kwargs={
            "max_pool_connections": connections,
            "retries": {"total_max_attempts": 1},
            "signature_version": "s3v4",  # of urls too; theirs is an older one in some regions
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    client.retries = 1
    return client


def content_md5(data: bytes) -> str:
    """Without it some servers (SeaweedFS 4.48) keep what a broken connection left of a put as the whole object."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """botocore sends a newer checksum in its place, which servers such as older MinIO do not take for one."""
    params["headers"]["Content-MD5"] = content_md5(params["body"])


def _direct(client: "s3fs.S3FileSystem") -> Direct | None:
    if client.s3.meta.config.proxies or get_environ_proxies(client.s3.meta.endpoint_url):
        return None
    return Direct(get_cert_path(client.session.get_config_variable("ca_bundle") or True))


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
    return one_line(error)
