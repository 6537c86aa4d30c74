"""Vocabulary, concepts and CLIP head as they lie beside the shards: whether they are whole."""

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.keys import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    GIVEN_CONCEPTS_KEY,
    PLAN_KEY,
    VOCABULARIES_KEY,
    VOCABULARY_KEY,
    VOCABULARY_KEYS,
)
from cluster.store.store import Store
from pcm.errors import InputError, one_line
from pcm.generation.names import IMPORTED, UNDRAWN

if TYPE_CHECKING:
    from pcm.text.concepts import ConceptVocabulary


def vocabulary_keys(plan: Plan) -> tuple[str, ...]:
    """Those that a dataset has once its first shard is scored."""
    return (VOCABULARY_KEY,) if plan.spec.clip.model == "null" else VOCABULARY_KEYS


def vocabulary_problems(store: Store, plan: Plan) -> dict[str, str]:
    """What is wrong with them: key -> a line. Before they are stored of the captions that are planned now nothing is
    missing but what was imported, and concepts that a user gave; of imported ones and of an earlier release's, which
    have no sha256, it is seen only that they can be read.
    """
    was_imported = plan.spec.generator.model == IMPORTED
    recorded = _recorded(store, plan)
    digests = dict(recorded or {})
    said_in = dict.fromkeys(digests, VOCABULARIES_KEY)
    if (given := _document_of_given(store)) is not None:
        digests[CONCEPTS_KEY], said_in[CONCEPTS_KEY] = given["sha256"], GIVEN_CONCEPTS_KEY
    problems = {}
    for key in vocabulary_keys(plan):
        try:
            data = store.read_bytes(key)
        except FileNotFoundError:
            if recorded is not None or was_imported or key in digests:
                problems[key] = f"{key}: missing"
            continue
        if (digest := digests.get(key)) is not None:
            if digest != hashlib.sha256(data).hexdigest():
                problems[key] = f"{key}: its sha256 is not the one in {said_in[key]}"
        elif why := _why_unreadable(key, data):
            problems[key] = f"{key}: damaged ({why})"
    return problems


def intact_vocabularies(store: Store, plan: Plan) -> set[str]:
    """The keys of those that are there, of the captions that are planned now, and as they were stored."""
    if _recorded(store, plan) is None:
        return set()
    return set(vocabulary_keys(plan)) - vocabulary_problems(store, plan).keys()


def _recorded(store: Store, plan: Plan) -> dict[str, str] | None:
    """The sha256 of each, of an earlier release's of none; None where none are stored of the captions of now."""
    try:
        said = dict(json.loads(store.read_bytes(VOCABULARIES_KEY)))
        digests = dict(said.get("sha256", {}))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return digests if said.get("corpus_fingerprint") == plan.corpus_fingerprint else None


def refuse_rebuilding(store: Store, plan: Plan) -> None:
    """Called where something of the three is to be built of the captions. Raises InputError where they were imported,
    and where concepts that a user gave are missing or damaged: nothing here can build these."""
    if plan.spec.generator.model == IMPORTED:
        raise InputError(
            f"{store.root}: its vocabulary, concepts and CLIP head were imported, and they are damaged or missing; "
            f"rerun the same {UNDRAWN[IMPORTED]}, which puts them there again"
        )
    given = _document_of_given(store)
    if given is None:
        return
    wrong = "missing"
    if store.exists(CONCEPTS_KEY):
        if hashlib.sha256(store.read_bytes(CONCEPTS_KEY)).hexdigest() == given["sha256"]:
            return
        wrong = "not the concepts that were given"
    raise InputError(
        f"{store.root}/{CONCEPTS_KEY}: {wrong}; rerun the command that made this dataset, with the same --concepts"
    )


def made_again(store: Store, manifest: Manifest, key: str) -> str:
    """What makes a missing one of the three again, as the end of a line; "" where nothing does."""
    if manifest.lineage is not None:
        return f"; make the dataset again with jobs.{manifest.lineage.method} into another --out"
    if manifest.spec.generator.model == IMPORTED:
        return f"; rerun the same {UNDRAWN[IMPORTED]}, which puts it there again"
    if key == CONCEPTS_KEY and store.exists(GIVEN_CONCEPTS_KEY):
        return "; rerun the command that made the dataset, with the same --concepts"
    return "; jobs.verify --repair makes it again" if store.exists(PLAN_KEY) else ""


def stored_document(store: Store, key: str, needed: str) -> dict[str, Any] | None:
    """A small JSON object beside the shards, whose value `needed` is a string; None where there is none. Raises
    InputError for a damaged one."""
    try:
        found = dict(json.loads(store.read_bytes(key)))
        return {**found, needed: str(found[needed])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{store.root}/{key}: damaged; delete it and run the same command again") from None


def _document_of_given(store: Store) -> dict[str, Any] | None:
    return stored_document(store, GIVEN_CONCEPTS_KEY, "sha256")


def unreadable_vocabularies(store: Store) -> list[str]:
    """Of those that are there what is wrong with the ones that cannot be read, a line each."""
    there = {key: store.read_bytes(key) for key in VOCABULARY_KEYS if store.exists(key)}
    return [f"{key}: damaged ({why})" for key, data in there.items() if (why := _why_unreadable(key, data))]


def check_vocabularies(store: Store) -> None:
    """Raises InputError where one cannot be read, and FileNotFoundError where it is not there."""
    for key in VOCABULARY_KEYS:
        if why := _why_unreadable(key, store.read_bytes(key)):
            raise _damaged(store, key, why)


def stored_concepts(store: Store) -> "ConceptVocabulary":
    """The concepts of a dataset. Raises InputError where they cannot be read, and FileNotFoundError where there are
    none."""
    from pcm.text.concepts import ConceptVocabulary

    data = store.read_bytes(CONCEPTS_KEY)
    try:
        return ConceptVocabulary.from_bytes(data)
    except InputError as error:
        raise _damaged(store, CONCEPTS_KEY, str(error)) from None


def _damaged(store: Store, key: str, why: str) -> InputError:
    mend = "run jobs.verify --repair on the dataset; a derived one must be made again, into another --out"
    return InputError(f"{store.root}/{key}: damaged ({why}); {mend}")


def _why_unreadable(key: str, data: bytes) -> str:
    """What is wrong with an object's bytes; "" where they can be read."""
    import safetensors  # with numpy half a second, which a short job has no need of

    from pcm.text.concepts import ConceptVocabulary
    from pcm.text.vocabulary import Vocabulary

    readers: dict[str, Callable[[bytes], object]] = {
        VOCABULARY_KEY: lambda data: Vocabulary.from_text(data.decode()),
        CONCEPTS_KEY: ConceptVocabulary.from_bytes,
        CLIP_HEAD_KEY: safetensors.deserialize,
    }
    try:
        readers[key](data)
    except (ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        return one_line(error, longest=200)
    return ""
