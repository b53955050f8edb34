"""Exception types. Every message says what is wrong, where, and what to do.

The user can fix every `SubnibbleError`: the command line prints its message alone and exits with code 2. Any other
exception, `SilentFailure`, `NotLoadable` and `NotSame` included, is a bug in subnibble (exit code 1).
"""


class SubnibbleError(Exception):
    """Base of all errors that the user can fix."""


class BadRecipe(SubnibbleError):
    """A setting that cannot be used: an unknown key or method, or an invalid group size or bit width."""


class BadArgument(SubnibbleError, TypeError):
    """A Python argument of the wrong type; the message says what to give."""


class NoWeight(SubnibbleError, AttributeError):
    """Code asked a packed module for its dense `weight`, which packed modules do not hold."""


class UnsupportedModel(SubnibbleError):
    """An architecture without a site table, or a checkpoint that does not match the table."""


class UnsupportedTransformers(SubnibbleError):
    """A transformers release whose names or behaviour differ from all releases that subnibble knows."""


class CheckpointError(SubnibbleError):
    """A checkpoint that is missing, truncated or inconsistent, or has NaN or infinite weights."""


class CalibrationError(SubnibbleError):
    """Calibration or evaluation text that cannot be read or is too short."""


class NumericalFailure(SubnibbleError):
    """A floating-point failure of an algorithm; the message names the linear and the remedy."""


class OutputError(SubnibbleError):
    """An output folder that cannot be written."""


class BadJournal(SubnibbleError):
    """The unfinished work of an earlier run that cannot be resumed: of another run or version, or damaged."""


class MissingExtra(SubnibbleError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""


class StaleKernels(SubnibbleError):
    """C++ kernels that were built from other sources than those beside them; the message says what to run."""


class SilentFailure(RuntimeError):
    """A hook, patch or stand-in module was never called; without this error the model would silently be worse."""


class NotLoadable(RuntimeError):
    """The checkpoint that a run wrote would not load, so it is not kept."""


class NotSame(RuntimeError):
    """A converted weight is not the same number as in the model that it was converted from."""
