"""Both graphs of a dialogue as data, as a picture in fixed columns, and as tables of the same content.

A picture takes its colours from the text around it and needs no style sheet; the same graph gives the same picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from case_fast.data.edited import edges_of
from case_fast.data.featurizer import Example
from case_fast.html import Html, table, tag
from case_fast.knowledge import COGNITION_RELATIONS
from case_fast.models.results import Choice
from case_fast.serving.lines import Line
from case_fast.serving.reasons import Edge, Graph, Node

TITLES = {"cognition": "G_CS, commonsense cognition graph", "concepts": "G_EC, emotional concept graph"}


# ---- as data


def graphs_of(example: Example, lines: Sequence[Line], subs: Sequence[str], choices: Mapping[str, Choice],
              before: Sequence[Line], needs: Collection[str]) -> tuple[Graph, ...]:
    """The graphs that a model with these `DialogueModel.needs` reads.

    Args:
        lines: of the example, with their numbers. before: those before edits: what is gone is drawn as left out.
    """
    found = []
    if "case" in needs:
        weights = choices["inferences"].prior.tolist() if "inferences" in choices else None
        found.append(_cognition(example, _of(lines, "inferences"), subs, weights, _of(before, "inferences")))
    if "concept" in needs:
        found.append(_concepts(example, lines, before))
    return tuple(found)


def _of(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line.kind == kind]


def _gone(before: Sequence[Line], now: Sequence[Line]) -> list[Line]:
    there = {line.label for line in now}
    return [line for line in before if line.label not in there]


def _cognition(example: Example, lines: Sequence[Line], subs: Sequence[str], weights: Sequence[float] | None,
               before: Sequence[Line]) -> Graph:
    nodes = [Node(f"u{place}", "sub-utterance", text) for place, text in enumerate(subs)]
    edges = [Edge("u0", f"u{place}", "global") for place in range(1, len(subs))]
    edges += [Edge(f"u{place}", f"u{place + 1}", "temporary") for place in range(1, len(subs) - 1)]
    gone = [line for line in _gone(before, lines) if max(line.item.of) < len(subs)]
    shown = [*((line, False) for line in lines), *((line, True) for line in gone)]
    shown.sort(key=lambda one: (COGNITION_RELATIONS.index(one[0].item.relation), -(one[0].item.prior or 0.0)))
    of = example.knowledge_sub.tolist()
    for place, (line, left_out) in enumerate(shown):
        item = line.item
        nodes.append(Node(f"i{place}", "inference", item.text, item.relation, item.lift, left_out=left_out))
        joined = [(sub, None) for sub in item.of] if left_out else [
            (of[row], None if weights is None else weights[row]) for row in line.rows]
        edges += [Edge(f"u{sub}", f"i{place}", item.relation, weight, left_out) for sub, weight in joined]
    return Graph("cognition", TITLES["cognition"], tuple(nodes), tuple(edges))


def _concepts(example: Example, lines: Sequence[Line], before: Sequence[Line]) -> Graph:
    start, *words = _of(lines, "context")
    concepts, same_words = _of(lines, "concepts"), [line.label for line in _of(before, "context")] == [
        line.label for line in (start, *words)]
    gone = _gone(_of(before, "concepts"), concepts) if same_words else []
    intensity = example.context_intensity.tolist()
    nodes = [Node("w0", "start", "[CLS]", lift=start.item.lift)]
    nodes += [Node(f"w{line.item.position}", "word", line.item.text, lift=line.item.lift, intensity=w)
              for line, w in zip(words, intensity, strict=True)]
    edges = [Edge("w0", node.id, "global") for node in nodes[1:]]
    edges += [Edge(f"w{place}", f"w{place + 1}", "temporary") for place in range(1, len(words))]
    hangs = defaultdict(list)
    for word, of in edges_of(example):
        hangs[of].append(f"w{word + 1}")
    for place, line in enumerate([*concepts, *gone]):
        left_out, item = place >= len(concepts), line.item
        nodes.append(Node(f"c{place}", "concept", item.text, lift=item.lift, intensity=item.intensity, left_out=left_out))
        joined = [f"w{word.item.position}" for word in words if word.item.text in item.tokens] if left_out else hangs[place]
        edges += [Edge("w0", f"c{place}", "global", left_out=left_out)]
        edges += [Edge(word, f"c{place}", "concept", left_out=left_out) for word in joined]
    return Graph("concepts", TITLES["concepts"], tuple(nodes), tuple(edges))


# ---- as a picture

_ROW, _FONT = 20, 12  # height of a line of text, and its size; a letter is about half as wide
_LEFT, _GAP, _RIGHT = 330, 200, 430  # of G_CS: sub-utterances, the lines between, inferences
_COLUMN, _COLUMNS = 120, 8  # of G_EC: words beside each other
_EVEN = 1.4  # width of the line of a lift of 1


def svg(graph: Graph) -> Html:
    """The graph as an ``<svg>`` element that says in words what it shows."""
    return (_cognition_svg if graph.name == "cognition" else _concepts_svg)(graph)


def _drawing(graph: Graph, about: str, width: int, height: int, *parts: object) -> Html:
    return tag("svg", tag("title", graph.title), tag("desc", about), *parts, xmlns="http://www.w3.org/2000/svg", role="img",
               viewBox=f"0 0 {width} {height}", width="100%", font_family="sans-serif", font_size=str(_FONT), fill="currentColor")


def _text(text: str, x: float, y: float, room: float, whole: str = "", **how: str) -> Html:
    """A text that is cut to its room, in full in its title."""
    most = max(2, int(room / (0.55 * _FONT)))
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return tag("text", tag("title", whole or text), short, x=f"{x:g}", y=f"{y:g}", **how)


def _line(start: tuple[float, float], end: tuple[float, float], width: float, left_out: bool) -> Html:
    return tag("line", x1=f"{start[0]:g}", y1=f"{start[1]:g}", x2=f"{end[0]:g}", y2=f"{end[1]:g}", stroke="currentColor",
               stroke_opacity="0.45", stroke_width=f"{width:.2f}", stroke_dasharray="4 3" if left_out else None)


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _cognition_svg(graph: Graph) -> Html:
    subs = [node for node in graph.nodes if node.kind == "sub-utterance"]
    inferences = [node for node in graph.nodes if node.kind == "inference"]
    place: dict[str, tuple[float, float]] = {}
    drawn: list[Html] = []
    y, right = _ROW, _LEFT + _GAP
    for relation in COGNITION_RELATIONS:
        of = [node for node in inferences if node.relation == relation]
        if of:
            drawn.append(_text(relation, right, y, _RIGHT, font_weight="bold"))
        for node in of:
            y += _ROW
            place[node.id] = (right - 6, y - 4)
            lift = "" if node.lift is None else f"{node.lift:.2f}  "
            how = {"fill_opacity": "0.5", "text_decoration": "line-through"} if node.left_out else {}
            drawn.append(_text(lift + node.text, right, y, _RIGHT, **how))
        y += _ROW * 1.5 if of else 0
    height = max(y, _ROW * (len(subs) + 1))
    step = (height - _ROW) / max(1, len(subs))
    for number, node in enumerate(subs):
        at = _ROW + step * number + step / 2 - _ROW / 2
        place[node.id] = (_LEFT, at - 4)
        drawn.append(_text(f"{node.id}  {node.text}", 8, at, _LEFT - 12, node.text))
    vertices = sum(edge.weight is not None for edge in graph.edges)
    lines = []
    for edge in graph.edges:
        if edge.target in place and edge.relation in COGNITION_RELATIONS:
            width = 1.0 if edge.weight is None else min(10.0, max(0.3, _EVEN * edge.weight * vertices))
            lines.append(_line(place[edge.source], place[edge.target], width, edge.left_out))
    about = (f"{len(subs)} sub-utterances at the left, {len(inferences)} inferences at the right by relation with their lifts, "
             "each joined to those that it was inferred from; the width of a line is the weight, a dashed one was left out. u0, "
             "the whole utterance, is joined to each of its sentences, and each sentence to the next.")
    return _drawing(graph, about, right + _RIGHT, round(height + _ROW), *lines, *drawn)


def _concepts_svg(graph: Graph) -> Html:
    words = [node for node in graph.nodes if node.kind == "word"]
    concepts = {node.id: node for node in graph.nodes if node.kind == "concept"}
    joined = [edge for edge in graph.edges if edge.relation == "concept"]
    below = defaultdict(list)  # concepts stand below their first word
    for name in concepts:
        below[next(edge.source for edge in joined if edge.target == name)].append(name)
    place: dict[str, tuple[float, float]] = {}
    drawn = [_text("[CLS]", 8, _ROW, _COLUMN, "[CLS], joined to every word and concept", font_weight="bold")]
    y = 2.2 * _ROW
    for start in range(0, len(words), _COLUMNS):
        row = words[start : start + _COLUMNS]
        for column, node in enumerate(row):
            x = 8 + column * _COLUMN
            place[node.id] = (x + 4, y + 4)
            drawn.append(_text(node.text, x, y, _COLUMN - 8, _about(node)))
            for depth, name in enumerate(below[node.id], 1):
                at, concept = y + 1.4 * _ROW * depth, concepts[name]
                radius = 2 + 6 * max(0.0, concept.intensity or 0.0)
                place[name] = (x + 16, at - 4 - radius)
                drawn.append(tag("circle", tag("title", _about(concept)), cx=f"{x + 16:g}", cy=f"{at - 4:g}", r=f"{radius:.1f}",
                                 fill_opacity="0.2" if concept.left_out else "0.6", stroke="currentColor",
                                 stroke_dasharray="2 2" if concept.left_out else None))
                drawn.append(_text(concept.text, x + 28, at, _COLUMN - 36, _about(concept)))
        y += _ROW * (1.8 + 1.4 * max(len(below[node.id]) for node in row))
    lines = [_line(place[edge.source], place[edge.target], 1.0, edge.left_out) for edge in joined]
    about = (f"[CLS] above, {len(words)} words in reading order, {len(concepts)} concepts below the first of their words and "
             "joined to all of them; the size of a dot is the emotion intensity, a dashed one was left out. [CLS] is joined to "
             "every word and concept, each word to the next.")
    return _drawing(graph, about, 16 + _COLUMN * _COLUMNS, round(y + 4), *lines, *drawn)


def _about(node: Node) -> str:
    parts = [node.text, *([f"intensity {node.intensity:.2f}"] if node.intensity is not None else []),
             *([f"lift {node.lift:.2f}"] if node.lift is not None else []), *(["left out"] if node.left_out else [])]
    return ", ".join(parts)


# ---- as tables


def tables(graph: Graph) -> Iterator[Html]:
    """Vertices and edges of the graph as ``<table>`` elements."""
    text = {node.id: node.text for node in graph.nodes}
    yield table(("", "what", "text", "relation", "intensity", "lift", ""), [
        (node.id, node.kind, node.text, node.relation or "", _number(node.intensity), _number(node.lift),
         "left out" if node.left_out else "") for node in graph.nodes], caption=f"{graph.title}: vertices")
    yield table(("from", "to", "relation", "weight", ""), [
        (f"{edge.source} {text[edge.source]}", f"{edge.target} {text[edge.target]}", edge.relation, _number(edge.weight, ".4f"),
         "left out" if edge.left_out else "") for edge in graph.edges], caption=f"{graph.title}: edges")
