"""SynC: which picture a caption gets, and which captions stay (arXiv 2507.18616).

Every pair of a caption and its picture is taken apart. T_i are the K pictures nearest to caption i by CLIP, R_j the K_r
captions nearest to picture j. Caption i and picture j of T_i score

    s(i, j) = max over c in R_j of cos(c, i), by a sentence encoder,

the caption takes the first of its best pictures along T_i, and the best share of captions stays. settings.py has K, K_r
and the share.

Scores saturate: where the caption itself is in R_j, s is 1. So ties decide, and the published code, which adds in
float16, lets rounding decide them. Here scores are rounded to 1e-6; of equal scores the nearer picture is taken, and
the caption that comes first stays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cluster.curation.sync.nearest import nearest, pair_cosines, rounded
from cluster.curation.sync.settings import SyncSettings


@dataclass(frozen=True)
class Choice:
    """What each of B captions got."""

    picture: np.ndarray  # (B,) int64
    score: np.ndarray  # (B,) int64, s in units of 1e-6
    cosine: np.ndarray  # (B,) float64, CLIP's, of the caption and its picture


def choose(candidates: np.ndarray, cosines: np.ndarray, scores: np.ndarray) -> Choice:
    """The first of the best candidates; all (B, K), best cosine first, `scores` being s."""
    units = rounded(scores)
    place = units.argmax(axis=1)  # the first of equals
    row = np.arange(len(units))
    return Choice(candidates[row, place], units[row, place], cosines[row, place])


def kept_in_order(score: np.ndarray, keep: float) -> np.ndarray:
    """Numbers of the captions that stay, best first, of equals the first: int(keep * N) of N, as published.

    `score` (N,) int64 in units.
    """
    return np.argsort(-score, kind="stable")[: int(keep * len(score))]


def captions_of_pictures(indices: np.ndarray, cosines: np.ndarray, members: np.ndarray) -> np.ndarray:
    """R_j (n, K_r) of captions that occur more than once: a caption counts as often as it occurs.

    `indices`, `cosines` (n, k): the distinct captions nearest to each picture. `members` (U, K_r): where each distinct
    caption occurs first, second, ... among all captions, ascending; -1 where it does not. The result names distinct
    captions, -1 where there are fewer than K_r.
    """
    count, _ = indices.shape
    per_picture = members.shape[1]
    places = members[indices].reshape(count, -1)  # (n, k * K_r)
    units = np.repeat(rounded(cosines), per_picture, axis=1)
    absent = places < 0
    order = np.lexsort((places, -units, absent), axis=1)[:, :per_picture]
    distinct = np.where(absent, -1, np.repeat(indices, per_picture, axis=1))
    return np.take_along_axis(distinct, order, axis=1)


def sentence_scores(
    sentences: np.ndarray, parts: Iterable[np.ndarray], candidates: np.ndarray, captions: np.ndarray
) -> np.ndarray:
    """s(i, j), (B, K) float64, of B captions and their candidates.

    `sentences` (B, E): their vectors; `parts`: those of all distinct captions; `candidates` (B, K): T_i; `captions`
    (n, K_r): R_j, -1 where there is none.
    """
    wanted = captions[candidates]  # (B, K, K_r)
    found = pair_cosines(sentences, parts, wanted.reshape(len(wanted), -1))
    return found.reshape(wanted.shape).max(axis=2)


class Parts:
    """The vectors of a matrix, some rows at a time, as often as asked for."""

    def __init__(self, matrix: np.ndarray, rows: int = 8192) -> None:
        self._matrix, self._rows = matrix, rows

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._matrix[start : start + self._rows] for start in range(0, len(self._matrix), self._rows))


def refine_in_memory(
    caption_vectors: np.ndarray,
    picture_vectors: np.ndarray,
    sentence_vectors: np.ndarray,
    settings: SyncSettings,
    *,
    block_size: int = 4096,
) -> tuple[Choice, np.ndarray]:
    """SynC of N captions and as many pictures whose vectors are in memory: what each caption got, and which stay.

    (N, D), (N, D) and (N, E), float32 and L2-normalised: CLIP's of captions and pictures, and a sentence encoder's.
    """
    count = len(caption_vectors)
    blocks = [slice(start, start + block_size) for start in range(0, count, block_size)]
    pictures, captions = Parts(picture_vectors, block_size), Parts(caption_vectors, block_size)
    of_pictures = np.concatenate(
        [nearest(picture_vectors[block], captions, settings.captions_per_picture).indices for block in blocks]
    )
    chosen = []
    for block in blocks:
        found = nearest(caption_vectors[block], pictures, settings.candidates)
        sentences = Parts(sentence_vectors, block_size)
        scores = sentence_scores(sentence_vectors[block], sentences, found.indices, of_pictures)
        chosen.append(choose(found.indices, found.cosines, scores))
    choice = Choice(*(np.concatenate([getattr(part, name) for part in chosen]) for name in Choice.__dataclass_fields__))
    return choice, kept_in_order(choice.score, settings.keep)
