"""Evaluating a model on a split of a store: one pass with the references given, one set of replies, four files.

    OUT/metrics.json        every metric with its signature; settings, store, counts, times
    OUT/metrics.md          the same as a table
    OUT/predictions.jsonl   one line an example: context, emotions, reference, reply
    OUT/confusion.png       which emotion is taken for which
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from case_fast import __version__
from case_fast.arguments import whole
from case_fast.batch import Batch
from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.data.store import Store
from case_fast.data.text import detokenize
from case_fast.data.vocabulary import UNK
from case_fast.errors import CheckpointError, ConfigError
from case_fast.evaluation import metrics as m
from case_fast.evaluation.figures import confusion_png
from case_fast.evaluation.metrics import Metric, format_value
from case_fast.files import require_folder_place, write_json, write_text
from case_fast.models import DialogueModel
from case_fast.optional import MissingPackage, needed
from case_fast.references import read_references

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TOP = 5
_log = logging.getLogger("case_fast")

Generate = Callable[[Sequence[int]], Iterable[Any]]


@dataclass
class Evaluation:
    """What `evaluate` found; `Evaluation.load` reads it back.

    Attributes:
        split: the split; ``examples`` of its ``size`` examples were used.
        bundled: the store holds the toy dialogues that come with the package.
        about: settings, store, counts, seconds, versions, as in metrics.json.
        published: the figures of a paper for this model, with their "source".
        out: the folder with the files.
    """

    split: str
    examples: int
    size: int
    metrics: list[Metric]
    bundled: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    published: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def paper(self) -> dict[str, float]:
        """The published values to stand beside these, only for a whole test split of real dialogues."""
        whole = self.split == "test" and self.examples == self.size and not self.bundled
        return {name: value for name, value in self.published.items() if name != "source"} if whole else {}

    @property
    def paper_note(self) -> str:
        """What must be known beside the published values."""
        return (f"The paper's column is that of {self.published.get('source')}: the official test set, greedy decoding, with "
                "GloVe and the paper's own vocabulary (CASE: and COMET). It is a reference, comparable only under the same data, "
                "vocabulary and inputs.")

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read OUT/metrics.json; `CheckpointError` if it is missing or damaged."""
        path = Path(folder) / "metrics.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            metrics = [Metric(**metric) for metric in found.pop("metrics")]
            published = {name: value for name, value in found.pop("paper", {}).items() if name != "note"}
            published.setdefault("source", "Zhou et al. (ACL 2023), Table 1")  # the only one before sources were written down
            known = {name: found.pop(name) for name in ("split", "examples", "size", "bundled")}
            _typed(known, split=str, examples=int, size=int, bundled=bool)
            for metric in metrics:
                _typed(vars(metric), name=str, value=(int, float, type(None)), signature=str, count=int, reason=str)
            return cls(**known, metrics=metrics, about=found, out=Path(folder), published=published)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: not found. Make it with: case-fast evaluate RUN --data STORE") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the metrics of an evaluation ({error!r}). Evaluate again.") from error


