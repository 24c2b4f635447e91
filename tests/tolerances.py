"""The one tolerance table: error ratio (RMS of the difference over RMS of the reference) allowed by dtype."""

import torch

ERROR_RATIO = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail with the tensor's name, the worst element and the error ratio; NaN on either side always fails."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bound = ERROR_RATIO[dtype or expected.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{name}: NaN in the result"
    assert not expected.isnan().any(), f"{name}: NaN in the reference"
    if expected.numel() == 0:
        return
    difference = actual - expected
    ratio = difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-12)
    worst = difference.abs().max()
    assert ratio <= bound or worst <= 1e-7, f"{name}: error ratio {ratio:.2e} > {bound:.0e}, worst element {worst:.2e}"
