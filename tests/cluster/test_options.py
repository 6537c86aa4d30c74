"""What Python callers may write for a field of a request, and what is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.curation.curate_request import CurateRequest, Subset
from cluster.evaluation.request import CaptionRequest
from cluster.generation import GenerateRequest
from cluster.options import Request
from cluster.sweep.request import SweepRequest
from cluster.training.request import TrainRequest
from pcm.errors import InputError

#: What each of these requests must be given.
REQUIRED: dict[type[Request], dict[str, Any]] = {
    CaptionRequest: {"checkpoint": "run"},
    CurateRequest: {"data": "made", "out": "chosen"},
    GenerateRequest: {"corpus": "embedded", "out": "made"},
    SweepRequest: {"data": "made", "out": "sweep", "search": "grid"},
    TrainRequest: {"data": "made", "out": "run"},
}


@pytest.mark.parametrize(
    ("kind", "name", "given", "expected"),
    [
        (CurateRequest, "drop_word", "dog", ("dog",)),
        (CurateRequest, "drop_word", {"dog", "cat", "a"}, ("a", "cat", "dog")),
        (CurateRequest, "drop_word", frozenset({"dog"}), ("dog",)),
        (CurateRequest, "data", "made", ("made",)),
        (CurateRequest, "data", [Path("a"), "b"], ("a", "b")),
        (CurateRequest, "out", Path("chosen/1"), "chosen/1"),
        (CurateRequest, "subset", "0.5", Subset(count=None, share=0.5)),
        (CaptionRequest, "images", "in/photos", ("in/photos",)),
        (CaptionRequest, "images", Path("in/photos"), ("in/photos",)),
        (CaptionRequest, "images", (Path(name) for name in ("b", "a")), ("b", "a")),
        (TrainRequest, "data", {"b": 1, "a": 2}.keys(), ("b", "a")),
        (TrainRequest, "data", {1: "b", 2: "a"}.values(), ("b", "a")),
        (TrainRequest, "data", Path("made"), "made"),
        (TrainRequest, "data", ["a", Path("b")], ("a", "b")),
        (TrainRequest, "epochs", np.int64(3), 3),
        (TrainRequest, "epochs", np.float64(3), 3),
        (TrainRequest, "fraction", 1, 1),  # as --spec has it of a dataset, whose digest tells 1 from 1.0
        (TrainRequest, "num_workers", "2:8", (2, 8)),
        (TrainRequest, "num_workers", [2, 8], (2, 8)),
        (TrainRequest, "overrides", "top_concepts=3", {"top_concepts": 3}),
        (TrainRequest, "overrides", {"top_concepts": 3}, {"top_concepts": 3}),
        (SweepRequest, "trials", 5.0, 5),
        (SweepRequest, "params", ("top_concepts=1,3", "tau=1"), {"top_concepts": "1,3", "tau": "1"}),
        (GenerateRequest, "t2i_without", "safety_checker", ("safety_checker",)),
        (GenerateRequest, "lora", "org/repo=0.5", (("org/repo", 0.5),)),
        (GenerateRequest, "lora", [("org/repo", 1)], (("org/repo", 1.0),)),
        (GenerateRequest, "pipeline_options", {"clip_skip": 1, "x": True}, {"clip_skip": 1, "x": True}),
        (GenerateRequest, "pipeline_options", {"strength": 1.0}, {"strength": 1.0}),
        (GenerateRequest, "limit", 1e3, 1000),
        (GenerateRequest, "batch_size", "8", 8),
        (GenerateRequest, "batch_size", 8.0, 8),
        (GenerateRequest, "node_label", ["a", "b"], ("a", "b")),
    ],
)
def test_a_value_becomes_what_the_field_holds(kind: type[Request], name: str, given: object, expected: object) -> None:
    found = getattr(kind(**REQUIRED[kind] | {name: given}), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "name", "given", "said"),
    [
        (CurateRequest, "max_words", "12", "--max-words '12': must be a whole number"),
        (CurateRequest, "min_clip_score", "0.5", "--min-clip-score '0.5': must be a number"),
        (CurateRequest, "max_words", True, "--max-words True: must be a whole number"),
        (CurateRequest, "drop_word", {"dog": 1}, "--drop-word {'dog': 1}: must be a text, or several in a list"),
        (CurateRequest, "drop_word", b"dog", "--drop-word b'dog': must be a text, or several in a list"),
        (CurateRequest, "drop_word", {3}, "--drop-word [3]: must be a text, or several in a list"),
        (TrainRequest, "data", {"https://token@host/made"}, "https://...: the URI carries a credential"),
        (TrainRequest, "out", None, "--out None: must be a text"),
        (TrainRequest, "data", ["a", 3], "--data ['a', 3]: must be a text, or several in a list"),
        (TrainRequest, "resume", 1, "--resume 1: must be true or false"),
        (TrainRequest, "overrides", 3, "--set 3: must be a mapping, or a text FIELD=VALUE"),
        (TrainRequest, "overrides", "tau", "--set 'tau': write FIELD=VALUE, such as top_concepts=3"),
        (TrainRequest, "num_workers", 2.5, "--num-workers 2.5: must be a whole number or (a whole number, a"),
        (
            SweepRequest, "params", {"top_concepts": [1, 3]},
            "--param {'top_concepts': [1, 3]}: must be a mapping, each value a text, or a text FIELD=SPEC",
        ),
        (GenerateRequest, "lora", ("org/repo", 0.5), "--lora ('org/repo', 0.5): must be (a text, a number), or"),
        (GenerateRequest, "limit", np.zeros((20, 20)), "--limit array([[0., 0., 0., 0."),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_one_line(kind: type[Request], name: str, given: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        kind(**REQUIRED[kind] | {name: given})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
