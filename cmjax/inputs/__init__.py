"""The doors by which files and numbers come in. Nothing past them asks again.

What a file holds is anyone's: every reader has a budget that is looked at before memory is taken,
reads UTF-8 whatever the locale, skips a byte-order mark, and refuses in one `ValueError` that names
the file, and the line where there is one.
"""

from cmjax.inputs.arrays import check_archive, read_array, read_arrays, read_member
from cmjax.inputs.documents import (
    listed,
    parse_json,
    parse_toml,
    read_json,
    read_json_lines,
    read_toml,
)
from cmjax.inputs.maps import map_bytes
from cmjax.inputs.numbers import (
    MOST_SEED,
    MOST_SIZE,
    check_count,
    check_number,
    check_seed,
    shown,
    whole_numbers,
)
from cmjax.inputs.tables import parse_csv, parse_row, read_csv, read_records, records_of
from cmjax.inputs.text import MOST_BYTES, in_one_line, read_bytes, read_text

__all__ = [
    "MOST_BYTES",
    "MOST_SEED",
    "MOST_SIZE",
    "check_archive",
    "check_count",
    "check_number",
    "check_seed",
    "in_one_line",
    "listed",
    "map_bytes",
    "parse_csv",
    "parse_json",
    "parse_row",
    "parse_toml",
    "read_array",
    "read_arrays",
    "read_bytes",
    "read_csv",
    "read_json",
    "read_json_lines",
    "read_member",
    "read_records",
    "read_text",
    "read_toml",
    "records_of",
    "shown",
    "whole_numbers",
]
