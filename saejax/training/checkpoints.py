"""Training checkpoints by Orbax: saved whole, restored onto any mesh, the newest kept."""

import errno
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from saejax.errors import UserError


class Checkpoints:
    """The checkpoints of one training run.

    Args:
      folder: where they are; made if missing. What a killed save left half-written is cleaned up.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.ContinuousCheckpointingPolicy(
                minimum_interval_secs=0
            ),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Saves and waits until it is on disk: the next step donates the state's buffers.

        Raises:
          UserError: the disk is full; earlier checkpoints stay.
        """
        if self.latest_step == step:
            return
        try:
            self._checkpointer.save(step, state, force=True)
        except Exception as error:  # TensorStore reports a full disk in words, under several types
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise UserError(
                    f"the disk is full while saving step {step} to {self._folder}: free space, then run again"
                ) from error
            raise

    def restore(self, abstract_state: Any) -> Any:
        """The newest state, placed as ``abstract_state``'s shardings say."""
        try:
            return self._checkpointer.load(self.latest_step, abstract_state)
        except Exception as error:
            message = (
                f"{self._folder}: step {self.latest_step} cannot be restored ({type(error).__name__}): "
                "delete that step's folder to go on from an earlier one"
            )
            raise UserError(message) from error

    def close(self) -> None:
        """Frees the threads."""
        self._checkpointer.close()
