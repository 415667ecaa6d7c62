"""The job behind `porter generate`: what the command line does not reach."""

from __future__ import annotations

import pytest
import torch

from porter.core.errors import ResourceError
from runtime.memory.exhausted import out_of_memory


def test_a_real_failed_allocation_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="out of memory") as caught, out_of_memory():
        torch.empty(1 << 50)
    assert caught.value.exit_code == 5
    assert "--height" in str(caught.value.hint)


def test_cuda_and_python_running_out_too() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(ResourceError), out_of_memory():
            raise error


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory():
        raise RuntimeError("shapes do not match")
