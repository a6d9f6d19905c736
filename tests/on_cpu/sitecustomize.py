import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def init(self, *args, **kwargs):
    state = PartialState._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU
    original(self, *args, **kwargs)


AcceleratorState.__init__ = init
