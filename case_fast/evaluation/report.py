"""RUN/report.html: one self-contained page on a run, for reading, mailing and printing."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from case_fast import __version__
from case_fast.errors import CheckpointError
from case_fast.evaluation.evaluate import Evaluation, heading
from case_fast.evaluation.figures import Curve, curve_svg
from case_fast.evaluation.metrics import format_value
from case_fast.files import require_file_place, write_text
from case_fast.html import Html, Node, facts, page, section, tag
from case_fast.models import MODELS, title_of
from case_fast.optional import needed
from case_fast.runs import Record, lookup

EXAMPLES = 10
_SPLITS = ("test", "valid", "train")  # order of the page
_LOSSES = {
    "loss": "Total loss", "generation": "Generation, L_gen", "diversity": "Diversity, L_div", "emotion": "Emotion, L_emo",
    "bow": "Bag of words, L_BOW", "kl": "Prior and posterior, L_KL", "coarse": "Coarse alignment, L_coarse",
    "fine": "Fine alignment, L_fine", "smoothed": "Generation, label smoothed",
    "critic": "Generated less real, of L_D", "penalty": "Penalty of gradients, of L_D", "adversarial": "Judgement, of L_G",
}
_OTHER = {
    "lr": "Learning rate", "grad_norm": "Gradient norm", "examples_per_second": "Dialogues a second",
    "coarse_saturated": "Saturated pairs, coarse", "fine_saturated": "Saturated pairs, fine",
}
# What a validation finds inside the model: name, and the level to compare with
_INSIDE = {
    "cs_common_share": ("Common share of the inferences", (1.0, "all one vector")),
    "inferences_prior_ratio": ("Prior's perplexity, inferences", (1.0, "uniform")),
    "concepts_prior_ratio": ("Prior's perplexity, concepts", (1.0, "uniform")),
    "coarse_over_chance": ("Top-1 over chance, coarse", (1.0, "chance")),
    "fine_over_chance": ("Top-1 over chance, fine", (1.0, "chance")),
}
_TOY = (
    "The dialogues are the few hundred that come with case_fast. The figures show that every part works; they say nothing on "
    "how well the model answers, and do not belong beside the paper's."
)
_LIMITS = (
    "One run is one seed: differences to another run that are smaller than those between seeds mean nothing. No figure here "
    "says whether a reply is kind, true or safe; only people who read the replies can."
)


@dataclass
class Reported(Record):
    """The record of a run with its evaluations: those of RUN/evaluation/, test first, with their predictions."""

    evaluations: list[tuple[Evaluation, list[dict[str, Any]]]] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        run = super().read(path)
        folders = [item for item in run.files.evaluations.glob("*") if item.is_dir()]
        order = {split: place for place, split in enumerate(_SPLITS)}
        for folder in sorted(folders, key=lambda item: (order.get(item.name.split("-")[0], len(order)), item.name)):
            try:
                evaluation = Evaluation.load(folder)
            except CheckpointError as error:
                run.problems.append(str(error))
            else:
                run.evaluations.append((evaluation, list(run.lines(folder / "predictions.jsonl"))))
        return run


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder, RUN/report.html unless ``out`` names a file, and return its path.

    An unfinished run, one without evaluations and one with damaged files are reported as they are; the page says what is
    missing and which command makes it.

    Raises:
        CheckpointError: the folder is missing or nothing in it belongs to a run.
        PlaceError: the page cannot be written.
    """
    found = Reported.read(run)
    path = Path(out) if out is not None else found.files.report
    place = require_file_place(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, _page(found))
    return path


def _page(run: Reported) -> str:
    name = run.files.path.resolve().name
    return page(
        f"{_model(run)} run {name}",
        tag("header", tag("h1", f"{_model(run)} run “{name}” ", _state(run)), tag("p", _about(run), class_="muted")),
        _tiles(run), _missing(run), _facts(run), _meaning(run), _training(run),
        [_evaluation(evaluation, predictions) for evaluation, predictions in run.evaluations],
        _everything(run),
        tag("footer", f"Written by case_fast {__version__} on {datetime.now():%Y-%m-%d at %H:%M}. "
                      "This page loads nothing from outside and runs no script."),
    )


