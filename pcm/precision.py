"""What float32 means on a GPU, and which GPUs are slow in bfloat16."""

import torch


def whole_float32() -> None:
    """float32 is float32 in this process: torch's convolutions take TensorFloat32 (10 bits of fraction) unless told not
    to, and its products do in containers that set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE. Who wants speed takes bfloat16. So
    what is drawn, scored, trained, captioned or compared does not depend on that.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def is_slow_in_bfloat16(device: str) -> bool:
    """Whether it is "cuda", and this machine's GPU emulates bfloat16: one before compute capability 8."""
    return device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
