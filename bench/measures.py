"""The measures: one declaration for each row of the table, and the sizes of a run. Pure.

A row compares beequeue with its baseline, by default bee-queue on Node. A ratio is always ours divided by the baseline's. The
row declares whether a high or a low ratio is better, and `target` is the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS, NODE, DRIVER = "beequeue", "Node", "redis.asyncio"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measure: str
    """Its name for `--only`. The rows of one measure come from the same runs."""
    key: str
    title: str
    unit: str
    higher_is_better: bool
    target: float | None
    """The ratio to reach, or not to exceed; None: no target."""
    baseline: str = NODE

    def met(self, ratio: float) -> bool | None:
        """Whether a ratio meets the target; None without a target."""
        if self.target is None:
            return None
        return ratio >= self.target if self.higher_is_better else ratio <= self.target


ROWS = (
    Row("harness", "harness", "harness: 6 workers × 2, 7 chains", "jobs/s", True, 1.5),
    Row("harness", "harness_cpu", "harness: CPU of client and workers", "µs/job", False, 0.7),
    Row("harness", "harness_redis_cpu", "harness: CPU of Redis", "µs/job", False, 0.85),
    Row("harness", "client_memory", "memory of the client after the harness run", "MB", False, 0.45),
    Row("drain", "drain_1", "drain, concurrency 1", "jobs/s", True, 2.5),
    Row("drain", "drain_10", "drain, concurrency 10", "jobs/s", True, 3.0),
    Row("drain", "drain_100", "drain, concurrency 100", "jobs/s", True, 4.5),
    Row("drain", "worker_memory", "memory of the worker after the drain at 10", "MB", False, 0.45),
    Row("enqueue", "save_all", "enqueue: save_all, batches of 1,000", "jobs/s", True, 2.0),
    Row("enqueue", "saves", "enqueue: single saves, 100 in flight", "jobs/s", True, 1.2),
    Row("latency", "latency_p50", "latency, save to own succeeded: p50", "µs", False, 0.85),
    Row("latency", "latency_p99", "latency, save to own succeeded: p99", "µs", False, 1.0),
    Row("import", "import", "import, beside that of redis.asyncio alone", "ms", False, None, DRIVER),
)
MEASURES = (*dict.fromkeys(row.measure for row in ROWS), "growth", "peers")
"""All names for `--only`, in the order in which they run."""
CONCURRENCIES = (1, 10, 100)
WORKERS, WORKER_CONCURRENCY, CHAINS = 6, 2, 7
BATCH, IN_FLIGHT = 1_000, 100

GROWTH_BOUND = 0.1
"""Growth is flat if no level is worse than the smallest one by more than this share."""
PEER_FACTOR = 10
"""Our drain should be this many times as fast as that of Python's best other queue."""


@dataclass(frozen=True)
class Sizes:
    """The amount of work of each measure."""

    drain: int = 20_000
    save_all: int = 50_000
    saves: int = 20_000
    latency: int = 3_000
    latency_warm_up: int = 300
    harness_warm_up_s: int = 3
    """Whole seconds after the client's start that are not counted."""
    harness_s: int = 10
    finished: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    waiting: tuple[int, ...] = (0, 1_000_000)
    waiting_for_memory: tuple[int, ...] = (100_000, 1_000_000)
    growth_rounds: int = 7
    peers: int = 5_000
    peers_at_1: int = 1_000
    """For the peers that run one job at a time."""


QUICK = Sizes(
    drain=300,
    save_all=2_000,
    saves=300,
    latency=50,
    latency_warm_up=5,
    harness_warm_up_s=1,
    harness_s=1,
    finished=(100, 1_000),
    waiting=(0, 1_000),
    waiting_for_memory=(1_000, 2_000),
    growth_rounds=1,
    peers=200,
    peers_at_1=50,
)
