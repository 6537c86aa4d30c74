"""What a worker raises reaches the user as what it is."""

import logging

from ray.exceptions import RayTaskError

from cluster.session import is_no_user_error, user_error
from pcm.errors import InputError

RECORD = logging.LogRecord("ray.data.exceptions", logging.ERROR, "", 0, "a long traceback", None, None)


def test_an_input_error_is_found_under_what_ray_wraps_around_it() -> None:
    inner = InputError("batch size 0: must be at least 1")
    task = RayTaskError("draw", "Traceback", inner)
    outer = RuntimeError("pipeline failed")
    outer.__cause__ = task
    assert user_error(outer) is inner
    told = user_error(RuntimeError("Traceback\npcm.errors.InputError: no such model\n"))
    assert told is not None and str(told) == "no such model"
    assert user_error(RayTaskError("draw", "Traceback", ValueError("a bug"))) is None


def test_ray_data_keeps_its_traceback_of_a_users_error_to_itself() -> None:
    assert is_no_user_error(RECORD)
    for error, shown in ((InputError("no such model"), False), (ValueError("a bug"), True)):
        try:
            raise error
        except ValueError:
            assert is_no_user_error(RECORD) is shown
