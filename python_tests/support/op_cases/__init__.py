"""The families of ops, for tests and scorecard: a file of this folder each. Needs only torch."""

import importlib
import pkgutil

from op_case import Case

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
FAMILIES: dict[str, type[Case]] = {kind.family: kind for kind in Case.__subclasses__()}
