"""Settings for all tests."""

from hypothesis import settings

# No deadline, because the first example of a test may have to compile or import something. And the
# same examples everywhere, so that a test which fails for one fails for all.
settings.register_profile("toma_fx", deadline=None, derandomize=True, database=None)
settings.load_profile("toma_fx")
