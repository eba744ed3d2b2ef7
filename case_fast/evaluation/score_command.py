"""What `case-fast score` does: read, measure, show, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from case_fast.evaluation.bertscore import BertScore
from case_fast.evaluation.measures import Measure, absent
from case_fast.evaluation.proxies import Epitome, Intents
from case_fast.evaluation.replies import read_all
from case_fast.evaluation.score import Measurer, score, with_rows
from case_fast.evaluation.score_table import show, write_scores
from case_fast.files import require_folder_place
from case_fast.optional import MissingPackage

# Of each option that brings measures: a row and its group that stand for them, and what to give.
OPTIONS = {
    "epitome": ("epitome_er", "empathy", "the folder dataset of behavioral-data/Empathy-Mental-Health"),
    "intents": ("intent_agreement", "empathy", "the folder datasets of anuradha1992/EmpatheticIntents"),
    "bertscore": ("bert_score", "overlap", "a folder with a model, such as a copy of roberta-large"),
}


@dataclass(frozen=True)
class ScoreSettings:
    """What `score` measures beside what needs no further data, and where it writes.

    Args:
        intents: folder datasets of EmpatheticIntents
        epitome: folder dataset of EPITOME, with its three CSV files
        bertscore: folder with the model for BERTScore
        bertscore_layer: layer whose vectors are compared; default: the last
        bertscore_baseline: table LAYER,P,R,F of bert_score to rescale with; default: not rescaled
        device: where BERTScore runs: auto, cpu, cuda or cuda:N
        out: folder for score.md, score.json and score.png
    """

    intents: str | None = None
    epitome: str | None = None
    bertscore: str | None = None
    bertscore_layer: int | None = None
    bertscore_baseline: str | None = None
    device: str = "auto"
    out: str | None = None


def score_command(predictions: Sequence[str], settings: ScoreSettings, console: Any) -> list[Path]:
    """Score files of replies, show what was found, and write it where ``out`` names a folder; the paths written.

    Args:
        predictions: as `read_replies` takes them.
        console: a `Terminal` of the command line.
    """
    if settings.out:
        require_folder_place(settings.out)

    def told(what: str) -> None:
        console.say(f"{what} ...", style="dim")

    files = read_all(predictions)
    for file in files:
        if file.report.skipped:
            console.say(file.report.summary(), style="yellow")
    given: dict[str, Callable[[], Measurer]] = {
        "epitome": lambda: Epitome(settings.epitome),
        "intents": lambda: Intents(settings.intents),
        "bertscore": lambda: BertScore(settings.bertscore, settings.bertscore_layer, settings.bertscore_baseline,
                                       settings.device),
    }
    measurers: list[Measurer] = []
    rows: list[Measure] = []
    for option, opened in given.items():
        row, group, what = OPTIONS[option]
        if not getattr(settings, option):
            rows.append(absent(row, group, f"give {what}: --{option} DIR"))
            continue
        told(option)
        try:
            measurers.append(opened())
        except MissingPackage as error:
            rows.append(absent(row, group, str(error)))
    found = with_rows(score(files, measurers, told=told), rows)
    show(found, console)
    return write_scores(found, Path(settings.out)) if settings.out else []
