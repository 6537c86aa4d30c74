"""How many actors of each stage a run has, and what each reserves."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pools:
    """How many actors do what, and what each reserves. Changes speed, never a byte of the result."""

    generators: int
    scorers: int
    writers: int
    generator_cpus: float
    generator_gpus: float
    scorer_cpus: float
    scorer_gpus: float
    writer_cpus: float

    @staticmethod
    def for_cluster(*, device: str, cpus: float, gpus: float, generators: int | None = None) -> "Pools":
        """One generator a GPU, sharing it with a scorer; on a CPU, a generator a core with room for the other stages.

        On a GPU the generator takes 0.8 of it and a scorer 0.2; on CPUs the fractions leave every stage schedulable
        on two cores, and the operating system shares the rest out.
        """
        if device == "cuda":
            count = generators or max(1, int(gpus))
            return Pools(
                generators=count, scorers=count, writers=max(1, count // 4),
                generator_cpus=1, generator_gpus=0.8, scorer_cpus=1, scorer_gpus=0.2, writer_cpus=0.5,
            )  # fmt: skip
        count = generators or max(1, int(cpus))
        share = max(0.1, min(1.0, cpus * 0.75 / count))
        return Pools(
            generators=count, scorers=max(1, count // 8), writers=1,
            generator_cpus=share, generator_gpus=0, scorer_cpus=0.2, scorer_gpus=0, writer_cpus=0.1,
        )  # fmt: skip
