"""W&B gets each row of a run, in the order of steps, under one id: while the run goes on, and later what it has missed.

Online its server says up to which step it has them: what was lost while it was away goes out with the next start.
Offline `wandb/sent.json`, beside W&B's files on the shared disk, says so of these.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_shards.errors import UserError, one_line
from data_shards.whole import write_whole
from pipeline.journal import attempt_folders, last_line, read_lines
from pipeline.wandb_client import FINISH_S, end_service, finish, open_client

if TYPE_CHECKING:  # which read this
    from pipeline.monitor import MonitorSettings
    from pipeline.run import Run

Row = dict[str, Any]
Alert = tuple[str, str]  # title and text

SETTLED_S = 3.0  # after that a row has certainly reached the file
WAITING_ROWS = 100_000  # that W&B may be behind
CATCH_UP_S = 600.0  # for W&B to get what it has missed, where nothing waits for it
LATER = "its rows go out with the next start, or by make sync"


@dataclass(frozen=True)
class WandbRun:
    """A run as W&B is to have it. folder: on the shared disk; url: its folder in the store; config: what W&B shows."""

    folder: Path
    url: str
    id: str
    settings: "MonitorSettings"
    config: dict[str, Any]

    def open(self, went_offline: Callable[[str], None], finish_s: float = FINISH_S) -> Any:
        """W&B's client; went_offline is told why where it should be online and is not."""
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        return open_client(
            self.settings.wandb,
            self.folder,
            went_offline,
            finish_s,
            id=self.id,
            name=(name := self.url.rsplit("/", 1)[-1]),
            group=name,
            project=self.settings.project,
            entity=self.settings.entity,
            config=self.config,
        )

    def sent(self, client: Any) -> int:
        """The last step that W&B has: its server, or its files of earlier starts."""
        step = self._kept()
        if client.offline:
            return step
        has = int(client.summary.get("step", 0))
        self.keep(max(step, has))
        return has

    def keep(self, step: int) -> None:
        """Note what W&B has."""
        write_whole(self._state, json.dumps({"id": self.id, "step": step}))

    def missed(self, sent: int, first: float = math.inf, but: Path | None = None) -> list[Row]:
        """Rows between the last step sent and `first`, in order, of all attempts `but` one; a later one's counts."""
        rows: dict[int, Row] = {}
        if sent + 1 < first:
            for folder in attempt_folders(self.folder).values():
                path = folder / "metrics.jsonl"
                last = last_line(path) if folder != but else None
                if last is not None and last["result"]["step"] > sent:  # of days, one attempt alone is parsed
                    rows |= {row["result"]["step"]: row for row in read_lines(path)}
        return [rows[step] for step in sorted(rows) if sent < step < first]

    def end(self, client: Any, outcome: str | None, sent: int) -> None:
        """End it there, as pipeline.train's outcome says. Raises when W&B has not got all in time."""
        finish(client, outcome)
        self.keep(sent)
        if not client.offline:  # rows that stood in files alone have gone out with the others
            for path in (self.folder / "wandb").glob(f"offline-run-*/run-{self.id}.wandb"):
                path.with_name(f"{path.name}.synced").touch()  # as W&B's own command leaves it

    def catch_up(self, outcome: str | None) -> int:
        """Send the rows that W&B's server has not got, of a run that is over; returns how many. Raises UserError."""
        try:
            client = self.open(_refuse, CATCH_UP_S)
            rows = self.missed(sent := self.sent(client))
            for row in rows:
                log(client, row)
            self.end(client, outcome, rows[-1]["result"]["step"] if rows else sent)
        except TimeoutError as error:
            raise UserError(f"W&B: {one_line(error)}; the same command tries again") from None
        finally:
            end_service()
        return len(rows)

    def _kept(self) -> int:
        try:
            state = json.loads(self._state.read_text())
            return int(state["step"]) if state["id"] == self.id else 0  # else of a run that had the same name
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0  # none, or cut by a machine that lost its power: rows go out again

    @property
    def _state(self) -> Path:
        return self.folder / "wandb" / "sent.json"


class WandbRows:
    """W&B's own client in a thread, fed each row of an attempt.

    A row above the last that W&B has goes out; rows of earlier attempts that it has missed go first. So each row goes
    out once, or twice if it went to a file in the seconds before a kill. After an error, or when it is far behind, W&B
    gets no more rows of this attempt.
    """

    def __init__(self, run: "Run", of_run: WandbRun) -> None:
        self._run, self._of_run = run, of_run
        self._rows: queue.Queue[Row | Alert | None] = queue.Queue(WAITING_ROWS)  # None: the end
        self._outcome: str | None = None
        self._behind = False
        self._sent = 0  # the last step that W&B has got
        self._settling: tuple[int, float] | None = None  # in a file: a step that it had got by that time
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def row(self, row: Row) -> None:
        """Take a row as it stands in metrics.jsonl. Never waits."""
        if not self._thread.is_alive() or self._behind:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._behind = True
            self._run.event("W&B failed", reason=f"it is {WAITING_ROWS} rows behind; {LATER}")

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell those who want to be told, by mail or Slack."""
        with suppress(queue.Full):
            self._rows.put_nowait((title, text))

    def close(self, deadline: float, outcome: str | None = None) -> None:
        """Finish W&B's files and end its process, by the deadline (monotonic). May be called twice."""
        self._outcome = self._outcome or outcome
        with suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self) -> None:
        try:
            client = self._of_run.open(lambda reason: self._run.event("W&B offline", reason=reason))
            self._sent = self._of_run.sent(client)
            self._settling = (self._sent, time.monotonic()) if client.offline else None
            self._feed(client)
            self._of_run.end(client, self._outcome, self._sent)
        except Exception as error:  # noqa: BLE001 - whatever befalls W&B, the training goes on
            self._run.event("W&B failed", reason=f"{one_line(error)}; {LATER}")
        finally:
            end_service()

    def _feed(self, client: Any) -> None:
        """Send rows until there are no more, before the first one those that W&B has missed."""
        behind = True
        while (row := self._rows.get()) is not None:
            if isinstance(row, tuple):
                client.alert(*row, level="WARN")
                continue
            first = row["result"]["step"]
            for earlier in self._of_run.missed(self._sent, first, but=self._run.local) if behind else ():
                self._send(client, earlier)
            behind = False
            self._send(client, row)

    def _send(self, client: Any, row: Row) -> None:
        step = row["result"]["step"]
        if step <= self._sent:
            return
        log(client, row)
        self._sent = step
        if self._settling is not None and time.monotonic() - self._settling[1] > SETTLED_S:
            self._of_run.keep(self._settling[0])
            self._settling = (step, time.monotonic())


def log(client: Any, row: Row) -> None:
    """Hand a row of metrics.jsonl to W&B: flat, without what is null."""
    named = {f"{part}/{key}": value for part in ("result", "run") for key, value in row[part].items()}
    values = {key: value for key, value in named.items() if value is not None and key != "result/step"}
    client.log({"step": row["result"]["step"]} | values)


def _refuse(reason: str) -> NoReturn:
    raise UserError(f"W&B: {reason}")
