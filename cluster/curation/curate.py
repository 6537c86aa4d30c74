"""jobs.curate: rows of one or several datasets, by rules, as a view."""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.curation.curate_request import CurateRequest
from cluster.curation.rows import FindNouns, IndexRows, read_index
from cluster.curation.rules import RULES, Context, Verdict, check_can_judge
from cluster.dataset.beside import is_there
from cluster.dataset.derived import lineage_source, open_source
from cluster.dataset.environment import made_by
from cluster.dataset.keys import CONCEPTS_KEY, MANIFEST_KEY, PLAN_KEY
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset
from cluster.dataset.rows import read_view_part
from cluster.dataset.view import ViewRows, write_view
from cluster.dataset.vocabulary_files import stored_concepts
from cluster.store.store import open_store, read_uri
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary, lexicon_nouns, noun_finder

log = logging.getLogger(__name__)

#: Rows that a rule dropped, shown in the report and by --dry-run.
EXAMPLES = 6


@dataclass(frozen=True)
class _Judged:
    """The rows that stay, and what each rule did."""

    rows: IndexRows
    rules: tuple[RuleCount, ...]
    facts: dict[str, Any]


def curate(request: CurateRequest) -> dict[str, Any]:
    """Write the view, or with dry_run say what would go: rows_in, rows_out, dropped (by rule), fingerprint.

    The same request on the same data gives the same fingerprint, however the data is cut into shards. Raises InputError
    for what cannot be read or judged, for datasets of different CLIPs, and where no row is left.
    """
    started = time.monotonic()
    sources = [
        open_source(uri, request.out, unfinished=request.unfinished, number=number)
        for number, uri in enumerate(request.data)
    ]
    if len({source.store.prefix for source in sources}) < len(sources):
        raise InputError(f"--data {' '.join(request.data)}: a dataset twice; give each once")
    for source in sources:
        _check_pictures(source)
    if len(sources) > 1:
        from cluster.dataset.together import check_same_clip  # brings torch and Ray, which take seconds

        check_same_clip(sources)
    concepts = _concepts(sources)
    scored = all(source.manifest.spec.clip.model != "null" for source in sources)
    names = [name for name in RULES if name in request.rules]
    check_can_judge(names, request, scored=scored, concepts=concepts, place=sources[0].store.root)
    needs = frozenset().union(*(RULES[name].needs for name in names))
    find_nouns = (
        noun_finder_of(concepts) if concepts and any(RULES[name].by_concept for name in names) else lexicon_nouns
    )
    rows = read_index(
        sources, needs=needs, concepts=frozenset(concepts.names) if concepts else frozenset(), find_nouns=find_nouns
    )
    rows_in = len(rows)
    judged = _judge(rows, names, Context(request, rows.own_id, concepts), sources)
    dropped = {rule.rule: rule.dropped for rule in judged.rules}
    summary = {
        "rows_in": rows_in,
        "rows_out": len(judged.rows),
        "dropped": dropped,
        **judged.facts,
        **_unfinished(sources),
    }
    if request.dry_run:
        return {**summary, "fingerprint": None, "seconds": round(time.monotonic() - started, 2)}
    if not len(judged.rows):
        said = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise InputError(f"no row of {rows_in} is left ({said}); loosen a rule, look at it with --dry-run")
    assert request.out is not None
    lineage = Lineage(
        method="curate",
        settings=_settings(request, names),
        sources=tuple(map(lineage_source, sources)),
        rows_in=rows_in,
        rules=judged.rules,
        facts=judged.facts,
    )
    out = open_store(request.out)
    manifest = write_view(
        out, sources, judged.rows.for_view(), lineage, materialise=request.materialise, made_by=made_by(out)
    )
    return {
        **summary,
        "fingerprint": manifest.fingerprint,
        "dataset": request.out,
        "seconds": round(time.monotonic() - started, 2),
    }


def _check_pictures(source: OpenDataset) -> None:
    """Raises InputError for a view whose pictures are gone: rules that look at captions and scores would not tell."""
    for each in source.manifest.pictures:
        if not is_there(each.path, (MANIFEST_KEY, PLAN_KEY)):
            raise InputError(
                f"{source.store.root}: a view, whose pictures are gone: no dataset at {each.path}; put it back there"
            )


