"""Python imports this at its start where the Makefile puts the folder on PYTHONPATH: for LLaVA-OneVision's tests.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and its import
then stops where it describes two of them. Declaring these two lets the rest import, which is Python and all that the
image and video processors of transformers use; calling the two themselves would still fail.
"""

import torch

if torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # kept: they last as long as it does
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
