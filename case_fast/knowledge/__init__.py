"""Commonsense and concepts: COMET or ATOMIC inferences, their cache, ConceptNet neighbours, emotion intensities."""

from case_fast.knowledge.cache import CachedSource, InferenceCache
from case_fast.knowledge.conceptnet import EXCLUDED_RELATIONS, read_concepts
from case_fast.knowledge.lexicon import VADLexicon, read_emotion_words
from case_fast.knowledge.opening import open_source
from case_fast.knowledge.source import (
    COGNITION_RELATIONS,
    REACTION_RELATION,
    RELATIONS,
    KnowledgeSource,
    clean_inferences,
)

__all__ = [
    "COGNITION_RELATIONS",
    "EXCLUDED_RELATIONS",
    "REACTION_RELATION",
    "RELATIONS",
    "CachedSource",
    "InferenceCache",
    "KnowledgeSource",
    "VADLexicon",
    "clean_inferences",
    "open_source",
    "read_concepts",
    "read_emotion_words",
]
