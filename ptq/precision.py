"""Where bfloat16 pays: a number of 8 significant bits, which some hardware multiplies at a multiple of float32's speed."""

import functools
import time

import torch
from torch.nn.functional import conv2d


def pays(precision: str, device: torch.device) -> bool:
    """Whether to use bfloat16, of `ptq.spec.PRECISIONS`: "auto" says yes on a CPU that multiplies it faster than float32.

    Having instructions for it says too little: some CPUs have them and take longer than in float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older torch cannot tell
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16")) and _faster()


@functools.cache
def _faster() -> bool:
    """Whether a convolution takes less time in bfloat16, the least of several runs each: a few hundredths of a second, once.

    CPUs were seen to take two thirds of the time or less, or half as much again or more, so that chance does not decide.
    """
    least = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            x, w = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((16, 32, 16, 16), (32, 32, 3, 3)))
            times = []
            for _ in range(8):
                start = time.perf_counter()
                conv2d(x, w, padding=1)
                times.append(time.perf_counter() - start)
            least[dtype] = min(times)
    return least[torch.bfloat16] < least[torch.float32]
