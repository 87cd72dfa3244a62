"""W&B's own client as this program opens it: of the machine it tells the name, the packages and the load (processor,
memory, GPUs), nothing of the code or the terminal."""

import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_shards.errors import one_line

Mode = Literal["auto", "online", "offline", "disabled"]
INIT_S = 30.0  # for a W&B server to answer, before the run is recorded offline
FINISH_S = 5.0  # for W&B to get the last rows, where a job waits for it
FLUSH_S = 1.0  # between W&B's writes to its file
RETRIES = 10_000  # a minute apart: W&B drops all rows of a start, without an error, when it has given up


def wandb_url() -> str:
    """The server that WANDB_BASE_URL names, wandb.ai by default."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def wandb_mode(asked: Mode) -> Mode:
    """online, offline or disabled; `auto` is online where there is a key: in WANDB_API_KEY, or in netrc for its url."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlsplit(wandb_url()).netloc
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"


def open_client(
    asked: Mode, folder: Path, went_offline: Callable[[str], None], finish_s: float = FINISH_S, **identity: Any
) -> Any:
    """W&B's client, whose files go to folder/wandb; offline when there is no network to be online with.

    went_offline: is told why. finish_s: how long its end may take. identity: what `wandb.init` is to know of the run.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else a crash sends stack frames to W&B
    mode = wandb_mode(asked)
    try:
        return _init(mode, folder, finish_s, identity)
    except Exception as error:
        if mode == "offline":
            raise
        went_offline(f"{one_line(error)}; make sync sends the run later")
        end_service()
        return _init("offline", folder, finish_s, identity)


def finish(client: Any, outcome: str | None) -> None:
    """End W&B's run as it is to be shown there: as finished, as preempted when it will go on, else as failed.

    outcome: pipeline.train's; None: an error. Raises when W&B has not got all of it in time.
    """
    if outcome in ("preempted", "terminated"):
        client.mark_preempting()
    client.finish(exit_code=0 if outcome in ("finished", "cancelled") else 1)


def end_service() -> None:
    """End W&B's process, with whatever run it still has open."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _init(mode: Any, folder: Path, finish_s: float, identity: dict[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_S,
        finish_timeout=finish_s,
        finish_timeout_raises=True,  # else what W&B has not got by then would count as sent
        x_disable_meta=True,
        x_transaction_log_flush_interval=FLUSH_S,
        x_file_stream_retry_max=RETRIES,
    )
    client = wandb.init(mode=mode, dir=folder, resume="allow", settings=settings, **identity)
    client.define_metric("*", step_metric="step")
    return client
