"""What a sweep found: a table, results.parquet, best.json for `jobs.train --config`, and plots."""

import io
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.store.store import Store, join
from cluster.sweep.plots import plots
from cluster.sweep.results import SettingResult, TrialResult, by_setting, tied
from cluster.sweep.trial import trial_id
from cluster.training.config import TrainConfig
from pcm.documents import document_bytes

log = logging.getLogger(__name__)

RESULTS_KEY = "results.parquet"
BEST_KEY = "best.json"
TABLE_KEY = "table.txt"
PLOTS = "plots"
#: Settings that log and report show at once; all are in the table.
ROWS_SHOWN = 15


def write_report(
    out: Store, results: Sequence[TrialResult], *, params: Sequence[str], base: TrainConfig
) -> dict[str, Any] | None:
    """Write everything under OUT, log the best; the job's summary, or None where no setting has a result."""
    ranked = by_setting(results, base=base)
    table = result_table(ranked, params=params)
    out.write_bytes(TABLE_KEY, (table + "\n").encode())
    shown = "\n".join(table.splitlines()[: 1 + ROWS_SHOWN])
    others = len(ranked) - ROWS_SHOWN
    more = f"\n{others} more settings are in {join(out.root, TABLE_KEY)}" if others > 0 else ""
    log.info("results, best first:\n%s%s", shown, more)
    out.write_bytes(RESULTS_KEY, _parquet(results, params=params))
    for name, data in plots(ranked, params=params).items():
        out.write_bytes(f"{PLOTS}/{name}", data)
    if not ranked or math.isnan(ranked[0].mean):
        return None
    best, ties = ranked[0], len(tied(ranked))
    if ties > 1:
        log.info("%d settings tie at CIDEr %.4f; the one that changes least of the preset is taken", ties, best.mean)
    config = base.with_overrides(best.settings)
    out.write_bytes(BEST_KEY, document_bytes(config.to_dict()))
    top = max(best.trials, key=lambda trial: trial.best["CIDEr"] if trial.best else -math.inf)
    return {
        "best": {
            "settings": best.settings,
            "CIDEr": best.mean,
            "CIDEr_spread": None if math.isnan(best.spread) else best.spread,
            "seeds": len(best.trials),
            "tied": ties,
        },
        "config": join(out.root, BEST_KEY),
        "checkpoint": join(out.root, "trials", trial_id(top.overrides), "best"),
        "trials": len(results),
        "by_status": dict(sorted(Counter(result.status for result in results).items())),
        "results": join(out.root, RESULTS_KEY),
        "plots": join(out.root, PLOTS),
    }


def result_table(ranked: Sequence[SettingResult], *, params: Sequence[str]) -> str:
    """One line a setting, columns aligned."""
    seeds = max((len(setting.trials) for setting in ranked), default=1)
    header = [*params, "CIDEr", *(["spread", "seeds"] if seeds > 1 else []), "epochs", "seconds", "status"]
    lines = [header]
    for setting in ranked:
        over_seeds = [_number(setting.spread), str(len(setting.trials))] if seeds > 1 else []
        epochs = [len([row for row in trial.history if not row.get("reason")]) for trial in setting.trials]
        seconds = sum(trial.seconds for trial in setting.trials)
        lines.append(
            [
                *(_number(setting.settings.get(name, "")) for name in params),
                *(
                    _number(setting.mean),
                    *over_seeds,
                    "/".join(map(str, sorted(set(epochs)))),
                    _number(seconds, "{:.1f}"),
                ),
                "; ".join(sorted({f"{t.status}: {t.reason}" if t.reason else t.status for t in setting.trials})),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _parquet(results: Sequence[TrialResult], *, params: Sequence[str]) -> bytes:
    """One row a trial: its settings, seed, status, reason, the best epoch's numbers, seconds, all epochs' CIDEr."""
    rows = []
    for result in results:
        best = result.best or {}
        rows.append(
            {
                "trial": trial_id(result.overrides),
                **{name: result.overrides.get(name) for name in params},
                "seed": result.overrides.get("seed"),
                "status": result.status,
                "reason": result.reason,
                "CIDEr": best.get("CIDEr"),
                "best_epoch": best.get("epoch"),
                "loss": best.get("loss"),
                "epochs": len(result.history),
                "seconds": result.seconds,
                "CIDEr_by_epoch": [row["CIDEr"] for row in result.history],
            }
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def _number(value: Any, form: str = "{:.4g}") -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else form.format(value)
    return str(value)
