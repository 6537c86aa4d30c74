"""The page around the sections: head, headline, contents, and what is not there."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from cluster.charts.markup import Html, Node, tag
from cluster.charts.svg import STYLE
from cluster.report.gallery import Picture
from cluster.report.parts import absent, code, tiles

_HERE = files("cluster.report")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What stands on top: a sentence, a paragraph, large numbers and a wall of pictures."""

    title: str
    lead: str
    numbers: tuple[tuple[str, str, str], ...]  # (number, what it is, a word more or "")
    wall: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A section and its name among the contents."""

    anchor: str
    name: str
    section: Html


def page(headline: Headline, entries: Sequence[Entry], *, missing: Sequence[tuple[str, Node]], made_by: str) -> str:
    """The whole document. `missing`: (part, why it is not there); `made_by`: the command that writes it again."""
    style = STYLE + _HERE.joinpath("report.css").read_text(encoding="utf-8")
    script = _HERE.joinpath("report.js").read_text(encoding="utf-8")
    links = [tag("a", each.name, href=f"#{each.anchor}") for each in entries]
    body = tag(
        "body",
        tag("a", "Skip to the report", href="#report", class_="skip"),
        _header(headline),
        tag("nav", tag("div", links), aria_label="Contents"),
        tag("main", (each.section for each in entries), missing and _missing(missing), id="report", tabindex=-1),
        tag("footer", tag("p", "Made by ", code(made_by), ". Metrics and pictures are as the store holds them.")),
        tag("script", Html(script)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", headline.title),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but the report's own: a second lock behind the escaping."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _header(headline: Headline) -> Html:
    wall = tag(
        "div",
        (tag("img", src=each.uri, alt="", class_="pixels") for each in headline.wall if each.uri),
        class_="wall", aria_hidden="true",
    )  # fmt: skip
    text = tag(
        "div",
        tag("p", "PCM-Net on Ray", class_="eyebrow"),
        tag("h1", headline.title),
        tag("p", headline.lead, class_="lead"),
    )
    top = tag("div", text, wall if headline.wall else None, class_="headline")
    return tag("header", top, tiles(headline.numbers), class_="top")


def _missing(parts: Sequence[tuple[str, Node]]) -> Html:
    return tag(
        "section",
        tag("header", tag("h2", "Not in this report")),
        [absent([tag("b", f"{name}: "), why]) for name, why in parts],
        id="missing",
    )
