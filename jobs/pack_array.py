"""Packing over the nodes of a cluster. The plan is made by who submits; whichever task ends last merges."""

from dataclasses import dataclass

from data_shards.merge import merge, unfinished
from data_shards.plan import Plan, load_plans
from data_shards.progress import Progress, quiet
from data_shards.store import Store
from data_shards.work import pack_groups
from jobs.array import Array, Task
from jobs.site import Site
from jobs.verbs import ProgressLine


@dataclass(frozen=True)
class Packing(Task):
    """Packs the groups `worker`, `worker` + workers and so on of a plan; merges when no other task has any left."""

    dst: str
    plan: int
    workers: int
    processes: int

    def work(self, worker: int) -> None:
        store = Store(self.dst)
        plan = load_plans(store)[self.plan - 1]
        pack_groups(store, plan, range(worker, plan.groups, self.workers), self.processes, ProgressLine())
        if not unfinished(store, plan):
            merge(store, plan)


def pack_array(site: Site, dst: Store, plan: Plan, workers: int, progress: Progress = quiet) -> None:
    """Pack a plan by an array of so many tasks, or follow the one that is at it; returns when the set is there.

    Raises UserError when SLURM refuses it, or with what the first task said that failed.
    """
    array = Array(site, "pack", f"{dst.url} {plan.identity}", "groups of shards", dst.url)
    workers = min(workers, plan.groups)
    task = Packing(str(array.errors), dst.url, plan.number, workers, site.cpus_per_rank)
    array.run(task, workers, lambda: len(unfinished(dst, plan)), progress)
    merge(dst, plan)  # the last task does it, too; this waits for nobody
