"""The files that published PCM-Net data comes in, read and written: annotations, features, concepts, checkpoints.

An annotation file is a pickled list of dicts: `image_id` (str), `split_id`, `tokens_ids` and `target_ids` (int arrays
(n, L) for n sentences), `clipscore` (2.5 times the cosine). Features are one `{image_id}.npz` a picture. Whatever is
read comes from others: pickles go through `pcm.safe_pickle.reader`, npz headers are checked before anything is
allocated.
"""

import io
import itertools
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from pcm.errors import InputError
from pcm.official.settings import CLIP_SCORE_SCALE
from pcm.safe_pickle import reader as safe_pickle
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import IGNORED_TARGET, SPECIAL_ID, Vocabulary

#: Published synthetic pictures are numbered from here, in the order of their captions.
FIRST_IMAGE_ID = 6_000_000
#: Pictures of one folder; MSCOCO's 542,401 are in 8 of them, the last of which has 67,794.
SPLIT_SIZE = 67_801

# A pickled list in pieces: each piece appends some items, and refers to nothing before it.
ANNOTATIONS_START = pickle.PROTO + bytes([3]) + pickle.EMPTY_LIST
ANNOTATIONS_END = pickle.STOP

#: Larger arrays than any CLIP gives are not read: 4,096 patches of 4,096 values.
_MAX_VALUES = 1 << 24
#: A global feature this near to unit length is one, rounded to half precision.
_UNIT = 2e-3
#: Characters of an image id; of the number that one is, digits.
_LONGEST_NAME = 200
_LEGACY_STORAGE = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Annotation:
    """One picture's sentences. token_ids and target_ids are (n, L) int64, clip_scores n cosines or None."""

    image_id: str
    split_id: int | None
    token_ids: np.ndarray
    target_ids: np.ndarray
    clip_scores: tuple[float, ...] | None


def split_of(position: int) -> int:
    """The folder, from 0, of the picture at `position` among all."""
    return position // SPLIT_SIZE


def read_annotation(value: Any, *, score_scale: float = CLIP_SCORE_SCALE) -> Annotation:
    """One dict of an annotation file, whose clipscore is so many times the cosine: 2.5 in SynthImgCap, 5 in SynC's.

    Raises InputError that says what is wrong with it.
    """
    if not isinstance(value, dict):
        raise InputError(f"an annotation of type {type(value).__name__}, not dict")
    missing = [name for name in ("image_id", "tokens_ids", "target_ids") if name not in value]
    if missing:
        raise InputError(f"no {', '.join(missing)}")
    image_id, split_id = value["image_id"], value.get("split_id")
    if isinstance(image_id, (int, np.integer)) and not isinstance(image_id, bool):
        image_id = str(int(image_id)) if abs(int(image_id)) < 10**_LONGEST_NAME else ""
    if not isinstance(image_id, str) or not _is_file_name(image_id):
        raise InputError("image_id must be a plain name, such as '6000000'")
    if isinstance(split_id, str) and re.fullmatch("[0-9]{1,6}", split_id):
        split_id = int(split_id)
    if split_id is not None and not (isinstance(split_id, (int, np.integer)) and 0 <= split_id < 1_000_000):
        raise InputError("split_id must be a small whole number")
    token_ids, target_ids = _id_rows(value["tokens_ids"]), _id_rows(value["target_ids"])
    if token_ids.shape != target_ids.shape:
        raise InputError(f"tokens_ids of shape {token_ids.shape} and target_ids of shape {target_ids.shape}")
    scores = _scores(value.get("clipscore"), len(token_ids), scale=score_scale)
    return Annotation(image_id, None if split_id is None else int(split_id), token_ids, target_ids, scores)


def _is_file_name(name: str) -> bool:
    """Whether a name can be the stem of a file and nothing else: it must lead out of no folder."""
    return (
        0 < len(name) <= _LONGEST_NAME
        and name.isprintable()
        and not set(name) & set("/\\:?*#%")
        and name.strip(". ") != ""
    )


