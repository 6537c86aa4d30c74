"""What the best epoch is chosen by: captions of validation pictures, decoded by all workers, scored by CIDEr."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch.distributed

from cluster.dataset.documents import StoredShard
from cluster.dataset.rows import Rows, not_finite, not_finite_error, read_rows
from cluster.sources.pictures import PictureSource, encode_pictures, load_picture_set
from cluster.store.store import Store
from cluster.training.data.selection import Selection
from pcm.captioners.captioner import decode_captions
from pcm.captioners.pcmnet.model import PCMNet
from pcm.clip.encoder import ClipEncoder
from pcm.records import FeatureShape
from pcm.text.metrics import cider_only
from pcm.text.vocabulary import Vocabulary

#: Shards that one worker reads at a time, beside those that it trains on.
_READ_THREADS = 4
#: Of one picture CIDEr is 0, whatever its caption: every word is in all references. So it is of several pictures that
#: have the same references.
LEAST_PICTURES = LEAST_CAPTIONS = 2


@dataclass(frozen=True)
class ValidationShare:
    """One worker's part of the validation pictures, as features."""

    references: dict[str, list[str]]  # by image id, in the order of the rows below
    global_feature: np.ndarray  # (n, D)
    patch_features: np.ndarray  # (n, N, D_v)
    unreadable: dict[str, str] = field(default_factory=dict)  # image id -> why it is left out


def held_out_share(
    held_out: Sequence[tuple[Store, Selection]], features: FeatureShape, *, rank: int, num_workers: int
) -> ValidationShare:
    """Held-out pairs of some datasets; the one reference is the pair's own caption. Ids begin with the set's number.

    Raises InputError for features that are not finite: their captions would be scored as if the model had failed.
    """
    places = [
        (place, store, selection.shards[number], selection.rows[number])
        for place, (store, selection) in enumerate(held_out)
        for number in range(rank, len(selection.shards), num_workers)
        if len(selection.rows[number])
    ]

    def read(store: Store, shard: StoredShard, numbers: np.ndarray) -> Rows:
        rows = read_rows(store, shard, numbers, features)
        bad = not_finite(rows.global_feature, rows.patch_features, rows.patch_scale, rows.clip_score)
        if bad.any():
            raise not_finite_error([(f"{store.root}/{shard.key}", each) for each in rows.sample_ids[bad]])
        return rows

    with ThreadPoolExecutor(_READ_THREADS, "held-out-reader") as readers:
        parts = list(readers.map(lambda place: read(*place[1:]), places))
    image_ids = [
        f"{place}/{sample_id}" for (place, *_), rows in zip(places, parts, strict=True) for sample_id in rows.sample_ids
    ]
    rows = Rows.concatenate([Rows.empty(features), *parts])
    references = {image_id: [caption] for image_id, caption in zip(image_ids, rows.captions, strict=True)}
    return ValidationShare(references, rows.global_feature, rows.patch_features)


def picture_share(source: PictureSource, encoder: ClipEncoder, *, rank: int, num_workers: int) -> ValidationShare:
    """Real pictures, featurised once; those that cannot be read are left out with a warning."""
    pictures = load_picture_set(source)
    batches = list(encode_pictures(pictures, encoder, positions=range(rank, len(pictures), num_workers)))
    image_ids = [image_id for batch in batches for image_id in batch.image_ids]
    empty = encoder.encode_images([])
    return ValidationShare(
        {image_id: pictures.references[image_id] for image_id in image_ids},
        np.concatenate([empty.global_feature, *(batch.features.global_feature for batch in batches)]),
        np.concatenate([empty.patch_features, *(batch.features.patch_features for batch in batches)]),
        {image_id: why for batch in batches for image_id, why in batch.unreadable.items()},
    )


def validation_cider(model: PCMNet, vocabulary: Vocabulary, share: ValidationShare, *, beam_size: int) -> float:
    """CIDEr over the shares of all workers, the same on each. All must call it; the model is left in eval mode."""
    model.eval()
    decoded = decode_captions(model, vocabulary, share.global_feature, share.patch_features, beam_size=beam_size)
    captions = {image_id: caption for image_id, (caption, _) in zip(share.references, decoded, strict=True)}
    shares = [(captions, share.references)]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        shares = [shares[0]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (captions, share.references))
    candidates = {image_id: caption for part, _ in shares for image_id, caption in part.items()}
    references = {image_id: texts for _, part in shares for image_id, texts in part.items()}
    return cider_only(candidates, references)
