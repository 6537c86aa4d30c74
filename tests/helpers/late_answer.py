"""A question to an actor on this node, asked from another node, whose answer takes some seconds: for a head.

Prints when it is asked, and when the answer has come.
"""

import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.generation.stages.asking import ask

ANSWER_TAKES_SECONDS = 6.0


class Answers:
    """Late, the first time."""

    def __init__(self) -> None:
        self._asked = 0

    def late(self) -> int:
        self._asked += 1
        if self._asked == 1:
            time.sleep(ANSWER_TAKES_SECONDS)
        return self._asked

    def busy(self) -> int:
        return 0


class Asks:
    """From another node; it is asked itself, over a connection that is lost, too."""

    def busy(self) -> int:
        return 0

    def ask(self, answers: ray.actor.ActorHandle, method: str) -> int:
        return ask(answers, method)


def main() -> None:
    ray.init(log_to_driver=False)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    again = {"max_restarts": -1, "max_task_retries": -1}
    answers = ray.remote(**again)(Answers).options(num_cpus=0, scheduling_strategy=here).remote()
    asks = ray.remote(**again)(Asks).options(num_cpus=1).remote()
    ask(asks, "ask", answers, "busy")
    print("asking", flush=True)
    print("answered", ask(asks, "ask", answers, "late"), flush=True)


if __name__ == "__main__":
    main()
