"""An HTML page as a browser's parser finds it."""

import html.parser


class Page(html.parser.HTMLParser):
    """Elements in document order, and the text between them, styles and scripts aside."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[dict[str, str | None]] = []  # of the element at the same place
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes.append(dict(attributes))
        self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        while self._open and self._open.pop() != name:
            pass  # elements without an end

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open[-1:]):
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of every element of this name."""
        return [found for other, found in zip(self.names, self.attributes, strict=True) if other == name]
