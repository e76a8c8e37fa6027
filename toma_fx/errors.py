"""One class per kind of mistake; each message names the value, the expectation and the fix."""


class TomaError(ValueError):
    """Base class of all errors that toma_fx raises on purpose."""


class ConfigError(TomaError):
    """An option has an invalid value."""


class ModelError(TomaError):
    """The model or pipeline cannot be transformed: unknown, compiled, or already transformed."""


class CaptureError(TomaError):
    """A block's forward contains an operation that one graph cannot represent."""


class InputError(TomaError):
    """A transformed model was called with an argument that merged tokens cannot support."""


class TomaWarning(UserWarning):
    """Code in a model may misinterpret merged tokens."""
