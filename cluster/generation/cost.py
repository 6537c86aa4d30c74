"""What a run costs: hours of what is paid for, times a price."""

from dataclasses import dataclass

from cluster.generation.pools import Pools

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Billing:
    """What is paid by the hour.

    Drawing on GPUs: every GPU that the pools reserve, from the moment its generator is there (on an autoscaling
    cluster they come one by one). Drawing on CPUs: every machine of the cluster. Storage and traffic are not in it.
    """

    price_per_hour: float | None  # of one unit
    unit: str  # "GPU" or "machine"
    units_per_generator: float = 0.0  # GPUs, the scorer's share included

    @staticmethod
    def of(pools: Pools, *, device: str, price_per_hour: float | None) -> "Billing":
        if device != "cuda":
            return Billing(price_per_hour=price_per_hour, unit="machine")
        gpus = pools.generators * pools.generator_gpus + pools.scorers * pools.scorer_gpus
        return Billing(price_per_hour=price_per_hour, unit="GPU", units_per_generator=gpus / pools.generators)

    def units(self, *, generators: float, machines: int) -> float:
        """How many units are paid for while so many generators and machines are there."""
        return machines if self.unit == "machine" else generators * self.units_per_generator

    def cost(self, unit_seconds: float) -> float | None:
        """None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * unit_seconds / SECONDS_AN_HOUR

    def basis(self, *, spot: bool) -> str | None:
        """'2.5 per GPU-hour (spot)'."""
        if self.price_per_hour is None:
            return None
        return f"{self.price_per_hour:g} per {self.unit}-hour{' (spot)' if spot else ''}"
