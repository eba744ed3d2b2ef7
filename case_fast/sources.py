"""The data sets that a model is made of: their licences, and where they are published. Said here, and nowhere else in code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A data set: the option of `prepare` that takes it, its licence, where it is published, and a line that gets or shows it."""

    option: str
    licence: str
    published: str
    get: str
    needed: bool = True


def _fetch(url: str) -> str:
    return f"curl -LO {url}"


_COMET = "github.com/allenai/comet-atomic-2020"
SOURCES = {
    "EmpatheticDialogues": Source("dialogues", "CC BY-NC 4.0", "github.com/facebookresearch/EmpatheticDialogues", _fetch(
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz")),
    "ATOMIC": Source("knowledge", "CC BY 4.0", _COMET, f"python -m webbrowser https://{_COMET}"),
    "COMET": Source("knowledge", "licence on its page", _COMET, f"python -m webbrowser https://{_COMET}"),
    "ConceptNet": Source("conceptnet", "CC BY-SA 4.0", "github.com/commonsense/conceptnet5/wiki/Downloads", _fetch(
        "https://s3.amazonaws.com/conceptnet/downloads/2019/edges/conceptnet-assertions-5.7.0.csv.gz")),
    "NRC-VAD": Source("lexicon", "research use, not to be passed on", "saifmohammad.com/WebPages/nrc-vad.html",
                      "python -m webbrowser https://saifmohammad.com/WebPages/nrc-vad.html"),
    "NRC EmoLex": Source("emotion_words", "research use, not to be passed on", "saifmohammad.com/WebPages/lexicons.html",
                         "python -m webbrowser https://saifmohammad.com/WebPages/lexicons.html", needed=False),
    "GloVe": Source("embeddings", "PDDL 1.0", "nlp.stanford.edu/projects/glove",
                    _fetch("https://nlp.stanford.edu/data/glove.6B.zip"), needed=False),
}
