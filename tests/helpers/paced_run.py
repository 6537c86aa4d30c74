"""A run of the pipeline on the cluster at RAY_ADDRESS, whose generators take a second a picture: for tests that take
machines or processes away from it meanwhile.

    python -m tests.helpers.paced_run OUT SHARDS GENERATORS

The file `drawn` beside OUT gets a line for each picture.
"""

import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from ray.cloudpickle import register_pickle_by_value

from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.generation.stages.draw import DrawShard
from cluster.session import start_ray
from pcm.generation.drawing import Drawing, Request, TextToImage
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from tests.helpers import faulty_generators
from tests.helpers.faulty_generators import Pixels
from tests.helpers.tiny_generation import plan_dataset, write_corpus


def paced(drawn: Path) -> type[DrawShard]:
    class PacedPixels(Pixels):
        def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
            for request in slots.values():
                time.sleep(1)
                with drawn.open("a") as file:
                    file.write(f"{request.caption}\n")
            return super().draw_batch(slots, batch_size)

    class DrawPaced(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            return PacedPixels(spec)

    return DrawPaced


def main() -> None:
    out, shards, generators = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.INFO)
    register_pickle_by_value(faulty_generators)  # Ray's workers do not have the tests on their path
    start_ray()
    corpus = write_corpus(out.parent, [f"caption number {number}" for number in range(shards)])
    # Not null, which nobody watches.
    spec = DatasetSpec(generator=GeneratorSpec(model="paced", revision=""), clip=ClipSpec(model="null", revision=""))
    store, plan = plan_dataset(out, corpus, spec, shard_size=1)
    pools = Pools(generators=generators, scorers=0, generator_cpus=1, generator_gpus=0, scorer_gpus=0)
    run_pipeline(store, plan, pools, draw=paced(out.parent / "drawn"))


if __name__ == "__main__":
    main()
