"""What a sweep varies: `top_concepts=1,3,5,7`, `lr_factor=log:0.1:2`, checked against TrainConfig's fields.

A domain is a list of values (VALUE,VALUE,...), or a range: `uniform:LOW:HIGH`, `log:LOW:HIGH` (uniform in the
logarithm), `int:LOW:HIGH` (whole numbers, both ends included).
"""

import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.training.config import TrainConfig
from pcm.errors import InputError
from pcm.name_value import read_value, split_name_value

SPEC_HELP = "VALUE,VALUE,... or uniform:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def sample(self, random: np.random.Generator) -> Any:
        return self.values[random.integers(len(self.values))]

    @property
    def examples(self) -> tuple[Any, ...]:
        return self.values


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`; `kind` is uniform, log or int."""

    kind: str
    low: float
    high: float

    def sample(self, random: np.random.Generator) -> Any:
        if self.kind == "int":
            return int(random.integers(int(self.low), int(self.high) + 1))
        if self.kind == "log":
            return float(np.exp(random.uniform(np.log(self.low), np.log(self.high))))
        return float(random.uniform(self.low, self.high))

    @property
    def examples(self) -> tuple[Any, ...]:
        """Both ends: a field that takes them takes what is between."""
        ends = (self.low, self.high)
        return tuple(map(int, ends)) if self.kind == "int" else ends


Domain = Choice | Range
SearchSpace = Mapping[str, Domain]

#: Mix-up thresholds and temperatures, loss temperatures and learning rate: what is searched where nothing is named.
DEFAULT_SPACE = types.MappingProxyType(
    {
        "concept_threshold": "uniform:0:0.1",
        "top_concepts": "1,3,5,7",
        "top_patches": "1,3,5,7,10",
        "tau": "log:0.003:0.1",
        "clip_weight": "uniform:1:6",
        "focal_gamma": "1,2,3",
        "label_smoothing": "0,0.1,0.2",
        "lr_factor": "log:0.2:2",
    }
)

#: The paper's ablations over K, M and w (arXiv 2501.00437, figure of section 4.4; CIDEr peaks at 5, 5 and 4): one
#: value of the default spec after another, nothing else varied.
ABLATIONS = types.MappingProxyType(
    {"K": {"top_concepts": "1,2,3,4,5,6,7"}, "M": {"top_patches": "1,2,3,4,5,6,7"}, "w": {"clip_weight": "1,2,3,4,5,6"}}
)


def parse_param(text: str) -> tuple[str, str]:
    """("tau", "log:0.01:1") of "tau=log:0.01:1"."""
    return split_name_value(text, option="--param", form="FIELD=SPEC", example=f"tau=log:0.01:1; SPEC is {SPEC_HELP}")


def parse_domain(name: str, spec: str) -> Domain:
    """Raises InputError for a spec that is not one of SPEC_HELP."""
    kind, colon, ends = spec.partition(":")
    if not colon:
        values = tuple(read_value(part) for part in spec.split(","))
        if len(set(map(repr, values))) < len(values) or "" in values:
            raise InputError(f"--param {name}={spec}: a value is empty or given twice; write {SPEC_HELP}")
        return Choice(values)
    if kind not in ("uniform", "log", "int"):
        raise InputError(f"--param {name}={spec}: {kind!r} is not known; write {SPEC_HELP}")
    number = int if kind == "int" else float
    try:
        low, high = (number(end) for end in ends.split(":"))
    except ValueError:
        raise InputError(f"--param {name}={spec}: write {kind}:LOW:HIGH with two numbers") from None
    if not (low < high and np.isfinite([low, high]).all()) or (kind == "log" and low <= 0):
        raise InputError(f"--param {name}={spec}: needs LOW below HIGH" + (", both above 0" if kind == "log" else ""))
    return Range(kind, low, high)


def search_space(specs: Mapping[str, str], *, base: TrainConfig) -> dict[str, Domain]:
    """The domains of `specs`. Raises InputError naming the first value that `base` does not accept."""
    space = {}
    for name, spec in specs.items():
        if name == "seed":
            raise InputError(f"--param seed={spec}: seeds are no setting to search; give --seeds N")
        if name == "epochs":
            raise InputError(f"--param epochs={spec}: every trial has the same; give --epochs N")
        space[name] = parse_domain(name, spec)
        for value in space[name].examples:
            # Each alone: whether the one divides the other is known of a trial's whole settings.
            beside = {"batch_size": {"grad_accumulation": 1}, "grad_accumulation": {"batch_size": value}}.get(name, {})
            try:
                base.with_overrides({**beside, name: value})
            except InputError as error:
                raise InputError(f"--param {name}={spec}: {error}") from None
    return space


def grid(space: SearchSpace) -> list[dict[str, Any]]:
    """Every combination of the values. Raises InputError where a domain is a range."""
    choices: list[Sequence[Any]] = []
    for name, domain in space.items():
        if not isinstance(domain, Choice):
            raise InputError(f"--param {name}: --search grid needs values ({name}=VALUE,VALUE,...), not a range")
        choices.append(domain.values)
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]


def random_settings(space: SearchSpace, *, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` random settings; the i-th depends on (space, seed, i) alone, so that a sweep can be made longer."""
    settings = []
    for index in range(count):
        random = np.random.default_rng([seed, index])
        settings.append({name: domain.sample(random) for name, domain in space.items()})
    return settings


def optuna_distributions(space: SearchSpace) -> dict[str, Any]:
    """The space in Optuna's own terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(domain: Domain) -> Any:
        if isinstance(domain, Choice):
            return CategoricalDistribution(list(domain.values))
        if domain.kind == "int":
            return IntDistribution(int(domain.low), int(domain.high))
        return FloatDistribution(domain.low, domain.high, log=domain.kind == "log")

    return {name: distribution(domain) for name, domain in space.items()}
