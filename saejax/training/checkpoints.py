"""Training checkpoints by Orbax: written in the background, restored onto any mesh, the newest kept and one more."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from saejax.dictionaries.formats.own import quiet_absl
from saejax.errors import UserError, out_of_room
from saejax.files import read_object, write_json
from saejax.parallel.collectives import is_first_process

RUN = "run.json"
KEPT = 2  # newest checkpoints: the last may be half-written when a run is killed
_copy_arrays = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Checkpoints:
    """The checkpoints of one training run; a context manager that waits for what is being written, and silences Orbax.

    Args:
      folder: their folder; made if missing. What a killed save left half-written is cleaned up.
      kept_step: a step whose checkpoint is kept, too.
    """

    def __init__(self, folder: Path, kept_step: int = 0):
        self._folder, policies = Path(folder).absolute(), ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.ContinuousCheckpointingPolicy(
                minimum_interval_secs=0
            ),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(KEPT), policies.CustomSteps([kept_step])]
            ),
            cleanup_tmp_directories=True,
        )
        self._writing: tuple[int, Any] | None = None
        self._silence = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._silence.enter_context(quiet_absl())  # its threads log a full disk a dozen times, with tracebacks
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with self._silence:
            # After an error, that one counts, not what a save that was under way makes of it.
            with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                self.wait()
            self.close()

    @property
    def latest_step(self) -> int | None:
        """The last step that was saved or is being written; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def check_or_record_run(self, run: Mapping[str, Any]) -> None:
        """Check that the checkpoints belong to this run; where there are none yet, record the run.

        Args:
          run: description of the run, JSON data.

        Raises:
          UserError: they belong to another run; it lists the differences.
        """
        path = self._folder / RUN
        if self.latest_step is not None and path.exists():
            if different := list(_differences(read_object(path), run)):
                raise UserError(
                    f"{self._folder} holds checkpoints of another configuration: {'; '.join(different)}: give those "
                    "settings, or delete the folder to start anew"
                )
        elif is_first_process():
            write_json(path, run)

    def save(self, step: int, state: Any) -> None:
        """Start to save; wait only for the previous save and until the state's buffers may be donated.

        Args:
          step: number of the step.
          state: a tree of arrays.

        Raises:
          UserError: the disk is full, now or at the save before; earlier checkpoints stay.
        """
        # One save at a time: a second would hold another copy of the state.
        self.wait()
        if self.latest_step == step:
            return
        if jax.tree.leaves(state)[0].sharding.mesh.devices.flat[0].platform == "cpu":
            state = _copy_arrays(state)  # elsewhere Orbax copies to the host before it returns
        with self._disk_errors(step):
            self._writing = step, self._checkpointer.save_async(step, state, force=True)

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises as ``save`` does."""
        if self._writing is not None:
            (step, response), self._writing = self._writing, None
            with self._disk_errors(step):
                response.result()

    @contextlib.contextmanager
    def _disk_errors(self, step: int) -> Iterator[None]:
        """Turn the many forms of a full disk into a ``UserError``."""
        try:
            yield
        except Exception as error:  # TensorStore reports a full disk in words, under several types
            if reason := out_of_room(error):
                raise UserError(
                    f"{reason} while saving step {step} to {self._folder}: free space, then run again"
                ) from error
            raise

    def restore(self, abstract_state: Any) -> Any:
        """Return the last state, placed as the shardings of ``abstract_state`` say."""
        try:
            return self._checkpointer.load(self.latest_step, abstract_state)
        except Exception as error:
            message = (
                f"{self._folder}: step {self.latest_step} cannot be restored ({type(error).__name__}): "
                "delete that step's folder to go on from an earlier one"
            )
            raise UserError(message) from error

    def close(self) -> None:
        """Free the threads."""
        self._checkpointer.close()


def _differences(recorded: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yield the entries of ``wanted`` that differ from what was recorded under the same names."""
    for key, value in wanted.items():
        before, full = recorded.get(key), f"{name}.{key}" if name else key
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(before, value, full)
        elif before != value:
            yield f"{full} was {before}, is {value}"
