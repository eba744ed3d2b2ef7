"""Talking to a responder in a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from case_fast.data.text import normalize_space
from case_fast.generation import GenerationConfig
from case_fast.knowledge import REACTION_RELATION
from case_fast.serving.responder import Inference, Reply, Responder

_COMMANDS = "/why details of the last reply · /new another dialogue · /quit"
_BAR = 12  # columns of a probability of 1
_SHOWN = 5  # inferences and concepts below a reply; /why shows all


def chat(responder: Responder, console: Console, config: GenerationConfig | None = None, show: bool = True,
         read: Callable[[str], str] = input) -> None:
    """Talk until /quit, Ctrl-D, Ctrl-C or the end of the piped text; one line is one turn of the speaker's.

    Args:
        show: print emotion, inferences and concepts below each reply.
        read: gives the next line, EOFError at the end.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        console.print(f"Tell what happened to you. {_COMMANDS}", style="dim", highlight=False)
    history: list[str] = []
    last: Reply | None = None
    try:
        while True:
            line = normalize_space(read("you  › " if interactive else ""))
            if not line:
                continue
            if line.startswith("/"):
                if line == "/quit":
                    return
                if line == "/new":
                    history, last = [], None
                    console.print("A new dialogue.", style="dim")
                elif line == "/why" and last:
                    _show_all(last, console)
                else:
                    console.print("Nothing has been said yet." if line == "/why" else _COMMANDS, style="dim", highlight=False)
                continue
            reply = responder.respond([*history, line], config)
            if not reply.text.strip():
                console.print("The model has no words for that; put it another way.", style="dim")
                continue
            history += [line, reply.text]
            last = reply
            who = f"{responder.model.config.kind} › " if interactive else ""
            console.print(Text.assemble((who, "green"), (reply.text, "bold")), highlight=False)
            if show:
                _show_some(reply, console)
    except (EOFError, KeyboardInterrupt):
        if interactive:
            console.print("\nGoodbye.", style="dim")


def _bar(share: float) -> Text:
    filled = round(share * _BAR)
    percent = " <1 %" if 0 < share < 0.005 else f"{100 * share:3.0f} %"
    return Text.assemble(("█" * filled, "cyan"), ("░" * (_BAR - filled), "dim"), f" {percent:>5}", no_wrap=True)


def _distinct(inferences: Iterable[Inference]) -> list[Inference]:
    """What several sub-utterances imply as one, with their weights together and the shortest of them; by falling weight."""
    alike: dict[tuple[str, str], list[Inference]] = {}
    for item in inferences:
        alike.setdefault((item.relation, item.text), []).append(item)
    return sorted(
        (
            Inference(min((item.sub_utterance for item in items), key=len), *key, sum(item.weight for item in items))
            for key, items in alike.items()
        ),
        key=lambda item: -item.weight,
    )


def _show_some(reply: Reply, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    if reply.emotion is not None:
        grid.add_row(Text("emotion", style="dim"), _bar(reply.emotions[0][1]), Text(reply.emotion, style="magenta"), "")
    for place, item in enumerate(_distinct(reply.inferences)[:_SHOWN]):
        label = "" if place else "inferences"
        grid.add_row(Text(label, style="dim"), _bar(item.weight), Text(item.text), Text(item.relation, style="dim"))
    for place, concept in enumerate(reply.concepts[:_SHOWN]):
        grid.add_row(Text("" if place else "concepts", style="dim"), _bar(concept.weight), Text(concept.word),
                     Text(", ".join(concept.tokens), style="dim"))
    console.print(grid)
    if reply.unknown_words:
        console.print(Text(f"unknown words: {', '.join(reply.unknown_words)}", style="dim"))


def _show_all(reply: Reply, console: Console) -> None:
    table = Table("emotion", "probability", title="Predicted emotion", title_justify="left")
    for emotion, probability in reply.emotions:
        table.add_row(emotion, _bar(probability))
    console.print(table if table.row_count else "No predicted emotion.")
    table = Table("weight", "relation", "inference", "of", title="Commonsense inferences", title_justify="left")
    reactions = [Inference(item.sub_utterance, REACTION_RELATION, item.text, 0.0) for item in reply.reactions]
    for item in [*_distinct(reply.inferences), *_distinct(reactions)]:
        bar = Text() if item.relation == REACTION_RELATION else _bar(item.weight)
        table.add_row(bar, item.relation, Text(item.text), Text(item.sub_utterance))
    console.print(table if table.row_count else "No commonsense inferences.")
    table = Table("weight", "concept", "of", "intensity", title="Emotional concepts", title_justify="left")
    for concept in reply.concepts:
        table.add_row(_bar(concept.weight), Text(concept.word), Text(", ".join(concept.tokens)), f"{concept.intensity:.2f}")
    console.print(table if table.row_count else "No emotional concepts.")
    facts = [f"concepts' share of the affection {reply.gate:.2f}"] if reply.gate is not None else []
    facts.append(f"log-probability of the reply {reply.score:.2f}")
    if reply.truncated:
        facts.append(f"{reply.truncated} context words cut off")
    if reply.unknown_words:
        facts.append(f"unknown words: {', '.join(reply.unknown_words)}")
    console.print(Text(" · ".join(facts), style="dim"))
