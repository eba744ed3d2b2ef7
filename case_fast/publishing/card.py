"""The model card: card.md, filled with what the run's folder says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from case_fast import __version__
from case_fast.evaluation.evaluate import Evaluation, markdown
from case_fast.models import DialogueModel, title_of
from case_fast.runs import Record, lookup
from case_fast.sources import SOURCES

_TEMPLATE = Path(__file__).with_name("card.md")
_SAMPLE = "the sample that comes with case_fast"
_FILES = {"lexicon": "NRC-VAD-Lexicon.txt", "emotion_words": "NRC-Emotion-Lexicon.txt", "atomic": "atomic2020",
          "comet": "comet-atomic_2020_BART"}  # the names that the snippet has for files that are not published


@dataclass(frozen=True)
class Used:
    """A data set in the card's table."""

    name: str
    gave: str
    here: str
    licence: str
    published: str


class Material:
    """What a run was made of. ``features``: what the published features.json holds; ``knowledge``: where inferences came from."""

    def __init__(self, model: DialogueModel, record: Record, features: Mapping[str, Any], knowledge: Mapping[str, Any]):
        self.model, self.features, self.knowledge = model, features, knowledge
        self._settings = record.store.get("settings") or {}
        self._all_bundled = bool(lookup(record.manifest, "store.bundled"))
        self.known = bool(self._settings)  # the store is there and says what it was prepared of

    def bundled(self, part: str) -> bool:
        """Whether a part of the store came from the sample; of a store that is gone: whether its dialogues did."""
        if part == "knowledge":
            return self.knowledge["spec"] == "bundled"
        return self._settings.get(part) == "bundled" if self.known else self._all_bundled

    @property
    def licence(self) -> str:
        """As the Hub names it."""
        if not self.bundled("dialogues"):
            return "cc-by-nc-4.0"
        return "mit" if all(row.name == _SAMPLE for row in self.rows()) else "other"

    def rows(self) -> list[Used]:
        """The data sets, the sample last and in one row."""
        found, of_sample = [], []
        for part, name, gave, here in self._parts():
            if self.bundled(part):
                of_sample.append(gave)
            else:
                found.append(Used(name, gave, here, SOURCES[name].licence, SOURCES[name].published))
        if of_sample:
            found.append(Used(_SAMPLE, ", ".join(of_sample), "the weights; the words in vocabulary.json", "MIT", "with case_fast"))
        return found

    def _parts(self) -> Iterator[tuple[str, str, str, str]]:
        """(option of prepare, data set, what it gave, what of it is in the folder)."""
        needs, left_out = self.model.needs, self.features["left_out"]
        yield ("dialogues", "EmpatheticDialogues", "dialogues, emotion labels",
               "the weights, trained on it; its words, by their count, in vocabulary.json")
        kind = self.knowledge["spec"].partition(":")[0]
        source, imported = {"atomic": "ATOMIC"}.get(kind, "COMET"), kind == "imported" or "imported" in self.knowledge
        read = "the weights, trained on them; " if self.features["knowledge"] else ""
        gave = "commonsense inferences, as released with the dialogues" if imported else "commonsense inferences"
        yield "knowledge", source, gave, f"{read}their words in vocabulary.json"
        if "concept" in needs:
            yield ("conceptnet", "ConceptNet", "concepts related to words",
                   "the weights, trained with them; features.json: to a word at most "
                   f"{self.features['settings']['concepts_per_token']} related ones")
        if left_out["lexicon"]:
            least = f"{self.features['settings']['minimum_intensity']:g}"
            concepts = f"; that a word is a concept in features.json says that its intensity is at least {least}"
            yield ("lexicon", "NRC-VAD", "an emotion intensity for each word",
                   "the weights, trained with them; none of its values" + concepts * ("concept" in needs))
        if left_out["emotion_words"]:
            yield "emotion_words", "NRC EmoLex", "which words are emotional", "the weights, trained with them; none of its words"
        if self._settings.get("embeddings"):
            yield "embeddings", "GloVe", "first word vectors", "the weights, which began with them"
        elif not self.known and not self._all_bundled:
            yield ("embeddings", "GloVe", "first word vectors, if any: the run's store is gone and cannot be asked",
                   "perhaps the weights")

    def obligations(self) -> str:
        """What the licences ask of whoever takes the folder."""
        said = []
        names = [row.name for row in self.rows()]
        if "EmpatheticDialogues" in names:
            said.append("The weights and the words are derived from EmpatheticDialogues: name it (Rashkin et al., ACL 2019), and use "
                        "them for nothing commercial (CC BY-NC 4.0).")
        if "ConceptNet" in names:
            said.append("The concepts in features.json are adapted from ConceptNet 5 (Speer et al., AAAI 2017; conceptnet.io), "
                        "neighbours chosen by emotion intensity: name it, and pass them on under CC BY-SA 4.0.")
        if "ATOMIC" in names:
            said.append("Inferences are those of ATOMIC (Sap et al., AAAI 2019; Hwang et al., AAAI 2021) for events like a text: name "
                        "it (CC BY 4.0).")
        if "COMET" in names:
            said.append("Inferences were generated by COMET (Hwang et al., AAAI 2021).")
        if "NRC-VAD" in names:
            said.append("Emotion intensities follow NRC-VAD (Mohammad, ACL 2018), which is free for research alone.")
        return " ".join(said) or "All of it was written for case_fast and is under its MIT licence."

    def left_out(self) -> list[str]:
        """What is not in the folder, a line each."""
        said, seals = [], self.features["left_out"]
        for option, name, what in (("lexicon", "NRC-VAD", "the emotion intensities of {:,} words, and the order of each word's "
                                    "concepts, which follows from them"), ("emotion_words", "NRC EmoLex", "{:,} emotional words")):
            if seal := seals[option]:
                if self.bundled(option):
                    remedy = f'the sample\'s are put back by `{option}="bundled"`'
                else:
                    remedy = (f"{name}'s terms forbid passing them on. Get it from {SOURCES[name].published}; "
                              "`case_fast.load` and `case-fast chat` read them from the file that you name, in any layout of it")
                said.append(f"{what.format(seal['words'])}: {remedy}, if a hash says that they are those of the training "
                            f"(sha256 {seal['sha256'][:16]}...)")
        if (knowledge := self.features["knowledge"]) and not self.bundled("knowledge"):
            said.append(f"the source of inferences, {knowledge['spec']} ({knowledge['identity'][:19]}...), which a new text needs")
        said.append("dialogues and replies: metrics.json has figures alone")
        return said

    def arguments(self, name: str) -> tuple[str, str]:
        """Of `case_fast.load` in the snippet, and the files that these name, in words."""
        words, files = [f'"{name}"'], [f"`{name}`"]
        for option, seal in self.features["left_out"].items():
            if seal and self.bundled(option):
                words.append(f'{option}="bundled"')
            elif seal:
                words.append(f'{option}="{_FILES[option]}"')
                files.append(f"`{_FILES[option]}`")
        kind = (self.features["knowledge"] or {}).get("spec", "")
        kind = "atomic" if kind.startswith("imported") else kind
        if kind in _FILES:
            words.append(f'knowledge="{kind}:{_FILES[kind]}"')
            files.append(f"`{_FILES[kind]}` ({kind.upper()})")
        return ", ".join(words), " and ".join(filter(None, [", ".join(files[:-1]), files[-1]]))