def _judge(rows: IndexRows, names: list[str], context: Context, sources: list[OpenDataset]) -> _Judged:
    counts: list[RuleCount] = []
    facts: dict[str, Any] = {}
    for name in names:
        verdict = RULES[name].apply(rows, context)
        setting = _plain(getattr(context.asked, name))
        examples = _examples(rows, verdict, sources)
        count = int(verdict.drop.sum())
        _say(name, setting, count, len(rows), examples, dry_run=getattr(context.asked, "dry_run", False))
        counts.append(RuleCount(rule=name, setting=setting, dropped=count, examples=examples))
        facts |= verdict.facts
        rows = rows.take(~verdict.drop)
    return _Judged(rows, tuple(counts), facts)


def _say(name: str, setting: Any, count: int, rows: int, examples: tuple[dict, ...], *, dry_run: bool) -> None:
    log.info("%s %s: %d of %d rows %s", name, setting, count, rows, "would go" if dry_run else "go")
    for each in examples if dry_run else ():
        log.info("    %s  %s  (%s)", each["sample_id"], each["caption"][:100], each["why"])
        if "beside" in each:
            log.info("      like %s  %s", each["beside"]["sample_id"], each["beside"]["caption"][:100])


def _examples(rows: IndexRows, verdict: Verdict, sources: list[OpenDataset]) -> tuple[dict[str, Any], ...]:
    """Rows that go most narrowly, so that the threshold can be judged by them."""
    goes = np.flatnonzero(verdict.drop)
    narrow = goes[np.lexsort((goes, np.asarray(verdict.margin, np.float64)[goes]))][:EXAMPLES]
    found = []
    for row in narrow.tolist():
        example = {**shown(rows, row, sources), "why": verdict.why(row)}
        if verdict.beside is not None:
            example["beside"] = shown(rows, int(verdict.beside[row]), sources)
        found.append(example)
    return tuple(found)


def shown(rows: IndexRows | ViewRows, row: int, sources: list[OpenDataset]) -> dict[str, Any]:
    """A row, and where its picture is: as of a view among the sources, in the dataset that holds it."""
    source = sources[int(rows.source[row])]
    stored, path, place = source.shards[int(rows.shard[row])], source.store.address, int(rows.row[row])
    if source.manifest.is_view:
        part = read_view_part(source.store, stored)
        pointed = part.rows.slice(place, 1).to_pylist()[0]
        shard = part.shards[pointed["shard"]]
        stored, path, place = shard.stored, source.manifest.pictures[shard.pictures].path, pointed["row"]
    shard_of = {name: getattr(stored, name) for name in ("key", "rows", "bytes", "sha256")}
    return {
        "sample_id": str(rows.sample_id[row]),
        "caption": str(rows.caption[row]),
        "clip_score": float(rows.clip_score[row]),
        "picture": {"path": path, "shard": shard_of, "row": place},
    }


def _settings(request: CurateRequest, names: list[str]) -> dict[str, Any]:
    """What decides the rows besides the data; of lists their content, too."""
    settings = {
        name: _plain(getattr(request, name)) for name in request.rules if name not in ("keep_list", "drop_list")
    }
    for name in ("keep_list", "drop_list"):
        if name in names:
            path = getattr(request, name)
            settings[name] = {"path": path, "sha256": hashlib.sha256(read_uri(path)).hexdigest()}
    return settings


def _plain(value: Any) -> Any:
    """In JSON."""
    if hasattr(value, "share"):
        return value.count if value.share is None else value.share
    return json.loads(json.dumps(value))


def _concepts(sources: list[OpenDataset]) -> ConceptVocabulary | None:
    if not all(source.store.exists(CONCEPTS_KEY) for source in sources):
        return None
    found = [stored_concepts(source.store) for source in sources]
    if len(found) == 1:
        return found[0]
    from cluster.dataset.together import merged_concepts

    return merged_concepts(found)


def noun_finder_of(concepts: ConceptVocabulary) -> FindNouns:
    """What found the concepts: a spaCy model, or the lexicon, which also serves for concepts that a user gave, and for
    those of several finders. Raises InputError where the spaCy model is not installed."""
    finder, _, model = concepts.source.partition(":")
    if finder != "spacy" or " + " in model:
        return lexicon_nouns
    try:
        return noun_finder(model)[1]
    except InputError:
        raise InputError(
            f"the concepts of the data were found by the spaCy model {model!r}, which is not installed here; install "
            "it, or leave out the rules by concept"
        ) from None


def _unfinished(sources: list[OpenDataset]) -> dict[str, Any]:
    found = {source.store.root: source.extent for source in sources if source.is_unfinished}
    return {"unfinished": found} if found else {}
