"""The backends that the deformable operators are tested with."""

import pytest

from pretrain.models.operators.cpu_library import missing


@pytest.fixture(params=["torch", "cpp"])
def backend(request) -> str:
    """Each backend of the CPU that this machine can have."""
    if request.param == "cpp" and missing() is not None:
        pytest.skip(missing())
    return request.param
