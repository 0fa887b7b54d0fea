"""A model on several processes of torch.distributed: what each of them holds, and how they put it together."""
