"""The layers of a loaded model: their tensors, how they run, and what they count."""