# ---- what kind of run it is


def _model(run: Reported) -> str:
    """Its name for people."""
    kind = lookup(run.config, "kind") or "case"
    return title_of(kind) if isinstance(kind, str) and kind in MODELS else str(kind)


def _bundled(run: Reported) -> bool:
    return bool(lookup(run.manifest, "store.bundled")) or any(evaluation.bundled for evaluation, _ in run.evaluations)


def _finished(run: Reported) -> bool:
    return run.newest("end", "step", "resume", "failure").get("event") == "end"


def _state(run: Reported) -> Html:
    if _finished(run):
        return tag("span", "finished", class_="pill")
    return tag("span", "not finished" if run.records else "no log", class_="pill warn")


def _about(run: Reported) -> str:
    what = "the toy dialogues bundled with case_fast" if _bundled(run) else "prepared dialogues"
    ablation = lookup(run.config, "ablation")
    return f"Empathetic dialogue, trained on {what}" + (f"; ablation {ablation}." if ablation else ".")


def _tiles(run: Reported) -> Node:
    tiles: list[tuple[str, str]] = []
    if run.evaluations:
        evaluation = run.evaluations[0][0]
        found = {metric.name: metric for metric in evaluation.metrics}
        tiles = [(f"{found[name].title}, {evaluation.split}", found[name].text)
                 for name in ("ppl", "acc_1", "dist_1", "dist_2") if name in found]
    elif (best := _best(run)) is not None:
        tiles = [("Best perplexity, validation", format_value(best[1])), ("at step", f"{best[0]:,}")]
    boxes = [tag("div", tag("b", value), tag("span", name, class_="muted")) for name, value in tiles]
    return tag("div", boxes, class_="tiles") if boxes else None


def _best(run: Reported) -> tuple[int, float] | None:
    """(step, value) of the best validation perplexity of the newest phase that has any, whose weights a run keeps."""
    phase = run.newest("validation").get("phase")
    points = [(value, step) for step, value in zip(*run.series("validation", "ppl", phase), strict=True) if value == value]
    value, step = min(points, default=(0.0, 0))
    return (step, value) if points else None


def _missing(run: Reported) -> Node:
    """What is not there yet, each with the command that makes it."""
    folder = shlex.quote(str(run.files.path))
    store = shlex.quote(_store(run) or "STORE")
    settings = f"--config {shlex.quote(str(run.files.config))} " if run.config else ""
    again = f"case-fast train {settings}--data {store} --out {folder} --resume"
    items: list[tuple[str, str | None]] = []
    last = run.newest("step", "phase", "failure")
    if not run.records:
        items.append(("The run has no log. To train:", f"case-fast train --data {store} --out {folder}"))
    elif last.get("event") == "failure":
        items.append((f"Training stopped at step {last.get('step')}: a loss or gradient was not finite. The folder failure "
                      "says more.", None))
    elif not _finished(run):
        where = f"phase {last.get('phase')} at step {last.get('step')}"
        items.append((f"Training has not ended: the log stops in {where}. To go on:", again))
    if run.records and _best(run) is None:
        items.append(("There is no validation yet.", None))
    if not run.evaluations:
        items.append(("The run has not been evaluated.", f"case-fast evaluate {folder} --data {store} --split test"))
    if not run.manifest and not any("manifest.json" in problem for problem in run.problems):
        items.append(("There is no manifest.json: command, versions, seed and data of this run are not known.", None))
    items += [(f"{problem.rstrip('.')}.", None) for problem in run.problems]
    if not items:
        return None
    said = [(tag("p", text), tag("pre", command) if command else None) for text, command in items]
    return tag("section", tag("h2", "What is missing"), said, class_="warn")


def _store(run: Reported) -> str | None:
    return _text(lookup(run.manifest, "store.path"))


