"""What a worker raises reaches the user as what it is."""

import logging
import os
import subprocess
import sys

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


def test_workers_start_with_the_environment_that_is_asked_for() -> None:
    code = (
        "import os, ray; from cluster.session import start_ray; start_ray(num_cpus=1, worker_env={'PCM_ASKED': 'for'});"
        "print(ray.get(ray.remote(lambda: os.environ.get('PCM_ASKED')).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.splitlines()[-1:] == ["for"], done.stderr
