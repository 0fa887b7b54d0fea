"""Load an int8 checkpoint and stream an answer to the terminal.

python examples/generate.py CHECKPOINT "a question"
"""

import sys

from transformers import AutoTokenizer

from llmint8 import runtime
from llmint8.runtime.model.generate import stream_chat

checkpoint, question = sys.argv[1:]
model = runtime.load(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
stream_chat(model, tokenizer, question, lambda text: print(text, end="", flush=True), max_new_tokens=100)
print()
