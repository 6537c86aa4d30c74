"""Published annotations as a corpus: a record a sentence, its words written out."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.sources.corpus import CorpusRecord, read_corpus
from pcm.errors import InputError
from pcm.official.files import FIRST_IMAGE_ID, Annotation, read_annotation, sentence_of
from pcm.reasons import BAD_RECORD
from pcm.text.rules import check_caption
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

#: Bad annotations that are named in the log; all are counted.
NAMED = 20


@dataclass(frozen=True)
class CaptionFile:
    """The sentences as they were written: in file order, and where those of each image id stand."""

    captions: tuple[str, ...] = ()
    by_image: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def read(uri: str, *, format: str, split: str) -> "CaptionFile":
        captions: list[str] = []
        by_image: dict[str, list[int]] = {}
        for record in read_corpus(uri, format=format, split=split):
            if record.image_id is not None:
                by_image.setdefault(record.image_id, []).append(len(captions))
            captions.append("" if record.reason else record.caption)
        return CaptionFile(tuple(captions), by_image)

    def caption(self, image_id: str, number: int) -> str:
        """Sentence `number` of an image id or, for a synthetic picture, the one whose place it carries; "" for none."""
        positions = self.by_image.get(image_id, [])
        if number < len(positions):
            return self.captions[positions[number]]
        place = int(image_id) - FIRST_IMAGE_ID if image_id.isdecimal() else -1
        return self.captions[place] if not (positions or number) and 0 <= place < len(self.captions) else ""


class AnnotationCorpus:
    """The records of an annotation file and, by record index, what stands beside their captions.

    split_ids: folder (-1: none). clip_scores: cosine (NaN: none).
    """

    def __init__(
        self, annotations: list[Any], vocabulary: Vocabulary, written: CaptionFile, *, score_scale: float
    ) -> None:
        self._annotations = annotations
        self._vocabulary = vocabulary
        self._written = written
        self._score_scale = score_scale
        self._named = 0
        self.split_ids: list[int] = []
        self.clip_scores: list[float] = []
        self.from_file = 0
        self.recovered = 0

    def records(self) -> Iterator[CorpusRecord]:
        """A record a sentence, ids IMAGE_ID#NUMBER; an annotation that cannot be used is one `bad_record`.

        The list of annotations is emptied on the way, so that its memory is free before pictures are read.
        """
        for position in range(len(self._annotations)):
            value, self._annotations[position] = self._annotations[position], None
            try:
                annotation = read_annotation(value, score_scale=self._score_scale)
            except InputError as error:
                self._name(f"annotation {position}: {error}")
                yield self._record(f"[{position}]", "", None, BAD_RECORD, split_id=None, clip_score=None)
                continue
            scores = annotation.clip_scores or (None,) * len(annotation.token_ids)
            for number, score in enumerate(scores):
                caption, reason = self._caption(annotation, number)
                yield self._record(
                    f"{annotation.image_id}#{number}", caption, annotation.image_id, reason,
                    split_id=annotation.split_id, clip_score=score,
                )  # fmt: skip

    def _record(
        self, corpus_id: str, caption: str, image_id: str | None, reason: str, *,
        split_id: int | None, clip_score: float | None,
    ) -> CorpusRecord:  # fmt: skip
        self.split_ids.append(-1 if split_id is None else split_id)
        self.clip_scores.append(np.nan if clip_score is None else clip_score)
        return CorpusRecord(len(self.split_ids) - 1, corpus_id, caption, image_id, reason)

    def _caption(self, annotation: Annotation, number: int) -> tuple[str, str]:
        """(caption, reason): the file's caption where its words are the annotation's ids, else the ids' own words."""
        token_ids, target_ids = annotation.token_ids[number], annotation.target_ids[number]
        written = self._written.caption(annotation.image_id, number)
        if written:
            encoded = self._vocabulary.encode(written, len(token_ids))
            if np.array_equal(encoded[0], token_ids) and np.array_equal(encoded[1], target_ids):
                self.from_file += 1
                return check_caption(written)
        try:
            caption, reason = check_caption(sentence_of(token_ids, target_ids, self._vocabulary))
        except InputError as error:
            self._name(f"{annotation.image_id}#{number}: {error}")
            return "", BAD_RECORD
        self.recovered += not reason
        return caption, reason

    def _name(self, problem: str) -> None:
        self._named += 1
        if self._named <= NAMED:
            log.warning("%s", problem)
