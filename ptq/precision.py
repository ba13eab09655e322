"""Where bfloat16 pays: a number of 8 significant bits, which some hardware multiplies at a multiple of float32's speed."""

import torch


def pays(precision: str, device: torch.device) -> bool:
    """Whether to use bfloat16, of `ptq.spec.PRECISIONS`: "auto" says yes on a CPU with a unit for its products of matrices (AMX).

    CPUs that have but vector instructions for it were seen to take twice float32's time. The answer is the processor's, not a
    clock's: on one machine, the same seed gives the same bytes.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older torch cannot tell
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