def _facts(run: Reported) -> Html:
    m = run.manifest
    counts = run.store.get("counts")
    vocabulary = lookup(counts, "vocabulary")
    command, fingerprint = lookup(m, "command"), lookup(m, "store.fingerprint")
    stopped, best = lookup(m, "result.stopped"), _best(run)
    resumed = m.get("resumed")
    rows: list[tuple[str, Node]] = [
        ("Command", tag("code", str(command)) if command else None),
        ("Started", _time(m.get("started"))),
        ("Ended", _time(m.get("finished")) if _finished(run) else None),
        ("Duration", _duration(m.get("started"), m.get("finished")) if _finished(run) else None),
        ("Resumed", f"{len(resumed)} times" if isinstance(resumed, list) else None),
        ("Device", _text(m.get("device"))),
        ("System", _text(m.get("system"))),
        ("Seed", _text(m.get("seed"))),
        ("Steps", _text(run.newest("end", "step").get("step"))),
        ("Ended by", _text(stopped) if _finished(run) else None),
        ("Best step", f"{best[0]:,}, by perplexity on the validation split" if best else None),
        ("Store", _store(run)),
        ("Fingerprint", tag("code", str(fingerprint)[:16]) if fingerprint else None),
        ("Examples", _listed(lookup(counts, "examples"))),
        ("Vocabulary", f"{_text(vocabulary)} words" if vocabulary else None),
        ("Versions", _listed(m.get("versions"))),
    ]
    return section("Run", facts(rows)) if m else Html()


def _listed(values: Any) -> str | None:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items()) if isinstance(values, dict) else None


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _time(value: Any) -> str | None:
    try:
        return f"{datetime.fromisoformat(str(value)):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return _text(value)


def _duration(started: Any, ended: Any) -> str | None:
    try:
        seconds = (datetime.fromisoformat(str(ended)) - datetime.fromisoformat(str(started))).total_seconds()
    except (ValueError, TypeError):  # no times, or one with and one without a zone
        return None
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"


# ---- in plain words


def _meaning(run: Reported) -> Html:
    said: list[Node] = []
    if _bundled(run):
        said.append((tag("b", "A toy run. "), _TOY))
    if run.evaluations:
        said += _in_words(run.evaluations[0][0])
    elif (best := _best(run)) is not None:
        said.append(f"So far there are validation figures only. The best perplexity, {format_value(best[1])} at step "
                    f"{best[0]:,}, is the best of several on the same examples, so it flatters the model.")
    else:
        said.append("There is nothing to measure yet: neither a validation nor an evaluation.")
    said.append(_LIMITS)
    return section("What the figures mean", [tag("p", words) for words in said])


def _in_words(evaluation: Evaluation) -> Iterator[Node]:
    found = {metric.name: metric for metric in evaluation.metrics if metric.value is not None}
    if "ppl" in found:
        words = lookup(evaluation.about, "store.vocabulary")
        scope = f" of {words:,} words" if isinstance(words, int) else ""
        unknown = f"; {100 * found['unk_rate'].value:.1f} % of the words are unknown" if "unk_rate" in found else ""
        yield (tag("b", f"Perplexity {found['ppl'].text}: "),
               f"at each word of the human replies of {evaluation.split} the model is as unsure as if it chose among "
               f"{found['ppl'].text} words that are equally likely. Lower is better. It depends on the vocabulary{scope}, so it "
               f"compares only with figures over the same one{unknown}. Papers of this field print the geometric mean over "
               "replies of each reply's perplexity, in which long replies weigh no more than short ones.")
    metric = found.get("acc_1")
    if metric is not None and 0 <= metric.value <= 1 <= metric.count:
        binomtest = needed("scipy.stats", "the interval of an accuracy").binomtest
        low, high = binomtest(round(metric.value * metric.count), metric.count).proportion_ci(method="wilson")
        top = f" It is among the first five for {100 * found['acc_5'].value:.1f} %." if "acc_5" in found else ""
        yield (tag("b", f"Emotion accuracy {metric.text}: "),
               f"the first guess among 32 emotions is right for {100 * metric.value:.1f} % of {metric.count:,} examples (95 % "
               f"interval for this many: {100 * low:.1f} to {100 * high:.1f} %; blind guessing: about 3.1 %).{top}")
    if "dist_1" in found and "dist_2" in found:
        different = ""
        if "distinct_replies" in found:
            metric = found["distinct_replies"]
            different = f" Among the {metric.count:,} replies there are {metric.value:,} different ones."
        yield (tag("b", "Dist-1 and Dist-2: "),
               f"{found['dist_1'].text} % of the words and {found['dist_2'].text} % of the word pairs in the replies are "
               "different ones. Both fall as replies are added, so they compare only over the same number of examples."
               f"{different}")


