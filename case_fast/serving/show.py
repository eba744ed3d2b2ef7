"""An explanation as text in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from case_fast.serving.reasons import Attention, Change, Explanation, Weighed

KINDS = {"inferences": "Commonsense inferences", "reactions": "Reactions", "concepts": "Emotional concepts",
         "context": "Words of the context"}  # of the kinds of things
NUMBERS = ("lift", "effect", "prior", "posterior", "intensity", "position")
_BAR = 12  # columns of a probability of 1
_EMOTIONS = 5  # shown, of 32; and changes of weights
_WORDS = 10  # of the context
_MARKS = {"equal": "", "delete": "red strike", "insert": "green bold"}


def bar(share: float) -> Text:
    """A probability as a bar and in per cent."""
    filled = round(share * _BAR)
    percent = " <1 %" if 0 < share < 0.005 else f"{100 * share:3.0f} %"
    return Text.assemble(("█" * filled, "cyan"), ("░" * (_BAR - filled), "dim"), f" {percent:>5}", no_wrap=True)


def show(found: Explanation, console: Console) -> None:
    """Print all of an explanation but the attention of its words, of which the strongest are shown, and the graphs."""
    grid = Table.grid(padding=(0, 2))
    for turn in found.turns:
        grid.add_row(Text("speaker" if turn.by_speaker else "listener", style="cyan" if turn.by_speaker else "green"),
                     Text(turn.text))
    grid.add_row(Text("given reply" if found.given else found.model, style="bold green"), Text(found.text, style="bold"))
    for place, (emotion, probability) in enumerate(found.emotions[:_EMOTIONS]):
        grid.add_row(Text("" if place else "emotion", style="dim"), Text.assemble(bar(probability), "  ", (emotion, "magenta")))
    for name, text in facts(found):
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)
    if not found.emotions:
        console.print("No predicted emotion.")
    if found.change is not None:
        _show_change(found.change, console)
    for kind, title in KINDS.items():
        head, rows = table_of(found, kind, _WORDS if kind == "context" else None)
        if rows:
            table = Table(title=f"{title}: {summary(found, kind)}", title_justify="left")
            for name in head:
                table.add_column(name, no_wrap=name in NUMBERS)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
            if len(rows) < len(items_of_kind(found, kind)):
                console.print(Text(f"  the {len(rows)} with the largest effects", style="dim"))
        else:
            console.print(f"No {title[0].lower()}{title[1:]}.")
        for note in found.notes.get(kind, ()):
            console.print(Text(f"  {note}", style="yellow"))
    for source in found.attention:
        _show_attention(source, console)


def facts(found: Explanation) -> Iterator[tuple[str, str]]:
    """What is said of a reply in a line each."""
    if found.gate is not None:
        first, second = found.balance
        yield "gate", f"{first} {100 * found.gate:.0f} % · {second} {100 * (1 - found.gate):.0f} %"
    yield "log P", f"{found.log_p:.2f} nats · perplexity {found.perplexity:.1f}"
    if found.truncated:
        yield "cut off", f"{found.truncated} context words at the front"
    if found.unknown_words:
        yield "unknown", ", ".join(found.unknown_words)
    if found.unknown_in_reply:
        yield "unknown in the reply", ", ".join(found.unknown_in_reply)


def summary(found: Explanation, kind: str) -> str:
    """How many there are, and as if over how many the weight were spread."""
    number = str(len(items_of_kind(found, kind)))
    spread = found.spreads.get(kind)
    if spread is None:
        return number
    parts = [f"prior as if {spread.prior:.1f} of {spread.number}"]
    if spread.posterior is not None:
        parts.append(f"posterior as if {spread.posterior:.1f}, KL {spread.kl:.4f}")
    return ", ".join([number, *parts])


def items_of_kind(found: Explanation, kind: str) -> Sequence[Weighed]:
    return getattr(found, kind)


def table_of(found: Explanation, kind: str, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of a kind of things; columns that none of them has a value for are left out. ``most``: only so
    many, those of the largest effects."""
    columns = {"lift": ".2f", "effect": "+.3f", "prior": ".4f", "posterior": ".4f", "intensity": ".2f"}
    items = items_of_kind(found, kind)
    if most is not None:
        chosen = sorted(items, key=lambda item: -abs(item.effect or 0.0))[:most]
        items = [item for item in items if item in chosen]
    numbers = [name for name in columns if any(getattr(item, name, None) is not None for item in items)]
    texts = {"inferences": ("relation", "text", "of"), "reactions": ("text", "of"), "concepts": ("text", "tokens", "position"),
             "context": ("position", "text")}[kind]
    rows = [[*(number(getattr(item, name), columns[name]) for name in numbers), *(_cell(item, name) for name in texts)]
            for item in items]
    heads = {"text": {"inferences": "inference", "reactions": "reaction", "concepts": "concept", "context": "word"}[kind],
             "tokens": "of"}
    return [*numbers, *(heads.get(name, name) for name in texts)], rows


def number(value: float | None, form: str) -> str:
    """-0.000 is no news: an effect that rounds to 0 has no sign."""
    if value is None:
        return ""
    text = format(value, form)
    return text.lstrip("+-") if not text.strip("+-0.") else text


def _cell(item: Weighed, name: str) -> str:
    value = getattr(item, name)
    if name == "of":
        return ",".join(f"u{sub}" for sub in value)
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _show_change(change: Change, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("without the edits", style="dim"), Text(change.before))
    grid.add_row(Text("with them", style="dim"), Text(change.after))
    grid.add_row(Text("words", style="dim"), Text.assemble(*_marked(change)))
    for name, text in changes(change):
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)


def _marked(change: Change) -> Iterator[tuple[str, str]]:
    for op, before, after in change.words:
        for words, mark in ((before, "delete"), (after, "insert")) if op != "equal" else ((before, "equal"),):
            yield from ((f"{word} ", _MARKS[mark]) for word in words)


def changes(change: Change) -> Iterator[tuple[str, str]]:
    """What edits changed, in a line each."""
    for emotion, before, after in change.emotions[:_EMOTIONS]:
        if abs(after - before) >= 0.0005:
            yield "emotion", f"{emotion} {100 * before:.1f} % → {100 * after:.1f} %"
    if change.gate is not None:
        yield "gate", f"{change.gate[0]:.3f} → {change.gate[1]:.3f}"
    for moved in change.weights[:_EMOTIONS]:
        name = " ".join(filter(None, (moved.relation, moved.text)))
        yield f"weight, {moved.kind}", f"{name} {number(moved.before, '.4f') or 'none'} → {number(moved.after, '.4f') or 'none'}"
    yield "log P of the old reply", f"{change.log_p[0]:.3f} → {change.log_p[1]:.3f}"


def _show_attention(source: Attention, console: Console) -> None:
    table = Table("word", *["read most"] * bool(source.rows), title=f"Attention to {source.source}", title_justify="left")
    for word, shares in zip(source.words, source.weights, strict=True):
        ranked = sorted(zip(shares, source.rows, strict=True), key=lambda pair: -pair[0])[:3]
        table.add_row(Text(word), Text(" · ".join(_shares(ranked))))
    console.print(table)


def _shares(ranked: Iterable[tuple[float, str]]) -> Iterator[str]:
    return (f"{label} {100 * share:.0f} %" for share, label in ranked)
