"""Explanations as one HTML file: no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence

from case_fast import __version__
from case_fast.html import Html, Node, facts, page, section, table, tag
from case_fast.serving import graphs
from case_fast.serving.reasons import Attention, Change, Explanation
from case_fast.serving.show import KINDS, NUMBERS, changes, summary, table_of
from case_fast.serving.show import facts as facts_of

_FIRST = 5  # emotions that are shown without being asked for
_READING = ("Lift: the weight over what it would be, were all weights equal. Effect: by how much log P of this reply falls when "
            "the thing is left out, in nats. A weight says what was read, not what mattered; an effect says what this reply "
            "loses, not what the model would have said instead.")


def explanation_page(found: Sequence[Explanation]) -> str:
    """A whole document about these explanations."""
    title = found[0].turns[-1].text if len(found) == 1 else f"{len(found)} replies explained"
    return page(f"Why: {title}", tag("header", tag("h1", "Why this reply?"), tag("p", _READING, class_="muted")),
                [_explanation(one, f"{number}. " if len(found) > 1 else "") for number, one in enumerate(found, 1)],
                tag("footer", f"Written by case_fast {__version__}. This page loads nothing from outside and runs no script."))


def _explanation(found: Explanation, number: str) -> Node:
    yield section(f"{number}{'Given reply' if found.given else 'Reply'} of {found.model}", _dialogue(found),
                  facts([(name, text) for name, text in facts_of(found)]), _emotions(found))
    if found.change is not None:
        yield section("What the edits changed", _change(found.change))
    for kind, title in KINDS.items():
        head, rows = table_of(found, kind)
        if rows:
            notes = [tag("p", tag("b", f"{note[0].upper()}{note[1:]}.")) for note in found.notes.get(kind, ())]
            yield section(f"{title}: {summary(found, kind)}", notes, tag("div", table(head, rows, NUMBERS), class_="scroll"))
    for graph in found.graphs:
        yield section(graph.title, tag("div", graphs.svg(graph), class_="scroll"),
                      tag("details", tag("summary", "As tables"), list(graphs.tables(graph))))
    for source in found.attention:
        if source.rows:
            yield section(f"Attention of the reply's words to {source.source}, in per cent", _attention(source))


def _dialogue(found: Explanation) -> Node:
    for turn in found.turns:
        who = "speaker" if turn.by_speaker else "listener"
        yield tag("p", tag("span", who, class_="who"), turn.text, class_=who)
    yield tag("p", tag("span", "given reply" if found.given else "reply", class_="who"), found.text, class_="reply")


def _emotions(found: Explanation) -> Node:
    if not found.emotions:
        return tag("p", "The model predicts no emotion.", class_="muted")
    rows = [tag("tr", tag("th", emotion, scope="row"), tag("td", tag("meter", value=f"{share:.4f}", min="0", max="1")),
                tag("td", f"{100 * share:.1f} %", class_="n")) for emotion, share in found.emotions]
    return (tag("h3", "Emotion"), tag("table", tag("tbody", rows[:_FIRST])),
            tag("details", tag("summary", f"The other {len(rows) - _FIRST}"), tag("table", tag("tbody", rows[_FIRST:]))))


def _change(change: Change) -> Node:
    marked = []
    for op, before, after in change.words:
        if op == "equal":
            marked.append(f"{' '.join(before)} ")
        else:
            marked += [(tag(name, " ".join(words)), " ") for name, words in (("del", before), ("ins", after)) if words]
    return (facts([("Without the edits", change.before), ("With them", change.after), ("Words", tag("span", marked))]),
            tag("ul", [tag("li", f"{name}: {text}") for name, text in changes(change)]))


def _attention(source: Attention) -> Html:
    """A row of the source a line, a word of the reply a column; what is below half a per cent is left blank."""
    head = tag("tr", tag("th", source.source), [tag("th", word, class_="n", scope="col") for word in source.words])
    rows = [tag("tr", tag("th", label, scope="row"), [
        tag("td", f"{100 * shares[place]:.0f}" if shares[place] >= 0.005 else "", class_="n") for shares in source.weights])
        for place, label in enumerate(source.rows)]
    return tag("details", tag("summary", f"{len(source.rows)} rows"),
               tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll"))
