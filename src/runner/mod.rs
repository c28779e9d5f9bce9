//! The only place where step plans meet tensors.
