"""How much of the valid and test dialogues a vocabulary of the training dialogues covers.

``python -m python_tests.coverage DATA/empatheticdialogues``, half a minute. The table is in docs/results.md.
"""

from __future__ import annotations

import argparse
from collections import Counter

from case_fast.data.empathetic_dialogues import SPLITS, read_conversations
from case_fast.data.text import tokenize


def counted(dialogues: str, split: str) -> Counter[str]:
    """The words of all turns of a split."""
    conversations, _ = read_conversations(dialogues, split)
    return Counter(word for conversation in conversations for turn in conversation.turns for word in tokenize(turn.text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dialogues")
    dialogues = parser.parse_args().dialogues
    known = counted(dialogues, "train")
    glued = sum(word[-1] in "-/~\\_" and len(word) > 1 for word in known)
    print(f"train: {known.total():,} words, {len(known):,} distinct, {glued} of them with a mark at their end")
    for split in SPLITS[1:]:
        words = counted(dialogues, split)
        unknown = {word: count for word, count in words.items() if word not in known}
        print(f"{split}: {words.total():,} words, {len(words):,} distinct; unknown {sum(unknown.values()):,} "
              f"({100 * sum(unknown.values()) / words.total():.3f} %), {len(unknown):,} distinct")


if __name__ == "__main__":
    main()
