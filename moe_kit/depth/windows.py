r"""Windows of a prompt, over which a per-sequence router reads it.

Windowed pooling (Dr.LLM, arXiv 2510.12773, section 3.1): the first W*w of n prompt tokens, w = floor(n / W),
W = min(8, n), are cut into W windows with means m_j, and

    z = (1/W) sum_j router(m_j)            the mean of logits, never the logits of a mean.

Shapes: B rows, S sequence, D width, W windows, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Windows:
    """Windows of the prompts of a batch, made once a pass for all routers.

    Args:
        mask_BS: bool [B, S], the prompts' real tokens.
        count: windows at most, 1 or more.
    """

    def __init__(self, mask_BS: Tensor, count: int) -> None:
        self._matrix: tuple[Tensor, Tensor] | None = None
        length = mask_BS.shape[1]
        self.count = min(count, length)
        self.size = length // max(1, self.count)
        # without padding a window is a view; its mean reads x once, at memory speed
        if not bool(mask_BS.all()):
            self._matrix = window_matrix(mask_BS, count)

    def means(self, x_BSD: Tensor) -> Tensor:
        """Means of the windows.

        Args:
            x_BSD: float [B, S, D].

        Returns:
            float32 [B, W, D]; 0 for windows that a prompt does not have.
        """
        if self._matrix is not None:
            return torch.bmm(self._matrix[0], x_BSD.float())
        x_BSD = x_BSD[:, : self.count * self.size]
        return x_BSD.unflatten(1, (self.count, self.size)).mean(2, dtype=torch.float32)

    def average(self, logits_BWA: Tensor) -> Tensor:
        """Mean of the windows' logits.

        Args:
            logits_BWA: float32 [B, W, A].

        Returns:
            float32 [B, A]; 0 for a row without any prompt token.
        """
        if self._matrix is not None:
            return torch.bmm(self._matrix[1][:, None], logits_BWA)[:, 0]
        return logits_BWA.mean(1)


def window_matrix(mask_BS: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Matrix that takes the means of the windows of each row.

    Args:
        mask_BS: bool [B, S], the prompt's real tokens.
        windows: windows at most, W.

    Returns:
        float32 [B, W, S], rows of a window sum to 1; float32 [B, W], weight of each window, rows sum to 1 (0 for the
        windows that a prompt shorter than W tokens does not have, and everywhere without any prompt token).

    Example:
        >>> import torch
        >>> matrix, weight = window_matrix(torch.tensor([[False, True, True, True]]), 2)
        >>> matrix.tolist(), weight.tolist()  # one token a window, the third is dropped
        ([[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]], [[0.5, 0.5]])
    """
    count_B1 = mask_BS.sum(1, keepdim=True)
    used_B1 = count_B1.clamp(max=windows)
    size_B1 = torch.div(count_B1, used_B1.clamp_min(1), rounding_mode="floor")
    rank_BS = mask_BS.long().cumsum(1) - 1
    window_BS = torch.div(rank_BS, size_B1.clamp_min(1), rounding_mode="floor")
    kept_BS = mask_BS & (window_BS < used_B1)
    index_W = torch.arange(windows, device=mask_BS.device)
    member_BWS = kept_BS[:, None] & (window_BS[:, None] == index_W[None, :, None])
    matrix = member_BWS.float() / size_B1.clamp_min(1)[:, :, None]
    weight = (index_W[None] < used_B1).float() / used_B1.clamp_min(1)
    return matrix, weight
