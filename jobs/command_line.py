"""The command line of every job, made from its request: help, one-line errors, --config, one JSON line on stdout.

Written on argparse: jsonargparse and tyro were tried, and neither keeps repeatable options (`--data A --data B`,
`--set NAME=VALUE`) and errors of one line.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import logging
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cluster.numbers import LOG_TIME
from cluster.options import Option, Request, flag, in_words, named_once, options_of, parsed
from cluster.releases import check_releases
from jobs.endings import STDOUT, StopSignals, flush_streams, open_streams, print_summary, say, use_utf8
from pcm.credentials import refuse_credentials
from pcm.documents import read_document
from pcm.errors import InputError, OneLineError, StoreFailure, not_known, one_line

_CONFIG = "--config"
_WIDTH = 78  # of paragraphs in --help


@dataclass(frozen=True)
class Job:
    """`python -m PACKAGE.NAME`: what it takes, and the function from that to its summary."""

    name: str
    description: str
    request: type[Request]
    run: Callable[[Any], dict[str, Any]]
    package: str = "jobs"

    @property
    def command(self) -> str:
        return f"python -m {self.package}.{self.name}"

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Read the request, run, print the summary as one JSON line, exit.

        0 = done; 2 = bad arguments or input, with one line on stderr; 130 and 143 after SIGINT and SIGTERM
        (jobs/endings.py); anything else raises, so Python prints the traceback and exits with 1. A summary may carry
        `"ok": False` (a check that ran and failed): exit 1.
        """
        use_utf8()
        open_streams()
        stop = StopSignals(self.request.AGAIN)
        try:
            with stop.watched():
                try:
                    self._main(argv)
                except SystemExit as end:
                    if end.code not in (None, 0, 2):
                        stop.end_if_received()
                    raise
                except BaseException:
                    stop.end_if_received()
                    raise
        finally:
            flush_streams()

    def _main(self, argv: Sequence[str] | None) -> None:
        try:
            request = self.read(sys.argv[1:] if argv is None else argv)
        except StoreFailure as error:
            end_with_error(str(error))
        except InputError as error:
            end_with_error(f"{error} (see `{self.command} --help`)")
        with STDOUT.kept(to_the_end=argv is None):
            try:
                set_up_logging()
                check_releases()
                _check_outputs(request)
                summary = self.run(request)
            except OneLineError as error:
                end_with_error(str(error))
            flush_streams()
            print_summary(json.dumps(summary, allow_nan=False))
        if summary.get("ok") is False:
            sys.exit(1)

    def read(self, argv: Sequence[str]) -> Any:
        """The request that the arguments mean. Raises InputError."""
        for text in argv:
            refuse_credentials(text)  # errors show what was given
        given = _arguments(self._parser(), argv, self.request)
        config = given.pop(_CONFIG, None)
        values = _file_values(self.request, config) if config is not None else {}
        for name, value in given.items():
            earlier = values.get(name)
            values[name] = {**earlier, **value} if isinstance(earlier, dict) else value
        missing = [
            flag(self.request, entry.name)
            for entry in dataclasses.fields(self.request)
            if _is_required(entry) and entry.name not in values
        ]
        if missing:
            raise InputError(f"{', '.join(missing)}: missing")
        return self.request(**values)

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        return self.description.partition(". ")[0].partition(".\n")[0].removesuffix(".")

    def help(self) -> str:
        return self._parser().format_help()

    def _parser(self) -> "_Parser":
        required = " ".join(
            _usage(self.request, entry.name) for entry in dataclasses.fields(self.request) if _is_required(entry)
        )
        parser = _Parser(
            prog=self.command,
            usage=" ".join(f"{self.command} {required} [options]".split()),
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        groups: dict[type, Any] = {}
        for name, described in options_of(self.request).items():
            owner = next(kind for kind in self.request.__mro__ if name in inspect.get_annotations(kind))
            if owner is self.request:
                _add(parser, self.request, name, described)
                continue
            if owner not in groups:
                title, _, text = (owner.__doc__ or "").partition(".")
                described_as = textwrap.fill(" ".join(text.split()), _WIDTH) or None
                groups[owner] = parser.add_argument_group(title.strip(), described_as)
            _add(groups[owner], self.request, name, described)
        parser.add_argument(
            _CONFIG, dest=_CONFIG, metavar="FILE", action=_Once, default=argparse.SUPPRESS,
            help="YAML or JSON file, path or URI, of these options by name, with _ for -; the command line wins. "
            f"{self.request.FILE_HELP}(default: none)",
        )  # fmt: skip
        return parser


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


class _Once(argparse.Action):
    """Keeps the one value of an option: of two, the first would be lost silently."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{option}: is given twice; give it once")
        setattr(namespace, self.dest, values)


class _OnOrOffOnce(argparse.BooleanOptionalAction):
    """--loud or --no-loud, once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{' or '.join(self.option_strings)}: is given twice; give it once")
        super().__call__(parser, namespace, values, option)


def end_with_error(message: str) -> NoReturn:
    """One line on stderr, and exit status 2."""
    say(f"error: {message}")
    sys.exit(2)


def set_up_logging() -> None:
    """Raises InputError for a level that is none."""
    level = os.environ.get("PCM_LOG_LEVEL") or "INFO"
    if level.upper() not in (levels := logging.getLevelNamesMapping()):
        raise not_known("PCM_LOG_LEVEL", level, tuple(levels))
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(name)s: %(message)s",
        datefmt=LOG_TIME,
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_worth_reading)
    for chatty in ("httpx", "httpcore", "botocore", "aiobotocore", "s3fs", "fsspec", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """open_clip narrates its loading on the root logger; only its warnings concern a user."""
    return record.name != "root" or record.levelno >= logging.WARNING


def _add(group: Any, request: type[Request], name: str, described: Option) -> None:
    entry = next(entry for entry in dataclasses.fields(request) if entry.name == name)
    shape = _shape(request, name)
    text = f"{described.help} ({_default_text(entry, described, shape)})".replace("%", "%%")
    settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if described.positional:
        nargs = "*" if shape.repeated else "?"
        group.add_argument(name, nargs=nargs, metavar=flag(request, name), help=text, default=argparse.SUPPRESS)
        return
    if shape.item is bool:
        group.add_argument(flag(request, name), dest=name, action=_OnOrOffOnce, **settings)
        return
    settings["metavar"] = _metavar(request, name)
    settings["action"] = "append" if shape.repeated or shape.pairs else _Once
    if described.bare is not None:
        settings |= {"nargs": "?", "const": described.bare}
    group.add_argument(flag(request, name), dest=name, **settings)


def _arguments(parser: _Parser, argv: Sequence[str], request: type[Request]) -> dict[str, Any]:
    """Field -> value, of what was given."""
    namespace, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise _unknown_argument(unknown, request)
    values = {}
    for name, value in vars(namespace).items():
        if name == _CONFIG:
            values[name] = value
        elif value != [] or not options_of(request)[name].positional:
            values[name] = _read(request, name, value, flag(request, name))
    return values


def _unknown_argument(unknown: list[str], request: type[Request]) -> InputError:
    shown = next((text for text in unknown if text.startswith("-")), unknown[0])
    if not shown.startswith("-"):
        return InputError(f"{shown}: not known; it belongs to no option")
    name = shown.partition("=")[0]
    flags = [_CONFIG, *(flag(request, field) for field in options_of(request))]
    if (setting := name.removeprefix("--").replace("-", "_")) in request.settable():
        return InputError(f"{name}: not known; it is a setting: use --set {setting}=VALUE")
    # Of two short names half of the letters are the same by chance: --lr and --clip.
    near = difflib.get_close_matches(name.removeprefix("--"), [each.removeprefix("--") for each in flags], n=1)
    return InputError(f"{name}: not known" + (f"; did you mean --{near[0]}?" if near else ""))


def _file_values(request: type[Request], place: str) -> dict[str, Any]:
    """Field -> value, of a --config file. Raises InputError."""
    fields = request.file_fields(_load(place))
    names = options_of(request)
    by_flag = {flag(request, name).removeprefix("--").replace("-", "_"): name for name in names}
    values = {}
    for key, value in fields.items():
        name = key if key in names else by_flag.get(str(key).replace("-", "_"))
        if name is None:
            allowed = [*by_flag, *(setting for setting in request.settable() if setting not in by_flag)]
            near = difflib.get_close_matches(str(key), [*names, *allowed], n=1)
            guess = f"; did you mean {near[0]!r}?" if near else f"; allowed are {', '.join(allowed)}"
            raise InputError(f"{place}: {key!r} is not known{guess}")
        if name in values:
            raise InputError(f"{place}: {key!r} is given twice, under two names; give it once")
        if value is None:
            continue
        values[name] = _read(request, name, _as_arguments(value), f"{place}: {key}")
    return values


def _load(place: str) -> dict[str, Any]:
    import yaml

    from cluster.store.store import read_uri

    class LoaderOfKeysOnce(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)], place)
            return node

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([key for key, _ in pairs], place)
        return dict(pairs)

    data = read_uri(place)
    try:
        # First: YAML takes 1e-8, which JSON writes, for a text.
        found = read_document(data, object_pairs_hook=object_of)
    except InputError:
        raise
    except ValueError:
        try:
            found = yaml.load(data, LoaderOfKeysOnce)
        except InputError:
            raise
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{place}: neither JSON nor YAML ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{place}: must hold NAME: value, an object in JSON")
    return found


