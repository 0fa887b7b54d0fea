"""Files of tensors: safetensors, and what `torch.save` writes."""
