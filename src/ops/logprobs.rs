//! Log-probabilities from logits.
