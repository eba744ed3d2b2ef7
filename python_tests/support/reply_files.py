"""Files of replies as the sister repositories write them, made up, and what is known of them by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

from case_fast.evaluation.metrics import INTENTS

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


def epitome_data(folder: Path, count: int = 120) -> Path:
    """The tables of EPITOME, the level of a response in its words."""
    folder.mkdir()
    said = {0: "what happened next", 1: "i understand it", 2: "i am so very sorry for you"}
    for aspect in ("emotional-reactions", "interpretations", "explorations"):
        with open(folder / f"{aspect}-reddit.csv", "w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["sp_id", "rp_id", "seeker_post", "response_post", "level", "rationales"])
            for place in range(count):
                table.writerow([f"s{place // 2}", f"r{place}", "I feel,\nwell", f"{said[place % 3]} {place % 7}", place % 3, ""])
    return folder


def intent_data(folder: Path) -> Path:
    """The texts of EmpatheticIntents' folder datasets, their intent in the words."""
    said = {"acknowledging": "that sounds", "questioning": "what did you do ?", "wishing": "good luck with"}
    for part in ("train", "test"):
        place = folder / "lexically_extended_intent_data" / part
        place.mkdir(parents=True)
        for intent in INTENTS:
            name = "acknowleding" if intent == "acknowledging" else intent  # as it is there
            lines = [f"39 <SEP> {said.get(intent, f'so {intent}')} {number}" for number in range(12)]
            (place / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    (folder / "manual_annotations").mkdir()
    (folder / "manual_annotations" / "wishing.txt").write_text("Good luck with it!\nGood luck\n")
    (folder / "manual_annotations" / "advising.txt").write_text("You should.\n")
    return folder


def tiny_bert(folder: Path) -> Path:
    """A BERT of random weights and thirty words, with a table of baselines."""
    import transformers

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] i am so sorry to hear that . oh no , what happened ? great ! is his name".split()
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)
    (folder / "baseline.tsv").write_text("LAYER,P,R,F\n0,.1,.1,.1\n1,.2,.2,.2\n2,.3,.3,.5\n")
    return folder


def predictions(run: Path, seed: int) -> None:
    """The file that an evaluation leaves in a run."""
    generator = np.random.default_rng(seed)
    folder = run / "evaluation" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    (run / "config.json").touch()
    told = {"emotion": "sad", "predicted": "proud", "nll": 12.5, "tokens": 4}
    rows = many(np.random.default_rng(0), 30)
    json_lines(folder / "predictions.jsonl", [row | told | {"reply": other["reply"]}
                                              for row, other in zip(rows, many(generator, 30), strict=True)])
