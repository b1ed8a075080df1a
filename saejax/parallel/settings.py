"""Settings of the mesh of devices and of the processes of a run."""

import dataclasses
import re

from saejax.config import Config, setting
from saejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """The mesh of devices, and the processes of the run."""

    member: int = setting(1, "devices over which the members of a stack are split", low=1)
    data: int = setting(0, "devices over which tokens are split; 0: all devices that the other axes leave", low=0)
    model: int = setting(1, "devices over which features, heads and the vocabulary are split", low=1)
    distributed: str = setting(
        "flags",
        "how the processes of a run find each other: by --mesh.processes, process_id and coordinator (flags), or from "
        "SLURM, Open MPI or the TPU slice (auto)",
        choices=("flags", "auto"),
        changes_results=False,
    )
    processes: int = setting(1, "number of processes of the run; if above 1, start each with the same flags", low=1)
    process_id: int = setting(0, "index of this process, from 0", low=0, changes_results=False)
    coordinator: str = setting(
        "", "host:port of process 0; empty: taken from the cluster's environment", changes_results=False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distributed == "flags" and self.process_id >= self.processes:
            raise UserError(f"process_id={self.process_id} is none of {self.processes} processes: they count from 0")
        if self.coordinator and not re.fullmatch(r".+:[0-9]+", self.coordinator):
            raise UserError(f"coordinator={self.coordinator} names no port: expected HOST:PORT of process 0")

    @property
    def together(self) -> bool:
        """True if the run may have several processes."""
        return self.distributed == "auto" or self.processes > 1