def _refuse_twice(keys: list[str], place: str) -> None:
    """Raises InputError for a key that stands twice in an object of a --config file: the first would be lost."""
    if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
        raise InputError(f"{place}: {twice[0]!r} is given twice; give it once")


def _check_outputs(request: Request) -> None:
    """Raises InputError for a place that cannot hold what the job makes, and for no number of seconds of patience."""
    from cluster.store.outputs import check_output  # --help needs no file systems
    from cluster.store.retries import retry_seconds

    retry_seconds()
    kind = type(request)
    for name, described in options_of(kind).items():
        if described.writes and (uri := getattr(request, name)) is not None:
            check_output(os.fspath(uri), described.writes, shown=flag(kind, name))


def _as_arguments(value: Any) -> Any:
    """A value of a file as the command line would have it: text, texts, or a bool."""
    if isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return [_text(f"{name}={_text(item)}") for name, item in value.items()]
    if isinstance(value, list):
        return [_text(item) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    refuse_credentials(text)
    return os.path.expanduser(text) if text.startswith("~/") else text  # as the shell does


def _read(request: type[Request], name: str, given: Any, shown: str) -> Any:
    """The value of a field from its texts. `shown` is what errors call it."""
    described, shape = options_of(request)[name], _shape(request, name)
    if shape.item is bool:
        if not isinstance(given, bool):
            raise InputError(f"{shown} {given!r}: must be true or false")
        return given
    if isinstance(given, bool):
        given = _text(given)
    if shape.pairs or shape.repeated:
        items = [_read_one(described, shape, text, shown) for text in (given if isinstance(given, list) else [given])]
        return named_once(items, shown=shown) if shape.pairs else tuple(items)
    if isinstance(given, list):
        raise InputError(f"{shown} {' '.join(given)}: takes one value")
    return _read_one(described, shape, given, shown)


def _read_one(described: Option, shape: "_Shape", text: str, shown: str) -> Any:
    if described.parse is not None:
        return parsed(described, text, shown=shown)
    try:
        return shape.item(text)
    except ValueError:
        raise InputError(f"{shown} {text}: must be {in_words(shape.item)}") from None


@dataclass(frozen=True)
class _Shape:
    """How a field is written: one value of type `item`, several, or NAME=VALUE pairs."""

    item: type
    repeated: bool = False
    pairs: bool = False


def _shape(request: type[Request], name: str) -> _Shape:
    hint = typing.get_type_hints(request)[name]
    parts = [
        part
        for part in (typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,))
        if part is not type(None)
    ]
    for part in parts:
        origin = typing.get_origin(part)
        if origin is tuple and typing.get_args(part)[-1] is Ellipsis:
            return _Shape(typing.get_args(part)[0], repeated=True)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return _Shape(str, pairs=True)
    return _Shape(parts[0])


def _metavar(request: type[Request], name: str) -> str:
    described = options_of(request)[name]
    if described.metavar:
        return described.metavar
    if described.choices:
        return "|".join(described.choices)
    return {int: "N", float: "X"}.get(_shape(request, name).item, name.upper())


def _usage(request: type[Request], name: str) -> str:
    described = options_of(request)[name]
    if described.positional:
        return flag(request, name) + ("..." if _shape(request, name).repeated else "")
    return f"{flag(request, name)} {_metavar(request, name)}"


def _is_required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _default_text(entry: dataclasses.Field, described: Option, shape: _Shape) -> str:
    more = "; repeatable" if shape.repeated or shape.pairs else ""
    if described.positional:
        more = "; one or more" if shape.repeated else ""
    if _is_required(entry):
        return f"required{more}"
    if entry.default in (None, ()) or entry.default is dataclasses.MISSING:
        return f"default: {described.unset}{more}"
    if shape.item is bool:
        return f"default: {'on' if entry.default else 'off'}"
    return f"default: {entry.default}{more}"
