//! Where model files come from and what they mean.
