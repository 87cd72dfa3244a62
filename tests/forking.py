"""Processes that begin as copies of one that has imported what a rank does: that takes five seconds of a core."""

import multiprocessing
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    """Its first process begins the one that the others are copies of, with the environment of that moment."""
    servers = multiprocessing.get_context("forkserver")
    servers.set_forkserver_preload(["pipeline.train"])
    return servers
