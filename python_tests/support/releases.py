"""Files as they were released with CASE, CEM and MoEL, made from dialogues of a test's own by what is known of their layout.

The module that an importer must do without, `pickle`, writes them here.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from nltk.tokenize import NLTKWordTokenizer

from case_fast.data.empathetic_dialogues import Conversation, Turn
from case_fast.knowledge import RELATIONS

LOADER = "src.utils.data.loader"  # where CASE and CEM keep the class of their vocabulary
NAMES = {"train": "train", "valid": "dev", "test": "test"}
Infer = Callable[[str], Mapping[str, Sequence[str]]]

TOY = {
    "train": [
        Conversation("a", "sad", "My exam.", (
            Turn("I failed my exam. My dog didn't care!", True), Turn("Oh no, so sad.", False),
            Turn("It's fine, he's a \"good\" dog.", True), Turn("Hug the dog 😀.", False))),
        Conversation("b", "joyful", "A dog came back.", (Turn("My dog is back", True), Turn("Happy dog!", False))),
    ],
    "valid": [Conversation("c", "afraid", "Noise", (Turn("A noise... at 5 p.m. in the house.", True), Turn("Call me.", False)))],
    "test": [Conversation("d", "sad", "Rain", (Turn("Rain. Rain.", True), Turn("So sad.", False), Turn("Yes.", True),
                                                 Turn("I see.", False)))],
}


def toy_inferences(text: str) -> dict[str, list[str]]:
    """What a toy COMET infers: five texts a relation, of which one says nothing and one repeats another."""
    first = text.split()[0].strip(".!?\"").lower()
    return {relation: [f"to {relation.lower()} {first}", "none", f"{first} again.", f"{first} again", "sad"]
            for relation in RELATIONS}


def words(text: str) -> list[str]:
    """Words as the releases have them: lower case, a few contractions written out, sentences by the Treebank's rules."""
    text = text.lower()
    for short, long in {"it's": "it is", "i'm": "i am", "don't": "do not", "can't": "cannot"}.items():
        text = text.replace(short, long)
    return [word for sentence in re.split(r"(?<=[.!?])\s+", text) for word in NLTKWordTokenizer().tokenize(sentence)]


def case_split(conversations: Sequence[Conversation], infer: Infer, lexicon: Mapping[str, Sequence[float]] | None = None) -> dict:
    """A split as CASE's pickle has it; ``lexicon``: valence, arousal, dominance, with which its further fields are filled."""
    found = defaultdict(list)
    for emotion, conversation, context, target in _examples(conversations):
        turns = [words(turn.text) for turn in context]
        last = turns[-1]
        pieces = [piece for sentence in " ".join(last).split(".") if (piece := words(" ".join(sentence.split())))]
        found["context"].append(turns)
        found["context_role"].append(["seeker" if turn.by_speaker else "support" for turn in context])
        found["situation"].append(words(conversation.situation))
        found["target"].append(words(target.text))
        found["emotion"].append(emotion)
        found["emotion_context"].append([word for word in last if lexicon and word in lexicon])
        found["utt_cs"].append(_inferred(last, infer))
        found["utt_cs_split"].append([_inferred(piece, infer) for piece in pieces])
        found["situation_cs"].append(_inferred(words(conversation.situation), infer))
        if lexicon is not None:
            vads = [[list(lexicon.get(word, (0.5, 0.0, 0.5))) for word in turn] for turn in turns]
            found["concepts"].append([[[[] for _ in turn] for _ in range(3)] for turn in turns])
            found["vads"].append(vads)
            found["vad"].append([[abs(v[0] - 0.5) for v in turn] for turn in vads])
    return dict(found)


def cem_split(conversations: Sequence[Conversation], infer: Infer) -> dict:
    """A split as CEM's pickle has it."""
    rows = list(_examples(conversations))
    return {
        "context": [[words(turn.text) for turn in context] for _, _, context, _ in rows],
        "target": [words(target.text) for *_, target in rows],
        "emotion": np.array([emotion for emotion, *_ in rows]),
        "situation": [words(conversation.situation) for _, conversation, *_ in rows],
        "emotion_context": [[] for _ in rows],
        "utt_cs": [[[words(text) for text in infer(" ".join(words(context[-1].text)))[relation]] for relation in RELATIONS]
                   for _, _, context, _ in rows],
    }


def _examples(conversations: Sequence[Conversation]) -> list[tuple[Any, Conversation, tuple[Turn, ...], Turn]]:
    """(emotion as a scalar of numpy, conversation, context, reply), every second turn a reply."""
    rows = [(conversation, place) for conversation in conversations for place in range(1, len(conversation.turns), 2)]
    emotions = np.array([conversation.emotion for conversation, _ in rows])
    return [(emotion, conversation, conversation.turns[:place], conversation.turns[place])
            for emotion, (conversation, place) in zip(emotions, rows, strict=True)]


def _inferred(said: list[str], infer: Infer) -> defaultdict:
    found = defaultdict(list)
    found["uttr"] = said
    for relation in RELATIONS:
        found[relation] = [words(text) for text in infer(" ".join(said))[relation] if text != "none"]
    return found


@contextmanager
def vocabulary_class(module: str = LOADER):
    """The class ``Lang`` in a module of that name, which is there as long as the block."""
    made = {name: ModuleType(name) for name in (module.rsplit(".", place)[0] for place in range(module.count(".") + 1))}
    lang = type("Lang", (), {"__module__": module, "__qualname__": "Lang"})
    made[module].Lang = lang
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield lang
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old


def pickled(splits: Sequence[dict], protocol: int, module: str = LOADER) -> bytes:
    """[train, dev, test, vocabulary] of splits."""
    known = ["UNK", "PAD", "EOS", "SOS", "USR", "SYS", "CLS"]
    known += dict.fromkeys(word for split in splits for row in split["context"] for turn in row for word in turn)
    with vocabulary_class(module) as lang:
        vocabulary = lang()
        vocabulary.word2index = {word: place for place, word in enumerate(known)}
        vocabulary.word2count = dict.fromkeys(known, 1)
        vocabulary.index2word = dict(enumerate(known))
        vocabulary.n_words = len(known)
        return pickle.dumps([*splits, vocabulary], protocol)


def case_pickle(protocol: int = 4, dialogues: Mapping[str, Sequence[Conversation]] = TOY, infer: Infer = toy_inferences,
                **more: Any) -> bytes:
    return pickled([case_split(dialogues[split], infer, **more) for split in NAMES], protocol)


def cem_pickle(protocol: int = 4, dialogues: Mapping[str, Sequence[Conversation]] = TOY, infer: Infer = toy_inferences) -> bytes:
    return pickled([cem_split(dialogues[split], infer) for split in NAMES], protocol)


def npy_bytes(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def write_arrays(folder: Path, dialogues: Mapping[str, Sequence[Conversation]] = TOY) -> Path:
    """The twelve files of arrays of texts, as MoEL has them."""
    folder.mkdir(exist_ok=True)
    for split, name in NAMES.items():
        rows = _examples(dialogues[split])
        contexts = np.empty(len(rows), dtype=object)
        contexts[:] = [[turn.text for turn in context] for _, _, context, _ in rows]
        for what, values in (("dialog", contexts), ("target", np.array([target.text for *_, target in rows], dtype=object)),
                             ("emotion", np.array([emotion for emotion, *_ in rows])),
                             ("situation", np.array([conversation.situation for _, conversation, *_ in rows]))):
            (folder / f"sys_{what}_texts.{name}.npy").write_bytes(npy_bytes(values))
    return folder