# ---- training


def _training(run: Reported) -> Node:
    if not run.records:
        return None
    best = _best(run)
    parts: list[Node] = []
    validation = []
    steps, values = run.series("validation", "ppl")
    if steps:
        marked = (best[0], best[1], f"best: {format_value(best[1])}") if best else None
        validation.append(Curve("Perplexity", steps, values, marked=marked))
    steps, values = run.series("validation", "accuracy")
    if any(value == value for value in values):
        at = dict(zip(steps, values, strict=True)).get(best[0], math.nan) if best else math.nan
        marked = (best[0], at, f"kept: {format_value(at)}") if best and at == at else None
        validation.append(Curve("Emotion accuracy", steps, values, marked=marked, level=(1 / 32, "guessing")))
    if validation:
        parts += [tag("h3", "Validation"), _charts("v", validation)]
    inside = [Curve(title, steps, values, level=level) for name, (title, level) in _INSIDE.items()
              for steps, values in [run.series("validation", name)] if steps]
    if inside:
        parts += [tag("h3", "Is knowledge read, do the alignments align?"), _charts("i", inside)]
    phases = _phases(run)
    for place, (phase, about) in enumerate(phases.items()):
        # the whole is not shown beside the only loss that it is made of
        losses = [name for record in _of_phases(run, "step") if record["phase"] == phase for name in record.get("losses") or {}]
        names = dict.fromkeys(losses) if len(set(losses)) == 1 else dict.fromkeys(["loss", *losses])
        if curves := _curves(run, phase, {name: _LOSSES.get(name, name) for name in names}):
            title = f"Training loss, phase {place + 1}: {about}" if len(phases) > 1 else "Training loss"
            parts += [tag("h3", title), _charts(f"p{phase}", curves)]
    if other := _curves(run, None, _OTHER):
        parts += [tag("h3", "How training went"), _charts("o", other)]
    if not parts:
        return None
    note = "Bold lines are running means of the pale ones." + (" Steps count across all phases." if len(phases) > 1 else "")
    return section("Training", tag("p", note, class_="muted"), parts)


_PHASES = {"bow": "L_BOW alone", "all": "the whole objective", "generator": "the generator alone",
           "discriminators": "the discriminators alone", "interactive": "both in turns"}


def _of_phases(run: Reported, event: str) -> list[dict[str, Any]]:
    return [record for record in run.records if record.get("event") == event and isinstance(record.get("phase"), int)]


def _phases(run: Reported) -> dict[Any, str]:
    """The phases that the log has steps of, in order, and what each trained; earlier versions gave CASE's two other names."""
    names = {record["phase"]: str(record.get("name")) for record in _of_phases(run, "phase")}
    earlier = {"phase 1 (L_BOW)": "bow", "phase 2 (all losses)": "all"}
    numbers = dict.fromkeys(record["phase"] for record in _of_phases(run, "step"))
    said = {number: earlier.get(names.get(number, ""), names.get(number, "")) for number in numbers}
    return {number: _PHASES.get(name, name or "unnamed") for number, name in said.items()}


def _curves(run: Reported, phase: int | None, names: dict[str, str]) -> list[Curve]:
    found = [(name, *run.series("step", name, phase)) for name in names]
    return [Curve(names[name], steps, values, smooth=name != "lr")
            for name, steps, values in found if any(value == value for value in values)]


def _charts(name: str, curves: list[Curve]) -> Html:
    charts = [tag("div", Html(curve_svg(curve, f"{name}{place}"))) for place, curve in enumerate(curves)]
    return tag("div", charts, class_="charts")


