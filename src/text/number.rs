//! Exact numbers in answers.
