"""What is in a blob: keys, values, scores and logits as safetensors, and how closely they are kept."""