def card_of(name: str, model: DialogueModel, record: Record, material: Material, evaluations: Mapping[str, Evaluation]) -> str:
    """The text of README.md for a folder called ``name``."""
    info, ablation = type(model)._hub_mixin_info, model.config.ablation
    title = title_of(model.config.kind) + (f" {ablation}" if ablation else "")
    data = ModelCardData(language="en", license=material.licence, library_name="case_fast", tags=info.model_card_data.tags)
    arguments, beside = material.arguments(name)
    results = [markdown(found).replace("# ", "### ", 1).strip() + _unsure(found) for found in evaluations.values()]
    card = ModelCard.from_template(
        data, template_path=str(_TEMPLATE), name=name, title=title, version=__version__, paper_url=info.paper_url,
        parameters=f"{sum(x.numel() for x in model.parameters()):,}", words=f"{model.config.vocab_size:,}", arguments=arguments,
        beside=beside, sources=material.rows(), obligations=material.obligations(), left_out=material.left_out(),
        recipe=_recipe(record), settings=json.dumps(record.config, indent=2) if record.config else "",
        results="\n\n".join(results) or "These weights have not been evaluated.",
    )
    return str(card).rstrip() + "\n"


def _unsure(evaluation: Evaluation) -> str:
    noted = lookup(evaluation.about, "model.weights")
    return "" if noted else "\n\nThe version that made this evaluation did not note by a hash which weights of the run it was of."


def _recipe(record: Record) -> list[str]:
    """How the weights came about, a line each."""
    manifest, config = record.manifest, record.config
    result, counts, best = manifest.get("result") or {}, record.store.get("counts") or {}, lookup(manifest, "result.best") or {}
    said = []
    if examples := lookup(counts, "examples.train"):
        said.append(f"{examples:,} training examples of {lookup(counts, 'conversations.train'):,} conversations, store "
                    f"`{str(lookup(manifest, 'store.fingerprint'))[:16]}`")
    elif fingerprint := lookup(manifest, "store.fingerprint"):
        said.append(f"store `{fingerprint[:16]}`")
    if result:
        said.append(f"{result['steps']:,} steps of {config.get('batch_size')} dialogues, ended by {result['stopped']}; the weights are "
                    f"those of step {result['best_step']:,}, the best validation")
        figures = [f"{what} {best[name]:.{digits}f}" for name, what, digits in
                   (("ppl", "perplexity", 2), ("accuracy", "emotion accuracy", 3)) if isinstance(best.get(name), float)]
        if figures:
            said.append(f"validation there: {', '.join(figures)} ({best.get('examples', 0):,} examples)")
    else:
        said.append("training had not ended when these weights were taken, the best so far")
    said.append(f"seed {lookup(config, 'seed') or 0}, one run: how far figures vary over seeds is not said by it")
    versions = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    said.append(f"on {manifest.get('device', 'a device that was not noted')}; {versions}")
    return said
