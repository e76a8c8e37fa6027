"""One class per kind of mistake; every message names the value, the expectation and the fix."""


class TomaError(ValueError):
    """Any mistake that toma_fx can explain."""


class ConfigError(TomaError):
    """An option holds a value that it cannot take."""


class ModelError(TomaError):
    """The model or pipeline cannot be transformed: unknown, compiled, or transformed already."""


class CaptureError(TomaError):
    """A block's forward does something that one graph cannot hold."""


class InputError(TomaError):
    """A transformed model was called with something that merged tokens cannot carry."""


class TomaWarning(UserWarning):
    """Something in a model may take merged tokens for what they are not."""
