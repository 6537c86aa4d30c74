"""Questions to the monitor, which is often on another node."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.actor import ActorHandle

#: The monitor answers within milliseconds; an answer that takes longer may have been lost.
NO_ANSWER_SECONDS = 10.0


def ask(monitor: "ActorHandle", method: str, *arguments: Any, **named: Any) -> Any:
    """Call the monitor and wait for its answer.

    A link that is cut for half a minute and heals leaves a connection whose other end is gone. Who only waits there
    learns of it after up to seven minutes (gRPC's keepalive, as Ray sets it); who sends something learns of it at once.
    Then Ray calls again, so a question may be asked twice.
    """
    import ray  # the stages are usable without it

    answer = getattr(monitor, method).remote(*arguments, **named)
    while True:
        try:
            return ray.get(answer, timeout=NO_ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError:
            monitor.busy.remote()
