"""What a derived dataset was made of, and by which rules: part of its dataset.json."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PictureStore:
    """A dataset that holds pictures of a view."""

    path: str  # absolute path or URI
    #: Its state when the view was made (cluster.dataset.state); of an unfinished one: what that said of its shards.
    sha256: str
    beside: str | None = None  # the way from the view to it (cluster.dataset.beside)

    @property
    def in_view(self) -> bool:
        """Whether it lies in the view's own folder: redraws, which views of this view point at too."""
        return self.beside is not None and not self.beside.startswith("../")


@dataclass(frozen=True, kw_only=True)
class LineageSource:
    """A dataset that rows were taken from, as it was then. `lineage`: of one that was derived itself."""

    path: str
    sha256: str  # as PictureStore
    rows: int
    shards: int
    planned_shards: int
    generator: str
    committed: tuple[int, ...] | None = None  # of an unfinished dataset: which of the planned shards were there
    lineage: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RuleCount:
    """A rule, and how many rows went by it. Rules come one after the other: a row goes by the first that it breaks.

    examples: some of these rows: sample_id, caption, clip_score, why, and picture (path, key, rows, bytes, sha256, row:
    the shard that holds it).
    """

    rule: str
    setting: Any
    dropped: int
    examples: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """method: the job, such as "curate" or "refine". settings: all that decides the rows besides the sources. facts:
    what it counted besides, in JSON."""

    method: str
    settings: dict[str, Any]
    sources: tuple[LineageSource, ...]
    rows_in: int
    rules: tuple[RuleCount, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        return {rule.rule: rule.dropped for rule in self.rules}

    def decides(self) -> dict[str, Any]:
        """What the rows are a function of, without counts: equal for the same command on the same data, wherever that
        lies. unfinished: of each source in its place the shards that were there, None for a finished one."""
        sources = [source.sha256 for source in self.sources]
        decides: dict[str, Any] = {"method": self.method, "settings": self.settings, "sources": sources}
        committed = [None if each.committed is None else list(each.committed) for each in self.sources]
        if any(numbers is not None for numbers in committed):
            decides["unfinished"] = committed
        return decides

    def moved(self, places: dict[str, str]) -> "Lineage":
        """With examples whose pictures are looked for where a dataset is now. `places`: old path to new."""

        def shown(example: Any) -> Any:
            if not isinstance(example, dict) or not isinstance(picture := example.get("picture"), dict):
                return example  # damaged: whoever shows it says so
            path = str(picture.get("path"))
            found = {**example, "picture": {**picture, "path": places.get(path, path)}}
            return found | ({"beside": shown(example["beside"])} if example.get("beside") else {})

        rules = (replace(rule, examples=tuple(map(shown, rule.examples))) for rule in self.rules)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def without_examples(self) -> dict[str, Any]:
        document = self.to_dict()
        for rule in document["rules"]:
            rule["examples"] = ()
        return document

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Lineage":
        """Raises TypeError or LookupError for what is no lineage."""
        found = Lineage(
            method=str(values["method"]),
            settings=dict(values["settings"]),
            sources=tuple(map(_source, values["sources"])),
            rows_in=values["rows_in"],
            rules=tuple(
                RuleCount(**{**_known(RuleCount, rule), "examples": tuple(rule.get("examples", ()))})
                for rule in values["rules"]
            ),
            facts=dict(values.get("facts", {})),
        )
        for number in (found.rows_in, *(rule.dropped for rule in found.rules)):
            if type(number) is not int:
                raise TypeError(f"a count is {number!r}")
        return found


def _source(values: dict[str, Any]) -> LineageSource:
    committed = values.get("committed")
    known = _known(LineageSource, values)
    return LineageSource(**{**known, "committed": None if committed is None else tuple(committed)})


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
