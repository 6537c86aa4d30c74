"""What float32 means on a GPU."""

import torch


def whole_float32() -> None:
    """float32 is float32 in this process: torch's convolutions take TensorFloat32 (10 bits of fraction) unless told not
    to. Who wants speed takes bfloat16. What is drawn and what is scored so does not depend on a default of torch.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
