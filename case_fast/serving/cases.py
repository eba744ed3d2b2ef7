"""Table 6: chosen examples, what several runs reply to them, and the knowledge that these replies depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from case_fast.data.text import is_word, tokenize
from case_fast.files import write_text
from case_fast.serving.reasons import NO_CHANGE, Explanation, Weighed

_ROWS = {"inferences": "Cognition", "reactions": "Reaction", "concepts": "Concept"}  # as the paper calls them
_MOST = 5  # of a kind
CAPTION = (f"Replies, and of the knowledge that each model read at most {_MOST} of a kind: those whose leaving out lowers log P "
           f"of its reply the most, with that effect in nats. A kind of which none lowers it by {NO_CHANGE} says so. Bold: words "
           "of a reply that stand in the knowledge shown. In parentheses behind a reply: the emotion that its model predicts.")


@dataclass(frozen=True)
class Case:
    """An example, and what runs made of it.

    Attributes:
        name: where it is from. emotion: that it was told under. reference: the reply that a person gave.
        replies: the name of each run, and its explanation with effects.
    """

    name: str
    emotion: str
    reference: str
    replies: Sequence[tuple[str, Explanation]]


def write_cases(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write table6.md and table6.tex into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table6.md", folder / "table6.tex"]
    write_text(paths[0], markdown(cases))
    write_text(paths[1], latex(cases))
    return paths


def _used(found: Explanation, kind: str) -> list[Weighed]:
    """What the reply depends on the most, of a kind."""
    ranked = sorted(getattr(found, kind), key=lambda item: -(item.effect or 0.0))
    return [item for item in ranked if (item.effect or 0.0) >= NO_CHANGE][:_MOST]


def _rows(case: Case, plain: Callable[[str], str], bold: Callable[[str], str]) -> list[tuple[str, str]]:
    """Name and content of each row but the first, the emotion's; ``plain`` and ``bold`` write a text and a word to be seen."""
    turns = [f"{'Speaker' if turn.by_speaker else 'Listener'}: {turn.text}" for turn in case.replies[0][1].turns]
    rows = [(plain("Context"), plain(" / ".join(turns)))]
    for name, found in case.replies:
        shown = {kind: _used(found, kind) for kind in _ROWS}
        for kind, title in _ROWS.items():
            if getattr(found, kind):
                texts = [plain(f"{item.text} (+{item.effect:.3f})") for item in shown[kind]]
                rows.append((plain(f"{name}: {title}"), ", ".join(texts) or plain("none that the reply depends on")))
        known = {word for items in shown.values() for item in items for word in tokenize(item.text) if is_word(word)}
        words = [bold(plain(word)) if known & set(tokenize(word)) else plain(word) for word in found.text.split()]
        rows.append((bold(plain(name)), " ".join([*words, *([plain(f"({found.emotion})")] if found.emotion else [])])))
    return [*rows, (plain("Ground-Truth"), plain(case.reference))]


def markdown(cases: Sequence[Case]) -> str:
    """A table with a row of each thing; the examples below one another."""
    lines = ["# Table 6", ""]
    for case in cases:
        lines += [f"| Emotion | {_for_markdown(case.emotion)} ({_for_markdown(case.name)}) |", "|---|---|"]
        lines += [f"| {name} | {text} |" for name, text in _rows(case, _for_markdown, lambda word: f"**{word}**")]
        lines.append("")
    return "\n".join([*lines, CAPTION]) + "\n"


def latex(cases: Sequence[Case]) -> str:
    """A booktabs table."""
    lines = [r"\begin{table*}", r"\centering\small", r"\begin{tabular}{l p{0.8\textwidth}}", r"\toprule"]
    for place, case in enumerate(cases):
        lines += [r"\midrule"] * bool(place)
        lines.append(rf"Emotion & {_for_latex(case.emotion)} ({_for_latex(case.name)}) \\")
        lines += [rf"{name} & {text} \\" for name, text in _rows(case, _for_latex, lambda word: rf"\textbf{{{word}}}")]
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_for_latex(CAPTION)}}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _for_markdown(text: str) -> str:
    """A text as a cell of a table: what would be a mark of Markdown or an element of HTML is none."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|~#" else sign for sign in " ".join(text.split()))


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}


def _for_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
