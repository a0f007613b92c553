"""The errors that moegen raises on purpose, as one tree.

    MoegenError                  exit 70  an engine bug or an unforeseen condition
    |-- SpecError                exit 64  the job specification is wrong; names the field, the value and the remedy
    |   `-- UnsupportedModel     exit 64  the model has a layer that the engine cannot keep exact; names the layer type
    |-- InputError               exit 65  an input cannot be read, or changed since the job began
    |   `-- CheckpointError      exit 65  a checkpoint file or tensor is missing, truncated or of another shape
    |-- StorageError             exit 69  storage refused: credentials, network, a conflict at the output
    |-- BudgetError              exit 64  the memory budget cannot hold the plan; says the smallest that would do
    |-- TooManyErrors            exit 2   more rows failed than the job allows; there is no _SUCCESS
    `-- Interrupted              exit 75  stopped on request; what was committed stays, the same command resumes

Row-level trouble is never an exception: it is a `moegen.row.RowError` in the row's result.
"""

from __future__ import annotations


class MoegenError(Exception):
    """Base of the tree. `exit_code` is the status that the CLI ends with (see the data contract)."""

    exit_code = 70


class SpecError(MoegenError):
    """A job specification (or a command's argument) that cannot be run as written."""

    exit_code = 64


class UnsupportedModel(SpecError):
    """A model that the engine refuses because it cannot prove its own passes equal to the model's forward."""


class InputError(MoegenError):
    """An input object that is missing, unreadable, or no longer the one that the job was pinned to."""

    exit_code = 65


class CheckpointError(InputError):
    """A checkpoint whose files or tensors do not make the model that its config.json describes."""


class StorageError(MoegenError):
    """Storage said no: permissions, an unreachable endpoint, or an output that belongs to other work."""

    exit_code = 69


class BudgetError(SpecError):
    """The memory that was promised cannot hold what the job needs."""


class TooManyErrors(MoegenError):
    """More rows failed than `errors` allows. What is done stays; with another `errors` the same job goes on."""

    exit_code = 2


class Interrupted(MoegenError):
    """The job ended before its last row: asked to, at a limit, or because another runner has it.

    What is on storage stays; running the same job again resumes it.
    """

    exit_code = 75
