"""
Muon, an optimizer for the matrices inside a model: momentum, then orthogonalization.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the method); Liu et al. 2025,
arXiv 2502.16982, section 2.2 (scales updates to the size of AdamW's, whose learning rates and
weight decay then carry over).
"""

import math
from collections import defaultdict

import torch

from runtime import has_native_bfloat16

MOMENTUM = 0.95
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
EPS = 1e-7
STACK_LIMIT = 2**26  # elements in a stack, so that a step needs at most about a gigabyte
CPU_STACK_LIMIT = 2**18  # on a CPU, matrices with more elements are faster one by one (caches)


def orthogonalize(stack):
    """
    Moves the singular values of each matrix near 1 (about 0.7 to 1.2), by Newton-Schulz iterations
    in the dtype of `stack` (n, rows, columns), which is overwritten.
    """
    norms = torch.stack(torch._foreach_norm(stack.unbind())).clamp_(min=EPS)
    x = stack.div_(norms[:, None, None])  # no singular value exceeds 1
    x = x.squeeze(0)  # note: baddbmm rounds a batch of one differently from addmm
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # x @ x.mT has the size of the shorter side
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):  # with G = x xᵀ: x ← a x + (b G + c G²) x
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.view(stack.shape)


class Muon(torch.optim.Optimizer):
    """
    Computes what torch.optim.Muon(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw") does,
    bit for bit on a CPU, but stacks matrices of one shape: far fewer operations for a small model
    or a GPU to launch. Each loads the other's state. `params` are float32 matrices.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1):
        # note: only lr and weight_decay are read; the rest lets torch's Muon go on from our state.
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=MOMENTUM, nesterov=True, eps=EPS,
            ns_coefficients=NS_COEFFICIENTS, ns_steps=NS_STEPS, adjust_lr_fn="match_rms_adamw",
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                stack_size = max(1, STACK_LIMIT // shape.numel())
                if params[0].device.type == "cpu" and shape.numel() > CPU_STACK_LIMIT:
                    stack_size = 1
                for i in range(0, len(params), stack_size):
                    self.update(params[i : i + stack_size], group["lr"], group["weight_decay"])

    def update(self, params, lr, weight_decay):
        """Updates `params`, all of one shape."""
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        grads = [param.grad for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
        updates = torch._foreach_lerp(grads, buffers, MOMENTUM)  # Nesterov momentum

        emulates_bfloat16 = params[0].is_cuda and not has_native_bfloat16("cuda")  # V100, T4
        dtype = torch.float32 if emulates_bfloat16 else torch.bfloat16
        updates = orthogonalize(torch.stack(updates).to(dtype))
        updates = updates.contiguous().float()  # dtype and strides of params: foreach's fast path
        rms_scale = 0.2 * math.sqrt(max(params[0].shape))  # 0.2: the RMS of AdamW's updates
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * rms_scale)
