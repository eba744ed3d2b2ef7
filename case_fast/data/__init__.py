"""Official readers, text, graphs, the packed store and its batches."""

from case_fast.batch import Batch
from case_fast.data.empathetic_dialogues import EMOTIONS, Turn
from case_fast.data.featurizer import FeatureSettings, Featurizer
from case_fast.data.pack import make_batch
from case_fast.data.store import Store, open_store
from case_fast.data.vocabulary import Vocabulary

__all__ = ["EMOTIONS", "Batch", "FeatureSettings", "Featurizer", "Store", "Turn", "Vocabulary", "make_batch", "open_store"]
