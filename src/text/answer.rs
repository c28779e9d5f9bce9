//! Final answers in texts, and when two of them are equal.
