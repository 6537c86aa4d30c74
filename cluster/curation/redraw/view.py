"""jobs.refine --method best-of-n and redraw: captions drawn again, each with the best of its pictures, as a view.

    lineage.json       what is asked for
    redraws/plan.json  how many pictures, and what they are expected to gain and to take; before the first is drawn
    redraws/round-*/   the rounds, each a dataset (rounds.py)
    attempts.parquet   what every picture scored: sample_id, attempt (0: the stored one), seed, clip_score, kept
    rows/, dataset.json  the view, last

What a round draws follows from the source and the rounds before it alone, and a round that was begun is finished as it
was planned. So a run that was killed goes on where it was, to the same view.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.curation.redraw.budget import pictures_of, seconds_per_picture
from cluster.curation.redraw.choice import predicted_gain, ranked
from cluster.curation.redraw.earlier import attempts_before
from cluster.curation.redraw.rounds import Draw, Drawn, Redraws, draw_round, round_store
from cluster.curation.redraw.scores import Scores
from cluster.curation.redraw.settings import LOWEST, MOST_REDRAWS, PICTURES, Policy
from cluster.curation.refine_request import BEST_OF_N, RefineRequest
from cluster.curation.rows import IndexRows, read_index
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import Manifest
from cluster.dataset.environment import made_by
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import OpenDataset
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.request import ShardOptions
from cluster.dataset.rows import read_shard
from cluster.dataset.view import ViewRows, write_view
from cluster.numbers import duration
from cluster.store.store import Store
from cluster.weights.node_copy import local_spec
from pcm.documents import document_bytes
from pcm.errors import InputError, one_line
from pcm.generation.prompt_length import truncation_check
from pcm.generation.seeds import REDRAW_STEP
from pcm.spec import DatasetSpec, GeneratorSpec

log = logging.getLogger(__name__)

REDRAW_PLAN_KEY = "redraws/plan.json"
ATTEMPTS_KEY = "attempts.parquet"


@dataclass(frozen=True)
class Asked:
    """How many pictures are drawn, and how they are chosen. redraws: of each row, for best-of-n; else None. before: how
    many redraws of a row the steps before counted (redraw.earlier)."""

    pictures: int
    rounds: int
    policy: Policy
    redraws: int | None = None
    before: int = 0


def redraw_lineage(source: OpenDataset, request: RefineRequest) -> Lineage:
    """What decides the view, before anything is drawn."""
    settings: dict[str, Any] = {"method": request.method}
    names = ("best_of",) if request.method == BEST_OF_N else ("budget", "budget_in", "choose", "rounds")
    settings |= {name: getattr(request, name) for name in names}
    if request.method != BEST_OF_N and request.price_per_hour is not None:
        settings["price_per_hour"] = request.price_per_hour
    if request.method != BEST_OF_N and request.choose == LOWEST:
        settings["lowest"] = request.lowest
    return Lineage(
        method="refine", settings=settings, sources=(lineage_source(source),), rows_in=source.manifest.stored
    )


def check_attempts(spec: GeneratorSpec, *, data: str) -> None:
    """Raises InputError where the seeds of two redraws could meet."""
    if spec.max_attempts >= REDRAW_STEP:
        raise InputError(
            f"--data {data}: was drawn with --max-attempts {spec.max_attempts}; only with fewer than {REDRAW_STEP} can "
            "it be drawn again"
        )


def dry_run(source: OpenDataset, request: RefineRequest) -> dict[str, Any]:
    """What would be drawn, in what time, and what it is expected to gain; drawn is nothing. Raises InputError as
    `keep_plan` does."""
    planned = _plan(source, request, source.manifest.stored)
    scores = Scores.of(read_index([source]).clip_score)
    planned |= _prediction(scores, _asked(source, request, planned["pictures"]), planned["seconds_per_picture"])
    _say_prediction(planned, scores)
    mean = float(scores.stored.mean())
    return {
        "pictures": planned["pictures"],
        "mean_score_before": mean,
        "expected_mean_score": mean + planned["expected_gain"],
        "expected_seconds": planned["expected_seconds"],
    }


def keep_plan(source: OpenDataset, out: Store, request: RefineRequest, rows: int) -> dict[str, Any]:
    """How many pictures are drawn: found the first time, and from then on as it stands on the store.

    Raises InputError for a budget that buys none or too many, or whose price nothing tells.
    """
    return kept_plan(out) or _plan(source, request, rows)


def kept_plan(out: Store) -> dict[str, Any] | None:
    """What stands on the store; None before the first time. Raises InputError where that is damaged."""
    try:
        found = json.loads(out.read_bytes(REDRAW_PLAN_KEY))
        if type(found["pictures"]) is not int:
            raise TypeError(f"pictures is {found['pictures']!r}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{out.root}/{REDRAW_PLAN_KEY}: damaged; give another --out") from None


def _plan(source: OpenDataset, request: RefineRequest, rows: int) -> dict[str, Any]:
    seconds = _seconds_per_picture(source, request)
    if request.method == BEST_OF_N:
        pictures = rows * (request.best_of - 1)
    else:
        assert request.budget is not None
        pictures = pictures_of(
            request.budget, request.budget_in, seconds=seconds, price_per_hour=request.price_per_hour, data=request.data
        )
    if pictures > rows * MOST_REDRAWS:
        asked = f"--best-of {request.best_of}" if request.method == BEST_OF_N else f"--budget {request.budget:g}"
        raise InputError(
            f"{asked}: is {pictures:,} pictures for {rows:,} captions; at most {MOST_REDRAWS:,} a caption can be drawn"
        )
    return {"pictures": pictures, "seconds_per_picture": seconds}


def _seconds_per_picture(source: OpenDataset, request: RefineRequest) -> float | None:
    """For a budget in pictures it is only told: None where it cannot be found. Raises InputError for another budget."""
    try:
        return seconds_per_picture(source)
    except InputError as error:
        if request.method != BEST_OF_N and request.budget_in != PICTURES:
            raise
        log.warning("%s; how long the pictures will take is not known", error)
        return None


def redraw_view(
    source: OpenDataset,
    out: Store,
    lineage: Lineage,
    request: RefineRequest,
    spec: DatasetSpec,
    planned: dict[str, Any],
    draw: Draw,
) -> Manifest:
    """The view at `out`, which cluster.dataset.view.claim has begun. `spec`: how the source was drawn; `planned`: what
    `keep_plan` says."""
    rows = read_index([source])
    seeds = _seeds(source, rows)
    asked = _asked(source, request, planned["pictures"])
    scores = Scores.of(rows.clip_score)
    if "expected_gain" not in planned:
        planned = planned | _prediction(scores, asked, planned["seconds_per_picture"])
        out.write_bytes(REDRAW_PLAN_KEY, document_bytes(planned))
    _say_prediction(planned, scores)
    rounds: list[Drawn] = []
    curve = [_point(scores, 0, 0, None)]
    is_truncated = truncation_check(local_spec(spec))
    left = asked.pictures
    while left:
        redraws, expected = _next_round(scores, asked, left)
        log.info("round %d: %d pictures", len(rounds), len(redraws))
        drawn = draw_round(
            round_store(out, len(rounds)), redraws, rows, seeds, spec, draw,
            corpus=source.manifest.corpus, shard_size=_shard_size(source), is_truncated=is_truncated,
        )  # fmt: skip
        rounds.append(drawn)
        left -= len(redraws)
        before = scores.best.sum()
        scores = scores.after(redraws.row, redraws.attempt - asked.before, drawn.score)
        curve.append(_point(scores, asked.pictures - left, int(np.isnan(drawn.score).sum()), expected))
        log.info(
            "round %d: mean clip score %.4f (+%.4f); expected +%.4f", len(rounds) - 1, scores.best.mean(),
            (scores.best.sum() - before) / len(scores), expected / len(scores),
        )  # fmt: skip
    chosen = _Chosen.of(rows, rounds)
    out.write_bytes(ATTEMPTS_KEY, parquet_bytes(_attempts(rows, seeds, rounds, chosen)))
    share, estimated = scores.caption_share
    facts = {
        "moved": int((chosen.round >= 0).sum()),
        "drawn": asked.pictures,
        "failed": sum(int(np.isnan(drawn.score).sum()) for drawn in rounds),
        "mean_score_before": float(scores.stored.mean()),
        "mean_score_after": float(scores.best.mean()),
        "expected_mean_score": float(scores.stored.mean() + planned["expected_gain"]),
        "expected_seconds": planned["expected_seconds"],
        "caption_share": share if estimated else None,
        "curve": curve,
    }
    view = chosen.view_rows(rows, rounds)
    return write_view(
        out, [source, *(drawn.data for drawn in rounds)], view, replace(lineage, facts=facts),
        materialise=request.materialise, same_words=True, made_by=made_by(out),
    )  # fmt: skip


def _asked(source: OpenDataset, request: RefineRequest, pictures: int) -> Asked:
    try:
        before = attempts_before(source.manifest.lineage)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{source.store.root}/{MANIFEST_KEY}: damaged (lineage: {one_line(error, longest=200)}); make it again"
        ) from None
    if request.method == BEST_OF_N:
        return Asked(pictures, 1, Policy(), redraws=request.best_of - 1, before=before)
    return Asked(pictures, request.rounds, Policy(request.choose, request.lowest), before=before)


def _next_round(scores: Scores, asked: Asked, left: int) -> tuple[Redraws, float]:
    """(what is drawn next, the gain that is expected of it in all). At most once a row, but for best-of-n."""
    if asked.redraws is not None:
        rows = np.repeat(np.arange(len(scores)), asked.redraws)
        attempts = np.tile(np.arange(1, asked.redraws + 1), len(scores))
        return Redraws(rows, asked.before + attempts), scores.gain_of_several(np.arange(len(scores)), asked.redraws)
    rows = np.sort(ranked(asked.policy, scores)[: min(left, math.ceil(asked.pictures / asked.rounds))])
    return Redraws(rows, asked.before + scores.tried[rows] + 1), scores.gain_of_several(rows, 1)


def _prediction(scores: Scores, asked: Asked, seconds: float | None) -> dict[str, Any]:
    if asked.redraws is not None:
        gain = scores.gain_of_several(np.arange(len(scores)), asked.redraws)
    else:
        gain = predicted_gain(asked.policy, scores, asked.pictures)
    return {
        "expected_gain": gain / len(scores),  # of the mean score
        "expected_seconds": None if seconds is None else seconds * asked.pictures,
    }


def _say_prediction(planned: dict[str, Any], scores: Scores) -> None:
    seconds = planned["expected_seconds"]
    log.info(
        "%d pictures for %d rows: expected mean clip score %.4f -> %.4f (if the caption decides half of a score's "
        "variance; each round measures it), %s",
        planned["pictures"], len(scores), scores.stored.mean(), scores.stored.mean() + planned["expected_gain"],
        "in a time that the source does not tell" if seconds is None else f"some {duration(seconds)} of a generator",
    )  # fmt: skip


def _point(scores: Scores, drawn: int, failed: int, expected: float | None) -> dict[str, Any]:
    """One point of the curve: after so many pictures in all. expected_gain: of the round, before it was drawn."""
    share, estimated = scores.caption_share
    return {
        "drawn": drawn,
        "failed": failed,
        "mean_score": float(scores.best.mean()),
        "expected_gain": None if expected is None else expected / len(scores),
        "caption_share": share if estimated else None,
    }


def _seeds(source: OpenDataset, rows: IndexRows) -> np.ndarray:
    """(n,) int64 of the rows' stored pictures."""
    found = [read_shard(source.store, shard, ["seed"], checksum=False)["seed"].to_numpy() for shard in source.shards]
    seeds = np.zeros(len(rows), np.int64)
    for shard, values in enumerate(found):
        mine = rows.shard == shard
        seeds[mine] = values[rows.row[mine]]
    return seeds


