"""Load an int8 checkpoint over several processes, each with a part of every layer, and answer a question.

torchrun --nproc-per-node 2 examples/parallel.py CHECKPOINT "a question"
"""

import sys

import torch
from transformers import AutoTokenizer

from llmint8 import runtime
from llmint8.runtime.model.generate import stream_chat

checkpoint, question = sys.argv[1:]
model = runtime.load(checkpoint, tp_plan="auto")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
# All processes compute the same answer; one says it.
says = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
stream_chat(model, tokenizer, question, lambda text: says and print(text, end="", flush=True), max_new_tokens=100)
if says:
    print()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
