"""Files of replies as the sister repositories write them, made up, and what is known of them by hand."""

from __future__ import annotations

import json
from pathlib import Path

# context, emotion, reply, reference; cut into words as KEMP's file has them ("should n't")
BLOCKS = [
    (["i lost my job ."], "sad", "i am so sorry to hear that .", "oh no , what happened ?"),
    (["i lost my job .", "oh no , what happened ?", "they did n't need me anymore ."], "sad",
     "i am so sorry to hear that .", "that is sad . i 'm sure you will find one ."),
    (["my dog is so happy"], "joyful", "that is great ! what is his name ?", "what is his name ?"),
    (["she should n't have come"], "annoyed", "i do n't know .", "why not ?"),
]


def kemp(path: Path, blocks=BLOCKS) -> Path:
    """The form of KEMP's released file: a blank before each line's end, nothing between blocks."""
    path.write_text("".join(
        f"Emotion:{emotion} \nContext:{context!r} \nConcept:[defaultdict(<class 'list'>, {{'job': ['stress']}})] \n"
        f"Pred:{reply}  \nRef:{reference} \n" for context, emotion, reply, reference in blocks))
    return path


def moel(path: Path, blocks=BLOCKS) -> Path:
    """The form of MoEL's file: several systems a block, the reference anywhere among them, an empty line between blocks."""
    path.write_text("\n".join(
        f"Emotion: {emotion}\nContext: {context!r}\ntrs: i see .\nMOE: {reply}\nref: {reference}\nMOE+oracle: oh .\n"
        for context, emotion, reply, reference in blocks))
    return path


def cem(path: Path, blocks=BLOCKS) -> Path:
    """The form that CEM's and CASE's code writes: COMET's inferences, beam and greedy replies, a rule between blocks."""
    path.write_text("".join(
        f"Emotion: {emotion}\nPred Emotions: ['sad', 'lonely', 'ashamed']\nx_intent:['to work']\nContext:{context!r}\n"
        f"Beam:no .\nGreedy:{reply}\nRef:{reference}\n{'-' * 63}\n" for context, emotion, reply, reference in blocks))
    return path


def json_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WORDS = "i you we they am are so very sorry glad happy to hear that this it is what when how did can will not a dog job".split()


def many(generator, count: int, common: float = 0.0):
    """Rows of JSON lines: conversations of one or two turns, replies of random words, of which a share is one and the same."""
    rows = []
    for place in range(count):
        context = [f"conversation {place // 2} begins"] + ["and then", f"turn {place}"] * (place % 2)
        reply, reference = (" ".join(generator.choice(WORDS, generator.integers(3, 9))) for _ in range(2))
        reply = "i am sorry ." if generator.random() < common else reply
        rows.append({"context": context, "reply": reply, "reference": reference})
    return rows
