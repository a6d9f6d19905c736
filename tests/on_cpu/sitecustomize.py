"""Python imports this at its start where tests/launch.py put the folder on PYTHONPATH: for the tests' child processes.

It lets accelerate shard on the CPU (accelerate 1.15 makes the switch to FSDP for GPUs and their kin alone, state.py),
and writes down what share of the parameters each process holds. Nothing else differs from a start by hand.
"""

import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

make_state, prepare = AcceleratorState.__init__, Accelerator.prepare


def make_state_that_shards(self, *args, **kwargs):
    shared = PartialState._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and shared.get("distributed_type") == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    make_state(self, *args, **kwargs)


def local_size(parameter) -> int:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.numel()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def prepare_and_record(self, *args, **kwargs):
    prepared = prepare(self, *args, **kwargs)
    for model in prepared if isinstance(prepared, (tuple, list)) else (prepared,):
        if isinstance(model, torch.nn.Module):
            parameters = list(model.parameters())
            record = {
                "wrapper": type(model).__name__,
                "share": sum(map(local_size, parameters))
                / sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
                "types": sorted({type(parameter).__name__ for parameter in parameters}),
                "zero_stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else 0,
            }
            path = Path(os.environ["SHARDING_RECORD"]) / f"{os.environ['RANK']}.json"
            path.write_text(json.dumps(record))
    return prepared


AcceleratorState.__init__, Accelerator.prepare = make_state_that_shards, prepare_and_record
