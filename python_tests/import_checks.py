"""The importer on real dialogues: a pickle as CASE's was released, made from EmpatheticDialogues, imported, compared, trained on.

    python -m python_tests.import_checks DATA --conversations 2000

DATA holds empatheticdialogues, atomic, conceptnet and nrc_vad. The inferences are retrieved from ATOMIC, as COMET's are not at
hand. All that is written lies in a temporary folder, which is removed. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # what tests share is imported by bare names

from releases import NAMES, case_pickle, words

from case_fast import cli
from case_fast.data.empathetic_dialogues import EMOTIONS, Conversation, read_conversations
from case_fast.data.prepare import PrepareSettings
from case_fast.data.store import Store
from case_fast.data.text import tokenize
from case_fast.importing import import_release
from case_fast.importing.pickles import read_pickle
from case_fast.knowledge import COGNITION_RELATIONS, REACTION_RELATION, RELATIONS, VADLexicon, clean_inferences, open_source

TINY = ["--model.d_model", "32", "--model.ffn", "32", "--phase1-steps", "10", "--max-steps", "10", "--validate-every", "10",
        "--valid-limit", "64", "--device", "cpu"]

# in a process of its own, whose memory nothing else has used; Linux says what the most was
CHECK = """
import sys, time
from pathlib import Path
from case_fast import cli
done = cli.main(["import", sys.argv[1], "--check"])
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(f"import --check: {time.process_time():.1f} s of a core with start, peak {int(peak) // 1024} MiB")
sys.exit(done)
"""


class Retrieved:
    """Inferences from ATOMIC of each text that is asked for, once."""

    def __init__(self, folder: Path):
        self.source, self.known = open_source(f"atomic:{folder}"), {}

    def __call__(self, text: str) -> dict[str, list[str]]:
        if text not in self.known:
            self.known[text] = self.source.infer([text], RELATIONS, 5)[0]
        return self.known[text]


def alternating(conversation: Conversation) -> bool:
    """Whether speaker and listener take turns, as the released code supposes."""
    return all(turn.by_speaker == (place % 2 == 0) for place, turn in enumerate(conversation.turns))


def compare(store: Store, dialogues: dict[str, list[Conversation]], infer: Retrieved) -> dict[str, tuple[int, int]]:
    """What of the dialogues and inferences is the same in the store: kind -> (equal, all)."""
    kinds = ("examples", "emotions", "roles", "replies", "turns", "feedback", "sub-utterances", "inferences")
    found = {name: [0, 0] for name in kinds}

    def count(name: str, equal: bool, times: int = 1) -> None:
        found[name][0] += times * equal
        found[name][1] += times

    for split, conversations in dialogues.items():
        rows = [(c, place) for c in conversations for place in range(1, len(c.turns), 2)]
        count("examples", store.size(split) == len(rows), len(rows))
        for index, (conversation, place) in enumerate(rows):
            example = store.example(split, index)
            count("emotions", EMOTIONS[example.emotion] == conversation.emotion)
            count("roles", example.source["by_speaker"] == [turn.by_speaker for turn in conversation.turns[:place]])
            for turn, text in zip(conversation.turns[:place], example.source["context"], strict=True):
                count("turns", tokenize(turn.text) == tokenize(text))
            count("replies", tokenize(conversation.turns[place].text) == tokenize(example.source["response"]))
            follows = conversation.turns[place + 1].text if place + 2 < len(conversation.turns) else ""
            count("feedback", tokenize(follows) == tokenize(example.source["feedback"]))
            said = words(conversation.turns[place - 1].text)
            pieces = [piece for part in " ".join(said).split(".") if (piece := words(" ".join(part.split())))]
            pieces = [said, *pieces] if pieces else [said, said]
            subs = [store.texts.text(int(text)) for text in example.sub_utterance]
            count("sub-utterances", ["".join(sub.split()) for sub in subs] == ["".join(piece) for piece in pieces])
            expected = [("".join(words(text)), sub, relation) for sub, piece in enumerate(pieces)
                        for relation in (*COGNITION_RELATIONS, REACTION_RELATION)
                        for text in clean_inferences(infer(" ".join(piece))[relation], 5)]
            vertices = [(text, sub, COGNITION_RELATIONS[relation]) for text, sub, relation in
                        zip(example.knowledge, example.knowledge_sub, example.knowledge_relation, strict=True)]
            vertices += [(text, sub, REACTION_RELATION) for text, sub in zip(example.reaction, example.reaction_sub, strict=True)]
            stored = [("".join(store.texts.text(int(text)).split()), int(sub), relation) for text, sub, relation in vertices]
            count("inferences", sorted(expected) == sorted(stored), len(expected))
    return {name: (equal, total) for name, (equal, total) in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--conversations", type=int, default=2000, help="of the training part; an eighth of it of the others")
    args = parser.parse_args()
    limits = {"train": args.conversations, "valid": args.conversations // 8, "test": args.conversations // 8}
    read = {split: read_conversations(args.data / "empatheticdialogues", split, limits[split])[0] for split in NAMES}
    dialogues = {split: [conversation for conversation in found if alternating(conversation)] for split, found in read.items()}
    infer, lexicon = Retrieved(args.data / "atomic"), VADLexicon.read(args.data / "nrc_vad" / "NRC-VAD-Lexicon.txt")
    started = time.process_time()
    content = case_pickle(3, dialogues, infer, lexicon={word: (*values, 0.5) for word, values in lexicon.words.items()})
    print(f"{sum(map(len, dialogues.values())):,} conversations; a pickle of {len(content) / 2**20:.1f} MiB, protocol 3, made in "
          f"{time.process_time() - started:.0f} s of a core")
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "dataset_preproc.p"), Path(folder, "imported.store")
        path.write_bytes(content)
        started = time.process_time()
        read_pickle(content, str(path))
        seconds = time.process_time() - started
        print(f"read_pickle: {seconds:.1f} s of a core, {len(content) / 2**20 / seconds:.1f} MiB a second")
        subprocess.run([sys.executable, "-c", CHECK, str(path)], check=True)
        started = time.process_time()
        store = import_release(PrepareSettings(str(path), None, str(args.data / "conceptnet" / "assertions.csv"),
                                               str(args.data / "nrc_vad" / "NRC-VAD-Lexicon.txt"), str(out)))
        sizes = ", ".join(f"{split} {store.size(split):,}" for split in store.splits)
        print(f"import: {time.process_time() - started:.1f} s of a core; {sizes}; {len(store.featurizer.vocabulary):,} words")
        found = compare(store, dialogues, infer)
        for name, (equal, total) in found.items():
            print(f"  {name}: {equal:,} of {total:,} the same ({100 * equal / total:.2f} %)")
        trained = cli.main(["train", "--data", str(out), "--out", str(Path(folder, "run")), *TINY])
    exact = all(found[name][0] == found[name][1] for name in ("examples", "emotions", "roles", "sub-utterances", "inferences"))
    return int(not exact or trained != 0)


if __name__ == "__main__":
    sys.exit(main())
