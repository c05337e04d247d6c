"""All formats, by name."""

from collections.abc import Mapping

from tests.fuzz import models, records, tables
from tests.fuzz.format import Format

FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        *(models.ADAPTER, models.MERGED, models.ENSEMBLE, models.OLD, models.PEFT, models.FOLDER, models.BASES),
        *(records.LEDGER, records.SCORES, records.CHECKPOINTS, records.RUNS),
        *(records.SEARCHES, records.COMPARISONS, records.CELLS, records.DESCENTS),
        *(
            tables.TASKS,
            tables.RECIPES,
            tables.TSV,
            tables.CSV,
            tables.JSONL,
            tables.PARQUET,
            tables.PLAIN,
            tables.REQUESTS,
        ),
    )
}