def _shard_size(source: OpenDataset) -> int:
    """As the source was drawn: as many as are drawn in a while."""
    return source.plan.shard_size if source.plan is not None else ShardOptions.shard_size


@dataclass(frozen=True)
class _Chosen:
    """(n,) for each row the round and the redraw of it that are kept, -1 where the stored picture is; and the score.

    Of equal scores the earlier picture is kept."""

    round: np.ndarray
    place: np.ndarray
    score: np.ndarray

    @staticmethod
    def of(rows: IndexRows, rounds: list[Drawn]) -> "_Chosen":
        found, place = np.full(len(rows), -1), np.full(len(rows), -1)
        score = rows.clip_score.astype(np.float64)
        for number, drawn in enumerate(rounds):
            for redraw in np.flatnonzero(np.isfinite(drawn.score)).tolist():
                row = int(drawn.redraws.row[redraw])
                if drawn.score[redraw] > score[row]:
                    found[row], place[row], score[row] = number, redraw, drawn.score[redraw]
        return _Chosen(found, place, score)

    def view_rows(self, rows: IndexRows, rounds: list[Drawn]) -> ViewRows:
        source, shard, row = np.zeros(len(rows), np.int64), rows.shard.copy(), rows.row.copy()
        for number, drawn in enumerate(rounds):
            mine = np.flatnonzero(self.round == number)
            source[mine] = number + 1
            shard[mine], row[mine] = drawn.shard[self.place[mine]], drawn.place[self.place[mine]]
        shown = replace(rows, clip_score=self.score.astype(np.float32), source=source, shard=shard, row=row)
        return shown.for_view()


