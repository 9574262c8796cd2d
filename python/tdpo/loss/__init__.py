"""From a batch's hidden states to the preference loss and its metrics."""
