"""Talking to a responder in a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from case_fast.data.text import normalize_space
from case_fast.generation import GenerationConfig
from case_fast.serving.reasons import Reply, Weighed
from case_fast.serving.responder import Responder
from case_fast.serving.show import bar
from case_fast.serving.show import show as show_all

_COMMANDS = "/why details of the last reply · /new another dialogue · /quit"
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
    try:
        while True:
            line = normalize_space(read("you  › " if interactive else ""))
            if not line:
                continue
            if line.startswith("/"):
                if line == "/quit":
                    return
                if line == "/new":
                    history = []
                    console.print("A new dialogue.", style="dim")
                elif line == "/why" and history:
                    show_all(responder.explain(history[:-1], config=config), console)
                else:
                    console.print("Nothing has been said yet." if line == "/why" else _COMMANDS, style="dim", highlight=False)
                continue
            reply = responder.respond([*history, line], config)
            if not reply.text.strip():
                console.print("The model has no words for that; put it another way.", style="dim")
                continue
            history += [line, reply.text]
            who = f"{responder.model.config.kind} › " if interactive else ""
            console.print(Text.assemble((who, "green"), (reply.text, "bold")), highlight=False)
            if show:
                _show_some(reply, console)
    except (EOFError, KeyboardInterrupt):
        if interactive:
            console.print("\nGoodbye.", style="dim")


def _show_some(reply: Reply, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    if reply.emotion is not None:
        grid.add_row(Text("emotion", style="dim"), bar(reply.emotions[0][1]), Text(reply.emotion, style="magenta"), "")
    for place, item in enumerate(reply.inferences[:_SHOWN]):
        label = "" if place else "inferences"
        grid.add_row(Text(label, style="dim"), _share(item), Text(item.text), Text(item.relation, style="dim"))
    for place, concept in enumerate(reply.concepts[:_SHOWN]):
        grid.add_row(Text("" if place else "concepts", style="dim"), _share(concept), Text(concept.text),
                     Text(", ".join(concept.tokens), style="dim"))
    console.print(grid)
    if reply.unknown_words:
        console.print(Text(f"unknown words: {', '.join(reply.unknown_words)}", style="dim"))


def _share(item: Weighed) -> Text:
    """Its weight, where it is weighed."""
    return Text() if item.prior is None else bar(item.prior)