# ---- evaluations


def _evaluation(evaluation: Evaluation, predictions: list[dict[str, Any]]) -> Html:
    paper = evaluation.paper
    head = tag("tr", tag("th", "Metric and how it was computed"), tag("th", "Value", class_="n"),
               tag("th", "Paper", class_="n") if paper else None, tag("th", "n", class_="n"))
    arrow = {"higher": " ↑", "lower": " ↓"}
    rows = [
        tag("tr", tag("td", metric.title + arrow.get(metric.better or "", ""), _signature(metric.signature),
                      tag("span", f"no value: {metric.reason}", class_="muted") if metric.reason else None),
            tag("td", tag("b", metric.text), class_="n"),
            tag("td", format_value(paper[metric.name]) if metric.name in paper else "", class_="n") if paper else None,
            tag("td", f"{metric.count:,}", class_="n"))
        for metric in evaluation.metrics
    ]
    return section(
        heading(evaluation),
        tag("table", tag("thead", head), tag("tbody", rows)),
        tag("p", "↑ higher is better, ↓ lower is better." + (f" {evaluation.paper_note}" if paper else ""), class_="muted"),
        _confusion(evaluation), _examples(predictions),
    )


def _signature(signature: str) -> Html:
    """It may break across lines between its parts."""
    first, *others = signature.split("|")
    return tag("code", first, [("|", tag("wbr"), part) for part in others])


def _confusion(evaluation: Evaluation) -> Node:
    path = evaluation.out / "confusion.png" if evaluation.out is not None else None
    if path is None or not path.is_file():
        return None
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    picture = tag("img", src=source, alt=f"Confusion matrix of the emotions, {evaluation.split}")
    caption = "Rows sum to 100 %; shares below 5 % are not written; right guesses lie in the frames."
    figure = tag("figure", tag("div", picture, class_="wide"), tag("figcaption", caption))
    return (tag("h3", "Which emotion is taken for which"), figure)


def _examples(predictions: list[dict[str, Any]]) -> Node:
    if not predictions:
        return None
    count = min(EXAMPLES, len(predictions))
    chosen = [predictions[round(place * (len(predictions) - 1) / max(1, count - 1))] for place in range(count)]
    note = f"{count} of {len(predictions):,}, evenly spaced through the split, not chosen by hand."
    return (tag("h3", "Replies"), tag("p", note, class_="muted"),
            tag("div", [_example(found) for found in chosen], class_="examples"))


def _example(found: dict[str, Any]) -> Html:
    context = found.get("context")
    roles = found.get("by_speaker")
    turns = []
    for place, text in enumerate(context if isinstance(context, list) else [context]):
        by_speaker = bool(roles[place]) if isinstance(roles, list) and place < len(roles) else place % 2 == 0
        who = "speaker" if by_speaker else "listener"
        turns.append(tag("p", tag("span", who, class_="who"), str(text), class_=who))
    true, guess, probability = found.get("emotion"), found.get("predicted"), found.get("probability")
    sure = f" {100 * probability:.0f} %" if isinstance(probability, (int, float)) else ""
    right = true == guess
    predicted = (", predicted ", tag("span", f"{guess}{sure} {'✓' if right else '✗'}", class_="good" if right else "bad"))
    emotion = tag("p", tag("span", "emotion", class_="who"), true or "unknown", predicted if guess else None)
    return tag("div", turns,
               tag("p", tag("span", "reply of the model", class_="who"), str(found.get("reply") or "(empty)"), class_="reply"),
               tag("p", tag("span", "reply of the person", class_="who"), str(found.get("reference") or "(none)")),
               emotion, class_="example")


def _everything(run: Reported) -> Node:
    found = [("Settings, config.json", run.config), ("Manifest, manifest.json", run.manifest)]
    parts = [tag("details", tag("summary", title), tag("pre", json.dumps(values, ensure_ascii=False, indent=2)))
             for title, values in found if values]
    return section("Everything the run recorded", parts) if parts else None
