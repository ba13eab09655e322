"""Where bfloat16 pays: a number of 8 significant bits, multiplied at twice float32's speed by hardware that knows it."""

import torch


def pays(precision: str, device: torch.device) -> bool:
    """Whether to use bfloat16, of `ptq.spec.PRECISIONS`: "auto" says yes on a CPU with instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older torch cannot tell
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
