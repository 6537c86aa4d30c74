"""The rules of jobs.curate: which rows go, and why.

A rule is a function from rows to a `Verdict`, and a line of RULES, in whose order they are applied, each to the rows
that those before it left.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.curation.curate_request import ONE_WORD, RuleOptions
from cluster.curation.duplicates import DECIMALS, near_captions, near_vectors
from cluster.curation.marks import DROP, KEEP, check_one_dataset, read_marks
from cluster.curation.rows import ATTEMPTS, FEATURES, REASON, IndexRows
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary

_BLOCK = 1024


@dataclass(frozen=True)
class Verdict:
    """drop: (n,) bool. why: of a row that goes, in words. margin: (n,) how clearly each goes: examples are those that
    go most narrowly. beside: (n,) for duplicates the row that stays in its place, else -1. facts: what was counted.
    """

    drop: np.ndarray
    why: Callable[[int], str]
    margin: np.ndarray
    beside: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What rules need besides rows. own_ids: of all rows, those too that went by an earlier rule, each in its dataset.
    concepts: the stored ones of all the datasets together, None where there are none."""

    asked: RuleOptions
    own_ids: np.ndarray
    concepts: ConceptVocabulary | None


@dataclass(frozen=True)
class Rule:
    """apply(rows, context): which go. needs: columns of the index. by_score, by_concept: what datasets must have."""

    apply: Callable[[IndexRows, Context], Verdict]
    needs: frozenset[str] = frozenset()
    by_score: bool = False
    by_concept: bool = False


def _keep_list(rows: IndexRows, context: Context) -> Verdict:
    assert context.asked.keep_list is not None
    marks = read_marks(context.asked.keep_list, but_for=DROP, tags=context.asked.tag)
    absent = check_one_dataset(marks, context.own_ids, option="--keep-list")
    drop = np.array([sample not in marks.ids for sample in rows.own_id], bool)
    facts = {"keep_list_unknown": absent, "keep_list_unreadable": marks.unreadable}
    return Verdict(drop, lambda row: "not in the list", _by_hash(rows), facts=facts)


def _drop_list(rows: IndexRows, context: Context) -> Verdict:
    assert context.asked.drop_list is not None
    marks = read_marks(context.asked.drop_list, but_for=KEEP, tags=context.asked.tag)
    absent = check_one_dataset(marks, context.own_ids, option="--drop-list")
    drop = np.array([sample in marks.ids for sample in rows.own_id], bool)
    facts = {"drop_list_unknown": absent, "drop_list_unreadable": marks.unreadable}
    return Verdict(drop, lambda row: "in the list", _by_hash(rows), facts=facts)


def _min_clip_score(rows: IndexRows, context: Context) -> Verdict:
    least = np.float32(context.asked.min_clip_score)
    score = rows.clip_score
    return Verdict(score < least, lambda row: f"score {score[row]:.4f}", -score.astype(np.float64))


def _max_attempts(rows: IndexRows, context: Context) -> Verdict:
    attempts = rows.attempts
    assert attempts is not None and context.asked.max_attempts is not None
    return Verdict(attempts > context.asked.max_attempts, lambda row: f"took {attempts[row]} seeds", attempts)


def _drop_reason(rows: IndexRows, context: Context) -> Verdict:
    reason = rows.reason
    assert reason is not None
    return Verdict(np.isin(reason, context.asked.drop_reason), lambda row: str(reason[row]), _by_hash(rows))


def _word_counts(rows: IndexRows) -> np.ndarray:
    return np.array([len(ONE_WORD.findall(caption)) for caption in rows.caption], np.int64)


def _min_words(rows: IndexRows, context: Context) -> Verdict:
    words = _word_counts(rows)
    return Verdict(words < context.asked.min_words, lambda row: f"{words[row]} words", -words)


def _max_words(rows: IndexRows, context: Context) -> Verdict:
    words = _word_counts(rows)
    return Verdict(words > context.asked.max_words, lambda row: f"{words[row]} words", words)