def _numbers(value: Any) -> np.ndarray:
    """The array that a pickle's tensor, array, number or list of numbers holds; an empty one for anything else."""
    if isinstance(value, Tensor):
        try:
            return value.numpy()
        except (TypeError, RuntimeError):  # bfloat16, sparse, quantised, ...
            raise InputError(f"a tensor of {value.dtype}, {value.layout}: must be a plain one of numbers") from None
    # A list of lists may refer to one list a million times: it is not unrolled.
    if isinstance(value, list) and not all(isinstance(item, (int, float, np.generic)) for item in value):
        return np.empty(0)
    return np.asarray(value) if isinstance(value, (int, float, list, np.generic, np.ndarray)) else np.empty(0)


def _id_rows(value: Any) -> np.ndarray:
    array = _numbers(value)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise InputError(f"word ids of type {array.dtype} and shape {array.shape}: must be whole numbers (n, L)")
    return np.atleast_2d(array).astype(np.int64)


def _scores(value: Any, sentences: int, *, scale: float) -> tuple[float, ...] | None:
    if value is None:
        return None
    array = _numbers(value)
    if array.dtype.kind not in "fiu" or array.size != sentences:
        raise InputError(f"clipscore of type {array.dtype} and shape {array.shape} for {sentences} sentences")
    scores = array.astype(np.float64).reshape(-1) / scale
    if not (np.abs(scores) <= 1.001).all():  # a NaN fails this too
        raise InputError(f"clipscore {array.reshape(-1).tolist()[:4]}: not {scale:g} times a cosine")
    return tuple(scores.tolist())


def sentence_of(token_ids: np.ndarray, target_ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The sentence that two rows of ids (L,) stand for, in the words of the vocabulary.

    Its `Vocabulary.encode` gives the same ids again: the unknown word is written as a word that is in no vocabulary.
    Raises InputError where that cannot be: ids beyond the vocabulary, inputs and targets that do not fit together, a
    word that another spelling rule made.
    """
    stop = np.flatnonzero((target_ids == SPECIAL_ID) | (target_ids == IGNORED_TARGET))
    words = target_ids[: stop[0] if len(stop) else None]
    # Where the sentence fills the row, its last word is a target but no input.
    given = token_ids[1 : len(words) + 1]
    if token_ids[0] != SPECIAL_ID or not np.array_equal(given, words[: len(given)]):
        raise InputError("tokens_ids and target_ids are not one sentence, shifted by one")
    if len(words) and not (words.min() > 0 and words.max() < len(vocabulary)):
        raise InputError(f"a word id beyond the vocabulary of {len(vocabulary)}")
    unknown = _unknown_text(vocabulary)
    sentence = " ".join(unknown if i == vocabulary.unknown_id else vocabulary.words[i - 1] for i in words.tolist())
    if not np.array_equal(vocabulary.encode(sentence, len(words) + 1)[1][:-1], words):
        raise InputError("a sentence whose words, written out, are other words")
    return sentence


def _unknown_text(vocabulary: Vocabulary) -> str:
    return next(text for n in itertools.count(1) if (text := "unk" * n) not in vocabulary.ids)


def annotations_piece(annotations: Iterable[Annotation]) -> bytes:
    """A piece of an annotation file: ANNOTATIONS_START, any number of pieces, ANNOTATIONS_END.

    So a file of any length is written with a shard's annotations in memory. Names of NumPy are those of NumPy 1, which
    every version reads.
    """
    items = []
    for annotation in annotations:
        scores = annotation.clip_scores or ()
        value: dict[str, Any] = {"image_id": annotation.image_id}
        if annotation.split_id is not None:  # a real photo has none, and lies in the folder without _sp
            value["split_id"] = annotation.split_id
        value |= {"tokens_ids": annotation.token_ids, "target_ids": annotation.target_ids}
        if scores:
            scaled = np.array(scores) * CLIP_SCORE_SCALE
            value["clipscore"] = scores[0] * CLIP_SCORE_SCALE if len(scores) == 1 else scaled
        body = pickle.dumps(value, protocol=3)[2:-1]  # without protocol and end
        items.append(body.replace(b"cnumpy._core.", b"cnumpy.core."))
    return pickle.MARK + b"".join(items) + pickle.APPENDS if items else b""


def features_to_npz(patch_features: np.ndarray, global_feature: np.ndarray) -> bytes:
    """One picture's `.npz`: `features` (N, D_v) and `g_feature` (1, D), float32. Equal values give equal bytes."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        features=patch_features.astype(np.float32),
        g_feature=global_feature.reshape(1, -1).astype(np.float32),
    )
    return buffer.getvalue()


