"""Other people's prepared data, read without running what they hold: released pickles and arrays of texts."""

from case_fast.importing.command import check, import_release, show
from case_fast.importing.released import Imported, read_released

__all__ = ["Imported", "check", "import_release", "read_released", "show"]