def _attempts(rows: IndexRows, seeds: np.ndarray, rounds: list[Drawn], chosen: _Chosen) -> pa.Table:
    """Every picture, in the order of row and attempt; clip_score null where it could not be made."""
    row = np.concatenate([np.arange(len(rows)), *(drawn.redraws.row for drawn in rounds)])
    attempt = np.concatenate([np.zeros(len(rows), np.int64), *(drawn.redraws.attempt for drawn in rounds)])
    score = np.concatenate([rows.clip_score.astype(np.float64), *(drawn.score for drawn in rounds)])
    seed = np.concatenate([seeds, *(drawn.seed for drawn in rounds)])
    kept = [chosen.round < 0]
    kept += [
        (chosen.round[drawn.redraws.row] == number) & (chosen.place[drawn.redraws.row] == np.arange(len(drawn.redraws)))
        for number, drawn in enumerate(rounds)
    ]
    order = np.lexsort((attempt, row))
    missing = np.isnan(score)
    table = pa.table(
        {
            "sample_id": pa.array(rows.sample_id[row].tolist(), pa.string()),
            "attempt": pa.array(attempt, pa.int32()),
            "seed": pa.array(seed, pa.int64(), mask=missing),
            "clip_score": pa.array(score.astype(np.float32), pa.float32(), mask=missing),
            "kept": pa.array(np.concatenate(kept)),
        }
    )
    return table.take(order).combine_chunks()
