"""Every error that lorasmith raises for a user's mistake or a user's machine.

    LorasmithError
    |-- SettingsError          a run file, an environment variable or a flag is wrong
    |-- DataError              a data file cannot be read, or rows of it are wrong
    |   `-- OverlongError      examples do not fit max_seq_len and the policy is "error"
    |-- RecipeError            a prompt recipe cannot render these examples, or is not the trained one
    |-- BaseModelError         the base model cannot be found, read, or is not the one that was trained on
    |-- AdapterError           an adapter folder is missing, broken, or fits another base
    |-- RunError               a run folder is missing, broken, or in use
    |-- StorageError           a file cannot be written: the disk is full, read-only, or not ours
    |-- TrainingError          training cannot start or go on
    |   |-- NonFiniteLossError the loss became NaN or infinite
    |   |-- LostProcessError   another process of the run has ended or does not answer
    |   `-- ResumeError        a checkpoint cannot be continued from with the same result
    |-- MergeError             the merged model parts from base + adapter
    |-- ExportError            a model cannot be written for another program, or is not the same there
    |-- HubError               the Hub refuses, cannot be reached, or what would be pushed must not be
    |-- EndpointError          an endpoint that is evaluated cannot be asked
    |-- CloudError             SkyPilot or a cloud's tool is missing, refuses or fails
    `-- MissingExtraError      an optional part is not installed

The text of each says what came, what was needed, and the way out. ``assert`` is for our own invariants only.
"""


class LorasmithError(Exception):
    """Base of every error that a user can mend. The command line prints its text without a traceback."""


class SettingsError(LorasmithError):
    """Raised for faults in settings; all faults of one file and its overrides are reported together."""


class DataError(LorasmithError):
    """Raised when a data source cannot be read or holds rows that are wrong, named as file:line."""


class OverlongError(DataError):
    """Raised when examples have more tokens than max_seq_len and the policy is "error"."""


class RecipeError(LorasmithError):
    """Raised when a prompt recipe cannot render an example or differs from the recipe of the run."""


class BaseModelError(LorasmithError):
    """Raised when the base model cannot be found or loaded, or its weights are not those of the run."""


class AdapterError(LorasmithError):
    """Raised when an adapter folder is missing, incomplete, not finite, or does not fit the base."""


class RunError(LorasmithError):
    """Raised when a run folder is missing, not a run, or would be overwritten."""


class StorageError(LorasmithError):
    """Raised when a file or folder cannot be written; what was whole before is whole still.

    ``why`` says what the system reports, and its way out.
    """

    def __init__(self, path: object, why: str, hint: str = "") -> None:
        self.why = why
        super().__init__(
            f"{path} cannot be written: {why}, or choose another place. What was saved before is whole.{hint}"
        )


class TrainingError(LorasmithError):
    """Raised when training cannot start or cannot go on."""


class NonFiniteLossError(TrainingError):
    """Raised when a step's loss is NaN or infinite; names the rows of the step."""


class LostProcessError(TrainingError):
    """Raised in the processes of a run that are left when one has ended or does not answer in time."""


class ResumeError(TrainingError):
    """Raised when a checkpoint does not belong to this run or does not reproduce its last step."""


class MergeError(LorasmithError):
    """Raised when a merged model cannot be made or its answers part from base + adapter."""


class ExportError(LorasmithError):
    """Raised when a model cannot be written in another program's format, or answers otherwise there."""


class HubError(LorasmithError):
    """Raised when the Hub refuses or cannot be reached, or when what would be pushed must not be."""


class EndpointError(LorasmithError):
    """Raised when an OpenAI-compatible endpoint cannot be reached, refuses, or answers as none does."""


class CloudError(LorasmithError):
    """Raised when SkyPilot or a cloud's own tool is missing, refuses what is asked, or fails."""


class MissingExtraError(LorasmithError):
    """Raised when an optional part is needed and not installed; its text is the pip line that mends it."""

    def __init__(self, needed_for: str, package: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package}, which is not installed. "
            f"Install it with: pip install 'lorasmith[{extra}]'"
        )


def first_line(fault: BaseException) -> str:
    """Return the first line of another library's error, or its type's name where it says nothing."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)