def _keep_word(rows: IndexRows, context: Context) -> Verdict:
    wanted = {word.lower() for word in context.asked.keep_word}
    drop = np.array([not wanted & set(ONE_WORD.findall(caption.lower())) for caption in rows.caption], bool)
    return Verdict(drop, lambda row: "none of the words", _by_hash(rows))


def _drop_word(rows: IndexRows, context: Context) -> Verdict:
    unwanted = {word.lower() for word in context.asked.drop_word}
    found = [sorted(unwanted & set(ONE_WORD.findall(caption.lower()))) for caption in rows.caption]
    return Verdict(np.array(list(map(bool, found)), bool), lambda row: ", ".join(found[row]), _by_hash(rows))


def _covered_by(rows: IndexRows, context: Context) -> Verdict:
    """Cosines in float64, rounded before they are ranked: a concept counts as found where fewer than K are nearer. Of a
    caption that names no concept nothing is judged: it stays, and is counted."""
    concepts, nearest = context.concepts, context.asked.covered_by
    assert concepts is not None and nearest is not None and rows.global_feature is not None
    number = {name: place for place, name in enumerate(concepts.names)}
    embeddings = concepts.embeddings.astype(np.float64)  # (C, D), unit rows
    share = np.ones(len(rows))
    missing: dict[int, list[str]] = {}
    for start in range(0, len(rows), _BLOCK):
        features = rows.global_feature[start : start + _BLOCK].astype(np.float64)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        cosine = np.round(features @ embeddings.T, DECIMALS)  # (b, C)
        for row, similar in enumerate(cosine, start=start):
            named = rows.named[row]
            unseen = [name for name in named if (similar > similar[number[name]]).sum() >= nearest]
            if unseen:
                missing[row] = unseen
                share[row] = 1 - len(unseen) / len(named)
    return Verdict(
        share < context.asked.min_coverage,
        lambda row: f"not seen: {', '.join(missing[row])}",
        -share,
        facts={"covered_by_no_concept": sum(not named for named in rows.named)},
    )


def _duplicate_captions(rows: IndexRows, context: Context) -> Verdict:
    assert context.asked.duplicate_captions is not None
    order = rows.best_first()
    found = near_captions(rows.caption[order].tolist(), context.asked.duplicate_captions)
    return _duplicates(rows, order, *found, "words")


def _duplicate_pictures(rows: IndexRows, context: Context) -> Verdict:
    assert context.asked.duplicate_pictures is not None and rows.global_feature is not None
    order = rows.best_first()
    found = near_vectors(rows.global_feature[order], context.asked.duplicate_pictures)
    return _duplicates(rows, order, *found, "cosine")


def _duplicates(
    rows: IndexRows, order: np.ndarray, partner: np.ndarray, similarity: np.ndarray, measure: str
) -> Verdict:
    """From places in `order` to rows."""
    beside, alike = np.full(len(rows), -1), np.zeros(len(rows))
    goes = partner >= 0
    beside[order[goes]] = order[partner[goes]]
    alike[order[goes]] = similarity[goes]
    return Verdict(
        beside >= 0, lambda row: f"{measure} {alike[row]:.4f} with {rows.sample_id[beside[row]]}", alike, beside
    )


def _lowest(rows: IndexRows, members: np.ndarray, share: float) -> np.ndarray:
    """The floor(share n) rows of `members` with the lowest scores; ties by source and sample id."""
    ranked = members[np.lexsort((members, rows.clip_score[members].astype(np.float64)))]
    return ranked[: int(share * len(members) + 1e-9)]


def _drop_lowest(rows: IndexRows, context: Context) -> Verdict:
    assert context.asked.drop_lowest is not None
    drop = np.zeros(len(rows), bool)
    drop[_lowest(rows, np.arange(len(rows)), context.asked.drop_lowest)] = True
    return Verdict(drop, lambda row: f"score {rows.clip_score[row]:.4f}", -rows.clip_score.astype(np.float64))


