"""How many actors of each stage a run has, and what each reserves."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.generation.request import MachineOptions
from pcm.errors import InputError

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

#: Generators that one CLIP actor with a GPU of its own keeps up with: it reads 16 pictures while one is denoised.
GENERATORS_PER_SCORER = 16
#: Of a CPU, for an actor of CLIP alone: next to nothing, so that it finds a place wherever there are CPUs. Not none:
#: then a head without CPUs would take it, and all pictures would go through that.
_SCORER_CPUS = 0.0002
#: So many of them find a place on a machine of whole CPUs, up to this number, that is full.
_SCORERS_A_MACHINE, _CPUS_A_MACHINE = 10, 128
#: Calls of an actor at a time: in one thread it works on a shard, in another it stores one.
CALLS = 2
#: Turns that Ray Data binds to a generator: while two are in work, it has the next ones, and waits for nobody. The rate
#: by which a pool grows needs as many. Nobody else gets them.
TURNS_AT_ONCE = 2 * CALLS
#: Ray counts a resource in so many parts of one.
_UNITS = 10_000


@dataclass(frozen=True, kw_only=True)
class Pools:
    """How many actors do what, and what each reserves. Changes speed, never a byte of the result."""

    generators: int  # at most
    scorers: int  # 0: every generator scores what it has drawn, in its own process and on its own GPU
    generator_cpus: float
    generator_gpus: float
    scorer_gpus: float
    min_generators: int | None = None  # None: as many as `generators` from the start; else the pool grows and shrinks
    node_label: tuple[str, str] | None = None  # only on nodes with this Ray label

    @staticmethod
    def for_cluster(
        *,
        device: str,
        cpus: float,
        gpus: float,
        generators: int | tuple[int, int] | None = None,
        scorers: int | None = None,
        clip_gpus: int = MachineOptions.clip_gpus,
        node_label: tuple[str, str] | None = None,
    ) -> "Pools":
        """One generator a GPU, which also scores; on a CPU, a generator a core with room for actors of CLIP alone.

        `generators` is a number or (least, most) of a pool that grows with its queue. With `scorers` or `clip_gpus`
        CLIP works in actors of its own, on a GPU each with `clip_gpus` of them, which serves 16 generators.

        Generators never fill a machine: else, when one is lost, generators that start again could take the last CPUs,
        their shards would wait for a scorer that has no place, and the run would stand still. The operating system
        shares the CPUs out. Raises InputError.
        """
        least, most = generators if isinstance(generators, tuple) else (None, generators)
        if device != "cuda":
            if clip_gpus:
                raise InputError(f"--clip-gpus {clip_gpus}: is for GPUs, and this run draws on CPUs; leave it out")
            count = most or max(1, int(cpus))
            cpus = cpus or count  # a cluster that has none yet is to get one for each generator
            share = max(0.1, min(1.0, min(cpus * 0.75, cpus - 0.35) / count))  # room for scorers
            return Pools(
                generators=count, min_generators=least, scorers=scorers or 0,
                generator_cpus=_that_never_fills(share), generator_gpus=0, scorer_gpus=0,
                node_label=node_label,
            )  # fmt: skip
        if scorers or clip_gpus:
            clip_gpus = clip_gpus or 1
            served = most / GENERATORS_PER_SCORER if most else gpus / (GENERATORS_PER_SCORER + clip_gpus)
            scorers = scorers or max(1, math.ceil(served))
        count = most or max(1, int(gpus - (scorers or 0) * clip_gpus))
        return Pools(
            generators=count, min_generators=least, scorers=scorers or 0,
            generator_cpus=0.9, generator_gpus=1, scorer_gpus=clip_gpus,
            node_label=node_label,
        )  # fmt: skip

    @staticmethod
    def of(asked: MachineOptions, *, device: str, cpus: float, gpus: float) -> "Pools":
        """`for_cluster` with what a request asks for."""
        return Pools.for_cluster(
            device=device,
            cpus=cpus,
            gpus=gpus,
            generators=asked.generators,
            scorers=asked.scorers,
            clip_gpus=asked.clip_gpus,
            node_label=asked.node_label,
        )

    @property
    def node_labels(self) -> dict[str, str]:
        """What the nodes have on which the actors are."""
        return dict([self.node_label]) if self.node_label else {}

    def generator_takes(self) -> dict[str, float]:
        """How much of which of Ray's resources one generator reserves."""
        return {"GPU": self.generator_gpus, "CPU": self.generator_cpus}

    def scorer_takes(self) -> dict[str, float]:
        """The same of an actor of CLIP alone."""
        return {"GPU": self.scorer_gpus, "CPU": _SCORER_CPUS}

    def require_room_for_clip(self, gpus: float) -> None:
        """Raises InputError where generators leave no GPU for the actors of CLIP alone, of so many that will not get
        more: what they draw would be stored by nobody."""
        generators = self.min_generators or self.generators
        wanted = generators * self.generator_gpus + self.scorers * self.scorer_gpus
        if self.scorers and wanted > gpus:
            raise InputError(
                f"generators ({generators}) and actors of CLIP alone ({self.scorers}) take {wanted:g} GPUs, and there "
                f"are {gpus:g}, to which no others come; lower --generators, --scorers or --clip-gpus, or "
                "leave the last two out: each generator scores then"
            )

    def turns(self, shards: int) -> int:
        """Of a run over so many shards: one for each, and those that may be of no use to it.

        Generators that are lost keep the turns that are bound to them. What an actor of CLIP holds that cannot load it
        is drawn again, each shard in one turn more; then it holds nothing else.
        """
        bound = TURNS_AT_ONCE * min(self.generators, shards)
        return shards + bound + CALLS * min(self.scorers, shards)

    def draw_options(self, shards: int) -> dict[str, Any]:
        """What `map_batches` is told about the generator pool of a run over so many shards."""
        most = min(self.generators, shards)
        least = most if self.min_generators is None else min(self.min_generators, most)
        return self._stage(_pool(least, most, TURNS_AT_ONCE), self.generator_cpus, self.generator_gpus)

    def score_options(self, shards: int) -> dict[str, Any]:
        """The same of the pool of CLIP alone, where there is one."""
        count = min(self.scorers, shards)
        return self._stage(_pool(count, count, CALLS), _SCORER_CPUS, self.scorer_gpus)

    def _stage(self, compute: "ActorPoolStrategy", cpus: float, gpus: float) -> dict[str, Any]:
        options: dict[str, Any] = {"compute": compute, "num_cpus": cpus, "num_gpus": gpus}
        return options | ({"label_selector": self.node_labels} if self.node_label else {})


def _that_never_fills(share: float) -> float:
    """The largest share of a CPU, up to this one, of which no number fills a machine of whole CPUs."""
    least = round(_SCORERS_A_MACHINE * _SCORER_CPUS * _UNITS)
    units = int(share * _UNITS)
    while any(cpus * _UNITS % units < least for cpus in range(1, _CPUS_A_MACHINE + 1)):
        units -= 1
    return units / _UNITS


def _pool(least: int, most: int, at_once: int) -> "ActorPoolStrategy":
    """`at_once`: shards that are bound to an actor."""
    from ray.data import ActorPoolStrategy  # seconds to import: not before Ray's start, which does it

    return ActorPoolStrategy(
        **({"size": most} if least == most else {"min_size": least, "max_size": most}),
        max_concurrent_calls_per_actor=CALLS,
        max_tasks_in_flight_per_actor=at_once,
        enable_true_multi_threading=True,
    )
