"""`case-fast publish`: a run as a folder that others may have, with a model card, without the data that nobody may pass on."""

from case_fast.publishing.command import Publication, publish

__all__ = ["Publication", "publish"]