def _typed(values: Mapping[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")


def evaluate(model: DialogueModel, store: Store, split: str, out: str | Path, generate: Generate, limit: int | None = None,
             batch_size: int = 32, device: torch.device | str = "cpu", console: Console | None = None,
             progress: Callable[[int, int], None] | None = None, settings: Mapping[str, Any] | None = None,
             ) -> Evaluation:
    """Evaluate ``model`` on the first ``limit`` examples of a split (all when None) and write the files of this module.

    Args:
        out: folder for the files; those of an earlier evaluation in it are replaced.
        generate: gives the word ids of a reply, without EOS, for each index it is asked for, in order; or an object
            that has them as ``words``.
        console: where to print the table; None prints nothing.
        progress: told (done, 2 x examples) while the references are read, and when all replies are there; between
            the two ``generate`` may tell it.
        settings: how ``generate`` decodes (a `GenerationConfig` as a dict) and anything else worth keeping; written
            into metrics.json. What the strategy uses of it enters the signatures of the reply metrics.

    Raises:
        ConfigError: no such split, no examples, a batch of none, or a model whose vocabulary or emotions are not the store's.
        PlaceError: nothing can be written into ``out``; found before the work, as far as it is so by then.
    """
    size = check(model, store, split, limit)
    if (batch_size := whole("batch_size", batch_size)) < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    indices = range(size if limit is None else min(limit, size))
    out = Path(out)
    require_folder_place(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)  # its presence says that the other files are whole and belong to it

    def told(done: int) -> None:
        if progress is not None:
            progress(done, 2 * len(indices))

    started = time.perf_counter()
    found = read_references(model, _batches(model, store, split, indices, batch_size, device, told))
    nll, scores, labels = found.nll, found.emotion, found.label.tolist()
    read = time.perf_counter()
    replies = [[int(word) for word in getattr(reply, "words", reply)] for reply in generate(indices)]
    told(2 * len(indices))
    if len(replies) != len(indices):
        raise ValueError(f"generate gave {len(replies):,} replies for {len(indices):,} examples")
    answered = time.perf_counter()

    settings = dict(settings or {})
    words = len(store.featurizer.vocabulary)
    decoding = _decoding(settings)
    references = [store.example(split, index).response.tolist() for index in indices]
    ranking = None if scores is None else m.rank_emotions(scores)
    found = [
        *m.perplexities(nll, words),
        m.distinct_n(replies, 1, decoding), m.distinct_n(replies, 2, decoding),
        m.emotion_accuracy(scores, labels, 1), m.emotion_accuracy(scores, labels, TOP),
        m.distinct_replies(replies, decoding), m.reply_words(replies, decoding), m.unknown_rate(references, UNK),
    ]
    evaluation = Evaluation(split, len(indices), size, found, bool(store.manifest.get("bundled")), {
        "settings": {**settings, "limit": limit, "batch_size": batch_size, "device": str(device)},
        "model": {"class": type(model).__name__, "config": model.config.as_dict(),
                  "parameters": sum(parameter.numel() for parameter in model.parameters())},
        "store": {"path": str(store.path), "fingerprint": store.fingerprint, "vocabulary": words},
        "counts": {"target_tokens": sum(map(len, nll)), "reply_words": sum(map(len, replies)),
                   "empty_replies": sum(not reply for reply in replies)},
        "seconds": {"references": round(read - started, 3), "replies": round(answered - read, 3)},
        "versions": {"case_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }, out, dict(model.published.get(model.config.ablation, {})))
    if console is not None:
        show(evaluation, console)  # before it is written: what took hours is seen on a full disk too
    write_text(out / "predictions.jsonl", "".join(_predictions(store, split, indices, nll, scores, ranking, replies)))
    (out / "confusion.png").unlink(missing_ok=True)  # that of an earlier evaluation, perhaps of another model
    if ranking is not None:
        counts = m.emotion_confusion(labels, ranking[:, 0].tolist(), len(EMOTIONS))
        title = f"Emotion accuracy {evaluation['acc_1'].text} (n = {evaluation['acc_1'].count:,} examples of {split})"
        try:
            confusion_png(counts, EMOTIONS, title, out / "confusion.png")
        except MissingPackage as error:
            _log.warning("%s. confusion.png is left out", error)
    write_text(out / "metrics.md", markdown(evaluation))
    write_json(out / "metrics.json", as_dict(evaluation))
    if console is not None:
        console.print(needed("rich.text", "a table in the terminal").Text(f"Written to {out}"), soft_wrap=True)
    return evaluation


def check(model: DialogueModel, store: Store, split: str, limit: int | None = None) -> int:
    """The number of examples of a split that can be measured with a model; `ConfigError` where it cannot be."""
    if split not in store.splits:
        raise ConfigError(f"split {split!r} is not in the store {store.path}; it has {', '.join(store.splits)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    size = store.size(split)
    if size == 0:
        raise ConfigError(f"the split {split!r} of the store {store.path} has no examples")
    for what, ours, theirs in (
        ("words", model.config.vocab_size, len(store.featurizer.vocabulary)),
        ("emotions", model.config.emotions, len(EMOTIONS)),
    ):
        if ours != theirs:
            raise ConfigError(f"the model knows {ours:,} {what}, the store {store.path} has {theirs:,}: "
                              "evaluate on the store that the model was trained on")
    return size


def _batches(model: DialogueModel, store: Store, split: str, indices: Sequence[int], batch_size: int, device: torch.device | str,
             told: Callable[[int], None]) -> Iterator[Batch]:
    for start in range(0, len(indices), batch_size):
        yield store.batch(split, indices[start : start + batch_size], model.needs, seed=0).to(device)
        told(min(start + batch_size, len(indices)))


def _decoding(settings: Mapping[str, Any]) -> str:
    """How replies were chosen, short enough for a signature; what the strategy does not use is left out."""
    strategy = settings.get("strategy")
    if not strategy:
        return ""
    used = {"greedy": (), "beam": ("beams", "length_penalty"), "sample": ("top_k", "top_p", "temperature", "seed")}
    names = (*used.get(strategy, ()), "max_words", "min_words", "allow_unk")
    off = {"top_k": 0, "top_p": 1, "temperature": 1, "min_words": 0, "allow_unk": False}
    parts = [f"{name}:{settings[name]}" for name in names if settings.get(name, off.get(name)) != off.get(name)]
    return ",".join([strategy, *parts])


def _predictions(store: Store, split: str, indices: Sequence[int], nll: Sequence[np.ndarray], scores: np.ndarray | None,
                 ranking: np.ndarray | None, replies: Sequence[Sequence[int]]) -> Iterator[str]:
    vocabulary, in_words = store.featurizer.vocabulary, _writer()
    for place, index in enumerate(indices):
        example = store.example(split, index)
        best: list[list[Any]] = []
        if scores is not None and ranking is not None:
            probability = np.exp(scores[place])
            best = [[EMOTIONS[label], _number(probability[label])] for label in ranking[place, :TOP]]
        yield json.dumps({
            "id": example.source.get("id", str(index)),
            "context": example.source.get("context", []),
            "by_speaker": example.source.get("by_speaker", []),
            "emotion": EMOTIONS[example.emotion] if example.emotion >= 0 else None,
            "predicted": best[0][0] if best else None,
            "probability": best[0][1] if best else None,
            "top": best,
            "reference": example.source.get("response", ""),
            "reply": in_words(vocabulary.decode(replies[place])),
            "words": vocabulary.decode(replies[place]),
            "nll": _number(math.fsum(nll[place])),
            "tokens": len(nll[place]),
        }, ensure_ascii=False) + "\n"


def _writer() -> Callable[[list[str]], str]:
    """How replies are written: as a person would, or where that cannot be done, word by word."""
    try:
        detokenize(["."])
        return detokenize
    except MissingPackage as error:
        _log.warning("%s. Replies are written word by word", error)
        return " ".join


def _number(value: float) -> float | None:
    """Rounded for a file; JSON has no NaN and no infinity."""
    return round(float(value), 6) if math.isfinite(value) else None


# ---- showing


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """What metrics.json holds."""
    return {
        "split": evaluation.split,
        "examples": evaluation.examples,
        "size": evaluation.size,
        "bundled": evaluation.bundled,
        "metrics": [dataclasses.asdict(metric) for metric in evaluation.metrics],
        **({"paper": {"note": evaluation.paper_note, **evaluation.published}} if evaluation.paper else {}),
        **evaluation.about,
    }


def heading(evaluation: Evaluation) -> str:
    whole = evaluation.examples == evaluation.size
    part = f"all {evaluation.size:,}" if whole else f"{evaluation.examples:,} of {evaluation.size:,}"
    source = " (bundled toy dialogues)" if evaluation.bundled else ""
    return f"Evaluation on {evaluation.split}, {part} examples{source}"


def markdown(evaluation: Evaluation) -> str:
    """The table of metrics.md."""
    paper = evaluation.paper
    lines = [f"# {heading(evaluation)}", "",
             "| Metric | Value |" + (" Paper |" if paper else "") + " Better | n | Signature |",
             "|---|---:|" + ("---:|" if paper else "") + "---|---:|---|"]
    for metric in evaluation.metrics:
        value = metric.text + (f" ({metric.reason})" if metric.reason else "")
        theirs = f" {format_value(paper.get(metric.name)) if metric.name in paper else ''} |" if paper else ""
        signature = metric.signature.replace("|", "\\|")
        lines.append(f"| {metric.title} | {value} |{theirs} {metric.better or ''} | {metric.count:,} | `{signature}` |")
    return "\n".join([*lines, *(["", evaluation.paper_note] if paper else [])]) + "\n"


_ARROW = {"higher": " ↑", "lower": " ↓", None: ""}


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the table, then the signatures."""
    Text = needed("rich.text", "a table in the terminal").Text
    console.print(compare({"value": evaluation}, heading(evaluation)))
    if evaluation.paper:
        console.print(Text(evaluation.paper_note, style="dim"))
    for metric in evaluation.metrics:
        reason = f"   n/a: {metric.reason}" if metric.reason else ""
        console.print(Text(metric.signature + reason, style="dim"), soft_wrap=True)


def compare(evaluations: Mapping[str, Evaluation], title: str = "") -> Table:
    """Several evaluations side by side; a * marks a value whose split or signature is not that of the first one."""
    Text = needed("rich.text", "a table in the terminal").Text
    table = needed("rich.table", "a table in the terminal").Table(title=title or None, title_justify="left")
    table.add_column("metric")
    for name in evaluations:
        table.add_column(Text(name), justify="right")
    first = next(iter(evaluations.values()))
    paper = first.paper if all(evaluation.paper for evaluation in evaluations.values()) else {}
    if paper:
        table.add_column("paper", justify="right", style="dim")
    if len(evaluations) == 1:
        table.add_column("n", justify="right")
    for metric in first.metrics:
        row = [Text(metric.title + _ARROW[metric.better])]
        for evaluation in evaluations.values():
            other = next((found for found in evaluation.metrics if found.name == metric.name), None)
            same = other is not None and (other.signature, evaluation.split) == (metric.signature, first.split)
            row.append(Text("" if other is None else other.text + ("" if same else "*")))
        row += [Text(format_value(paper[metric.name]) if metric.name in paper else "")] if paper else []
        row += [Text(f"{metric.count:,}")] if len(evaluations) == 1 else []
        table.add_row(*row)
    return table
