"""Asking a run that goes on what its steps spend their time on; its first rank answers (pipeline.profile)."""

import time
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from jobs.logs import ASK_S, is_over
from jobs.runs import Job, history, owned, state

QUESTION = "profile"  # the file by which pipeline.profile, which needs torch, is asked
ANSWERS = ("profiled", "profile failed")  # events
POLL_S = 0.5


def profile(job: Job) -> tuple[Path, Path]:
    """Wait for the next steps of a run; returns a table of them and their trace.

    Raises UserError when the run does not go on, or torch's profiler does not work there.
    """
    if (now := state(job)) != "RUNNING":
        is_so = "is over" if now is None else f"is {now.lower()}"
        raise UserError(f"RUN={job.run}: job {job.id} {is_so}, and has no steps to look at; make status says more")
    question, known = job.run_dir / QUESTION, len(_answers(job))
    with owned(job.run_dir):
        question.touch()
    try:
        answer = _next_answer(job, known)
    finally:
        question.unlink(missing_ok=True)
    if "trace" not in answer:
        raise UserError(f"RUN={job.run}: torch's profiler does not work there: {answer['reason']}")
    return Path(answer["table"]), Path(answer["trace"])


def _next_answer(job: Job, known: int) -> dict[str, Any]:
    asked = time.monotonic()
    while len(told := _answers(job)) == known:
        if time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            if is_over(job) and len(_answers(job)) == known:
                raise UserError(f"RUN={job.run}: job {job.id} ended before its next steps did; make status says more")
        time.sleep(POLL_S)
    return told[-1]


def _answers(job: Job) -> list[dict[str, Any]]:
    return [event for event in history(job.run_dir) if event["event"] in ANSWERS]
