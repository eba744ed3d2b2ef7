"""HTML by small steps: everything is escaped unless it is `Html` already, and a page fetches nothing and runs nothing."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence


class Html(str):
    """Text that is HTML already; `tag` escapes every other text."""


Node = str | Iterable["Node"] | None


def render(node: Node) -> Html:
    """HTML of a text (escaped), of `Html` (as it is), of None (nothing), or of several of these one after the other."""
    if node is None:
        return Html()
    if isinstance(node, str):
        return node if isinstance(node, Html) else Html(html.escape(node))
    return Html("".join(map(render, node)))


def tag(name: str, /, *children: Node, **attributes: str | None) -> Html:
    """An element; ``class_`` stands for class, an attribute that is None is left out."""
    found = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value is not None
    )
    void = name in ("img", "meta", "wbr")
    return Html(f"<{name}{found}>" + ("" if void else f"{render(children)}</{name}>"))


def page(title: str, *body: Node) -> str:
    """A whole document. Its content policy forbids scripts and every fetch, should a text ever escape the escaping."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", http_equiv="Content-Security-Policy", content=policy),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("title", title), tag("style", Html(_STYLE)))
    return "<!doctype html>\n" + tag("html", head, "\n", tag("body", tag("main", *body)), lang="en") + "\n"


def facts(pairs: Iterable[tuple[str, Node]]) -> Html:
    """Names with their values, two columns; pairs without a value are left out."""
    rows = [(tag("dt", name), tag("dd", value)) for name, value in pairs if value]
    return tag("dl", rows, class_="facts")


def section(title: str, *body: Node) -> Html:
    return tag("section", tag("h2", title), *body)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = (), caption: str | None = None) -> Html:
    """A table of texts; columns called one of ``numbers`` are set to the right."""
    sides = ["n" if name in numbers else None for name in head]
    names = [tag("th", name, class_=side, scope="col") for name, side in zip(head, sides, strict=True)]
    cells = [[tag("td", cell, class_=side) for cell, side in zip(row, sides, strict=True)] for row in rows]
    return tag("table", tag("caption", caption) if caption else None, tag("thead", tag("tr", names)),
               tag("tbody", [tag("tr", row) for row in cells]))


_STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f5f6f8; --card: #ffffff; --ink: #1c2430; --muted: #5a6573; --line: #dfe3e8; --grid: #e4e8ed;
  --accent: #2563a8; --faint: #bdd2ea; --second: #b45309; --good: #17734a; --bad: #b3261e; --tint: #eef3f9;
  --warn: #fff6e5; --warn-line: #e8c37a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #11151a; --card: #191f27; --ink: #e4e9ef; --muted: #9aa6b4; --line: #2b3440; --grid: #2b3440;
    --accent: #74b3ff; --faint: #35557b; --second: #f0ab4e; --good: #57c790; --bad: #ff8a80; --tint: #202934;
    --warn: #2a2417; --warn-line: #6d5723;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 14px; }
h3 { font-size: 1rem; margin: 22px 0 10px; }
p { margin: 0 0 12px; max-width: 75ch; }
section, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin: 18px 0; }
section > :last-child, p:last-child { margin-bottom: 0; }
.muted, figcaption, footer { color: var(--muted); font-size: .9rem; }
.pill {
  display: inline-block; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--line); font-size: .85rem;
  background: var(--tint); vertical-align: 2px; white-space: nowrap;
}
.warn { background: var(--warn); border-color: var(--warn-line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0; }
.tiles > div { padding: 12px 16px; }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 5px 18px; margin: 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  background: var(--tint); border-radius: 6px; padding: 8px 12px; margin: 6px 0 12px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .9rem; color: var(--muted); }
td.n, th.n { text-align: right; padding: 7px 0 7px 16px; white-space: nowrap; }
table + p { margin-top: 10px; }
td code { display: block; color: var(--muted); font-size: .74rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px 22px; }
.charts svg { width: 100%; height: auto; display: block; stroke-linejoin: round; stroke-linecap: butt; }
figure { margin: 0; }
figcaption { margin-top: 8px; }
.scroll { overflow-x: auto; }
.wide { overflow-x: auto; border-radius: 8px; background: #fff; border: 1px solid var(--line); }
.wide img { display: block; width: 100%; min-width: 760px; height: auto; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.example { border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0; overflow-wrap: anywhere; }
.example p { margin: 0 0 7px; }
.example p:last-child { margin: 0; }
.who { display: block; color: var(--muted); font-size: .74rem; letter-spacing: .02em; }
.listener { padding-left: 18px; border-left: 3px solid var(--line); }
.reply { padding: 7px 12px; border-left: 3px solid var(--accent); background: var(--tint); border-radius: 0 6px 6px 0; }
.good { color: var(--good); }
.bad { color: var(--bad); }
summary { cursor: pointer; font-weight: 600; }
details + details { margin-top: 12px; }
details pre { max-height: 480px; overflow: auto; }
@media (max-width: 560px) {
  main { padding: 16px 10px 40px; }
  section { padding: 15px 14px; }
  h1 { font-size: 1.4rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 8px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tiles b { font-size: 1.35rem; }
}
@media print { section { break-inside: avoid-page; } body { background: #fff; } }
"""
