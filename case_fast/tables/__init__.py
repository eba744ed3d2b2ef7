"""Tables of models over seeds: which runs they are made of, and what the runs say together."""

from case_fast.tables.numbers import Table, floors_of, table_of
from case_fast.tables.plan import Planned, Row, plan, rows_of
from case_fast.tables.write import write_table

__all__ = ["Planned", "Row", "Table", "floors_of", "plan", "rows_of", "table_of", "write_table"]
