"""Where a dataset's objects lie on the store."""

PLAN_KEY = "plan.json"
MANIFEST_KEY = "dataset.json"
PARTS, CLAIMS = "plan/", "planning/"
VOCABULARY_KEY = "vocabulary.txt"
CONCEPTS_KEY = "concepts.safetensors"
CLIP_HEAD_KEY = "clip_head.safetensors"
VOCABULARY_KEYS = (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY)
VOCABULARIES_KEY = "vocabularies.json"  # of which captions the three are
#: First object of a derived dataset: what decides its rows, so that a run that was interrupted is finished by the same
#: command and by no other.
LINEAGE_KEY = "lineage.json"
GIVEN_CONCEPTS_KEY = "concepts.json"  # where the concepts are a user's: which
NOUNS_KEY = "nouns.json"  # where a spaCy model finds the nouns: which


def plan_part_key(folder: str, shard: int) -> str:
    """`folder`: of a segment; see Plan.part_key."""
    return f"{folder}/part-{shard:06d}.parquet"


def shard_key(shard: int) -> str:
    return f"shards/part-{shard:06d}.parquet"


def rows_key(shard: int) -> str:
    """Of a view's shard: rows without pictures."""
    return f"rows/part-{shard:06d}.parquet"


def quarantine_key(shard: int) -> str:
    return f"quarantine/part-{shard:06d}.parquet"


def stats_key(shard: int) -> str:
    return f"stats/part-{shard:06d}.json"


def shard_number(key: str) -> int:
    """The shard of a key of a shard, or of what belongs to one."""
    return int(key.rpartition("/part-")[2].partition(".")[0])


def claim_key(digest: str, claimant: str) -> str:
    """Of what a run writes while it puts plan.json there: see cluster.dataset.plan."""
    return f"{CLAIMS}{digest}-{claimant}.json"


def group_key(group: int) -> str:
    return f"progress/group-{group:06d}.json"


def manifest_part_key(digest: str) -> str:
    """Of a part of the list of shards; `digest`: the sha256 of its bytes."""
    return f"manifest/{digest}.parquet"


def row_index_key(group: int) -> str:
    return f"progress/rows-{group:06d}.parquet"
