"""One example of a store as a person wants to see it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from case_fast.data.graphs import COGNITION_GRAPH_RELATIONS, CONCEPT, CONCEPT_GRAPH_RELATIONS, CSR, FIRST_COMMONSENSE
from case_fast.data.store import Store
from case_fast.data.vocabulary import UNK
from case_fast.knowledge import COGNITION_RELATIONS, REACTION_RELATION


def describe(store: Store, split: str, index: int) -> dict[str, Any]:
    """All of an example in plain values: dialogue, sub-utterances with their inferences, concepts, both graphs by name."""
    example = store.example(split, index)
    text = store.texts.text
    words = store.featurizer.vocabulary.decode(example.context)
    concepts = store.featurizer.vocabulary.decode(example.concept)
    emotional = store.featurizer.emotional.of_context(example.context, example.context_intensity)
    subs = [text(int(i)) for i in example.sub_utterance]
    inferences: list[dict[str, list[str]]] = [{r: [] for r in (*COGNITION_RELATIONS, REACTION_RELATION)} for _ in subs]
    for t, sub, relation in zip(example.knowledge, example.knowledge_sub, example.knowledge_relation, strict=True):
        inferences[sub][COGNITION_RELATIONS[relation]].append(text(int(t)))
    for t, sub in zip(example.reaction, example.reaction_sub, strict=True):
        inferences[sub][REACTION_RELATION].append(text(int(t)))
    cognition_names = [*(f"u{i}" for i in range(len(subs))), *(text(int(t)) for t in example.knowledge)]
    concept_names = ["[CLS]", *words, *concepts]
    return {
        **example.source,
        "truncated_words": example.truncated,
        "words": words,
        "unknown_words": int((example.context == UNK).sum()),
        "emotional_words": [word for word, chosen in zip(words, emotional, strict=True) if chosen],
        "sub_utterances": [{"name": f"u{i}", "text": sub, "inferences": inferences[i]} for i, sub in enumerate(subs)],
        "concepts": [
            {"word": word, "intensity": round(float(w), 3), "of": list(tokens)}
            for word, w, tokens in zip(concepts, example.concept_intensity, example.tokens_of_concepts(words), strict=True)
        ],
        "cognition_graph": _graph(example.cognition_graph, cognition_names, COGNITION_GRAPH_RELATIONS),
        "concept_graph": _graph(example.concept_graph, concept_names, CONCEPT_GRAPH_RELATIONS),
    }


def _graph(graph: CSR, names: list[str], relations: tuple[str, ...]) -> dict[str, Any]:
    """Vertices, and undirected edges by relation, each once as (vertex, vertex)."""
    edges: dict[str, list[tuple[int, int]]] = {name: [] for name in relations}
    for vertex, neighbour, relation in graph.edges():
        if vertex <= neighbour:
            edges[relations[relation]].append((vertex, neighbour))
    return {"vertices": names, "edges": edges}


def show(store: Store, split: str, index: int, console: Console) -> None:
    """Print `describe` as panels and tables."""
    found = describe(store, split, index)
    # Text, not str, wherever somebody's words are shown: a bracket in them is no markup
    dialogue = Text()
    dialogue.append(f"situation {found['situation']}\n", style="dim")
    for said, by_speaker in zip(found["context"], found["by_speaker"], strict=True):
        dialogue.append("speaker   " if by_speaker else "listener  ", style="cyan" if by_speaker else "green")
        dialogue.append(said + "\n")
    dialogue.append("reply     ", style="bold green")
    dialogue.append(found["response"])
    if found.get("feedback"):  # not in the stores of earlier versions
        dialogue.append("\nspeaker   ", style="cyan")
        dialogue.append(found["feedback"], style="dim")
    title = Text(f"{split} {index} of {store.size(split):,} · {found['id']} · {found['emotion']}")
    console.print(Panel(dialogue, title=title, title_align="left"))
    if found["truncated_words"] or found["unknown_words"]:
        console.print(f"{found['truncated_words']} words cut off, {found['unknown_words']} words not in the vocabulary")

    table = Table(title="Sub-utterances and inferences (cognition and reactions)", title_justify="left", show_lines=True)
    table.add_column("sub-utterance", ratio=2)
    for relation in (*COGNITION_RELATIONS, REACTION_RELATION):
        table.add_column(relation, ratio=1)
    for sub in found["sub_utterances"]:
        cells = ["\n".join(sub["inferences"][r]) or "–" for r in (*COGNITION_RELATIONS, REACTION_RELATION)]
        table.add_row(Text(f"{sub['name']}  {sub['text']}"), *map(Text, cells))
    console.print(table)

    table = Table(title="Emotional concepts", title_justify="left")
    for column in ("concept", "intensity", "of the words"):
        table.add_column(column)
    for concept in found["concepts"]:
        table.add_row(*map(Text, (concept["word"], f"{concept['intensity']:.3f}", ", ".join(concept["of"]))))
    console.print(table if found["concepts"] else "No emotional concepts.")
    console.print(Text("Emotional words: " + (", ".join(found["emotional_words"]) or "none")))

    for title, graph, first in (
        ("G_CS, commonsense cognition graph", found["cognition_graph"], FIRST_COMMONSENSE),
        ("G_EC, emotional concept graph", found["concept_graph"], CONCEPT),
    ):
        names = graph["vertices"]
        total = sum(map(len, graph["edges"].values()))
        body = Text()
        for place, (relation, edges) in enumerate(graph["edges"].items()):
            body.append(f"{relation:<10}", style="magenta" if place >= first else "cyan")
            body.append(f"{len(edges):>4}  ")
            if relation == "self":
                body.append("every vertex with itself")
            elif relation == "temporary" and names[0] == "[CLS]":
                body.append("each word with the next: " + " – ".join(names[1 : 2 + len(edges)]))
            elif relation == "global" and names[0] == "[CLS]":
                body.append("[CLS] with every other vertex")
            else:
                body.append(", ".join(f"{names[a]} – {names[b]}" for a, b in edges) or "–")
            body.append("\n")
        body.rstrip()
        console.print(Panel(body, title=f"{title}: {len(names)} vertices, {total} edges", title_align="left"))
