"""The life of jobs against the real database; `python -m proofs.queue machine` plays it longer."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

from proofs.queue.machine import Life

LifeOfJobs = Life.TestCase
LifeOfJobs.settings = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
