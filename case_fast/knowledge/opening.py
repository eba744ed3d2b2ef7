"""Opening the source of inferences that the command line's ``--knowledge`` names."""

from __future__ import annotations

from typing import Any

from case_fast.errors import ConfigError
from case_fast.knowledge.source import KnowledgeSource
from case_fast.optional import needed

_SPEC_FORMS = "'bundled', 'atomic:PATH' (a file of ATOMIC or ATOMIC-2020, or the folder) or 'comet:DIR' (a COMET-BART folder)"


def open_source(spec: str, device: str = "auto", **settings: Any) -> KnowledgeSource:
    """Open the source that ``spec`` names: 'bundled', 'atomic:PATH' or 'comet:DIR'.

    ``device`` (see `resolve_device`) matters to COMET alone; ``settings`` go to the source's constructor.

    Raises:
        ConfigError: the spec or a setting is not an accepted one.
        DataError: the files it names are missing or unusable.
    """
    kind, _, path = spec.partition(":")
    if kind == "imported":
        raise ConfigError(f"the knowledge came with an imported file ({spec}), which says nothing about other texts. Give a "
                          f"source for them with --knowledge: {_SPEC_FORMS}")
    try:
        if spec == "bundled" or (kind == "atomic" and path):
            for package in ("nltk", "sklearn"):
                needed(package, "retrieval from ATOMIC")
            from case_fast.knowledge.atomic import AtomicRetrieval

            return AtomicRetrieval(path, **settings) if path else AtomicRetrieval.bundled(**settings)
        if kind == "comet" and path:
            from case_fast.knowledge.comet import CometSource

            return CometSource(path, device=device, **settings)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"--knowledge {spec}: {error}") from error
    raise ConfigError(f"--knowledge {spec!r} is not a source of inferences. Give {_SPEC_FORMS}")
