"""Ring attention: blocks of keys and values pass from rank to rank, and each rank's queries meet all of them.

Results of the blocks are merged by the log-sum-exp of their scores. `F.scaled_dot_product_attention` does not return
it; torch's operators under it do: `_scaled_dot_product_flash_attention_for_cpu` on the CPU,
`_scaled_dot_product_flash_attention` and, for float32 and masks, `_scaled_dot_product_efficient_attention` on CUDA.
Where the chosen backend is "math", or no kernel takes the tensors, it is the formula.

B: batch, Q: queries, K: keys of a block, T: text tokens, n: heads, E: head width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda

from porter.core.errors import UsageError

Pair = tuple[Tensor, Tensor]
aten = torch.ops.aten


def attend(
    q: Tensor, text: Pair, own: Pair, masks: list[Tensor | None], real: list[int], group: dist.ProcessGroup, index: int
) -> Tensor:
    """Attention of q (B, Q, n, E) to the text and to every rank's block -> (B, Q, n, E).

    Args:
        text: keys and values (B, T, n, E) that every rank has; they count once.
        own: this rank's keys and values (B, K, n, E), padded.
        masks: for each rank's block None or bool (B, keys); this rank's own with the text's before it.
        real: for each rank's block, how many keys are no padding.
        index: this rank's in the ring.
    """
    count = len(real)
    after, before = (dist.get_global_rank(group, (index + step) % count) for step in (1, -1))
    block, coming = torch.stack(own), torch.empty(0)
    result: Pair | None = None
    for turn in range(count):
        source = (index - turn) % count
        exchange = []
        if turn < count - 1:  # the next block travels while this one is used
            coming = torch.empty_like(block)
            sends = dist.P2POp(dist.isend, block, after, group)
            receives = dist.P2POp(dist.irecv, coming, before, group)
            exchange = dist.batch_isend_irecv([sends, receives])
        k, v = block[:, :, : real[source]]
        if not turn:
            k, v = torch.cat((text[0], k), dim=1), torch.cat((text[1], v), dim=1)
        if k.shape[1]:
            new = with_lse(q, k, v, masks[source])
            result = new if result is None else _merged(*result, *new)
        for work in exchange:
            work.wait()
        block = coming
    assert result is not None  # some rank's block has a real token
    return result[0].to(q.dtype)


def _merged(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> Pair:
    """Two blocks' results as one: (B, Q, n, E) and (B, Q, n, 1) twice. Where neither has a key, the result is 0."""
    total = torch.logaddexp(lse, new_lse)
    weights = [torch.exp(each - total.clamp(min=torch.finfo(total.dtype).min)) for each in (lse, new_lse)]
    return out * weights[0] + new * weights[1], total


def with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Pair:
    """Attention and the log-sum-exp of its scores, in float32 at least: (B, Q, n, E), (B, Q, n, 1).

    A picture of the batch whose keys are all masked gets 0 and minus infinity.
    """
    seen = None
    if mask is not None:
        seen = mask.any(dim=1)  # (B,); a kernel's answer to no key at all is its own
        mask = mask | ~seen[:, None]
    out, lse = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # (B, n, Q, E), (B, n, Q)
    out, lse = out.transpose(1, 2).to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)
    if seen is not None:
        nothing = ~seen[:, None, None, None]
        out, lse = out.masked_fill(nothing, 0), lse.masked_fill(nothing, float("-inf"))
    return out, lse


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Pair:
    """(B, n, Q, E), (B, n, K, E) twice, None or (B, K) -> (B, n, Q, E), (B, n, Q), by the backend that is chosen."""
    bias = None
    if mask is not None:
        # Stored as kernels want a bias: rows of a multiple of 16.
        room = F.pad(torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf")), (0, -mask.shape[1] % 16))
        bias = room[:, None, None, : mask.shape[1]].expand(-1, q.shape[1], q.shape[2], -1)  # (B, n, Q, K)
    if q.device.type == "cpu" and cuda.flash_sdp_enabled():
        found: Pair = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
        return found
    if q.device.type == "cuda":
        tensors = cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        if cuda.can_use_flash_attention(tensors) and q.shape[-1] % 8 == 0:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
            return out, lse[..., : q.shape[2]]
        if cuda.can_use_efficient_attention(tensors):
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
            return out, lse[..., : q.shape[2]]  # rows are stored in multiples of 32
    if not cuda.math_sdp_enabled():
        raise UsageError(
            "the chosen attention backend does not run in a ring: it does not return the log-sum-exp",
            expected="sdpa | flash | efficient | math", found=f"{q.dtype} on {q.device.type}",
            hint="leave --attention at the default, or share the tokens with --ulysses alone",
        )  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) / q.shape[-1] ** 0.5) @ k.to(wide).transpose(-1, -2)  # (B, n, Q, K)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]) @ v.to(wide), lse