def _drop_lowest_per_concept(rows: IndexRows, context: Context) -> Verdict:
    """Rows that name no concept are a group of their own."""
    assert context.asked.drop_lowest_per_concept is not None
    members: dict[str, list[int]] = defaultdict(list)
    for row, named in enumerate(rows.named):
        for name in named or ("",):
            members[name].append(row)
    low: Counter[int] = Counter()
    for group in members.values():
        low.update(_lowest(rows, np.array(group), context.asked.drop_lowest_per_concept).tolist())
    drop = np.array([low[row] == max(1, len(named)) for row, named in enumerate(rows.named)], bool)

    def why(row: int) -> str:
        return f"score {rows.clip_score[row]:.4f}, low for {', '.join(rows.named[row]) or 'no concept'}"

    return Verdict(drop, why, -rows.clip_score.astype(np.float64))


def _max_per_concept(rows: IndexRows, context: Context) -> Verdict:
    most = context.asked.max_per_concept
    assert most is not None
    kept: Counter[str] = Counter()
    drop = np.zeros(len(rows), bool)
    full: dict[int, list[str]] = {}
    for row in rows.best_first().tolist():
        named = rows.named[row]
        full[row] = [name for name in named if kept[name] >= most]
        drop[row] = bool(full[row])
        if not full[row]:
            kept.update(named)
    return Verdict(drop, lambda row: f"full: {', '.join(full[row])}", -rows.clip_score.astype(np.float64))


def _subset(rows: IndexRows, context: Context) -> Verdict:
    asked = context.asked.subset
    assert asked is not None
    place = np.array([unit_hash(context.asked.seed, sample) for sample in rows.sample_id])
    if asked.count is None:
        assert asked.share is not None
        drop = place >= asked.share
    else:
        drop = np.ones(len(rows), bool)
        drop[np.lexsort((rows.sample_id.astype(str), place))[: asked.count]] = False
    return Verdict(drop, lambda row: f"drawn by seed {context.asked.seed}", place)


RULES: dict[str, Rule] = {
    "keep_list": Rule(_keep_list),
    "drop_list": Rule(_drop_list),
    "min_clip_score": Rule(_min_clip_score, by_score=True),
    "max_attempts": Rule(_max_attempts, frozenset({ATTEMPTS})),
    "drop_reason": Rule(_drop_reason, frozenset({REASON})),
    "min_words": Rule(_min_words),
    "max_words": Rule(_max_words),
    "keep_word": Rule(_keep_word),
    "drop_word": Rule(_drop_word),
    "covered_by": Rule(_covered_by, frozenset({FEATURES}), by_concept=True),
    "duplicate_captions": Rule(_duplicate_captions),
    "duplicate_pictures": Rule(_duplicate_pictures, frozenset({FEATURES}), by_score=True),
    "drop_lowest": Rule(_drop_lowest, by_score=True),
    "drop_lowest_per_concept": Rule(_drop_lowest_per_concept, by_score=True, by_concept=True),
    "max_per_concept": Rule(_max_per_concept, by_concept=True),
    "subset": Rule(_subset),
}


def check_can_judge(
    names: list[str], asked: RuleOptions, *, scored: bool, concepts: ConceptVocabulary | None, place: str
) -> None:
    """Raises InputError for a rule that asks for what the datasets do not have, or can leave no row out."""
    for name in names:
        option = f"--{name.replace('_', '-')}"
        if RULES[name].by_score and not scored:
            raise InputError(f"{option}: {place} was made with --clip null, which gives no scores; featurise it first")
        if RULES[name].by_concept and concepts is None:
            raise InputError(f"{option}: {place} has no concepts (concepts.safetensors); leave the rule out")
    if concepts is not None and asked.covered_by is not None and asked.covered_by >= len(concepts):
        raise InputError(
            f"--covered-by {asked.covered_by}: no row would go, as the data has {len(concepts)} concepts; give fewer"
        )


def unit_hash(seed: int, sample_id: str) -> float:
    """A number in [0, 1) that depends on the seed and the sample id alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()[:8], "big") / 2**64


def _by_hash(rows: IndexRows) -> np.ndarray:
    """Where no row goes more clearly than another, chance picks the examples."""
    return np.array([unit_hash(0, sample) for sample in rows.sample_id])
