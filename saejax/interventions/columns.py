"""Tables of measurements: one array for each column, kept as Parquet."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.errors import UserError
from saejax.files import whole_file


@dataclasses.dataclass(frozen=True)
class Columns:
    """Arrays of one length, which are the fields of a subclass; ``kind`` names its files."""

    kind: ClassVar[str]

    @classmethod
    def file(cls, folder: Path, behaviour: str) -> Path:
        """Return the file in which a stage keeps the table of a behaviour."""
        return folder / f"{behaviour}-{cls.kind}.parquet"

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def save(self, path: Path) -> None:
        """Write a Parquet table with a column for each attribute, null where it is NaN."""
        columns = {name: pa.array(values_N, from_pandas=True) for name, values_N in self.columns.items()}
        with whole_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
          UserError: it is missing or damaged.
        """
        try:
            table = pq.read_table(path)
            return cls(**{field.name: table[field.name].to_numpy() for field in dataclasses.fields(cls)})
        except (OSError, pa.ArrowException, KeyError):
            raise UserError(f"{path} is missing or damaged: delete {path.parent} and run its stage again") from None
