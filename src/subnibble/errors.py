"""What can go wrong, as types. Every message says what, where and what to do.

All but `SilentFailure` and `NotLoadable` are the user's to mend, so the command line prints the message alone and exits
with 2; any other exception is a fault of subnibble's own (exit code 1).
"""


class SubnibbleError(Exception):
    """Base of everything subnibble raises on purpose."""


class BadRecipe(SubnibbleError):
    """A request that cannot be carried out as written: unknown key, method, group size or bit width."""


class BadArgument(SubnibbleError, TypeError):
    """A Python argument of a kind that the call does not take; says what to give."""


class NoWeight(SubnibbleError, AttributeError):
    """A packed module was asked for the dense weight that it does not hold."""


class UnsupportedModel(SubnibbleError):
    """The model's architecture has no site table, or its table does not describe this checkpoint."""


class UnsupportedTransformers(SubnibbleError):
    """A release of transformers that names something otherwise than all releases that subnibble knows."""


class CheckpointError(SubnibbleError):
    """A checkpoint that is missing, truncated, inconsistent or not finite."""


class CalibrationError(SubnibbleError):
    """Calibration or evaluation text that cannot be had or does not suffice."""


class NumericalFailure(SubnibbleError):
    """An algorithm that could not finish in floating point; names the linear and the remedy."""


class OutputError(SubnibbleError):
    """An output folder that cannot be written."""


class MissingExtra(SubnibbleError, ImportError):
    """An optional dependency that this call needs; names the extra to install."""


class SilentFailure(RuntimeError):
    """A hook, patch or stand-in that must have been called was not: going on would give a worse model, silently."""


class NotLoadable(RuntimeError):
    """What a run wrote would not load, so that nothing of it is kept."""