UNUSABLE_FEATURES = "features that are not finite, or zero"


def features_from_npz(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D_v), g_feature (D,)), float32, of one `.npz`; g_feature is L2-normalised where it was not.

    Raises InputError: no npz, an array is missing, of objects, too large, of another rank, or not finite.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            patches = _npy(archive, "features.npy")
            image = _npy(archive, "g_feature.npy").reshape(-1)
    except InputError:
        raise
    except Exception as error:  # zipfile and zlib raise many kinds for a damaged file
        raise InputError(f"not a readable npz ({type(error).__name__})") from None
    if patches.ndim != 2:
        raise InputError(f"features of shape {patches.shape}: must be (patches, width)")
    norm = float(np.linalg.norm(image))
    if not (np.isfinite(patches).all() and math.isfinite(norm) and norm > 0):
        raise InputError(UNUSABLE_FEATURES)
    return patches, image if abs(norm - 1) <= _UNIT else image / np.float32(norm)


def _npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if name not in archive.namelist():
        raise InputError(f"no array {name.removesuffix('.npy')}")
    if archive.getinfo(name).file_size > 8 * _MAX_VALUES + 4096:
        raise InputError(f"{name.removesuffix('.npy')} is larger than any features are")
    stream = io.BytesIO(archive.read(name))
    version = npy.read_magic(stream)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.kind != "f" or dtype.hasobject:
        raise InputError(f"{name.removesuffix('.npy')} of type {dtype}: must be floats")
    values = stream.read()
    if math.prod(shape) * dtype.itemsize != len(values):
        raise InputError(f"{name.removesuffix('.npy')} is cut short")
    array = np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(np.float32)


def concepts_to_pickle(concepts: ConceptVocabulary) -> bytes:
    """The published pickle: (list of names, (C, D) float32 tensor). The same concepts give the same bytes."""
    tensor = _PickledTensor(torch.from_numpy(np.ascontiguousarray(concepts.embeddings, np.float32)))
    return pickle.dumps((list(concepts.names), tensor), protocol=2)


def concepts_from_pickle(data: bytes) -> ConceptVocabulary:
    """The inverse; rows that are of unit length already stay bit for bit. Raises InputError."""
    value = safe_pickle.load(data)
    concepts = ConceptVocabulary.from_published(value)
    given = value[1] if isinstance(value[1], np.ndarray) else value[1].numpy()
    if given.dtype == np.float32 and (np.abs(np.linalg.norm(given, axis=-1) - 1) < 1e-6).all():
        return ConceptVocabulary(concepts.names, given, concepts.source)
    return concepts


class _PickledTensor:
    """Pickles as a tensor does, except that PyTorch names the storage by its address in memory, and this does not."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple:
        storage = _PickledStorage(self.tensor.numpy().tobytes())
        size, stride = tuple(self.tensor.size()), self.tensor.stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, OrderedDict())


class _PickledStorage:
    """A float32 storage: five pickles, then its size and its bytes."""

    def __init__(self, values: bytes) -> None:
        self.values = values

    def __reduce__(self) -> tuple:
        buffer = io.BytesIO()
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        for part in (*_LEGACY_STORAGE, system):
            pickle.dump(part, buffer, protocol=2)
        _StoragePickler(buffer, protocol=2).dump(self)
        pickle.dump(["0"], buffer, protocol=2)
        buffer.write((len(self.values) // 4).to_bytes(8, "little"))
        return torch.storage._load_from_bytes, (buffer.getvalue() + self.values,)


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _PickledStorage):
            return ("storage", torch.FloatStorage, "0", "cpu", len(obj.values) // 4, None)
        return None


def checkpoint_to_pth(state: dict[str, Tensor]) -> bytes:
    """A torch file of {"model": state}. The same tensors give the same bytes."""
    buffer = io.BytesIO()
    torch.save({"model": {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}}, buffer)
    return buffer.getvalue()
