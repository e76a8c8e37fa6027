"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Nothing is downloaded in a test, and asking for it would only wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. torch keeps compiled code between processes under the names of the
# operators in a graph, which do not change when what they do does.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

# No deadline, because the first example of a test may have to compile or import something. And the
# same examples everywhere, so that a test which fails for one fails for all.
settings.register_profile("toma_fx", deadline=None, derandomize=True, database=None)
settings.load_profile("toma_fx")


@pytest.fixture
def backend_as_it_was() -> Iterator[None]:
    """diffusers keeps the backend that was set last for models to come."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before
