"""What a generation run knows about its generators while they work: batches in flight, deaths, failures."""

from dataclasses import dataclass

from pcm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """When a run gives a batch up, and when it gives itself up."""

    batch_timeout: float = 900.0  # seconds a batch may take; the first of a process, which may compile, takes longer
    max_error_share: float = 0.5  # of the samples drawn so far that failed through the generator

    def __post_init__(self) -> None:
        if self.batch_timeout <= 0:
            raise InputError(f"batch timeout {self.batch_timeout:g}: must be more than 0 seconds")
        if not 0 < self.max_error_share <= 1:
            raise InputError(f"max error share {self.max_error_share:g}: allowed are more than 0, up to 1")


class RunMonitor:
    """Knows each generator's batch in flight and counts deaths per sample; a tiny Ray actor beside the driver."""

    def __init__(self, policy: FaultPolicy) -> None:
        self._policy = policy

    def snapshot(self) -> dict:
        """{"drawn": pictures in shards not yet committed, "in_flight": batches, "generators": live ones}."""
        return {"drawn": 0, "in_flight": 0, "generators": 0}
