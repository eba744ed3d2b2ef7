"""README.md and the pages of docs/, and what stands in code marks on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt().parse(page.read_text(encoding="utf-8"))


def _fences(page: Path) -> list[Block]:
    return [Block(page, token.map[0] + 1, token.info.strip(), token.content) for token in _tokens(page) if token.type == "fence"]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. Those of directives are Sphinx's, and not among them."""
    return [block for block in _fences(page) if not block.language.startswith("{")]


def of_the_site(page: Path) -> bool:
    """Whether a page is made of Sphinx's directives, for the site alone."""
    return len(blocks(page)) < len(_fences(page))


def named(page: Path) -> Iterator[str]:
    """What stands in code marks on a page: in a line of text between back quotes, or on a line of a block."""
    for block in blocks(page):
        yield from block.text.replace("\\\n", " ").splitlines()
    for token in _tokens(page):
        yield from (child.content for child in token.children or () if child.type == "code_inline")
