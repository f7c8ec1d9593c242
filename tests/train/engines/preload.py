"""Loaded once by the server that the processes of a test are forked from: imports cost more than the tests."""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed decorates a function with torch.compile when it is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)

import deepspeed.runtime.engine  # noqa: E402
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.optim._muon  # noqa: E402
from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: E402

from mohawkify.train.engines.deepspeed_engine import import_deepspeed  # noqa: E402
from tests.train.engines import cases  # noqa: E402

import_deepspeed(torch.device("cpu"))
LOADED = (deepspeed.runtime.engine, LlamaForCausalLM, Qwen2ForCausalLM, cases)
